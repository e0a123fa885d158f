"""Safetensors files read and written a few rows at a time: no model is ever in memory twice.

A file is written header first, then tensor by tensor, each from bytes made when their turn comes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_medphi.errors import CheckpointError
from mlx_medphi.files import DTYPE_BYTES, SafetensorsHeader, TensorInfo, read_safetensors_header

__all__ = [
    "MLX_DTYPES",
    "Piece",
    "ShardSet",
    "TensorSpec",
    "array_bytes",
    "array_piece",
    "header_bytes",
    "row_blocks",
    "write_pieces",
]

MLX_DTYPES: Mapping[str, mx.Dtype] = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
}
"""The stored dtypes that a Phi-3 checkpoint or an adapter may hold."""

NUMPY_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32}

# 4 Mi elements are 16 MiB in float32: large enough to keep the disk busy, small beside any model.
BLOCK_ELEMENTS = 1 << 22
COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a file to be written: its name, stored dtype such as "F16", and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """Consecutive tensors of a file and the bytes that fill them, made when they are asked for."""

    tensors: tuple[TensorSpec, ...]
    chunks: Callable[[], Iterable[bytes]]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def array_bytes(array: mx.array) -> bytes:
    """The little-endian bytes of an array as safetensors stores them."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)  # numpy has no bfloat16
    return np.array(array).tobytes()


def array_piece(name: str, array: mx.array) -> Piece:
    """A piece that holds one array already in memory."""
    stored = {dtype: key for key, dtype in MLX_DTYPES.items()}[array.dtype]
    spec = TensorSpec(name, stored, tuple(array.shape))
    return Piece((spec,), lambda: (array_bytes(array),))


def header_bytes(
    tensors: Iterable[TensorSpec], metadata: Mapping[str, str], size: int = 0
) -> bytes:
    """A safetensors header for tensors in this order, its length included.

    Args:
        tensors: what follows, without gaps.
        metadata: text facts about the file.
        size: pad with spaces up to this many bytes, so that the metadata can be completed later.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end],
        }  # fmt: skip
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    # The format asks for tensor data on an eight-byte border; trailing spaces belong to the header.
    padded = max(size - 8, len(text) + -len(text) % 8)
    return padded.to_bytes(8, "little") + text.ljust(padded)


def write_pieces(path: Path, header: bytes, pieces: Iterable[Piece]) -> None:
    """Write a file from its header and its pieces; memory holds one chunk at a time.

    Raises:
        OSError: the disk is full or cannot be written; the caller removes what was written.
    """
    with Path(path).open("wb") as handle:
        handle.write(header)
        for piece in pieces:
            written = sum(handle.write(chunk) for chunk in piece.chunks())
            assert written == piece.nbytes, (piece.tensors, written, piece.nbytes)


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Row ranges (start, stop) of a shape, each of about `BLOCK_ELEMENTS` elements."""
    rows, columns = shape[0], math.prod(shape[1:])
    step = max(1, BLOCK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


class ShardSet:
    """The weight files of one checkpoint directory, opened for reading only.

    Attributes:
        files: path and header of each weight file, in name order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files: dict[Path, SafetensorsHeader] = {
            path: read_safetensors_header(path, CheckpointError) for path in files
        }
        self._home = {name: path for path, header in self.files.items() for name in header.tensors}

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor."""
        return self.files[self._home[name]].tensors[name]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(header.tensor_bytes for header in self.files.values())

    def raw(self, name: str) -> Iterator[bytes]:
        """The stored bytes of a tensor, piece by piece."""
        info = self.info(name)
        for begin in range(info.begin, info.end, COPY_BYTES):
            yield self._read(name, begin, min(info.end, begin + COPY_BYTES))

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> mx.array:
        """Some rows of a tensor (all of it by default) in its stored dtype."""
        info = self.info(name)
        count = info.shape[0] if info.shape else 1
        stop = count if stop is None else stop
        width = info.nbytes // max(count, 1)
        data = self._read(name, info.begin + start * width, info.begin + stop * width)
        flat = np.frombuffer(data, dtype=NUMPY_DTYPES[info.dtype])
        array = mx.array(flat.reshape(stop - start, *info.shape[1:]))
        return array.view(mx.bfloat16) if info.dtype == "BF16" else array

    def header(self, path: Path) -> bytes:
        """The header of one file, byte for byte, its length included."""
        with path.open("rb") as handle:
            return handle.read(self.files[path].data_start)

    def _read(self, name: str, begin: int, end: int) -> bytes:
        path = self._home[name]
        with path.open("rb") as handle:
            handle.seek(self.files[path].data_start + begin)
            data = handle.read(end - begin)
        if len(data) != end - begin:
            raise CheckpointError(f"{path}: became shorter while it was read; fetch the file again")
        return data
