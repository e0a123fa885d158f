"""Small tokenizers of Phi-3's structure, as published and in variants."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_medphi.text.tokenizer import Tokenizer

MINI = Path(__file__).resolve().parents[1] / "fixtures" / "phi3" / "mini-4k"

# (spec of tokenizer.json, tokenizer_config, generation_config), to be changed in place
Change = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], None]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tokenizer of the small reference checkpoint."""
    return Tokenizer.load(MINI)


@pytest.fixture(scope="session")
def phi3(shared_tokenizer: Path) -> Tokenizer:
    """Phi-3-mini's own tokenizer, where the checkout has it beside it."""
    return Tokenizer.load(shared_tokenizer)


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Callable[[Change], Path]:
    """Makes a copy of the small tokenizer's files with something changed."""

    def make(change: Change) -> Path:
        names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
        contents = [json.loads((MINI / name).read_text(encoding="utf-8")) for name in names]
        change(*contents)
        for name, content in zip(names, contents, strict=True):
            (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return make


@pytest.fixture
def tokenizer_copy(tmp_path: Path) -> Path:
    """A copy of the small tokenizer's files."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(MINI / name, tmp_path / name)
    return tmp_path
