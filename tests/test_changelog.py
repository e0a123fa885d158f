"""The change log names the version the package has."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import mlx_medphi

CHANGELOG = Path(__file__).resolve().parents[1] / "CHANGELOG.md"


def test_the_newest_entry_is_the_package_version() -> None:
    entries = re.findall(
        r"^## \[(.+?)\]", CHANGELOG.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert next(entry for entry in entries if entry != "Unreleased") == mlx_medphi.__version__


def test_the_installed_package_has_the_same_version() -> None:
    assert version("mlx_medphi") == mlx_medphi.__version__
