"""Small Phi-3 checkpoints with the outputs transformers gives for them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
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
def copy_of(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of a reference checkpoint that a test may change."""

    def copy(name: str) -> Path:
        to = tmp_path / name
        to.mkdir()
        for file in (PHI3 / name).iterdir():
            if file.is_file() and not file.name.startswith("reference"):
                shutil.copyfile(file, to / file.name)
        return to

    return copy


@pytest.fixture
def mini(copy_of: Callable[[str], Path]) -> Path:
    """A copy of mini-4k that a test may change."""
    return copy_of("mini-4k")
