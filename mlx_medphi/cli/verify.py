"""`medphi verify`: is a bundle whole, and does its program compute what MLX computes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import mlx_medphi as mp
from mlx_medphi.cli.options import JsonOption
from mlx_medphi.cli.show import duration, examples, fail, print_json, table
from mlx_medphi.cli.stages import Stages
from mlx_medphi.errors import ParityError

if TYPE_CHECKING:
    from mlx_medphi.coreml.verify import ParityReport

__all__ = ["report_text", "verify"]

EXAMPLES = examples(
    "medphi verify notes.medphi",
    "medphi verify notes.medphi --layers",
    "medphi verify notes.medphi --level predict   # on a Mac",
)
HALF_MAX = 65504


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.medphi", help="The bundle.")],
    level: Annotated[
        str | None,
        typer.Option(
            metavar="spec|graph|predict",
            help="spec: files and program, part by part; graph: the saved program is run on this "
            "machine and compared with MLX's logits; predict: with Core ML, on a Mac [default: "
            "graph, or spec where the bundle was exported with no more].",
        ),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show the largest number after each block.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Check a bundle: every file, every operation, and what the program computes.

    Exit code 1, and one line for each finding, when something is beyond its limit.
    """
    failure = None
    with Stages(quiet=as_json) as stages:
        try:
            report = mp.verify(
                bundle,
                level,  # type: ignore[arg-type]  # verify checks it and names the choices
                layers=layers,
                progress=stages,
            )
        except ParityError as exc:
            failure, report = exc, exc.report  # type: ignore[assignment]
    if as_json:
        print_json(report.to_dict())
    else:
        print(report_text(report))
    return 0 if failure is None else fail(str(failure), failure.exit_code)


def report_text(report: ParityReport) -> str:
    """What was checked and what came out, as a table of the cases."""
    spec = report.spec
    operations = sum(sum(f.operations.values()) for f in spec.functions.values())
    lines = [
        f"{report.bundle}: level {report.level} "
        f"{'passed' if report.passed else 'NOT passed'}, in {duration(report.seconds)}",
        f"spec: {len(spec.functions)} functions, {operations:,} operations, {spec.constants:,} "
        f"constants of which {spec.shared:,} are shared, {spec.quantized} quantised weights",
    ]
    lines[1:1] = report.notes
    if report.notes and report.level != "spec":
        lines.insert(
            1 + len(report.notes),
            "golden logits for these are nowhere, and a bundle has nothing to make them from: "
            "export it with them to compare them",
        )
    for name, found in (("graph", report.graph), ("predict", report.predict)):
        if found is None:
            continue
        lines.append(
            f"{name}: blocks against single tokens differ by {found.prefill_decode:.2%} of the "
            f"largest logit, first against last slots by {found.late:.2%}"
            + ("; adapters in, out and in again: bit for bit" if found.swaps else "")
        )
    if report.level == "spec":
        lines.append("the program was not run: spec was asked for, or is all that was exported")
    rows = [list(row) for row in report.rows()]
    if rows:
        head = ["case", "rows", "largest error", "KL, nats", "same first token", "greedy"]
        lines.append(table([head, *rows]))
    hidden = report.graph.hidden if report.graph is not None else ()
    if hidden:
        largest = max(hidden)
        shown = ", ".join(f"{value:.0f}" for value in hidden)
        lines.append(f"largest number after each block: {shown}")
        name, peak = report.graph.peak if report.graph and report.graph.peak else ("", largest)
        lines.append(
            f"largest of all: {peak:.0f} in {name}; float16 ends at {HALF_MAX:,}, "
            f"{HALF_MAX / peak:,.0f} times that"
        )
    return "\n".join(lines)
