"""Verification of a bundle: the saved package is read back, run, and compared; nothing is trusted.

Levels build on each other. `spec` checks files and every operation of the program. `graph` runs the
saved program with the interpreter on any machine and compares its logits with MLX's. `predict` does
the same with Core ML itself, on a Mac.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from mlx_medphi.coreml.bundle import Bundle, open_bundle
from mlx_medphi.coreml.certificate import check_golden, read_golden
from mlx_medphi.coreml.golden import Golden
from mlx_medphi.coreml.interpreter import Interpreter
from mlx_medphi.coreml.lints import Expected, SpecReport, check_spec
from mlx_medphi.coreml.manifest import (
    DECODE,
    MASK_VALUE,
    METADATA,
    PREFILL,
    Manifest,
    added_adapters,
    plain,
)
from mlx_medphi.coreml.manifest_build import generation_facts, tokenizer_facts
from mlx_medphi.coreml.package_file import Package, open_package
from mlx_medphi.coreml.parity import GraphReport, Variant, measure
from mlx_medphi.coreml.predict import CoreMLPredictor, need_mac
from mlx_medphi.coreml.runner import Predictor, Shape
from mlx_medphi.coreml.vectors import check_vectors
from mlx_medphi.errors import BundleError, ParityError, UsageError
from mlx_medphi.model.slot_pack import MODULES, slot_names
from mlx_medphi.model.slot_pack_read import read_pack
from mlx_medphi.text.tokenizer import Tokenizer

__all__ = [
    "LEVELS",
    "Level",
    "ParityReport",
    "check_bundle",
    "check_level",
    "failed",
    "variants",
    "verify",
]

Level = Literal["spec", "graph", "predict"]
LEVELS: tuple[str, ...] = get_args(Level)

Progress = Callable[[str, int, int], None]

ADDED = "added after the export"
"""Why an adapter has no golden logits."""

SLOTS = frozenset(name for module in MODULES for name in slot_names(module))
# These hand on what was there; masks and whole caches among them.
NO_ARITHMETIC = frozenset(
    ("read_state", "slice_update", "slice_by_index", "slice_by_size", "reshape", "transpose",
     "split", "concat", "tile", "const", "constexpr_blockwise_shift_scale")
)  # fmt: skip


@dataclass(frozen=True)
class ParityReport:
    """How far a bundle was verified and what was found.

    Attributes:
        bundle: its folder.
        level: the level that was reached, by all but `not_compared`.
        spec: the program, part by part.
        graph: the saved program run by the interpreter.
        predict: the same by Core ML.
        seconds: how long it took.
        not_compared: adapters without golden logits, because they came after the export. What they
            make the program compute is unknown; their slots are filled and emptied like all others.
    """

    bundle: Path
    level: Level
    spec: SpecReport
    graph: GraphReport | None
    predict: GraphReport | None
    seconds: float
    not_compared: tuple[str, ...] = ()

    @property
    def findings(self) -> tuple[str, ...]:
        """What is wrong, a line each; empty for a bundle that passed."""
        reports = (self.spec, self.graph, self.predict)
        return tuple(line for report in reports if report is not None for line in report.findings)

    @property
    def passed(self) -> bool:
        """Whether everything that was compared is within its limit."""
        return not self.findings

    @property
    def notes(self) -> tuple[str, ...]:
        """What the verification says nothing of, a line each."""
        return tuple(f"not compared: {name} ({ADDED})" for name in self.not_compared)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "bundle": self.bundle.name,
            "level": self.level,
            "passed": self.passed,
            "not_compared": {name: ADDED for name in self.not_compared},
            "spec": self.spec.to_dict(),
            "graph": None if self.graph is None else _json(asdict(self.graph)),
            "predict": None if self.predict is None else _json(asdict(self.predict)),
            "seconds": round(self.seconds, 3),
        }

    def rows(self) -> Iterator[tuple[str, ...]]:
        """One line for each case: its name, rows, largest error, KL, and agreement."""
        for name, report in (("graph", self.graph), ("predict", self.predict)):
            for case in report.cases if report is not None else ():
                yield (
                    f"{name} {case.name}",
                    f"{case.rows}",
                    f"{case.max_abs:.4f}",
                    f"{case.kl:.1e}",
                    f"{case.top1:.1%}",
                    {True: "yes", False: "no", None: "-"}[case.greedy],
                )

    def _repr_html_(self) -> str:
        head = ("case", "rows", "largest error", "KL in nats", "same first token", "greedy")
        lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
        lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self.rows()]
        verdict = "passed" if self.passed else "; ".join(self.findings)
        table = "".join(f"<tr>{line}</tr>" for line in lines)
        verdict = "; ".join([verdict, *self.notes])
        return (
            f"<p><b>{escape(self.bundle.name)}</b>, level {self.level}: {escape(verdict)}</p>"
            f"<table>{table}</table>"
        )


def verify(
    bundle: Bundle | str | Path,
    level: Level | None = None,
    *,
    layers: bool = False,
    progress: Progress | None = None,
) -> ParityReport:
    """Check a bundle's files, its program, and what the program computes.

    An adapter that an app added to the bundle has no golden logits, and a bundle holds nothing to
    make them from: the report names it as not compared, and speaks of all the others.

    Args:
        bundle: the bundle or its folder.
        level: how far; None: "graph", or "spec" where the bundle holds no golden logits.
        layers: also record the largest number after each block, and of any operation.
        progress: called with (what is done, steps done, steps in all).

    Returns:
        A report without findings.

    Raises:
        BundleError: the bundle is damaged; the altered file is named.
        ParityError: something is beyond its limit; the error carries the report.
        UsageError: a level this machine or this bundle cannot reach.
    """
    if level is not None:
        check_level(level)
    opened = open_bundle(
        bundle.path if isinstance(bundle, Bundle) else bundle,
        progress=None if progress is None else lambda *n: progress("files", *n),
    )
    path = opened.path
    tokenizer = Tokenizer.load(opened.tokenizer_directory)
    check_vectors(tokenizer, opened.vectors)
    _check_facts(opened, tokenizer)
    golden = read_golden(path)
    check_golden(golden, opened.manifest, path)
    if not golden.cases and (layers or level in ("graph", "predict")):
        raise UsageError(
            f"{path}: was exported without golden logits (--verify spec), so its program cannot be "
            "compared and level spec is all it reaches; export it with --verify graph"
        )
    report = check_bundle(
        opened,
        golden,
        level or ("graph" if golden.cases else "spec"),
        layers=layers,
        progress=progress,
    )
    if not report.passed:
        raise failed(path, report)
    return report


def _check_facts(bundle: Bundle, tokenizer: Tokenizer) -> None:
    """What an app goes by must be what the files beside the manifest say.

    Raises:
        BundleError: names the first entry that differs.
    """
    facts = bundle.manifest.medphi
    path = bundle.path / METADATA
    if facts.coreml.mask_value != MASK_VALUE:
        raise BundleError(f"{path}: mask_value is {facts.coreml.mask_value}, not {MASK_VALUE}")
    said = {"tokenizer": plain(facts.tokenizer), "generation": plain(facts.generation)}
    found = {
        "tokenizer": plain(tokenizer_facts(tokenizer)),
        "generation": plain(generation_facts(tokenizer, facts.model.vocab_size)),
    }
    for group, values in said.items():
        if odd := [name for name, value in values.items() if value != found[group][name]]:
            raise BundleError(
                f"{path}: {group}.{odd[0]} is not what the files in tokenizer/ say; export the "
                "bundle again"
            )


def check_level(level: str) -> None:
    """Refuse a level that is none, or that this machine cannot reach, before any work.

    Raises:
        UsageError: says which there are.
    """
    if level not in LEVELS:
        raise UsageError(f"level is {level!r}, expected one of {', '.join(LEVELS)}")
    if level == "predict":
        need_mac("level predict")


def _json(value: Any) -> Any:
    """The same values; JSON has no number that is none, as a broken program's figures are."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def failed(path: Path, report: ParityReport, advice: str = "") -> ParityError:
    """The error for a report with findings: the first in its line, the others below."""
    first, *rest = report.findings
    more = f" (and {len(rest)} more)" if rest else ""
    lines = "".join(f"\n  {line}" for line in rest)
    return ParityError(f"{path}: {first}{more}{advice}{lines}", report)


