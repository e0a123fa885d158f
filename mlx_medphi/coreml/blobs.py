"""`weight.bin`, the file beside a Core ML program that holds its large constants.

The format (coremltools, `mlmodel/src/MILBlob/Blob/StorageFormat.hpp`), all little endian: a header
of 64 bytes (number of blobs, version 2, zeros), then for each blob a record of 64 bytes (a mark,
the type, bytes of data, offset of the data, unused bits at its end, zeros) and the data, each
starting on a multiple of 64. A program names a blob by the offset of its record. Numbers below a
byte are packed from the lowest bits up.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from mlx_medphi.errors import BundleError, ExportError

__all__ = ["BITS", "BlobFile", "BlobPlan", "BlobWriter", "Part", "plan_blobs"]

ALIGN = 64
MARK = 0xDEADBEEF
VERSION = 2
HEADER = struct.Struct("<II56x")
RECORD = struct.Struct("<IIQQQ32x")
CODES = {"float16": 1, "float32": 2, "uint8": 3, "int8": 4, "uint4": 11, "int32": 14}
NAMES = {code: name for name, code in CODES.items()}

BITS: Mapping[str, int] = {
    "float16": 16, "float32": 32, "uint8": 8, "int8": 8, "uint4": 4, "int32": 32,
}  # fmt: skip
"""Bits of one number of each type that is read and written here."""


@dataclass(frozen=True)
class Part:
    """One constant of the weight file.

    Attributes:
        id: its name in this project, which all functions that use it share.
        dtype: a key of `BITS`.
        shape: extents, in numbers.
    """

    id: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed numbers."""
        return (math.prod(self.shape) * BITS[self.dtype] + 7) // 8


@dataclass(frozen=True)
class BlobPlan:
    """Where each constant lies: id -> offset of its record; and the size of the whole file."""

    offsets: Mapping[str, int]
    nbytes: int


def plan_blobs(parts: Iterable[Part]) -> BlobPlan:
    """Lay constants out one after the other; an id that comes twice is stored once."""
    offsets: dict[str, int] = {}
    position = HEADER.size
    for part in parts:
        if part.id in offsets:
            continue
        position = -(-position // ALIGN) * ALIGN
        offsets[part.id] = position
        position += RECORD.size + part.nbytes
    return BlobPlan(offsets, position)


class BlobWriter:
    """Writes a weight file whose layout is known, constants side by side and piece by piece."""

    def __init__(self, path: Path, parts: Sequence[Part]) -> None:
        """Create `path` with all its records; the data follows by `append`."""
        self.plan = plan_blobs(parts)
        self._open: dict[str, list[int]] = {}
        self._file = path.open("xb")
        try:
            self._lay_out(parts)
        except BaseException:
            self._file.close()
            raise

    def _lay_out(self, parts: Sequence[Part]) -> None:
        self._file.write(HEADER.pack(len(self.plan.offsets), VERSION))
        for part in {part.id: part for part in parts}.values():
            offset = self.plan.offsets[part.id]
            unused = part.nbytes * 8 - math.prod(part.shape) * BITS[part.dtype]
            record = RECORD.pack(MARK, CODES[part.dtype], part.nbytes, offset + RECORD.size, unused)
            os.pwrite(self._file.fileno(), record, offset)
            start = offset + RECORD.size
            self._open[part.id] = [start, start + part.nbytes]
        self._file.flush()
        os.ftruncate(self._file.fileno(), self.plan.nbytes)

    def append(self, part_id: str, data: bytes) -> None:
        """Write the next bytes of one constant."""
        place = self._open[part_id]
        if place[0] + len(data) > place[1]:
            raise ExportError(f"{part_id}: more numbers than its shape has; nothing was written")
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file.fileno(), view, place[0])
            place[0] += written
            view = view[written:]

    def close(self) -> None:
        """Close the file; every constant must be complete."""
        self._file.close()
        short = [name for name, (at, end) in self._open.items() if at != end]
        if short:
            raise ExportError(f"{short[0]}: fewer numbers than its shape has; nothing was written")

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


class BlobFile:
    """A weight file opened for reading; the data stays on disk until it is asked for."""

    def __init__(self, path: Path) -> None:
        """Map `path`.

        Raises:
            BundleError: missing, empty or not a weight file.
        """
        self.path = path
        try:
            with path.open("rb") as handle:
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as exc:
            raise BundleError(f"{path}: the weight file cannot be read ({exc})") from exc
        if len(self._map) < HEADER.size or HEADER.unpack_from(self._map)[1] != VERSION:
            raise BundleError(f"{path}: not a weight file of version {VERSION}; export again")
        self.count = int(HEADER.unpack_from(self._map)[0])

    def part(self, offset: int) -> tuple[str, memoryview]:
        """Type and packed bytes of the blob whose record lies at `offset`.

        Raises:
            BundleError: no whole blob lies there.
        """
        size = len(self._map)
        if offset < HEADER.size or offset % ALIGN or offset + RECORD.size > size:
            raise BundleError(f"{self.path}: no constant can start at byte {offset}; export again")
        mark, code, nbytes, start, _ = RECORD.unpack_from(self._map, offset)
        if mark != MARK or code not in NAMES or start + nbytes > size:
            raise BundleError(f"{self.path}: no whole constant at byte {offset}; export again")
        return NAMES[code], memoryview(self._map)[start : start + nbytes]

    def array(self, offset: int, shape: Sequence[int]) -> npt.NDArray[np.generic]:
        """The numbers of one blob; those of four bits are unpacked to uint8.

        Raises:
            BundleError: no whole blob lies there, or it is not as large as `shape`.
        """
        dtype, data = self.part(offset)
        count = math.prod(shape)
        if (count * BITS[dtype] + 7) // 8 != len(data):
            raise BundleError(
                f"{self.path}: {len(data)} bytes of {dtype} at byte {offset}, the program expects "
                f"{tuple(shape)}; export again"
            )
        if dtype == "uint4":
            packed = np.frombuffer(data, np.uint8)
            codes = np.empty((len(packed), 2), np.uint8)
            codes[:, 0], codes[:, 1] = packed & 15, packed >> 4
            return codes.reshape(-1)[:count].reshape(shape)
        return np.frombuffer(data, dtype).reshape(shape)
