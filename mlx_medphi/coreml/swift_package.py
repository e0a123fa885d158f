"""The Swift sources that come with this package, written to a folder for an app to build on.

They lie in `assets/swift`: in a checkout as links into examples/, in a wheel as files. Both give
the same folder, because a package is what its manifest, its README and its folder Sources hold;
tests, which read the checkout around them, and what tools leave behind stay away.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from mlx_medphi.errors import MedPhiError, UsageError
from mlx_medphi.files import atomic_directory

__all__ = ["APP", "KIT", "SwiftPackage", "swift_files", "write_swift_package"]

KIT, APP = "MedPhiKit", "MedPhiApp"
ASSETS = Path(__file__).resolve().parents[1] / "assets" / "swift"
TOP = ("Package.swift", "README.md")


@dataclass(frozen=True)
class SwiftPackage:
    """A Swift package that was written.

    Attributes:
        path: its folder.
        name: "MedPhiKit" or "MedPhiApp".
        files: the files in it, by their paths.
        nbytes: how large they are together.
    """

    path: Path
    name: str
    files: tuple[str, ...]
    nbytes: int


def swift_files(name: str = KIT) -> dict[str, Path]:
    """The files of a package that comes with this one: path in the package -> where it lies.

    Raises:
        MedPhiError: they are not part of this installation.
    """
    root = ASSETS / name
    found = [root / top for top in TOP]
    found += [path for path in (root / "Sources").rglob("*") if path.is_file()]
    files = {path.relative_to(root).as_posix(): path for path in sorted(found)}
    files = {path: place for path, place in files.items() if not _is_hidden(path)}
    if len(files) == len(TOP) or not all(place.is_file() for place in files.values()):
        raise MedPhiError(
            f"{root}: the sources of {name} are not there; a wheel has them, and so has a checkout "
            "on a system with symbolic links. Install the package again from one of these."
        )
    return files


def write_swift_package(dest: Path, name: str = KIT) -> SwiftPackage:
    """Write a Swift package to a new folder, which appears complete or not at all.

    Args:
        dest: the folder to make; it may be there as long as it is empty.
        name: which package.

    Raises:
        UsageError: `dest` holds something, or is the folder the command runs in.
        MedPhiError: the sources are not part of this installation.
    """
    files = swift_files(name)
    _check_free(dest)
    nbytes = 0
    with atomic_directory(dest, replace=True) as folder:
        for path, place in files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            # The bytes only: in a wheel's folder files may be read-only, or belong to someone else.
            shutil.copyfile(place, target)
            nbytes += target.stat().st_size
        # Something may have come in while the files were written.
        _check_free(dest)
    return SwiftPackage(dest, name, tuple(files), nbytes)


def _check_free(dest: Path) -> None:
    if dest.is_symlink() and not dest.exists():
        raise UsageError(f"{dest}: a link to nothing; give a new folder")
    if not dest.exists():
        return
    if not dest.is_dir():
        raise UsageError(f"{dest}: a file is there; give a new folder")
    if next(dest.iterdir(), None) is not None:
        raise UsageError(f"{dest}: the folder is not empty; give a new one, or empty it first")
    if dest.samefile(Path.cwd()):
        # It would be replaced under the feet of the shell.
        raise UsageError(f"{dest}: the folder this command runs in; give a new one below it")


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))
