"""Files: written beside and renamed, hashed, and safetensors headers read strictly.

A reader of a path never sees a half-written file, and a failed write leaves what was there before.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_medphi.errors import MedPhiError

__all__ = [
    "SafetensorsHeader",
    "TensorInfo",
    "atomic_directory",
    "atomic_path",
    "json_hash",
    "read_safetensors_header",
    "sha256_file",
    "write_json",
    "write_text",
]

# The format's own limit on the header (safetensors README).
MAX_HEADER_BYTES = 100_000_000
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@contextmanager
def atomic_path(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success fsync it and rename it into place.

    The sibling keeps the suffix of `path`, because some writers append one when it is missing.
    On any error the sibling is removed and `path` is untouched.

    Args:
        path: the file to write.
        replace: whether an existing `path` is replaced.

    Raises:
        FileExistsError: `path` exists, before or after the writing, and `replace` is false.
    """
    # Through a link the place it points to is written; the link itself stays.
    path = Path(os.path.realpath(path))
    _check_free(path, replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        # mkstemp makes files private; what people share gets the ordinary mode.
        os.chmod(temporary, 0o666 & ~_umask())
        yield temporary
        fsync_file(temporary)
        _check_free(path, replace)
        os.replace(temporary, path)
        _fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling directory; on success fsync all of it and rename it to `path`.

    No system replaces a directory with files in one step everywhere, so an old one is renamed
    aside first. A process killed or a machine switched off between those two renames leaves it
    whole in a sibling `.NAME.*.old`, and no `path`; any exception puts it back.

    Args:
        path: the directory to make.
        replace: whether an existing `path` is replaced (only once the new one is complete).

    Raises:
        FileExistsError: `path` exists, before or after the writing, and `replace` is false.
    """
    # Through a link the place it points to is written; the link itself stays.
    path = Path(os.path.realpath(path))
    _check_free(path, replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        for place in (*temporary.rglob("*"), temporary):
            if place.is_dir():
                _fsync_directory(place)
            elif place.is_file():
                fsync_file(place)
        _check_free(path, replace)
        if os.path.lexists(path):
            _swap(temporary, path)
        else:
            os.replace(temporary, path)
        _fsync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    """Rename `new` to `path` and delete what was there; if that fails, what was there is back."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    old = aside / path.name
    try:
        os.replace(path, old)
        os.replace(new, path)
        _fsync_directory(path.parent)
    except BaseException:  # Ctrl-C between the renames is no reason to lose anything either
        if os.path.lexists(old) and not os.path.lexists(path):
            os.replace(old, path)
        raise
    finally:
        # Without the name the old directory is all there is: then it stays where it is.
        if os.path.lexists(path):
            shutil.rmtree(aside, ignore_errors=True)


def _check_free(path: Path, replace: bool) -> None:
    if not replace and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically, keys in the order given, with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def json_hash(value: object) -> str:
    """The SHA-256 of a value's canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a safetensors file: stored dtype name, shape, byte range after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a safetensors file; `data_start` is the offset of the first tensor byte."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def tensor_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def read_safetensors_header(
    path: Path, error: type[MedPhiError] = MedPhiError
) -> SafetensorsHeader:
    """Read and check a safetensors header without touching the tensor data.

    Args:
        path: the file.
        error: the class to raise, so that the message fits the caller's tree.

    Raises:
        error: missing, truncated or corrupt file, or tensor ranges that overlap or leave holes.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            first = handle.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise error(
                    _damaged(path, f"it is {size} bytes and its header asks for {length + 8}")
                )
            header = json.loads(handle.read(length))
    except OSError as exc:
        raise error(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    except (ValueError, RecursionError) as exc:
        raise error(_damaged(path, "its header is not JSON")) from exc
    return _checked_header(path, header, 8 + length, size, error)


def _checked_header(
    path: Path, header: Any, data_start: int, size: int, error: type[MedPhiError]
) -> SafetensorsHeader:
    if not isinstance(header, dict):
        raise error(_damaged(path, "its header is not a JSON object"))
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null where there is none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise error(_damaged(path, "its metadata is not a map of text to text"))
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            info = TensorInfo(entry["dtype"], tuple(entry["shape"]), begin, end)
            expected = DTYPE_BYTES[info.dtype]
            if any(type(number) is not int for number in (begin, end, *info.shape)):
                raise TypeError(name)
        except (KeyError, TypeError, ValueError) as exc:
            raise error(_damaged(path, f"the entry of tensor {name} is malformed")) from exc
        for extent in info.shape:
            expected *= extent
        if min(info.shape, default=0) < 0 or info.nbytes != expected:
            raise error(
                _damaged(path, f"tensor {name} has {info.nbytes} bytes, its shape needs {expected}")
            )
        tensors[name] = info
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise error(
                _damaged(path, f"tensor {name} starts at {info.begin}, expected {position}")
            )
        position = info.end
    if data_start + position != size:
        raise error(
            _damaged(path, f"it is {size} bytes, its header describes {data_start + position}")
        )
    return SafetensorsHeader(tensors, metadata, data_start)


def _damaged(path: Path, what: str) -> str:
    return f"{path}: not a whole safetensors file: {what}. Fetch or write the file again."


def fsync_file(path: Path) -> None:
    with Path(path).open("rb") as handle:
        os.fsync(handle.fileno())


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
