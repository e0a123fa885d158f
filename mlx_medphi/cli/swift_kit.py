"""`medphi swift-kit`: the Swift package that loads a bundle, as a folder for an app to build on."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mlx_medphi.cli.options import JsonOption
from mlx_medphi.cli.show import examples, number_of, print_json, size
from mlx_medphi.coreml.swift_package import APP, KIT, SwiftPackage, write_swift_package

__all__ = ["package_text", "swift_kit"]

EXAMPLES = examples(
    "medphi swift-kit MyApp/MedPhiKit",
    "medphi swift-kit MyApp/MedPhiApp --app",
    "medphi swift-kit MyApp/MedPhiKit --replace",
    "medphi swift-kit MyApp/MedPhiKit --json",
)


def swift_kit(
    dest: Annotated[
        Path,
        typer.Argument(
            metavar="DEST", help="The folder to make; nothing may be in it, but for --replace."
        ),
    ],
    app: Annotated[
        bool,
        typer.Option(
            "--app",
            help="Write the sample app in place of the package; it takes the package from the "
            "folder MedPhiKit beside DEST.",
        ),
    ] = False,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Replace the same package in DEST, with every change that was made to its files; "
            "nothing else is ever replaced.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Write MedPhiKit, the Swift package that loads a bundle and writes notes.

    It needs no other package: Swift 6, iOS 18 or macOS 15, and all but Core ML also on Linux.
    """
    written = write_swift_package(dest, APP if app else KIT, replace=replace)
    if as_json:
        print_json(written)
    else:
        print(package_text(written))
    return 0


def package_text(written: SwiftPackage) -> str:
    """What was written, and what to do with it."""
    what = f"{written.path}: {written.name}, {number_of(len(written.files), 'file')}, "
    lines = [what + size(written.nbytes)]
    build = f"swift build --package-path {shlex.quote(str(written.path))}"
    if written.name == APP:
        kit = written.path.parent / KIT
        if not (kit / "Package.swift").is_file():
            make = f"medphi swift-kit {shlex.quote(str(kit))}"
            lines.append(f"it builds on the package beside it: {make}")
        lines.append(f"open it in Xcode, or try: {build}")
    else:
        lines.append(f"try it: {build} -c release --product medphi-kit")
        lines.append("in Xcode: File, Add Package Dependencies, Add Local, and this folder")
    return "\n".join(lines)
