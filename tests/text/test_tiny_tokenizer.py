"""The tiny base's tokenizer: Phi-3's structure, made by the script, its hash recorded."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlx_medphi.data import synthetic_words as words
from mlx_medphi.data.synthetic import sample
from mlx_medphi.files import sha256_file
from mlx_medphi.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "mlx_medphi" / "assets" / "tiny"
REFERENCE = ROOT / "tests" / "fixtures" / "phi3" / "mini-4k"
SPACE = "\u2581"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "examples" / "make_tiny_tokenizer.py"
    spec = importlib.util.spec_from_file_location("make_tiny_tokenizer", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return _read(TINY / "tokenizer.json")


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return _read(REFERENCE / "tokenizer.json")


def test_the_pipeline_is_phi3s(tiny: dict[str, Any], reference: dict[str, Any]) -> None:
    assert set(tiny) == set(reference)
    for part in sorted(set(tiny) - {"added_tokens", "model"}):
        assert tiny[part] == reference[part], part
    assert _settings(tiny["model"]) == _settings(reference["model"])


def test_ids_are_laid_out_as_phi3s(tiny: dict[str, Any], reference: dict[str, Any]) -> None:
    names, expected = list(tiny["model"]["vocab"]), list(reference["model"]["vocab"])
    assert names[:259] == expected[:259]  # <unk>, <s>, </s> and the bytes
    assert list(tiny["model"]["vocab"].values()) == list(range(len(names)))
    added = [entry["id"] for entry in tiny["added_tokens"]]
    assert added == [0, 1, 2, *range(len(names), len(names) + 11)]


def test_added_tokens_have_phi3s_names_order_and_flags(
    tiny: dict[str, Any], reference: dict[str, Any]
) -> None:
    assert _flags(tiny["added_tokens"]) == _flags(reference["added_tokens"])


def test_the_configuration_is_phi3s(tiny: dict[str, Any]) -> None:
    config = _read(TINY / "tokenizer_config.json")
    expected = _read(REFERENCE / "tokenizer_config.json")
    other = ("added_tokens_decoder", "model_max_length")
    assert {k: v for k, v in config.items() if k not in other} == {
        k: v for k, v in expected.items() if k not in other
    }
    described = config["added_tokens_decoder"]
    assert [{"id": int(i), **described[i]} for i in described] == [
        {"id": entry["id"], **{k: v for k, v in entry.items() if k != "id"}}
        for entry in tiny["added_tokens"]
    ]


def test_no_merge_joins_words_punctuation_or_numbers(tiny: dict[str, Any]) -> None:
    kinds = re.compile(rf"{SPACE}?(?:[A-Za-z]+|[0-9]+)")
    joined = ["".join(merge.split(" ")) for merge in tiny["model"]["merges"]]
    assert len(joined) > 500
    assert [piece for piece in joined if not kinds.fullmatch(piece)] == []


def test_names_drugs_and_numbers_are_one_token_each() -> None:
    tokenizer = Tokenizer.load(TINY)
    single = [*words.FIRST_NAMES, *words.LAST_NAMES, *words.DRUGS, *map(str, words.AGES)]
    single += [dose.split()[0] for dose in words.DOSES]
    assert [word for word in single if len(tokenizer.encode_text(word)) != 1] == []


def test_conversations_and_notes_come_back_as_they_were() -> None:
    tokenizer = Tokenizer.load(TINY)
    for example in sample(20, seed=5, held_out=True):
        for text in (example.conversation.text(), example.note.text):
            assert tokenizer.decode(tokenizer.encode_text(text)) == text
    assert (
        tokenizer.decode(tokenizer.encode_text("Größe 38 °C – {x} <b>")) == "Größe 38 °C – {x} <b>"
    )


@pytest.mark.slow
def test_the_script_makes_this_very_file(script: ModuleType, tmp_path: Path) -> None:
    digest = script.write_tokenizer(tmp_path)
    assert digest == sha256_file(TINY / "tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_the_recorded_hash_is_the_files_own(name: str) -> None:
    recorded = dict(re.findall(r"\| (\S+) \| ([0-9a-f]{64}) \|", _page()))
    assert recorded[name] == sha256_file(TINY / name)


def test_the_page_says_that_everything_is_made_up() -> None:
    assert "do not exist" in _page() and "knows no medicine" in _page()


def test_the_assets_stay_small() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 6_000_000


def _read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def _page() -> str:
    return (TINY / "README.md").read_text(encoding="utf-8")


def _settings(model: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key not in ("vocab", "merges")}


def _flags(added: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key != "id"} for entry in added]