def check_bundle(
    bundle: Bundle,
    golden: Golden,
    level: Level,
    *,
    layers: bool = False,
    progress: Progress | None = None,
) -> ParityReport:
    """The levels of a bundle whose files need no check; findings are returned, not raised.

    Raises:
        BundleError: the package cannot be read or run.
    """
    begun = time.monotonic()
    package = open_package(bundle.package)
    spec = check_spec(package, Expected.from_manifest(bundle.manifest))
    graph = predict = None
    # A program that is not what it should be is not worth running.
    if spec.passed and level != "spec":
        graph = _run(_Watched(package, layers), bundle, golden, "run", progress, layers)
    if level == "predict" and graph is not None and graph.passed:
        units = bundle.manifest.medphi.coreml.compute_units.recommended
        predictor = CoreMLPredictor(bundle.package, units)
        predict = _run(predictor, bundle, golden, "predict", progress, False)
    reached: Level = "predict" if predict else "graph" if graph else "spec"
    asked = {case.adapter for case in golden.cases}
    added = [name for name in added_adapters(bundle.manifest) if name not in asked]
    seconds = time.monotonic() - begun
    return ParityReport(bundle.path, reached, spec, graph, predict, seconds, tuple(added))


def _run(
    predictor: Predictor,
    bundle: Bundle,
    golden: Golden,
    stage: str,
    progress: Progress | None,
    layers: bool,
) -> GraphReport:
    report = measure(
        predictor,
        variants(bundle),
        golden,
        progress=None if progress is None else lambda *n: progress(stage, *n),
    )
    if layers and isinstance(predictor, _Watched):
        hidden = predictor.hidden(bundle.manifest.medphi.model.layers)
        report = replace(report, hidden=hidden, peak=predictor.peak)
    return report


