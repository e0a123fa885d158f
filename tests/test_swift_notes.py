"""What MedPhiKit must write token by token is what this package writes today."""

from __future__ import annotations

import json
import sys

import pytest
from fixtures.make_swift_notes import ADAPTER, BASE, BUNDLE, CONVERSATIONS, OUT, notes

from mlx_medphi.coreml.bundle import open_bundle
from mlx_medphi.files import sha256_file
from mlx_medphi.model.adapter_files import read_adapter
from mlx_medphi.model.fingerprint import fingerprint
from mlx_medphi.model.weights import open_checkpoint

RECORDED, AGAIN = OUT / "notes.json", 2


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="recorded on MLX's plain processor backend; others round in another way",
)
def test_recorded_notes_are_written_again() -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    # All ten take half a minute.
    recorded["cases"] = recorded["cases"][:AGAIN]
    assert notes(AGAIN) == recorded


def test_recorded_notes_show_something() -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    cases = recorded["cases"]
    assert len(cases) == CONVERSATIONS
    for case in cases:
        greedy = [case[name]["greedy"] for name in ("base", "notes")]
        assert greedy[0] != greedy[1]
        assert case["notes"]["sampled"] != case["notes"]["greedy"]
        assert len(case["prompt"]) + recorded["max_tokens"] <= recorded["context"]


def test_the_adapter_of_the_notes_belongs_to_the_demos_base() -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert sha256_file(ADAPTER) == recorded["adapter_sha256"]
    assert read_adapter(ADAPTER).origin.base_fingerprint == fingerprint(open_checkpoint(BASE))


def test_the_small_bundle_is_whole() -> None:
    bundle = open_bundle(BUNDLE)
    assert bundle.manifest.medphi.verification.level == "graph"
    assert [entry.name for entry in bundle.manifest.medphi.adapters.list] == ["a", "b"]
