"""A fast BLAS is in front of MLX when one is there, and only when a program asks."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from mlx_medphi import blas

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def has_openblas() -> bool:
    # In a child: a library once loaded stays.
    code = "import ctypes; ctypes.CDLL('libopenblas.so.0')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@linux
def test_openblas_is_visible_to_what_is_loaded_after_it() -> None:
    if not has_openblas():
        pytest.skip("libopenblas.so.0 is not installed (Debian: libopenblas0-pthread)")
    code = (
        "import ctypes, sys; from mlx_medphi.blas import load_blas; print(load_blas()); "
        "print('mlx.core' in sys.modules, hasattr(ctypes.CDLL(None), 'cblas_sgemm'))"
    )
    assert run_python(code).splitlines() == ["OpenBLAS", "False True"]


@linux
def test_importing_the_library_loads_no_blas() -> None:
    code = "import mlx_medphi, mlx_medphi.blas as b; print(b.loaded_blas())"
    assert run_python(code) == "None"


@linux
def test_nothing_found_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_candidates", lambda: ["libno-such-blas.so"])
    monkeypatch.setattr(blas, "MARKS", {"no_such_symbol": "none"})
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    assert blas.load_blas() is None


@linux
def test_no_library_is_loaded_once_mlx_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", sys)
    monkeypatch.setattr(blas, "MARKS", {"no_such_symbol": "none"})
    opened: list[str | None] = []
    real = ctypes.CDLL

    def spy(name: str | None, *args: object, **kwargs: object) -> ctypes.CDLL:
        opened.append(name)
        return real(name)

    monkeypatch.setattr(blas.ctypes, "CDLL", spy)
    assert blas.load_blas() is None
    assert set(opened) <= {None}


def test_other_systems_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert blas.load_blas() is None
