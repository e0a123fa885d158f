"""What the Swift tests compare with is what this package computes today."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from fixtures.make_swift_vectors import CHECKPOINTS, GROUPS, OUT, PHI3, write

from mlx_medphi.coreml.vectors import check_vectors, write_vectors
from mlx_medphi.text.tokenizer import Tokenizer

SWIFT_TESTS = Path(__file__).resolve().parents[1] / "examples" / "MedPhiKit" / "Tests"
# Where a run of the Swift tests finds what cannot be part of the repository.
MADE = "MEDPHI_SWIFT_VECTORS"


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_recorded_cases_are_computed_again(name: str, tmp_path: Path) -> None:
    if name == "sampling" and sys.platform != "linux":
        pytest.skip("recorded on MLX's plain processor backend; others round in another way")
    assert write(tmp_path, name).read_bytes() == (OUT / f"{name}.json").read_bytes()


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_recorded_vectors_are_true(name: str, tmp_path: Path) -> None:
    tokenizer, recorded = Tokenizer.load(CHECKPOINTS[name]), OUT / f"vectors-{name}.json"
    assert check_vectors(tokenizer, recorded) >= 200
    write_vectors(tokenizer, tmp_path / "now.json")
    assert (tmp_path / "now.json").read_bytes() == recorded.read_bytes()


def test_vectors_of_phi3s_own_tokenizer_can_be_made_for_swift(
    shared_tokenizer: Path, tmp_path: Path
) -> None:
    # The tokenizer is not ours to pass on, nor are its vectors: they are made where it lies.
    tokenizer, made = Tokenizer.load(shared_tokenizer), tmp_path / f"vectors-{PHI3}.json"
    write_vectors(tokenizer, made)
    assert check_vectors(tokenizer, made) >= 200
    read_by_swift = Path(os.environ.get(MADE, "")) / made.name
    if MADE in os.environ and read_by_swift.exists():
        assert read_by_swift.read_bytes() == made.read_bytes()


def test_nothing_of_phi3s_own_tokenizer_is_recorded() -> None:
    assert not (OUT / f"vectors-{PHI3}.json").exists()


def test_both_languages_read_every_recorded_file() -> None:
    known = set(GROUPS) | {f"vectors-{name}" for name in CHECKPOINTS}
    recorded = {path.stem for path in OUT.glob("*.json")}
    assert known <= recorded
    text = "".join(path.read_text(encoding="utf-8") for path in SWIFT_TESTS.rglob("*.swift"))
    assert [name for name in GROUPS if f'Vectors.cases("{name}")' not in text] == []
    vectors = (SWIFT_TESTS / "Phi3CoreTests" / "VectorsTests.swift").read_text(encoding="utf-8")
    assert [name for name in CHECKPOINTS if f'"{name}"' not in vectors] == []
