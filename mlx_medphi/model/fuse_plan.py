"""What a fused checkpoint consists of: which bytes are copied, which are made, in which files.

Nothing is read here but headers and config.json; the weights pass through block by block when the
pieces of a plan are written. Sums are made in float32 and rounded once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_medphi.errors import FuseError
from mlx_medphi.model.adapter_formats import LowRank
from mlx_medphi.model.delta import Tally
from mlx_medphi.model.lora import adapted_weight
from mlx_medphi.model.shards import (
    MLX_DTYPES,
    Piece,
    ShardSet,
    TensorSpec,
    array_bytes,
    row_blocks,
)
from mlx_medphi.model.weights import Checkpoint

__all__ = ["Precision", "Source", "fused_config", "plan_files", "shard_index", "stored_form"]

Precision = Literal["same", "float16", "8bit"]
EIGHT_BITS = 8
COARSEST_FIRST = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Source:
    """A base and the changes to be folded into it.

    Attributes:
        checkpoint: the base, opened.
        shards: its files.
        changes: layer name -> change, float32.
        scale: what A B is multiplied by.
        tallies: layer name -> where the change is measured while it is written.
    """

    checkpoint: Checkpoint
    shards: ShardSet
    changes: Mapping[str, LowRank]
    scale: float
    tallies: Mapping[str, Tally]

    def rows(self, layer: str, start: int, stop: int) -> mx.array:
        """Rows of a base weight in float32, unpacked where it is quantised."""
        weight = self.shards.rows(f"{layer}.weight", start, stop)
        form = self.checkpoint.quantized_layers.get(layer)
        if form is None:
            return weight.astype(mx.float32)
        scales, biases = (
            self.shards.rows(f"{layer}.{part}", start, stop).astype(mx.float32)
            for part in ("scales", "biases")
        )
        return mx.dequantize(weight, scales, biases, form[1], form[0])

    def fused_rows(self, layer: str, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """Rows of W and of W', float32; the two are one where nothing changes."""
        base = self.rows(layer, start, stop)
        change = self.changes.get(layer)
        if change is None:
            return base, base
        m = None if change.m is None else change.m[start:stop]
        return base, adapted_weight(base, change.a, change.b[:, start:stop], m, self.scale)

    @property
    def used(self) -> Mapping[str, object]:
        """The tensors that the model reads; a file may hold others, which are copied."""
        return self.checkpoint.tensors

    def shape(self, layer: str) -> tuple[int, int]:
        """(out, in) of a layer."""
        outputs, inputs = self.shards.info(f"{layer}.weight").shape
        form = self.checkpoint.quantized_layers.get(layer)
        return outputs, inputs if form is None else inputs * 32 // form[0]


def plan_files(source: Source, precision: Precision) -> dict[str, list[Piece]]:
    """Every weight file of the fused checkpoint: name -> its tensors in order.

    Files keep the base's names, and their tensors its order.
    """
    quantized = source.checkpoint.quantized_layers
    files: dict[str, list[Piece]] = {}
    for path, header in source.shards.files.items():
        pieces = []
        for name, info in sorted(header.tensors.items(), key=lambda item: item[1].begin):
            layer, _, part = name.rpartition(".")
            if layer in quantized and _is_remade(source, layer, precision):
                # Codes, scales and biases are made together, where the codes stand.
                if part == "weight":
                    lifted = precision == "8bit"
                    pieces.append(
                        _eight_bits(source, layer) if lifted else _plain(source, layer, "F16")
                    )
            elif layer in source.changes and part == "weight":
                pieces.append(_plain(source, layer, _stored_dtype(info.dtype, precision)))
            elif precision == "float16" and info.dtype != "F16" and name in source.used:
                pieces.append(_half(source, name))
            else:
                pieces.append(_copy(source, name))
        if pieces:
            files[path.name] = pieces
    return files


def stored_form(source: Source, precision: Precision) -> str:
    """What the changed weights are stored as, the coarsest where there are several."""
    if precision != "same":
        return precision
    found = {source.shards.info(f"{layer}.weight").dtype for layer in source.changes}
    return next(name for dtype, name in COARSEST_FIRST.items() if dtype in found)


def _is_remade(source: Source, layer: str, precision: Precision) -> bool:
    """Whether a quantised layer is stored in another form than the base's."""
    return precision == "float16" or (precision == "8bit" and layer in source.changes)


def _stored_dtype(dtype: str, precision: Precision) -> str:
    return "F16" if precision == "float16" else dtype


def _copy(source: Source, name: str) -> Piece:
    info = source.shards.info(name)
    return Piece((TensorSpec(name, info.dtype, info.shape),), lambda: source.shards.raw(name))


