"""Phi-3's parts as MIL operations, written straight into the function that is being built.

Activations are float16; the sums of squares of a norm and a decomposed softmax are float32, since
their float16 forms overflow or lose the small terms. Every builder names the operation whose output
it returns, so that what a verification reports can be found in the program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_medphi.coreml.blobs import Part
from mlx_medphi.coreml.library import coremltools
from mlx_medphi.coreml.weights import Weight
from mlx_medphi.model.config import Phi3Config

__all__ = ["Adapted", "Cache", "Constants", "attention", "embedding", "mlp", "rms_norm", "zeros"]

# A MIL variable; coremltools has no type information.
Var = Any


def builder() -> Any:
    """The MIL builder."""
    return coremltools("converters.mil").Builder


def virtual(part: Part) -> npt.NDArray[Any]:
    """An array of a constant's type and shape that takes no memory; its numbers come from disk."""
    types = coremltools("converters.mil.mil.types")
    dtype = types.np_uint4_dtype if part.dtype == "uint4" else np.dtype(part.dtype)
    return np.broadcast_to(np.zeros((), dtype), part.shape)


class Constants:
    """The constants of one function; each is made once, and shared with other functions by its id.

    `weights` are the forms of the checkpoint's layers.
    """

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self.weights = weights
        self._made: dict[str, Var] = {}

    def part(self, part: Part) -> Var:
        """A constant of the weight file."""
        if part.id not in self._made:
            var = builder().const(val=virtual(part), name=name_of(part.id))
            var.op.weight_id = part.id
            self._made[part.id] = var
        return self._made[part.id]

    def weight(self, layer: str) -> Var:
        """A weight as float16, dequantised by Core ML where it is stored in fewer bits."""
        source = self.weights[layer]
        if source.form == "float16":
            return self.part(source.parts["weight"])
        if layer not in self._made:
            parts = {kind: self.part(part) for kind, part in source.parts.items()}
            self._made[layer] = builder().constexpr_blockwise_shift_scale(
                **parts, name=name_of(layer)
            )
        return self._made[layer]

    def linear(self, x: Var, matrix: Var, name: str | None = None) -> Var:
        """x (1, S, in) by a constant (out, in) -> (1, S, out).

        MIL writes a bias of zeros wherever there is none; all layers of one width share theirs.
        """
        named = {} if name is None else {"name": name}
        bias = self.part(zeros(matrix.shape[0]))
        return builder().linear(x=x, weight=matrix, bias=bias, **named)


def name_of(part_id: str) -> str:
    """A name MIL accepts."""
    return part_id.replace(".", "_").replace("-", "_")


def zeros(width: int) -> Part:
    """The bias that all layers with `width` outputs share."""
    return Part(f"zeros.{width}", "float16", (width,))


def embedding(table: Var, ids: Var) -> Var:
    """The rows of ids (1, S) -> (1, S, hidden)."""
    return builder().gather(x=table, indices=ids, axis=0, validate_indices=False, name="embedding")


def rms_norm(x: Var, gamma: Var, eps: float, name: str) -> Var:
    """x (1, S, hidden) over its root mean square, in float32, then times gamma in float16.

    coremltools' own lowering of `rms_norm` scales eps with the largest number (apple/coremltools
    issue 2821).
    """
    mb = builder()
    wide = (
        x if x.dtype == coremltools("converters.mil.mil.types").fp32 else mb.cast(x=x, dtype="fp32")
    )
    mean = mb.reduce_mean(x=mb.mul(x=wide, y=wide), axes=[-1], keep_dims=True)
    unit = mb.mul(x=wide, y=mb.rsqrt(x=mean, epsilon=np.float32(eps)))
    return mb.mul(x=mb.cast(x=unit, dtype="fp16"), y=gamma, name=name)


@dataclass(frozen=True)
class Adapted:
    """A projection, and its low-rank change where there is one.

    Attributes:
        constants: of the function.
        layer: the checkpoint's name of the projection.
        a: first factor, (r, in) as a constant or (1, r, in) from a slot; None without an adapter.
        b: second factor, (out, r) or (1, out, r).
    """

    constants: Constants
    layer: str
    a: Var | None = None
    b: Var | None = None

    def __call__(self, x: Var, name: str) -> Var:
        """x (1, S, in) -> (1, S, out)."""
        matrix = self.constants.weight(self.layer)
        if self.a is None:
            return self.constants.linear(x, matrix, name)
        change = self._times(self._times(x, self.a), self.b)
        return builder().add(x=self.constants.linear(x, matrix), y=change, name=name)

    def _times(self, x: Var, factor: Var) -> Var:
        if factor.rank == 2:
            return self.constants.linear(x, factor)
        return builder().matmul(x=x, y=factor, transpose_y=True)


