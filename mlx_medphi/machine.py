"""What this machine can do and what is missing on it, measured where it can be."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from mlx_medphi.blas import loaded_blas

__all__ = ["Finding", "State", "look"]

State = Literal["ok", "note", "missing"]

# A product of two matrices this wide is 2 GFLOP, long enough to time.
WIDTH = 1024
REPEATS = 2
# Phi-3-mini in 4 bits trains an adapter in about 5 GB; its float16 weights are 7.6 GB on the disk.
MEMORY_WANTED, DISK_WANTED = 8e9, 10e9
PYTHON_WANTED = (3, 10)
LOAD_CORE_ML = "import coremltools"


@dataclass(frozen=True)
class Finding:
    """One fact about the machine.

    Attributes:
        name: what was looked at.
        state: "ok", "note" (it works, and could be better) or "missing" (something will not work).
        text: what was found, and what would help.
    """

    name: str
    state: State
    text: str


def look() -> Iterator[Finding]:
    """Yield what is found, one thing after the other; the whole takes a few seconds."""
    yield _python()
    mlx = _mlx()
    yield mlx
    if mlx.state != "missing":
        yield _blas()
        yield _speed()
    yield _memory()
    yield _disk(Path.cwd())
    yield _package("mlx-lm", "needed to check adapters and fused models with it")
    yield _core_ml()
    yield _system()


def _python() -> Finding:
    state: State = "ok" if sys.version_info >= PYTHON_WANTED else "missing"
    return Finding("python", state, f"{platform.python_version()} at {sys.executable}")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _package(name: str, without: str) -> Finding:
    found = _installed(name)
    return Finding(name, "ok", found) if found else Finding(name, "missing", without)


def _mlx() -> Finding:
    found = _installed("mlx")
    if found is None:
        return Finding("mlx", "missing", "not installed: run make, or pip install mlx_medphi")
    try:
        import mlx.core as mx
    except ImportError as exc:
        return Finding("mlx", "missing", f"{found} does not load ({exc}); on Linux use mlx[cpu]")
    device = "GPU (Metal)" if mx.metal.is_available() else str(mx.default_device())
    return Finding("mlx", "ok", f"{found} on {device}")


def _blas() -> Finding:
    if not sys.platform.startswith("linux"):
        return Finding("blas", "ok", "MLX's own for this system")
    found = loaded_blas()
    if found is not None:
        return Finding("blas", "ok", f"{found}, loaded in front of MLX's own")
    help_text = "apt install libopenblas0-pthread, or pip install mkl"
    return Finding(
        "blas", "note", f"none found, so products are some thirty times slower: {help_text}"
    )


def _speed() -> Finding:
    rates = (f"{name} {_gflops(name):,.0f} GFLOP/s" for name in ("float32", "float16"))
    return Finding("matrix product", "ok", ", ".join(rates))


def _gflops(dtype: str) -> float:
    """Billions of operations a second in a product of two square matrices, the best of a few."""
    import mlx.core as mx

    matrix = mx.ones((WIDTH, WIDTH), getattr(mx, dtype))
    mx.eval(matrix @ matrix)
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        mx.eval(matrix @ matrix)
        times.append(time.perf_counter() - begun)
    return 2 * WIDTH**3 / min(times) / 1e9


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB of it free"
    if memory.total >= MEMORY_WANTED:
        return Finding("memory", "ok", text)
    return Finding(
        "memory", "note", f"{text}; Phi-3-mini in 4 bits wants {MEMORY_WANTED / 1e9:.0f} GB"
    )


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free at {folder}"
    if free >= DISK_WANTED:
        return Finding("disk", "ok", text)
    return Finding("disk", "note", f"{text}; a fused Phi-3-mini in float16 takes 7.6 GB")


def _core_ml() -> Finding:
    found = _installed("coremltools")
    if found is None:
        return Finding(
            "coremltools", "missing", "not installed; it makes packages for Apple devices"
        )
    # In a process of its own: it is slow to load and warns about what it does not find.
    done = subprocess.run([sys.executable, "-c", LOAD_CORE_ML], capture_output=True)
    if done.returncode:
        return Finding("coremltools", "missing", f"{found} does not load on this Python")
    return Finding("coremltools", "ok", found)


def _system() -> Finding:
    if sys.platform == "darwin":
        return Finding("mac", "ok", f"macOS {platform.mac_ver()[0]}, {platform.machine()}")
    text = (
        f"{platform.system()} {platform.machine()}: no Mac, so no Metal, no Core ML, no Swift app"
    )
    return Finding("mac", "note", text)