def _half(source: Source, name: str) -> Piece:
    """A tensor of any shape in float16."""
    shape = source.shards.info(name).shape

    def chunks() -> Iterator[bytes]:
        for start, stop in row_blocks(shape):
            yield array_bytes(_rounded(name, source.shards.rows(name, start, stop), mx.float16))

    return Piece((TensorSpec(name, "F16", shape),), chunks)


def _plain(source: Source, layer: str, dtype: str) -> Piece:
    """A plain weight with its change, if it has one, rounded once to `dtype`."""
    name, shape, target = f"{layer}.weight", source.shape(layer), MLX_DTYPES[dtype]

    def chunks() -> Iterator[bytes]:
        for start, stop in row_blocks(shape):
            # On the CPU on every machine: GPUs may multiply float32 with fewer digits.
            with mx.stream(mx.cpu):
                base, wanted = source.fused_rows(layer, start, stop)
                stored = _rounded(name, wanted, target)
                if layer in source.changes:
                    source.tallies[layer].add(base, wanted, stored.astype(mx.float32))
                data = array_bytes(stored)
            yield data

    return Piece((TensorSpec(name, dtype, shape),), chunks)


def _eight_bits(source: Source, layer: str) -> Piece:
    """A changed layer in 8 bits with the group size and the scales' dtype of the base."""
    group = source.checkpoint.quantized_layers[layer][1]
    outputs, inputs = source.shape(layer)
    stored = source.shards.info(f"{layer}.scales").dtype
    small = (outputs, inputs // group)
    specs = (
        TensorSpec(f"{layer}.weight", "U32", (outputs, inputs * EIGHT_BITS // 32)),
        TensorSpec(f"{layer}.scales", stored, small),
        TensorSpec(f"{layer}.biases", stored, small),
    )

    def chunks() -> Iterator[bytes]:
        scales: list[bytes] = []
        biases: list[bytes] = []
        for start, stop in row_blocks((outputs, inputs)):
            with mx.stream(mx.cpu):
                base, wanted = source.fused_rows(layer, start, stop)
                codes, scale, bias = _quantize(wanted, group, MLX_DTYPES[stored])
                step, low = scale.astype(mx.float32), bias.astype(mx.float32)
                kept = mx.dequantize(codes, step, low, group, EIGHT_BITS)
                source.tallies[layer].add(base, wanted, kept)
                data = array_bytes(codes)
                scales.append(array_bytes(scale))
                biases.append(array_bytes(bias))
            yield data
        yield from scales
        yield from biases

    return Piece(specs, chunks)


def _quantize(weight: mx.array, group: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    """8-bit codes for the scales as they are stored.

    `mx.quantize` chooses codes for its float32 scales and rounds those afterwards; with bfloat16
    scales that costs as much again as the 8 bits themselves.
    """
    _, scales, biases = mx.quantize(weight, group, EIGHT_BITS)
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    step, low = (mx.repeat(part.astype(mx.float32), group, axis=1) for part in (scales, biases))
    codes = mx.clip(mx.round((weight - low) / step), 0, 2**EIGHT_BITS - 1)
    # Four codes to a word, the first in the lowest byte.
    return codes.astype(mx.uint8).view(mx.uint32), scales, biases


def _rounded(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    rounded = array.astype(dtype)
    if not mx.isfinite(rounded).all().item():
        largest = float(np.array(mx.abs(array.astype(mx.float32)).max()))
        raise FuseError(
            f"{name}: holds {largest:g}, beyond what {str(dtype).removeprefix('mlx.core.')} can "
            "store; keep the adapter beside the base"
        )
    return rounded


def fused_config(source: Source, precision: Precision) -> dict[str, Any] | None:
    """config.json for the fused checkpoint; None: the base's, byte for byte."""
    if precision == "same":
        return None
    raw: dict[str, Any] = json.loads(json.dumps(source.checkpoint.raw_config))
    if precision == "float16":
        for key in ("quantization", "quantization_config"):
            raw.pop(key, None)
        # Loaders that follow this would round the weights a second time.
        raw["dtype" if "dtype" in raw else "torch_dtype"] = "float16"
        return raw
    for layer, (_, group) in source.checkpoint.quantized_layers.items():
        if layer in source.changes:
            for key in ("quantization", "quantization_config"):
                if key in raw:
                    raw[key][layer] = {"group_size": group, "bits": EIGHT_BITS}
    return raw


def shard_index(files: Mapping[str, Sequence[Piece]]) -> dict[str, Any]:
    """model.safetensors.index.json for these files."""
    return {
        "metadata": {"total_size": sum(p.nbytes for pieces in files.values() for p in pieces)},
        "weight_map": {
            tensor.name: name
            for name, pieces in files.items()
            for piece in pieces
            for tensor in piece.tensors
        },
    }
