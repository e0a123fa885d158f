"""The bytes of a package's weights, made from a checkpoint's a few rows at a time.

Each function here gives tuples of bytes, one for each constant that a weight is stored in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_medphi.coreml.codes import (
    HALF_MAX,
    HALF_NORMAL,
    Form,
    Groups,
    carry,
    packed,
    packed_data,
    row_codes,
    row_grid,
    same_codes,
    signed_data,
    unpacked,
)
from mlx_medphi.errors import CheckpointError, ExportError
from mlx_medphi.model.layout import linear_shapes
from mlx_medphi.model.weights import Checkpoint, StoredTensor

__all__ = [
    "BLOCK_GROUPS",
    "NUMPY",
    "Blocks",
    "StoredCodes",
    "all_finite",
    "beyond_float16",
    "carried_blocks",
    "half_blocks",
    "quantised_blocks",
    "read_rows",
    "row_ranges",
    "unpacked_blocks",
]

NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
# All bits but the sign; those of the exponent.
WITHOUT_SIGN = {
    "float16": (0x7FFF, 0x7C00), "uint16": (0x7FFF, 0x7F80), "float32": (0x7FFFFFFF, 0x7F800000),
}  # fmt: skip
BLOCK_GROUPS = 1 << 14
"""Groups that are looked at together; their numbers stay in the processor's cache."""
# 2 Mi weights are 1 MiB of codes, or 8 MiB in float32.
BLOCK_WEIGHTS = 1 << 21

Blocks = Iterator[tuple[bytes, ...]]


