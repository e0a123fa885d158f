"""LoRA, rsLoRA and DoRA layers: born by `from_base`, ended by `fused_weight`.

W' = W + scale · (A B)^T, with A (in, r) and B (r, out) in float32 and the arithmetic of a forward
pass in the dtype of the activations (Hu et al. 2021). rsLoRA differs in the scale only
(Kalajdzievski 2023). DoRA rescales each output row of W' to a learned magnitude m (Liu et al.
2024); its norm carries no gradient, as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from mlx_medphi.config import PROJECTIONS, LoRAConfig
from mlx_medphi.errors import AdapterError, capped

__all__ = [
    "LoRALinear",
    "adapted_layers",
    "adapted_weight",
    "apply_lora",
    "base_weight",
    "project",
    "projection",
    "remove_lora",
    "weight_shape",
    "wrap",
]

# A row of zeros has magnitude 0: 0 / TINY is 0 where 0 / 0 would poison the model.
TINY = 1e-15


class LoRALinear(nn.Module):
    """A linear layer, plain or quantised, with a low-rank change beside it.

    Parameters: `lora_a` (in, r), `lora_b` (r, out) and, for DoRA, `m` (out,), all float32.
    """

    def __init__(
        self, linear: nn.Module, rank: int, scale: float, dropout: float, dora: bool, key: mx.array
    ) -> None:
        super().__init__()
        self.linear = linear
        self.scale, self.dropout = scale, dropout
        outputs, inputs = weight_shape(linear)
        bound = 1 / math.sqrt(inputs)  # the reference start: kaiming-uniform A, zero B
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), dtype=mx.float32, key=key)
        self.lora_b = mx.zeros((rank, outputs), dtype=mx.float32)
        if dora:
            self._row_squares = mx.square(base_weight(linear)).sum(axis=1)  # |W_i|^2 never changes
            self.m = mx.sqrt(self._row_squares)
            # Layer by layer, or the float32 copies of all base weights would be alive together.
            mx.eval(self._row_squares, self.m)

    @classmethod
    def from_base(cls, linear: nn.Module, config: LoRAConfig, key: mx.array) -> LoRALinear:
        """Wrap a `Linear` or `QuantizedLinear`; the wrapped layer computes the same as before."""
        dora = config.fine_tune_type == "dora"
        return cls(linear, config.rank, config.multiplier, config.dropout, dora, key)

    @property
    def is_dora(self) -> bool:
        return "m" in self

    @property
    def rank(self) -> int:
        return int(self.lora_a.shape[1])

    def __call__(self, x: mx.array, key: mx.array | None = None) -> mx.array:
        """x (…, in) -> (…, out); `key` draws the dropout mask, without it there is none."""
        dropped = x
        if key is not None and self.dropout > 0:
            keep = mx.random.bernoulli(1 - self.dropout, x.shape, key=key)
            dropped = mx.where(keep, x / (1 - self.dropout), mx.zeros_like(x))
        change = (dropped @ self.lora_a.astype(x.dtype)) @ self.lora_b.astype(x.dtype)
        change = self.scale * change
        base: mx.array = self.linear(x)
        if not self.is_dora:
            return base + change
        # ratio - 1 is small: by itself it keeps its digits, a bfloat16 ratio near 1 steps by 0.008.
        excess = (self.magnitude_ratio() - 1).astype(x.dtype)
        # With dropout PEFT drops the input of everything but the plain base output.
        scaled: mx.array = base if dropped is x else self.linear(dropped)
        return base + change + excess * (scaled + change)

    def magnitude_ratio(self) -> mx.array:
        """m / |W'| for each output, float32 (out,); the norm is a constant for the gradient."""
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b)
        # |W + s(AB)^T|^2 by rows without forming AB: |W|^2 + 2s<W A, B^T> + s^2 |(AB)^T|^2.
        wa = self.linear(a.T.astype(_multiply_dtype(self.linear))).astype(mx.float32).T  # (out, r)
        cross = (wa * b.T).sum(axis=1)
        square = ((b.T @ (a.T @ a)) * b.T).sum(axis=1)
        norms = mx.sqrt(self._row_squares + 2 * self.scale * cross + self.scale**2 * square)
        return self.m / mx.maximum(norms, TINY)

    def fused_weight(self) -> mx.array:
        """W' in float32, (out, in)."""
        m = self.m if self.is_dora else None
        return adapted_weight(base_weight(self.linear), self.lora_a, self.lora_b, m, self.scale)


