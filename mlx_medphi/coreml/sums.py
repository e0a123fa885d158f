"""SHA256SUMS: every file of a bundle and its hash, as `sha256sum -c` reads it.

Links and devices have no place in a bundle: what is hashed must be what is loaded.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from mlx_medphi.coreml.manifest import SUMS, FileEntry
from mlx_medphi.coreml.manifest_checks import path_problem
from mlx_medphi.errors import BundleError, capped
from mlx_medphi.files import write_text

__all__ = ["Progress", "bundle_files", "differing", "hash_files", "read_sums", "write_sums"]

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes in all)."""

PIECE = 4 << 20
MAX_BYTES = 16 << 20
# Finder leaves this in every folder it shows.
NOBODYS = {".DS_Store"}
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def bundle_files(directory: Path) -> dict[str, Path]:
    """Every file but SHA256SUMS: path in the bundle, sorted -> path on this machine.

    Raises:
        BundleError: a link, a device, or a name that cannot be listed; or an unreadable folder.
    """
    found: dict[str, Path] = {}
    refused: list[str] = []
    try:
        _walk(Path(directory), "", found, refused)
    except OSError as exc:
        raise BundleError(f"{directory}: cannot be read ({exc.strerror or exc})") from exc
    if refused:
        raise BundleError(
            f"{directory}: holds what is no plain file ({capped(refused)}); copy the bundle anew, "
            "following links"
        )
    return dict(sorted(found.items()))


def _walk(folder: Path, prefix: str, found: dict[str, Path], refused: list[str]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            if path_problem(path):
                refused.append(f"{path.encode('ascii', 'backslashreplace').decode()!r:.80}")
            elif stat.S_ISDIR(mode):
                _walk(folder / entry.name, f"{path}/", found, refused)
            elif not stat.S_ISREG(mode):
                refused.append(path)
            elif path != SUMS and entry.name not in NOBODYS:
                found[path] = folder / entry.name


def hash_files(
    files: Mapping[str, Path], progress: Progress | None = None
) -> tuple[FileEntry, ...]:
    """Size and SHA-256 of each file, in the order given.

    Raises:
        BundleError: a file that cannot be read.
    """
    total, done = 0, 0
    entries = []
    try:
        total = sum(path.stat().st_size for path in files.values())
        for name, path in files.items():
            digest, begun = hashlib.sha256(), done
            with path.open("rb") as handle:
                while piece := handle.read(PIECE):
                    digest.update(piece)
                    done += len(piece)
                    if progress is not None:
                        progress(done, total)
            entries.append(FileEntry(name, done - begun, digest.hexdigest()))
    except OSError as exc:
        raise BundleError(f"{exc.filename}: cannot be read ({exc.strerror or exc})") from exc
    return tuple(entries)


def write_sums(directory: Path, entries: Iterable[FileEntry] | None = None) -> None:
    """Write SHA256SUMS over all files of `directory`.

    Args:
        directory: the bundle.
        entries: hashes of all its files; None reads them.

    Raises:
        BundleError: a link, a device, or a file that cannot be read.
    """
    directory = Path(directory)
    if entries is None:
        entries = hash_files(bundle_files(directory))
    lines = sorted((entry.path, entry.sha256) for entry in entries)
    write_text(directory / SUMS, "".join(f"{sha256}  {path}\n" for path, sha256 in lines))


def read_sums(directory: Path) -> dict[str, str]:
    """Path -> SHA-256, as SHA256SUMS lists them.

    Raises:
        BundleError: missing or damaged.
    """
    path = Path(directory) / SUMS
    try:
        with path.open("rb") as handle:
            data = handle.read(MAX_BYTES + 1)
        lines = data.decode("utf-8").split("\n")
    except OSError as exc:
        raise BundleError(
            f"{path}: cannot be read ({exc.strerror or exc}), so nothing says what the bundle "
            "must hold; fetch or export it again"
        ) from exc
    except UnicodeDecodeError as exc:
        raise BundleError(f"{path}: damaged (not UTF-8); fetch or export the bundle again") from exc
    sums: dict[str, str] = {}
    for number, line in enumerate(lines[:-1], 1):
        match = _LINE.fullmatch(line)
        if match is None or path_problem(match[2]) or match[2] in sums:
            raise BundleError(
                f"{path}: line {number} is damaged, or names a file outside the bundle or twice; "
                "fetch or export the bundle again"
            )
        sums[match[2]] = match[1]
    if lines[-1] or len(data) > MAX_BYTES:
        raise BundleError(f"{path}: cut short or damaged; fetch or export the bundle again")
    return sums


def differing(
    directory: Path,
    sums: Mapping[str, str],
    progress: Progress | None = None,
    only: Iterable[str] | None = None,
) -> list[str]:
    """Files that are not as `sums` says: altered, missing or not listed, one line for each.

    Args:
        directory: the bundle.
        sums: path -> SHA-256.
        progress: called while files are read.
        only: read just these; None: all.
    """
    files = bundle_files(directory)
    wanted = sums.keys() if only is None else set(only)
    lines = [f"{path} is missing" for path in sums.keys() - files.keys()]
    lines += [f"{path} is not listed" for path in files.keys() - sums.keys()]
    read = {path: place for path, place in files.items() if path in sums and path in wanted}
    for entry in hash_files(read, progress):
        if entry.sha256 != sums[entry.path]:
            lines.append(f"{entry.path} is altered")
    return sorted(lines)
