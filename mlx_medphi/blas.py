"""Give MLX on Linux a fast matrix product by loading an optimised BLAS before it.

MLX's CPU wheel brings the reference BLAS, some thirty times slower than OpenBLAS. The dynamic
linker takes the first global definition of a symbol, so loading OpenBLAS (or Intel's MKL) globally
before `mlx.core` puts it in front. Programs call this (the command line, the tests, the
benchmarks); importing the library never does.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

__all__ = ["load_blas", "loaded_blas"]

# Debian's libopenblas0-pthread first: it needs no second threading runtime. MKL is what the
# package `mkl` brings.
LIBRARIES = ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.2", "libmkl_rt.so.1")
# A symbol that only this BLAS has, so that a preloaded one is recognised by what it is.
MARKS = {"openblas_get_config": "OpenBLAS", "MKL_Get_Version": "MKL"}


def load_blas() -> str | None:
    """Load OpenBLAS or MKL globally, unless MLX is already there; silent where none is found.

    Returns:
        "OpenBLAS" or "MKL" when MLX will use (or already uses) it, else None. Always None off
        Linux, where MLX brings what is right for the machine.
    """
    if not sys.platform.startswith("linux"):
        return None
    if loaded_blas() is None and "mlx.core" not in sys.modules:
        for name in _candidates():
            try:
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            break
    return loaded_blas()


def loaded_blas() -> str | None:
    """The optimised BLAS whose symbols this process sees globally, or None; whoever loaded it."""
    if not sys.platform.startswith("linux"):
        return None
    process = ctypes.CDLL(None)
    return next((name for symbol, name in MARKS.items() if hasattr(process, symbol)), None)


def _candidates() -> list[str]:
    # PyPI's mkl puts its library under the environment's prefix, where the linker does not look.
    beside = [str(path) for path in sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so.*"))]
    return [*LIBRARIES, *beside]
