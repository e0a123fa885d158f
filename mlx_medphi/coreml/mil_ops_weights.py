"""Constants of a program, left on disk until an operation uses them.

A quantised matrix is dequantised where it is used: `(code - offset) * scale` in float32, rounded
once to the type the program gives it. With integer offsets that is the exact value, rounded once.
Matrices that fit into the cache stay there as float32; the others go through a matrix product in
blocks of rows, so that a model much larger than the memory runs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_medphi.coreml.blobs import BlobFile
from mlx_medphi.coreml.mil_ops_half import Array, narrow, round_in_place, widen
from mlx_medphi.errors import BundleError

__all__ = ["Constant", "FloatCache", "Quantised", "Stored", "numpy_dtype"]

# Numbers in a block of rows between weight file and product (16 MB), and in a piece of it that one
# thread works on in the processor's cache.
BLOCK, PIECE = 1 << 22, 1 << 16
MIN_PIECES = 4  # fewer are not worth a thread
MAX_HALF, MAX_CODE = 65504.0, 255
NUMPY_NAMES = {"uint4": "uint8", "int4": "int8"}
NUMPY_DTYPES = (
    "bool", "float16", "float32", "int8", "int16", "int32", "uint8", "uint16", "uint4", "int4",
)  # fmt: skip


def numpy_dtype(name: str) -> np.dtype[Any]:
    """What holds the program's numbers of this type; those of four bits are held in eight.

    Raises:
        BundleError: numbers of this type cannot be computed with here.
    """
    if name not in NUMPY_DTYPES:
        raise BundleError(f"numbers of type {name!r} are not implemented")
    return np.dtype(NUMPY_NAMES.get(name, name))


@dataclass(frozen=True)
class Stored:
    """The numbers of one constant as the package stores them.

    Attributes:
        dtype: as the program says.
        shape: extents.
        data: packed bytes: a part of the weight file, or of the model file.
        key: where the bytes are, for the cache; None: not in the weight file.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    key: Hashable = None

    def __post_init__(self) -> None:
        bits = 4 if self.dtype in NUMPY_NAMES else numpy_dtype(self.dtype).itemsize * 8
        needed = (math.prod(self.shape) * bits + 7) // 8
        if len(self.data) != needed:
            raise BundleError(
                f"{len(self.data)} bytes for {self.dtype} {list(self.shape)}, expected {needed}"
            )

    @classmethod
    def in_file(
        cls, blobs: BlobFile | None, offset: int, dtype: str, shape: tuple[int, ...]
    ) -> Stored:
        """The constant whose record lies at `offset` of the weight file.

        Raises:
            BundleError: it is not there, or of another type or size.
        """
        if blobs is None:
            raise BundleError("there is no weight file")
        found, data = blobs.part(offset)
        if found != dtype:
            raise BundleError(f"{blobs.path}: {found} at byte {offset}, the program says {dtype}")
        return cls(dtype, shape, data, offset)

    def rows(self, start: int, stop: int) -> Array:
        """Some of the first axis; a view of the file where the numbers need no unpacking."""
        width = math.prod(self.shape[1:])
        first, last = start * width, stop * width
        shape = (stop - start, *self.shape[1:])
        if self.dtype not in NUMPY_NAMES:
            dtype = numpy_dtype(self.dtype)
            return np.frombuffer(self.data, dtype, last - first, first * dtype.itemsize).reshape(
                shape
            )
        packed = np.frombuffer(self.data, np.uint8)[first // 2 : (last + 1) // 2].astype(np.uint16)
        # Two codes of a byte become two bytes, the lower four bits first (little endian).
        packed |= packed << 4
        packed &= 0x0F0F
        codes = packed.view(np.uint8)[first % 2 :][: last - first].reshape(shape)
        if self.dtype == "int4":
            return ((codes ^ 8).view(np.int8) - np.int8(8)).astype(np.int8, copy=False)
        return codes

    def array(self) -> Array:
        """All numbers."""
        if not self.shape:
            return Stored(self.dtype, (1,), self.data).rows(0, 1).reshape(())
        return self.rows(0, self.shape[0])


@dataclass(frozen=True)
class Quantised:
    """Codes with a scale, and perhaps an offset, for each block of them."""

    data: Stored
    scale: Stored
    offset: Stored | None

    def __post_init__(self) -> None:
        shape, blocks = self.data.shape, self.scale.shape
        fits = len(shape) == len(blocks) > 0 and all(
            b > 0 and n % b == 0 for n, b in zip(shape, blocks, strict=True)
        )
        if not fits:
            raise BundleError(f"scales {list(blocks)} do not divide {list(shape)} into blocks")
        if self.offset is not None and self.offset.shape != blocks:
            raise BundleError(f"offsets {list(self.offset.shape)} beside scales {list(blocks)}")
        if self.scale.dtype not in ("float16", "float32"):
            raise BundleError(f"scales of type {self.scale.dtype}, expected float16 or float32")

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents."""
        return self.data.shape

    @property
    def dtype(self) -> str:
        """The type of the dequantised numbers."""
        return self.scale.dtype

    @property
    def key(self) -> Hashable:
        """Where all parts are; None if one is not in the weight file."""
        parts = [self.data, self.scale] + ([self.offset] if self.offset else [])
        keys = tuple(part.key for part in parts)
        return None if None in keys else keys

    def array32(self) -> Array:
        """All numbers as float32; of any rank."""
        codes = self.data.array().astype(np.float32)
        scale, offset = (
            None if part is None else part.array().astype(np.float32)
            for part in (self.scale, self.offset)
        )
        assert scale is not None
        for axis, extent in enumerate(self.data.shape):
            block = extent // self.scale.shape[axis]
            scale = np.repeat(scale, block, axis)
            offset = None if offset is None else np.repeat(offset, block, axis)
        codes = (codes if offset is None else codes - offset) * scale
        return widen(narrow(codes, self.scale.dtype))

    def fill(self, out: Array, start: int) -> None:
        """Dequantise the rows of a matrix from `start` on into `out` (rows, columns), float32."""
        stop = start + len(out)
        groups = self.scale.shape[1]
        grouped = out.reshape(len(out), groups, -1)
        grouped[...] = self.data.rows(start, stop).reshape(grouped.shape)
        if self.offset is not None:
            np.subtract(grouped, self._blocks(self.offset, start, stop), out=grouped)
        scale = self._blocks(self.scale, start, stop)
        np.multiply(grouped, scale, out=grouped)
        if self.scale.dtype == "float32":
            return
        whole_codes = self.offset is None or not self.offset.dtype.startswith("float")
        if whole_codes and np.abs(scale).max() * MAX_CODE <= MAX_HALF:
            round_in_place(out, np.empty(out.size, np.uint32))
        else:
            out[...] = widen(narrow(out, np.float16))

    def _blocks(self, part: Stored, start: int, stop: int) -> Array:
        """Scales or offsets of some rows: (rows, groups, 1), float32."""
        block = self.data.shape[0] // part.shape[0]
        first = start // block
        values = part.rows(first, -(-stop // block)).astype(np.float32)
        if block > 1:
            values = np.repeat(values, block, axis=0)[start - first * block :][: stop - start]
        return values[..., None]


@dataclass(frozen=True)
class Constant:
    """A constant as the operations see it, in the type the program gives it."""

    source: Stored | Quantised
    cache: FloatCache = field(repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents."""
        return self.source.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type it has in the program."""
        return numpy_dtype(self.source.dtype)

    def array(self) -> Array:
        """All numbers, in `dtype`."""
        if isinstance(self.source, Stored):
            return self.source.array()
        if len(self.shape) == 2:
            return narrow(self.array32(), self.dtype)
        return narrow(self.source.array32(), self.dtype)

    def take(self, indices: Array) -> Array:
        """Entries of the first axis, in `dtype`; of a matrix only these are dequantised."""
        if isinstance(self.source, Stored) or len(self.shape) != 2:
            return self.array()[indices]
        wanted, place = np.unique(indices, return_inverse=True)
        rows = np.empty((len(wanted), self.shape[1]), np.float32)
        for at, row in enumerate(wanted):
            self.source.fill(rows[at : at + 1], int(row))
        return narrow(rows, self.dtype)[place.reshape(indices.shape)]

    def product(self, x: Array) -> Array:
        """`x @ matrix.T` in float32: x (…, in), float32; the matrix (out, in)."""
        rows, columns = self.shape
        flat = x.reshape(-1, columns)
        whole = self.cache.whole(self)
        if whole is not None:
            return (flat @ whole.T).reshape(*x.shape[:-1], rows)
        result = np.empty((len(flat), rows), np.float32)
        # One buffer for all blocks: fresh memory costs as much as what is written to it.
        buffer = np.empty((min(rows, max(1, BLOCK // max(1, columns))), columns), np.float32)
        for start in range(0, rows, len(buffer)):
            block = buffer[: rows - start]
            self.fill(block, start)
            np.matmul(flat, block.T, out=result[:, start : start + len(block)])
        return result.reshape(*x.shape[:-1], rows)

    def array32(self) -> Array:
        """All numbers of a matrix as float32."""
        if isinstance(self.source, Stored) and self.source.dtype == "float32":
            return self.source.array()
        whole = np.empty(self.shape, np.float32)
        self.fill(whole, 0)
        return whole

    def fill(self, out: Array, start: int) -> None:
        """Rows of a matrix from `start` on as float32 into `out`, C-contiguous.

        In threads, since numpy uses one for each operation, and in pieces that stay in the cache.
        """
        step = max(1, PIECE // max(1, out.shape[1]))

        def fill(first: int) -> None:
            piece = out[first : first + step]
            with np.errstate(all="ignore"):
                if isinstance(self.source, Quantised):
                    self.source.fill(piece, start + first)
                else:
                    stop = start + first + len(piece)
                    piece[...] = widen(self.source.rows(start + first, stop))

        firsts = range(0, len(out), step)
        if len(firsts) < MIN_PIECES:
            for first in firsts:
                fill(first)
        else:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(fill, firsts))


class FloatCache:
    """float32 matrices by where they come from.

    What is in stays in: a model's matrices are used one after the other and again in the same
    order, so that replacing the oldest would lose each one just before it is needed.
    """

    def __init__(self, limit: int) -> None:
        """Hold at most `limit` bytes."""
        self.limit = limit
        self.nbytes = 0
        self._held: dict[Hashable, Array] = {}

    def whole(self, constant: Constant) -> Array | None:
        """The matrix as float32, or None where there is no room for it."""
        key = constant.source.key
        if key is None or key in self._held:
            return self._held.get(key)
        nbytes = math.prod(constant.shape) * 4
        if self.nbytes + nbytes > self.limit:
            return None
        self._held[key] = constant.array32()
        self.nbytes += nbytes
        return self._held[key]
