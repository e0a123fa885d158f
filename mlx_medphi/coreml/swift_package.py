"""The Swift sources that come with this package, written to a folder for an app to build on.

They lie in `assets/swift`: in a checkout as links into examples/, in a wheel as files. Both give
the same folder, because a package is what its manifest, its README and its folder Sources hold;
tests, which read the checkout around them, and what tools leave behind stay away.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_medphi import __version__
from mlx_medphi.errors import MedPhiError, UsageError, capped
from mlx_medphi.files import atomic_directory

__all__ = ["APP", "KIT", "SwiftPackage", "swift_files", "write_swift_package"]

KIT, APP = "MedPhiKit", "MedPhiApp"
ASSETS = Path(__file__).resolve().parents[1] / "assets" / "swift"
MANIFEST, README = "Package.swift", "README.md"
TOP = (MANIFEST, README)
# What lies in a package's folder after it was built or opened.
LEFT_BY_TOOLS = (".DS_Store", ".build", ".index-build", ".swiftpm", "Package.resolved")
ORIGIN = f"\nWritten by `medphi swift-kit` of mlx_medphi {__version__}.\n"
"""The last line of a README that was written."""


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


def write_swift_package(dest: Path, name: str = KIT, *, replace: bool = False) -> SwiftPackage:
    """Write a Swift package to a folder, which appears complete or not at all.

    Args:
        dest: the folder to make; it may be there as long as it is empty.
        name: which package.
        replace: whether `dest` may hold the same package, which the new one takes the place of
            once it is complete; nothing else is ever replaced.

    Raises:
        UsageError: `dest` holds something, or is the folder the command runs in.
        MedPhiError: the sources are not part of this installation, or `dest` cannot be written.
    """
    files = swift_files(name)
    try:
        nbytes = _write(dest, files, name if replace else None)
    except OSError as exc:
        if exc.filename is not None and str(exc.filename).startswith(f"{ASSETS}{os.sep}"):
            raise
        raise MedPhiError(
            f"{dest}: cannot be written in {dest.parent} ({_reason(dest, exc)}). What was there "
            "before is unchanged; mend that, or give another folder."
        ) from exc
    return SwiftPackage(dest, name, tuple(files), nbytes)


def _write(dest: Path, files: Mapping[str, Path], replaced: str | None) -> int:
    """Fill the folder; returns how many bytes are in it."""
    _check_free(dest, replaced)
    nbytes = 0
    with atomic_directory(dest, replace=True) as folder:
        for path, place in files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            # The bytes only: in a wheel's folder files may be read-only, or belong to someone else.
            shutil.copyfile(place, target)
            if path == README:
                with target.open("a", encoding="utf-8", newline="\n") as text:
                    text.write(ORIGIN)
            nbytes += target.stat().st_size
        # Something may have come in while the files were written.
        _check_free(dest, replaced)
    return nbytes


def _reason(dest: Path, exc: OSError) -> str:
    """Why a folder cannot be made, by the place that is in its way."""
    for place in dest.parents:
        if os.path.lexists(place) and not place.is_dir():
            return f"{place} is {'a link to nothing' if place.is_symlink() else 'a file'}"
    return exc.strerror or type(exc).__name__


def _check_free(dest: Path, replaced: str | None) -> None:
    if dest.is_symlink() and not dest.exists():
        raise UsageError(f"{dest}: a link to nothing; give a new folder")
    if not dest.exists():
        return
    if not dest.is_dir():
        raise UsageError(f"{dest}: a file is there; give a new folder")
    if next(dest.iterdir(), None) is not None:
        if replaced is None:
            raise UsageError(
                f"{dest}: the folder is not empty; give a new one, or empty it first"
                + ("" if _package_in(dest) is None else ", or replace the package with --replace")
            )
        _check_replaced(dest, replaced)
    if dest.resolve() in (Path.cwd(), *Path.cwd().parents):
        # It would be replaced under the feet of the shell.
        raise UsageError(
            f"{dest}: the folder this command runs in; give a new one below it, or run the command "
            "elsewhere"
        )


def _check_replaced(dest: Path, name: str) -> None:
    """Refuse to replace what is not such a package, or holds what nobody could write again."""
    if _package_in(dest) != name:
        raise UsageError(
            f"{dest}: the folder is not empty and holds no package {name} to replace; give a new "
            "one, or empty it first"
        )
    if others := {path.name for path in dest.iterdir()} - {*TOP, "Sources", *LEFT_BY_TOOLS}:
        raise UsageError(
            f"{dest}: holds more than {name}: {capped(others)}; move that elsewhere, or give a new "
            "folder"
        )


def _package_in(folder: Path) -> str | None:
    """The name of the Swift package in a folder, as its manifest says it."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    # At the start of a line: in its dependencies another package may speak of ours.
    found = re.search(r'^let package = Package\(\s*name:\s*"([^"]*)"', text, flags=re.MULTILINE)
    return found[1] if found and found[1] in (KIT, APP) else None


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))
