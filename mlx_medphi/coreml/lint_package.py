"""Does a package describe itself: version, functions, and every input, output and state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_medphi.coreml.manifest_program import Signature, Tensor
from mlx_medphi.coreml.package import SPEC_VERSION
from mlx_medphi.coreml.package_file import Package, TensorType

__all__ = ["description_findings", "signature_findings"]


def signature_findings(
    package: Package, functions: Mapping[str, Signature], default: str
) -> Iterator[tuple[str, str]]:
    """(function, what is wrong) with names and types, against those the manifest says.

    Opening a package has made sure that its description and its program say the same.
    """
    if package.spec_version != SPEC_VERSION:
        yield "model", f"specification version {package.spec_version}, expected {SPEC_VERSION}"
    if package.default_function != default:
        yield "model", f"the default function is {package.default_function!r}, expected {default!r}"
    for name in sorted(functions.keys() | package.functions.keys()):
        found, expected = package.functions.get(name), functions.get(name)
        if found is None or expected is None:
            yield name, "is in the manifest alone" if found is None else "is not in the manifest"
            continue
        for kind, here, there in (
            ("input", found.inputs, expected.inputs),
            ("output", found.outputs, expected.outputs),
            ("state", found.states, expected.states),
        ):
            for line in _differences(kind, here, there):
                yield name, line


def _differences(
    kind: str, found: Mapping[str, TensorType], expected: tuple[Tensor, ...]
) -> Iterator[str]:
    wanted = {item.name: TensorType(item.dtype, tuple(item.shape)) for item in expected}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            yield (
                f"the {kind} {name!r} is {found.get(name, 'absent')}, expected "
                f"{wanted.get(name, 'none')}"
            )


def description_findings(package: Package, model: Any) -> Iterator[tuple[str, str]]:
    """(function, what is wrong) with what the package says to a reader."""
    metadata = model.description.metadata
    if not metadata.shortDescription or not metadata.userDefined:
        yield "model", "no description or no user-defined metadata; expected both"
    for function in model.description.functions:
        for feature in (*function.input, *function.output, *function.state):
            if not feature.shortDescription.strip():
                yield function.name, f"{feature.name!r} has no description"
    if not model.description.functions:
        yield "model", "describes no functions; expected one entry for each"
