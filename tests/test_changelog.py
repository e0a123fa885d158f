"""The version is the same wherever it is written."""

from __future__ import annotations

import re
from pathlib import Path

import mlx_medphi

ROOT = Path(__file__).resolve().parents[1]


def test_the_newest_entry_is_the_package_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## \[(.+?)\]", text, flags=re.MULTILINE)
    assert next(entry for entry in entries if entry != "Unreleased") == mlx_medphi.__version__


def test_the_project_file_has_the_same_version() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{mlx_medphi.__version__}"\n' in text
