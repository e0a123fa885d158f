"""Files appear whole or not at all, and a safetensors header is believed only when it adds up."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_medphi import files
from mlx_medphi.errors import AdapterError, CheckpointError, MedPhiError
from mlx_medphi.files import (
    atomic_directory,
    atomic_path,
    json_hash,
    read_safetensors_header,
    sha256_file,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# One file.


def test_a_failed_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "notes.json"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("stopped")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["notes.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = tmp_path / "notes.json"
    target.write_text("old")
    monkeypatch.setattr(files.os, step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(target, "new")
    monkeypatch.undo()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["notes.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_disk_that_really_is_full_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "adapter.bin"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"), atomic_path(target) as temporary:
        temporary.unlink()
        temporary.symlink_to("/dev/full")
        temporary.write_bytes(b"new" * 1000)
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["adapter.bin"]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "notes.txt"
    write_text(target, "old")
    reader = target.open()
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert reader.read() == "old", "a file that is open was changed in place"
    reader.close()


def test_the_temporary_keeps_the_suffix_that_writers_look_at(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "deep" / "a.safetensors") as temporary:
        assert temporary.suffix == ".safetensors"
        assert temporary.parent == tmp_path / "deep"
        temporary.write_bytes(b"")
    assert names(tmp_path / "deep") == ["a.safetensors"]


def test_new_files_have_the_ordinary_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
        with atomic_directory(tmp_path / "d"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o750


def test_text_is_utf8_with_plain_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "38.5 °C\n…\n")
    assert (tmp_path / "a.txt").read_bytes() == "38.5 °C\n…\n".encode()
    write_json(tmp_path / "a.json", {"b": "é", "a": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "b": "é",\n  "a": 1\n}\n'


# A directory.


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "run" / "adapter"
    with atomic_directory(target) as temporary:
        (temporary / "a.json").write_text("{}")
        assert not target.exists()
    assert names(target) == ["a.json"]
    assert names(target.parent) == ["adapter"]


def test_an_existing_directory_is_not_touched_unless_asked(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(FileExistsError), atomic_directory(target):
        raise AssertionError("nothing must be written before the check")
    assert names(target) == ["old"]
    with atomic_directory(target, replace=True) as temporary:
        (temporary / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["adapter"]


def test_a_failed_directory_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(target, replace=True) as temporary:
        (temporary / "new").write_text("new")
        raise RuntimeError("stopped")
    assert names(target) == ["old"]
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_swap_that_fails_half_way_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").write_text("old")
    real, calls = os.replace, 0

    def replace(source: Any, destination: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            full_disk()
        real(source, destination)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        with atomic_directory(target, replace=True) as temporary:
            (temporary / "new").write_text("new")
    assert names(target) == ["old"]
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_between_the_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException], after: int
) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").write_text("old")
    real, calls = os.replace, 0

    def replace(source: Any, destination: Any) -> None:
        nonlocal calls
        calls += 1
        real(source, destination)
        if calls == after:  # the rename is done when the signal is noticed
            raise stop

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(stop), atomic_directory(target, replace=True) as temporary:
        (temporary / "new").write_text("new")
    assert names(target) == (["old"] if after == 1 else ["new"])
    assert names(tmp_path) == ["adapter"]


def test_an_old_directory_that_cannot_be_put_back_stays_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").write_text("old")
    real, calls = os.replace, 0

    def replace(source: Any, destination: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            full_disk()
        real(source, destination)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        with atomic_directory(target, replace=True) as temporary:
            (temporary / "new").write_text("new")
    (aside,) = tmp_path.iterdir()
    assert aside.name.endswith(".old") and names(aside / "adapter") == ["old"]


@pytest.mark.parametrize("make", [atomic_directory, atomic_path])
def test_what_appears_during_the_writing_is_not_replaced_unless_asked(
    tmp_path: Path, make: Any
) -> None:
    target = tmp_path / "adapter"
    with pytest.raises(FileExistsError), make(target, replace=False) as temporary:
        (temporary / "new" if temporary.is_dir() else temporary).write_text("new")
        target.mkdir()  # empty: a rename would replace it without a word
    assert names(target) == []
    assert names(tmp_path) == ["adapter"]


def test_an_existing_file_is_not_touched_when_told_so(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(FileExistsError), atomic_path(target, replace=False):
        raise AssertionError("nothing must be written before the check")
    assert target.read_text() == "old"


def test_names_and_contents_of_a_directory_reach_the_disk_before_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append("/".join(Path(os.readlink(f"/proc/self/fd/{descriptor}")).parts[-2:]))
        real(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("the system does not tell what a descriptor is")
    monkeypatch.setattr(files.os, "fsync", fsync)
    with atomic_directory(tmp_path / "run") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "a").write_text("a")
        place = temporary.name
    assert set(synced[:-1]) == {"deep/a", f"{place}/deep", f"{tmp_path.name}/{place}"}
    assert synced[-1].endswith(tmp_path.name)


# Hashes.


def test_hashes_are_those_of_the_bytes_and_of_the_meaning(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # The test vector of FIPS 180-2.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "abc") == expected
    assert json_hash({"a": 1, "b": [1.5, "é"]}) == json_hash({"b": [1.5, "é"], "a": 1})
    assert json_hash({"a": 1}) != json_hash({"a": 2})


# Safetensors headers.


def entry(begin: int = 0, end: int = 4, shape: list[Any] | None = None, dtype: Any = "F32") -> Any:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [begin, end]}


def file_with(
    tmp_path: Path, header: Any, data: bytes = b"\0" * 4, length: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_a_header_is_read_without_its_tensors(tmp_path: Path) -> None:
    tensors = {
        "b": entry(4, 8),
        "a": entry(),
        "none": entry(8, 8, [0, 3]),
        "one": entry(8, 10, [], "F16"),
    }
    path = file_with(tmp_path, {"__metadata__": {"rank": "8"}, **tensors}, b"\0" * 10)
    header = read_safetensors_header(path)
    assert header.metadata == {"rank": "8"}
    assert sorted(header.tensors) == ["a", "b", "none", "one"]
    assert header.tensors["b"].shape == (1,) and header.tensors["b"].nbytes == 4
    assert header.tensor_bytes == 10
    assert header.data_start + 10 == path.stat().st_size


Broken = Callable[[Path], Path]
BROKEN: dict[str, Broken] = {
    "empty": lambda p: file_with(p, b"", b"", length=0).parent / "model.safetensors",
    "seven bytes": lambda p: _written(p, b"\1" * 7),
    "header longer than the file": lambda p: file_with(p, {"a": entry()}, length=1 << 40),
    "header of 2^64 - 1 bytes": lambda p: file_with(p, {"a": entry()}, length=(1 << 64) - 1),
    "not JSON": lambda p: file_with(p, b"{'a': 1}"),
    "not UTF-8": lambda p: file_with(p, b'{"\xff": 1}'),
    "JSON too deep": lambda p: file_with(p, b"[" * 200_000),
    "a list": lambda p: file_with(p, [entry()]),
    "metadata of numbers": lambda p: file_with(p, {"__metadata__": {"rank": 8}, "a": entry()}),
    "metadata as text": lambda p: file_with(p, {"__metadata__": "x", "a": entry()}),
    "entry is a number": lambda p: file_with(p, {"a": 1}),
    "no offsets": lambda p: file_with(p, {"a": {"dtype": "F32", "shape": [1]}}),
    "three offsets": lambda p: file_with(p, {"a": {**entry(), "data_offsets": [0, 2, 4]}}),
    "offsets as text": lambda p: file_with(p, {"a": {**entry(), "data_offsets": ["x", "y"]}}),
    "unknown dtype": lambda p: file_with(p, {"a": entry(dtype="F31")}),
    "dtype is a list": lambda p: file_with(p, {"a": entry(dtype=["F32"])}),
    "shape is a number": lambda p: file_with(p, {"a": {**entry(), "shape": 1}}),
    "negative extents": lambda p: file_with(p, {"a": entry(shape=[-1, -1])}),
    "fewer bytes than the shape": lambda p: file_with(p, {"a": entry(shape=[2])}),
    "end before begin": lambda p: file_with(p, {"a": entry(4, 0)}),
    "a hole": lambda p: file_with(p, {"a": entry(), "b": entry(8, 12)}, b"\0" * 12),
    "an overlap": lambda p: file_with(p, {"a": entry(), "b": entry(0, 4)}),
    "data missing": lambda p: file_with(p, {"a": entry()}, b"\0" * 3),
    "data too long": lambda p: file_with(p, {"a": entry()}, b"\0" * 5),
}


def _written(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_safetensors_file_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = BROKEN[kind](tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_safetensors_header(path, CheckpointError)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert "safetensors" in message


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 60, 100])
def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path: Path, cut: int) -> None:
    path = file_with(tmp_path, {"a": entry(0, 40, [10])}, b"\0" * 40)
    content = path.read_bytes()
    assert cut < len(content)
    path.write_bytes(content[:cut])
    with pytest.raises(MedPhiError, match="not a whole safetensors file"):
        read_safetensors_header(path)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"none\.safetensors: cannot be read"):
        read_safetensors_header(tmp_path / "none.safetensors", AdapterError)
    with pytest.raises(AdapterError, match="cannot be read"):
        read_safetensors_header(tmp_path, AdapterError)


@pytest.mark.parametrize("number", ["Infinity", "1.5", "true", '"4"'])
def test_a_header_with_numbers_that_are_not_whole_is_refused(tmp_path: Path, number: str) -> None:
    for entry in (
        f'{{"dtype":"F32","shape":[{number}],"data_offsets":[0,4]}}',
        f'{{"dtype":"F32","shape":[1],"data_offsets":[0,{number}]}}',
    ):
        header = f'{{"a":{entry}}}'.encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
        with pytest.raises(MedPhiError, match="the entry of tensor a is malformed"):
            read_safetensors_header(path)


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "file.txt").write_text("old")
    (tmp_path / "folder").symlink_to("disk", target_is_directory=True)
    (tmp_path / "link.txt").symlink_to("file.txt")
    with atomic_directory(tmp_path / "folder", replace=True) as temporary:
        (temporary / "new").write_text("new")
    with atomic_path(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "folder").is_symlink() and (tmp_path / "disk" / "new").is_file()
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "file.txt").read_text() == "new"