def rotated(x: Var, cos: Var, sin: Var, rotary: int) -> Var:
    """Rotate the first `rotary` of each head's numbers: x (1, H, S, D), cos, sin (S, rotary/2)."""
    mb, half, width = builder(), rotary // 2, x.shape[-1]
    sizes = [half, half] + ([width - rotary] if width > rotary else [])
    first, second, *rest = mb.split(x=x, split_sizes=sizes, axis=-1)
    turned = [
        mb.sub(x=mb.mul(x=first, y=cos), y=mb.mul(x=second, y=sin)),
        mb.add(x=mb.mul(x=second, y=cos), y=mb.mul(x=first, y=sin)),
    ]
    return mb.concat(values=[*turned, *rest], axis=-1)


@dataclass(frozen=True)
class Cache:
    """Where one block's keys and values go: the states, and the first slot as a variable (1,)."""

    keys: Var
    values: Var
    layer: int
    position: Var

    def update(self, keys: Var, values: Var) -> tuple[Var, Var]:
        """Write (1, KV, S, D) from `position` on; returns all slots, (1, KV, ctx, D)."""
        mb = builder()
        _, heads, width, dim = keys.shape
        begin = mb.concat(values=[np.array([self.layer, 0], np.int32), self.position, ZERO], axis=0)
        extent = np.array([1, heads, width, dim], np.int32)
        end = mb.add(x=begin, y=extent)
        return (
            self._write(self.keys, keys, begin, end, "keys"),
            self._write(self.values, values, begin, end, "values"),
        )

    def _write(self, state: Var, update: Var, begin: Var, end: Var, what: str) -> Var:
        mb = builder()
        before = mb.read_state(input=state)
        after = mb.slice_update(x=before, update=update, begin=begin, end=end)
        # What the update returns is read, not what was there before.
        stored = mb.coreml_update_state(state=state, value=after)
        _, heads, slots, dim = state.shape
        return mb.slice_by_index(
            x=stored,
            begin=[self.layer, 0, 0, 0],
            end=[self.layer + 1, heads, slots, dim],
            name=f"layer_{self.layer}_{what}",
        )


ZERO = np.zeros(1, np.int32)


def attention(
    x: Var,
    qkv: Adapted,
    out: Adapted,
    cache: Cache,
    rope: tuple[Var, Var],
    mask: Var,
    config: Phi3Config,
    fused: bool,
) -> Var:
    """x (1, S, hidden) -> (1, S, hidden); the block's keys and values enter the cache."""
    mb, prefix = builder(), f"layer_{cache.layer}"
    heads, shared, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    width = x.shape[1]
    stacked = mb.reshape(x=qkv(x, f"{prefix}_qkv"), shape=[1, width, heads + 2 * shared, dim])
    stacked = mb.transpose(x=stacked, perm=[0, 2, 1, 3])  # (1, H + 2 KV, S, D)
    turning, values = mb.split(x=stacked, split_sizes=[heads + shared, shared], axis=1)
    turning = rotated(turning, *rope, rotary=config.rotary_dim)
    queries, keys = mb.split(x=turning, split_sizes=[heads, shared], axis=1)
    keys, values = cache.update(keys, values)
    if heads > shared:
        # Query heads that share keys become further rows, so that nothing is repeated in memory.
        queries = mb.reshape(x=queries, shape=[1, shared, heads // shared * width, dim])
    core = scaled_attention if fused else decomposed_attention
    mixed = core(queries, keys, values, mask)
    if heads > shared:
        mixed = mb.reshape(x=mixed, shape=[1, heads, width, dim])
    mixed = mb.reshape(x=mb.transpose(x=mixed, perm=[0, 2, 1, 3]), shape=[1, width, heads * dim])
    return out(mixed, f"{prefix}_attention")


def scaled_attention(queries: Var, keys: Var, values: Var, mask: Var) -> Var:
    """softmax(q kᵀ / √D + mask) v as one operation."""
    return builder().scaled_dot_product_attention(
        query=queries, key=keys, value=values, attn_mask=mask
    )


def decomposed_attention(queries: Var, keys: Var, values: Var, mask: Var) -> Var:
    """The same in steps, for systems whose own operation is wrong; the softmax is float32."""
    mb = builder()
    scaled = mb.mul(x=queries, y=np.float16(1 / math.sqrt(queries.shape[-1])))
    scores = mb.add(x=mb.matmul(x=scaled, y=keys, transpose_y=True), y=mask)
    shares = mb.softmax(x=mb.cast(x=scores, dtype="fp32"), axis=-1)
    return mb.matmul(x=mb.cast(x=shares, dtype="fp16"), y=values)


def mlp(x: Var, gate_up: Adapted, down: Adapted, layer: int) -> Var:
    """x (1, S, hidden) -> (1, S, hidden): down(silu(gate) · up)."""
    mb = builder()
    gate, up = mb.split(x=gate_up(x, f"layer_{layer}_gate_up"), num_splits=2, axis=-1)
    return down(mb.mul(x=mb.silu(x=gate), y=up), f"layer_{layer}_mlp")