def variants(bundle: Bundle) -> dict[str | None, Variant]:
    """The base and every adapter of a bundle, and how each is run."""
    facts = bundle.manifest.medphi
    base = _shape(bundle.manifest, (PREFILL, DECODE))
    slots = None
    if facts.adapters.slot_kind == "input":
        slots = {
            feature.name: np.zeros(feature.shape, np.float16)
            for feature in facts.coreml.functions[DECODE].inputs
            if feature.name in SLOTS
        }
    found: dict[str | None, Variant] = {None: Variant(base, slots)}
    for entry in facts.adapters.list:
        if entry.functions:
            names = (entry.functions[PREFILL], entry.functions[DECODE])
            found[entry.name] = Variant(replace(base, functions=names))
        elif entry.path is not None and facts.adapters.mode == "slots":
            pack = read_pack(bundle.path / entry.path)
            found[entry.name] = Variant(base, pack.arrays)
    return found


def _shape(manifest: Manifest, functions: tuple[str, str]) -> Shape:
    facts = manifest.medphi
    both = facts.model.rope.factors == "both"
    return Shape(
        context=facts.coreml.context_length,
        prefill=facts.coreml.prefill_width,
        window=facts.model.sliding_window,
        functions=functions,
        slot_kind=facts.adapters.slot_kind,
        switch=facts.model.rope.switch_length if both else None,
    )


class _Watched:
    """The interpreter, with an eye on how large its numbers become."""

    def __init__(self, package: Package, layers: bool) -> None:
        self._interpreter, self.layers = Interpreter(package), layers
        self._largest: dict[str, float] = {}
        self.peak: tuple[str, float] = ("", 0.0)

    def new_state(self, function: str) -> Any:
        """As of the interpreter."""
        return self._interpreter.new_state(function)

    def run(self, function: str, inputs: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
        """As of the interpreter."""
        watch = self._watch if self.layers else None
        return self._interpreter.run(function, inputs, state, watch)

    def _watch(self, kind: str, name: str, value: Any) -> None:
        # The sum may be kept in float32.
        block = kind == "add" and name.startswith("layer_") and name[6:].isdigit()
        half = value.dtype == np.float16 and kind not in NO_ARITHMETIC
        if not (block or half):
            return
        largest = max(float(value.max()), -float(value.min()))
        if half and largest > self.peak[1]:
            self.peak = (name, largest)
        if block:
            self._largest[name] = max(self._largest.get(name, 0.0), largest)

    def hidden(self, count: int) -> tuple[float, ...]:
        """The largest |h| after each block, over all runs."""
        if missing := [i for i in range(count) if f"layer_{i}" not in self._largest]:
            raise BundleError(f"no sum of block {missing[0]} was seen")
        return tuple(self._largest[f"layer_{i}"] for i in range(count))
