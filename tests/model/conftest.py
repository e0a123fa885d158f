"""Small Phi-3 checkpoints with the outputs transformers gives for them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

PHI3 = Path(__file__).resolve().parents[1] / "fixtures" / "phi3"
FOLDERS = sorted(folder.name for folder in PHI3.iterdir())


@pytest.fixture(params=FOLDERS)
def each_folder(request: pytest.FixtureRequest) -> Path:
    """Every reference checkpoint in turn."""
    return PHI3 / str(request.param)


@pytest.fixture
def phi3() -> Path:
    """The folder of the reference checkpoints."""
    return PHI3


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    """A copy of mini-4k that a test may change."""
    return copied(PHI3 / "mini-4k", tmp_path / "mini")


def copied(folder: Path, to: Path) -> Path:
    """A writable copy of a checkpoint, without the reference outputs."""
    to.mkdir()
    for file in folder.iterdir():
        if file.is_file() and not file.name.startswith("reference"):
            shutil.copyfile(file, to / file.name)
    return to
