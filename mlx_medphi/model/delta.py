"""What training changed: ‖ΔW‖ of each layer, how much a file kept, and how two adapters differ.

For LoRA the norms and angles come from r × r products, so no full matrix is formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_medphi.errors import AdapterError
from mlx_medphi.model.adapter_files import read_adapter
from mlx_medphi.model.adapter_formats import Adapter, LowRank

__all__ = ["AdapterDiff", "LayerChange", "LayerDiff", "Tally", "adapter_diff"]


@dataclass(frozen=True)
class LayerChange:
    """How far one weight moved, and how much of that a rounded copy of it kept.

    Attributes:
        name: the layer.
        relative: ‖ΔW‖ / ‖W‖ of the wanted change.
        cosine: between the wanted and the stored change; 1 where nothing was to change.
        error: ‖stored − wanted‖ / ‖wanted‖.
        kept: length of the stored change along the wanted one, as a share of it.
    """

    name: str
    relative: float
    cosine: float
    error: float
    kept: float


@dataclass(frozen=True)
class LayerDiff:
    """One layer of two adapters: ‖ΔW‖ of each (0: not adapted) and the cosine between them."""

    name: str
    first: float
    second: float
    cosine: float


@dataclass(frozen=True)
class AdapterDiff:
    """Two adapters side by side.

    Attributes:
        layers: every layer that either adapts, sorted.
        first: ‖ΔW‖ of the first adapter over all layers.
        second: the same of the second.
        cosine: between the two over all layers.
        exact: false when one is DoRA, whose magnitudes act on the base: then the numbers are of
            the low-rank parts alone.
    """

    layers: tuple[LayerDiff, ...]
    first: float
    second: float
    cosine: float
    exact: bool


class Tally:
    """Sums over rows from which a `LayerChange` follows, kept in double precision."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._base = self._wanted = self._stored = self._both = self._error = 0.0

    def add(self, base: mx.array, wanted: mx.array, stored: mx.array) -> None:
        """Count some rows: base W, wanted W' and W' as it is stored, all float32."""
        change, kept = wanted - base, stored - base
        self._base += _sum(base * base)
        self._wanted += _sum(change * change)
        self._stored += _sum(kept * kept)
        self._both += _sum(change * kept)
        self._error += _sum(mx.square(stored - wanted))

    def plus(self, other: Tally) -> Tally:
        """The sums of both, under this one's name."""
        both = Tally(self.name)
        for part in ("_base", "_wanted", "_stored", "_both", "_error"):
            setattr(both, part, getattr(self, part) + getattr(other, part))
        return both

    def result(self) -> LayerChange:
        if self._wanted == 0:
            unchanged = self._stored == 0
            return LayerChange(self.name, 0.0, float(unchanged), float(not unchanged), 1.0)
        lengths = math.sqrt(self._wanted * self._stored)
        return LayerChange(
            self.name,
            relative=math.sqrt(self._wanted / self._base) if self._base else math.inf,
            cosine=self._both / lengths if lengths else 0.0,
            error=math.sqrt(self._error / self._wanted),
            kept=self._both / self._wanted,
        )


def _sum(array: mx.array) -> float:
    # By rows first: one float32 total over millions of values loses digits.
    return float(np.array(array.sum(axis=-1)).astype(np.float64).sum())


def adapter_diff(first: str | Path, second: str | Path) -> AdapterDiff:
    """Compare two adapters layer by layer, in whatever files they are.

    Raises:
        AdapterError: one of them is damaged, or they are for models of different shape.
    """
    a, b = read_adapter(Path(first)), read_adapter(Path(second))
    _check_shapes(a, b, f"{first} and {second}")
    layers = []
    sums = np.zeros(3)
    for name in sorted(a.layers.keys() | b.layers.keys()):
        one, two = a.layers.get(name), b.layers.get(name)
        products = np.array([
            _product(one, one) * a.scaling.scale**2,
            _product(two, two) * b.scaling.scale**2,
            _product(one, two) * a.scaling.scale * b.scaling.scale,
        ])  # fmt: skip
        sums += products
        layers.append(LayerDiff(name, *_lengths(products)))
    exact = not (a.scaling.dora or b.scaling.dora)
    return AdapterDiff(tuple(layers), *_lengths(sums), exact=exact)


def _check_shapes(a: Adapter, b: Adapter, where: str) -> None:
    for name in sorted(a.layers.keys() & b.layers.keys()):
        one, two = a.layers[name], b.layers[name]
        if one.a.shape[0] != two.a.shape[0] or one.b.shape[1] != two.b.shape[1]:
            shapes = [f"{c.a.shape[0]} -> {c.b.shape[1]}" for c in (one, two)]
            raise AdapterError(
                f"{where}: {name} maps {shapes[0]} in one and {shapes[1]} in the other"
            )


def _product(one: LowRank | None, two: LowRank | None) -> float:
    """⟨A₁B₁, A₂B₂⟩ = Σ (A₁ᵀA₂) ∘ (B₁B₂ᵀ), in double precision."""
    if one is None or two is None:
        return 0.0
    return float(((_double(one.a).T @ _double(two.a)) * (_double(one.b) @ _double(two.b).T)).sum())


def _double(array: mx.array) -> npt.NDArray[np.float64]:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _lengths(products: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    first, second = (math.sqrt(max(float(p), 0.0)) for p in products[:2])
    cosine = float(products[2]) / (first * second) if first and second else 0.0
    return first, second, cosine
