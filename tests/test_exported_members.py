"""The public names: sorted, complete, lazy, and the same for Python and for type checkers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_medphi

FACE = Path(mlx_medphi.__file__)


def names_for_type_checkers() -> list[str]:
    for node in ast.parse(FACE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If):
            return [
                alias.asname or alias.name
                for entry in node.body
                if isinstance(entry, ast.ImportFrom)
                for alias in entry.names
            ]
    raise AssertionError("no TYPE_CHECKING block")


def test_all_is_sorted_without_duplicates() -> None:
    assert mlx_medphi.__all__ == sorted(set(mlx_medphi.__all__))


@pytest.mark.parametrize("name", mlx_medphi.__all__)
def test_every_name_can_be_imported(name: str) -> None:
    value = getattr(mlx_medphi, name)
    assert value.__name__ == name
    assert value.__doc__, f"{name} is public and has no docstring"


def test_type_checkers_see_the_same_names() -> None:
    assert sorted(names_for_type_checkers()) == mlx_medphi.__all__
    assert sorted(n for names in mlx_medphi._MODULES.values() for n in names) == mlx_medphi.__all__


def test_dir_lists_the_public_names() -> None:
    assert dir(mlx_medphi) == sorted([*mlx_medphi.__all__, "__version__"])


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'traim'"):
        mlx_medphi.traim  # noqa: B018


@pytest.mark.parametrize("module", ["mlx_medphi", "mlx_medphi.cli.main"])
def test_importing_loads_no_heavy_library(module: str) -> None:
    heavy = {"mlx", "mlx.core", "mlx_lm", "coremltools", "numpy", "tokenizers", "huggingface_hub"}
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
