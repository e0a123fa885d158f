"""The weight file: laid out before it is written, byte for byte as coremltools lays it out."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlx_medphi.coreml.blobs import BlobFile, BlobWriter, Part, plan_blobs
from mlx_medphi.coreml.library import coremltools
from mlx_medphi.errors import BundleError, ExportError

Array = npt.NDArray[Any]

RNG = np.random.default_rng(3)
# Whole and broken multiples of 64 bytes, and an odd count of half bytes.
PARTS: Mapping[Part, Array] = {
    Part("a.weight", "float16", (5, 7)): RNG.standard_normal((5, 7)).astype(np.float16),
    Part("b.data", "uint4", (3, 33)): RNG.integers(0, 16, (3, 33)).astype(np.uint8),
    Part("b.scale", "float32", (4, 4)): RNG.standard_normal((4, 4)).astype(np.float32),
    Part("b.offset", "uint8", (129,)): RNG.integers(0, 256, 129).astype(np.uint8),
    Part("c.data", "int8", (64,)): RNG.integers(-128, 128, 64).astype(np.int8),
    Part("d", "int32", (3, 1)): RNG.integers(-9, 9, (3, 1)).astype(np.int32),
    Part("e.data", "uint4", (8, 16)): RNG.integers(0, 16, (8, 16)).astype(np.uint8),
}


def packed(part: Part, values: Array) -> bytes:
    """Half bytes from the lowest bits up; everything else as it lies."""
    if part.dtype != "uint4":
        return values.tobytes()
    flat = np.append(values.reshape(-1), np.zeros(values.size % 2, np.uint8))
    return (flat[::2] | flat[1::2] << 4).astype(np.uint8).tobytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A weight file of `PARTS`, each written in two pieces, all side by side."""
    target = tmp_path / "weight.bin"
    with BlobWriter(target, list(PARTS)) as writer:
        halves = {part: divmod(part.nbytes, 2)[0] for part in PARTS}
        for part, values in PARTS.items():
            writer.append(part.id, packed(part, values)[: halves[part]])
        for part, values in reversed(PARTS.items()):
            writer.append(part.id, packed(part, values)[halves[part] :])
    return target


def storage() -> Any:
    return coremltools("libmilstoragepython")


def to_words(part: Part, values: Array) -> tuple[str, Array]:
    """How coremltools' own writer and reader want the numbers of a type."""
    name = {"float16": "fp16", "float32": "float"}.get(part.dtype, part.dtype)
    return name, values.reshape(-1).view(np.uint16) if name == "fp16" else values.reshape(-1)


def test_the_file_is_the_one_coremltools_writes(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.bin"
    writer = storage()._BlobStorageWriter(str(other))
    offsets = {}
    for part, values in PARTS.items():
        name, words = to_words(part, values)
        offsets[part.id] = getattr(writer, f"write_{name}_data")(words)
    del writer  # closes the file
    assert path.read_bytes() == other.read_bytes()
    assert plan_blobs(PARTS).offsets == offsets
    assert plan_blobs(PARTS).nbytes == other.stat().st_size


def test_coremltools_reads_what_was_written(path: Path) -> None:
    reader, plan = storage()._BlobStorageReader(str(path)), plan_blobs(PARTS)
    for part, values in PARTS.items():
        name, words = to_words(part, values)
        found = getattr(reader, f"read_{name}_data")(plan.offsets[part.id])
        np.testing.assert_array_equal(np.asarray(found)[: values.size], words)


def test_what_was_written_is_read_back(path: Path) -> None:
    blobs, plan = BlobFile(path), plan_blobs(PARTS)
    assert blobs.count == len(PARTS)
    for part, values in PARTS.items():
        offset = plan.offsets[part.id]
        dtype, data = blobs.part(offset)
        assert (dtype, bytes(data)) == (part.dtype, packed(part, values))
        found = blobs.array(offset, part.shape)
        np.testing.assert_array_equal(found, values)
        assert found.dtype == values.dtype and found.shape == part.shape


def test_constants_begin_on_multiples_of_64_and_do_not_overlap() -> None:
    plan = plan_blobs(PARTS)
    end = 64
    for part in PARTS:
        offset = plan.offsets[part.id]
        assert offset % 64 == 0 and end <= offset < end + 64
        end = offset + 64 + part.nbytes
    assert plan.nbytes == end


def test_a_constant_that_comes_twice_is_stored_once(tmp_path: Path) -> None:
    part, other = Part("a", "uint8", (3,)), Part("b", "uint8", (1,))
    assert plan_blobs([part, other, part]) == plan_blobs([part, other])
    with BlobWriter(tmp_path / "w", [part, other, part]) as writer:
        writer.append("a", b"xyz")
        writer.append("b", b"!")
    assert BlobFile(tmp_path / "w").count == 2


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("float16", (3, 5), 30), ("float32", (2,), 8), ("uint4", (3, 5), 8), ("uint4", (4,), 2),
        ("int8", (7,), 7), ("int32", (), 4),
    ],
)  # fmt: skip
def test_bytes_of_a_part_are_those_of_its_packed_numbers(
    dtype: str, shape: tuple[int, ...], nbytes: int
) -> None:
    assert Part("x", dtype, shape).nbytes == nbytes