@dataclass(frozen=True)
class StoredCodes:
    """A layer as MLX quantised it."""

    layer: str
    shape: tuple[int, int]
    bits: int
    group: int
    weight: StoredTensor
    scales: StoredTensor
    biases: StoredTensor

    @classmethod
    def of(cls, checkpoint: Checkpoint, layer: str) -> StoredCodes:
        bits, group = checkpoint.quantized_layers[layer]
        parts = [checkpoint.tensors[f"{layer}.{name}"] for name in ("weight", "scales", "biases")]
        return cls(layer, linear_shapes(checkpoint.config)[layer], bits, group, *parts)

    @property
    def levels(self) -> int:
        return int(2**self.bits - 1)

    def numbers(
        self, start: int, stop: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Scales and biases of some rows, flat."""
        scales = _floats(self.scales, start, stop).reshape(-1)
        return scales, _floats(self.biases, start, stop).reshape(-1)

    def data(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Packed codes of some rows, (groups, bytes)."""
        raw = read_rows(self.weight, start, stop)
        return np.frombuffer(raw, np.uint8).reshape(-1, self.group * self.bits // 8)

    def carried(self, start: int, stop: int, data: npt.NDArray[np.uint8] | None = None) -> Groups:
        """Some rows' groups as Core ML has them.

        Args:
            start, stop: rows.
            data: their packed codes; None reads them where they matter.

        Raises:
            ExportError: a value is beyond float16.
        """
        scales, biases = self.numbers(start, stop)
        small = np.abs(scales) < HALF_NORMAL
        same = None
        if small.any():
            data = self.data(start, stop) if data is None else data
            same = np.full(len(scales), -1, np.int16)
            same[small] = same_codes(data[small], self.bits)
        groups = carry(scales, biases, self.levels, same)
        largest = float(groups.size.max())
        if not largest <= HALF_MAX:
            raise beyond_float16(self.layer, largest)
        return groups


def carried_blocks(codes: StoredCodes, form: Form, bits: int) -> Blocks:
    """A layer's own codes, scales and offsets in the form planned for it, `bits` to a code."""
    for start, stop in row_ranges(*codes.shape):
        data = codes.data(start, stop)
        groups = codes.carried(start, stop, data)
        scale = groups.scale.tobytes()
        if form == "no offset":
            yield signed_data(data, groups).tobytes(), scale
            continue
        kept = packed_data(data, groups, codes.bits)
        if bits != codes.bits:
            kept = unpacked(kept)
        if form == "float16 offset":
            offset = groups.offset().tobytes()
        else:
            whole = groups.zero.astype(np.uint8)
            offset = packed(whole) if bits == 4 else whole.tobytes()
        yield kept.tobytes(), scale, offset


def quantised_blocks(layer: str, tensor: StoredTensor, bits: int) -> Blocks:
    """A plain layer quantised on the way, each row on a grid of its own.

    Raises:
        ExportError: a number is beyond float16, or no number.
    """
    levels = 2**bits - 1
    for start, stop in row_ranges(*tensor.info.shape):
        weight = _floats(tensor, start, stop)
        largest = _largest(weight)
        if not largest <= HALF_MAX:
            raise beyond_float16(layer, largest)
        scale, zero = row_grid(weight, levels)
        codes, offset = row_codes(weight, scale, zero, levels), zero.astype(np.uint8)
        if bits == 4:
            yield packed(codes), scale.tobytes(), packed(offset)
        else:
            yield codes.tobytes(), scale.tobytes(), offset.tobytes()


def half_blocks(layer: str, tensor: StoredTensor) -> Blocks:
    """A plain tensor rounded to float16; what is float16 already is copied.

    Raises:
        ExportError: a number is beyond float16, or no number.
    """
    rows, *rest = tensor.info.shape
    for start, stop in row_ranges(rows, math.prod(rest)):
        if tensor.info.dtype == "F16":
            data = read_rows(tensor, start, stop)
            _check_finite(layer, np.frombuffer(data, np.float16))
            yield (data,)
        else:
            yield (_half(layer, _floats(tensor, start, stop)).tobytes(),)


def unpacked_blocks(codes: StoredCodes) -> Blocks:
    """A quantised layer as float16: MLX's values in float32, each rounded once.

    Raises:
        ExportError: a value is beyond float16.
    """
    import mlx.core as mx  # heavy, and needed by this form alone

    width = codes.weight.info.shape[1]
    for start, stop in row_ranges(*codes.shape):
        words = np.frombuffer(read_rows(codes.weight, start, stop), np.uint32).reshape(-1, width)
        scales, biases = (
            mx.array(part.reshape(stop - start, -1)) for part in codes.numbers(start, stop)
        )
        # On the CPU on every machine: the same bytes from all of them.
        with mx.stream(mx.cpu):
            made = mx.dequantize(mx.array(words), scales, biases, codes.group, codes.bits)
            values = np.array(made)
        yield (_half(codes.layer, values).tobytes(),)


def row_ranges(rows: int, columns: int, size: int = BLOCK_WEIGHTS) -> Iterator[tuple[int, int]]:
    """Row ranges of about `size` entries; even, so that half bytes never meet at a border."""
    step = max(2, size // columns // 2 * 2)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def read_rows(tensor: StoredTensor, start: int, stop: int) -> bytes:
    """The stored bytes of some rows.

    Raises:
        CheckpointError: the file ends before them.
    """
    info = tensor.info
    width = info.nbytes // info.shape[0]
    with tensor.file.open("rb") as handle:
        handle.seek(tensor.offset + start * width)
        data = handle.read((stop - start) * width)
    if len(data) != (stop - start) * width:
        raise CheckpointError(
            f"{tensor.file}: became shorter while it was read; fetch the file again"
        )
    return data


def _floats(tensor: StoredTensor, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Some rows of a float tensor in float32."""
    raw = np.frombuffer(read_rows(tensor, start, stop), NUMPY[tensor.info.dtype])
    if tensor.info.dtype == "BF16":  # the upper half of a float32
        values = (raw.astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.astype(np.float32, copy=False)
    return values.reshape(stop - start, *tensor.info.shape[1:])


def _half(layer: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore", invalid="ignore"):
        half = values.astype(np.float16)
    _check_finite(layer, half, values)
    return half


def _check_finite(
    layer: str,
    half: npt.NDArray[np.float16],
    values: npt.NDArray[np.float32] | None = None,
) -> None:
    if not all_finite(half):
        raise beyond_float16(layer, _largest(half if values is None else values))


def all_finite(raw: npt.NDArray[np.generic]) -> bool:
    """Whether all of float16, float32 or bfloat16 (as uint16) are numbers, and none infinite."""
    # Compared as integers, which numpy does faster: an exponent with all bits set is neither.
    rest, top = WITHOUT_SIGN[raw.dtype.name]
    if raw.dtype.itemsize == 4:
        return int((raw.view(np.uint32) & np.uint32(rest)).max()) < top
    return int((raw.view(np.uint16) & np.uint16(rest)).max()) < top


def _largest(values: npt.NDArray[np.floating]) -> float:
    return float(np.abs(values).max())


def beyond_float16(layer: str, value: float) -> ExportError:
    """The error for a value that float16 cannot hold."""
    return ExportError(
        f"{layer}: holds {value:g}, but Core ML computes in float16, which ends at {HALF_MAX:g}; "
        "fetch the checkpoint again in case its file is damaged, and if an adapter was fused into "
        "it, export its base with the adapter apart"
    )
