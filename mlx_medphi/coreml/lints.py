"""Verification level `spec`: is the package on disk what its manifest says, part by part.

The saved program and weight file are read back; nothing of the export is in memory. A clean report
means that the operations are known ones with right types and shapes, and that float32 parts,
states, masks and shared constants are in place. That the program computes the right thing, with
operands in the right order, is for the level `graph`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_medphi.coreml.library import coremltools
from mlx_medphi.coreml.lint_contract import (
    contract,
    projection_findings,
    rope_findings,
    slot_names,
)
from mlx_medphi.coreml.lint_head import head_findings
from mlx_medphi.coreml.lint_norms import find_norms, find_softmaxes, island_findings
from mlx_medphi.coreml.lint_ops import operation_findings
from mlx_medphi.coreml.lint_package import description_findings, signature_findings
from mlx_medphi.coreml.lint_read import view_function
from mlx_medphi.coreml.lint_report import Expected, FunctionCounts, SpecReport
from mlx_medphi.coreml.lint_states import cache_findings, slot_findings
from mlx_medphi.coreml.lint_view import Op, View
from mlx_medphi.coreml.lint_weights import (
    Stored,
    number_findings,
    quantized_layers,
    sharing_findings,
    stored_findings,
)
from mlx_medphi.coreml.manifest import DECODE
from mlx_medphi.coreml.package import MODEL_FILE
from mlx_medphi.coreml.package_file import Package

__all__ = ["Expected", "SpecReport", "check_spec"]

MAX_FINDINGS = 20
WEIGHT_TOLERANCE = 0.02
"""How far the weight file may be from its planned bytes, where its own are not listed."""


def check_spec(package: Package, expected: Expected) -> SpecReport:
    """Check an opened package, part by part.

    Where a function is not well formed, only that is said of it: what it computes cannot be told.

    Args:
        package: what `open_package` returns.
        expected: what the package must be.
    """
    views = {
        name: view_function(name, function)
        for name, function in sorted(package.program.functions.items())
    }
    lines = [
        f"{where}: {line}; export again" for where, line in _findings(package, views, expected)
    ]
    used = Counter(offset for view in views.values() for offset in Stored.of([view]).names)
    return SpecReport(
        functions={name: _counts(view) for name, view in views.items()},
        constants=len(used),
        shared=sum(times > 1 for times in used.values()),
        quantized=quantized_layers(views),
        weight_bytes=_weight_bytes(package),
        findings=_capped(lines),
    )


def _findings(
    package: Package, views: Mapping[str, View], expected: Expected
) -> Iterator[tuple[str, str]]:
    yield from description_findings(package, _model(package.path / MODEL_FILE))
    yield from _signatures(package, expected)
    formed = {name: list(operation_findings(view)) for name, view in views.items()}
    bodies = {name: lines or list(_body(views[name], expected)) for name, lines in formed.items()}
    for name, lines in bodies.items():
        yield from ((name, line) for line in lines)
    if not any(bodies.values()):
        yield from _differences(views, expected.pairs)
    # Constants are looked at through well formed functions, all of them.
    if not any(formed.values()):
        yield from _weights(package, views, expected)


def _differences(
    views: Mapping[str, View], pairs: tuple[tuple[str, str], ...]
) -> Iterator[tuple[str, str]]:
    """Where the functions of a pair do not consist of the same operations."""
    for wide, narrow in pairs:
        if wide in views and narrow in views:
            there, here = (Counter(op.type for op in views[name].ops) for name in (wide, narrow))
            odd = sorted(kind for kind in there | here if there[kind] != here[kind])
            if odd:
                counts = f"{here[odd[0]]} operations {odd[0]!r}, {wide} has {there[odd[0]]}"
                yield narrow, f"{counts}; expected the same in both"


def _signatures(package: Package, expected: Expected) -> Iterator[tuple[str, str]]:
    said = expected.coreml
    due = {
        name: contract(
            expected.model, width, said.context_length, expected.slot_rank, expected.slot_kind
        )
        for pair in expected.pairs
        for name, width in zip(pair, (said.prefill_width, 1), strict=True)
    }
    found = list(signature_findings(package, said.functions, said.default_function))
    yield from found
    # A package that differs from the manifest is told of once.
    if not found:
        for name, line in signature_findings(package, due, DECODE):
            yield name, f"{line} by the extents of the model"


def _body(view: View, expected: Expected) -> Iterator[str]:
    model = expected.model
    adapter = any(view.name in pair for pair in expected.pairs[1:])
    yield from island_findings(
        view,
        model.layers,
        model.eps,
        decomposed=expected.attention == "decomposed",
        wide=expected.residual == "float32",
    )
    yield from cache_findings(view, model.layers)
    yield from head_findings(view, model.tied_embeddings)
    yield from rope_findings(view, model, expected.coreml.context_length)
    slots = expected.slot_rank is not None
    yield from projection_findings(view, model, adapter, slots)
    if slots:
        yield from slot_findings(view, slot_names(), model.layers, expected.slot_kind == "state")


def _weights(
    package: Package, views: Mapping[str, View], expected: Expected
) -> Iterator[tuple[str, str]]:
    if package.blobs is None:
        yield "weight file", "the program names none"
        return
    pairs = [pair for pair in expected.pairs if set(pair) <= views.keys()]
    if pairs:
        yield from sharing_findings(views, pairs)
    yield from stored_findings(views, package.blobs)
    yield from number_findings(views, package.blobs)
    least, most = expected.quantized
    count = quantized_layers(views)
    if not least <= count <= most:
        wanted = str(most) if least == most else f"{least} to {most}"
        yield "weight file", f"{count} weights stored as codes, expected {wanted}"
    nbytes, planned = _weight_bytes(package), expected.weight_bytes
    if abs(nbytes - planned) > (0 if expected.exact else WEIGHT_TOLERANCE * planned):
        yield "weight file", f"{nbytes} bytes, expected {planned}"


def _weight_bytes(package: Package) -> int:
    return package.blobs.path.stat().st_size if package.blobs is not None else 0


def _counts(view: View) -> FunctionCounts:
    operations = {kind: len(ops) for kind, ops in sorted(view.by_type.items())}
    norms = sum(not isinstance(norm, Op) for norm in find_norms(view))
    softmaxes = sum(not isinstance(softmax, Op) for softmax in find_softmaxes(view))
    return FunctionCounts(operations, norms, softmaxes)


def _capped(lines: list[str]) -> tuple[str, ...]:
    if len(lines) <= MAX_FINDINGS:
        return tuple(lines)
    return (*lines[:MAX_FINDINGS], f"and {len(lines) - MAX_FINDINGS} more")


def _model(path: Path) -> Any:
    # Opening a package has parsed this file; its descriptions are for people and were left there.
    model = coremltools("proto.Model_pb2").Model()
    model.ParseFromString(path.read_bytes())
    return model