def test_a_file_that_is_there_stays(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        BlobWriter(path, list(PARTS))
    assert path.read_bytes() == before


@pytest.mark.parametrize("pieces", [[b"1234"], [b"12", b"34567"], [b"123456789"], []])
def test_a_constant_that_is_not_just_full_is_our_mistake(
    tmp_path: Path, pieces: list[bytes]
) -> None:
    def write() -> None:
        with BlobWriter(tmp_path / "w", [Part("a", "uint8", (6,))]) as writer:
            for piece in pieces:
                writer.append("a", piece)

    with pytest.raises(ExportError, match="numbers than its shape has"):
        write()


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_all_of_them(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, few = os.pwrite, 7

    def hesitant(handle: int, data: Any, offset: int) -> int:
        is_record = len(data) == 64 and bytes(data[:4]) == b"\xef\xbe\xad\xde"
        return pwrite(handle, data if is_record else data[:few], offset)

    monkeypatch.setattr(os, "pwrite", hesitant)
    with BlobWriter(tmp_path / "again", list(PARTS)) as writer:
        for part, values in PARTS.items():
            writer.append(part.id, packed(part, values))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_more_than_a_constant_holds_is_not_written(tmp_path: Path) -> None:
    with BlobWriter(tmp_path / "w", [Part("a", "uint8", (6,)), Part("b", "uint8", (1,))]) as writer:
        writer.append("a", b"12")
        with pytest.raises(ExportError):
            writer.append("a", b"34567")
        writer.append("a", b"3456")
        writer.append("b", b"!")
    offsets = plan_blobs([Part("a", "uint8", (6,)), Part("b", "uint8", (1,))]).offsets
    blobs = BlobFile(tmp_path / "w")
    assert [bytes(blobs.part(offsets[name])[1]) for name in "ab"] == [b"123456", b"!"]


def test_an_error_while_writing_is_the_one_that_is_seen(tmp_path: Path) -> None:
    def write() -> None:
        with BlobWriter(tmp_path / "w", [Part("a", "uint8", (6,))]):
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write()


def test_a_file_that_is_none_is_refused(tmp_path: Path, path: Path) -> None:
    files: dict[str, bytes] = {
        "empty": b"",
        "short": path.read_bytes()[:63],
        "newer": struct.pack("<II56x", 1, 3) + path.read_bytes()[64:],
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BundleError, match=name):
            BlobFile(tmp_path / name)
    with pytest.raises(BundleError, match="absent"):
        BlobFile(tmp_path / "absent")


def shift(by: int) -> Callable[[int, Path], int]:
    return lambda offset, path: offset + by


def cut(offset: int, path: Path) -> int:
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    return plan_blobs(PARTS).offsets["e.data"]


def unmarked(offset: int, path: Path) -> int:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    return offset


def foreign_type(offset: int, path: Path) -> int:
    data = bytearray(path.read_bytes())
    data[offset + 4] = 99
    path.write_bytes(data)
    return offset


@pytest.mark.parametrize(
    "where",
    [
        shift(1), shift(64), shift(-(10**6)), shift(10**6), lambda offset, path: 0,
        lambda offset, path: path.stat().st_size // 64 * 64, cut, unmarked, foreign_type,
    ],
    ids=["odd", "data", "before", "behind", "header", "end", "cut", "unmarked", "foreign"],
)  # fmt: skip
def test_an_offset_without_a_whole_constant_is_refused(
    path: Path, where: Callable[[int, Path], int]
) -> None:
    # 64 bytes behind a record its data begins.
    offset = where(plan_blobs(PARTS).offsets["b.scale"], path)
    blobs = BlobFile(path)
    with pytest.raises(BundleError, match="weight.bin"):
        blobs.part(offset)


@pytest.mark.parametrize("shape", [(4, 5), (4, 4, 2), (), (17,)])
def test_a_constant_of_another_size_is_refused(path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(BundleError, match="64 bytes of float32"):
        BlobFile(path).array(plan_blobs(PARTS).offsets["b.scale"], shape)