def adapted_weight(
    weight: mx.array, a: mx.array, b: mx.array, m: mx.array | None, scale: float
) -> mx.array:
    """W' of some output rows, in float32.

    Args:
        weight: (rows, in) base weight, float32.
        a: (in, r).
        b: (r, rows), the columns of B that belong to these rows.
        m: (rows,) magnitudes, or None without DoRA.
        scale: what the product of the factors is multiplied by.
    """
    changed = weight + scale * (b.T @ a.T)
    if m is None:
        return changed
    return changed * (m / mx.maximum(mx.linalg.norm(changed, axis=1), TINY))[:, None]


def project(layer: nn.Module, x: mx.array, key: mx.array | None) -> mx.array:
    """Apply a projection, handing the dropout key to the layers that have dropout."""
    return layer(x, key) if isinstance(layer, LoRALinear) else layer(x)


def base_weight(linear: nn.Module) -> mx.array:
    """The weight (out, in) of a plain or quantised linear layer in float32."""
    if isinstance(linear, nn.QuantizedLinear):
        # With bfloat16 scales the result would be rounded once more than in the layer itself.
        scales, biases = (linear[part].astype(mx.float32) for part in ("scales", "biases"))
        return mx.dequantize(linear.weight, scales, biases, linear.group_size, linear.bits)
    weight: mx.array = linear.weight.astype(mx.float32)
    return weight


def weight_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a plain or quantised linear layer, for any number of bits."""
    outputs, inputs = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        inputs = inputs * 32 // linear.bits
    return int(outputs), int(inputs)


def _multiply_dtype(linear: nn.Module) -> mx.Dtype:
    # A plain bfloat16 weight would be copied whole to float32; a quantised one is read in pieces.
    return mx.float32 if isinstance(linear, nn.QuantizedLinear) else linear.weight.dtype


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every adapted projection with its name, e.g. `model.layers.0.self_attn.qkv_proj`."""
    for index in range(len(model.model.layers)):
        for key in PROJECTIONS:
            name = f"model.layers.{index}.{key}"
            layer = projection(model, name)
            if isinstance(layer, LoRALinear):
                yield name, layer


def apply_lora(model: nn.Module, config: LoRAConfig, seed: int = 0) -> None:
    """Freeze the model and wrap the chosen projections; only the new parameters train.

    Raises:
        AdapterError: a key that names no projection, more layers than there are, or a model that
            has an adapter already.
    """
    unknown = [key for key in config.keys if key not in PROJECTIONS]
    if unknown:
        raise AdapterError(
            f"keys {capped(unknown)} match nothing in Phi-3; "
            f"its projections are {', '.join(PROJECTIONS)}"
        )
    blocks = len(model.model.layers)
    count = blocks if config.num_layers is None else config.num_layers
    if count > blocks:
        raise AdapterError(f"num_layers is {count}, this model has {blocks} layers")
    if next(adapted_layers(model), None) is not None:
        raise AdapterError("this model already has an adapter; take it off with remove_lora(model)")
    shapes = {key: weight_shape(projection(model, f"model.layers.0.{key}")) for key in config.keys}
    narrow = min(shapes, key=lambda key: min(shapes[key]))
    if config.rank > min(shapes[narrow]):
        raise AdapterError(
            f"rank is {config.rank}, {narrow} is {shapes[narrow]}: a rank above its smaller side "
            "adds numbers and nothing else"
        )
    model.freeze()
    # One key for each site of the whole model: a site starts the same whatever else is adapted.
    starts = mx.random.split(mx.random.key(seed), blocks * len(PROJECTIONS))
    for index in range(blocks - count, blocks):
        for site, key in enumerate(PROJECTIONS):
            if key in config.keys:
                start = starts[index * len(PROJECTIONS) + site]
                wrap(model, f"model.layers.{index}.{key}", config, start)


def wrap(model: nn.Module, name: str, config: LoRAConfig, key: mx.array) -> LoRALinear:
    """Put a new `LoRALinear` around the projection called `name`; the caller freezes the base."""
    layer = LoRALinear.from_base(projection(model, name), config, key)
    _replace(model, name, layer)
    return layer


def remove_lora(model: nn.Module) -> None:
    """Put the bare base layers back."""
    for name, layer in list(adapted_layers(model)):
        _replace(model, name, layer.linear)


def projection(model: nn.Module, name: str) -> nn.Module:
    """The layer with this checkpoint name, e.g. `model.layers.0.mlp.down_proj`."""
    _, _, index, room, leaf = name.split(".")
    found: nn.Module = getattr(getattr(model.model.layers[int(index)], room), leaf)
    return found


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    _, _, index, room, leaf = name.split(".")
    setattr(getattr(model.model.layers[int(index)], room), leaf, layer)
