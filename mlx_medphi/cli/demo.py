"""`medphi demo`: the whole path on the embedded model and sample, offline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_medphi.cli.export import bundle_text
from mlx_medphi.cli.fuse import fuse_text
from mlx_medphi.cli.options import JsonOption
from mlx_medphi.cli.progress import Progress
from mlx_medphi.cli.show import duration, examples, print_json, size

if TYPE_CHECKING:
    from mlx_medphi.demo import DemoResult, Exported, Notes, Prepared
    from mlx_medphi.model.fuse import FuseReport

__all__ = ["demo"]

EXAMPLES = examples("medphi demo", "medphi demo --out runs/first-look", "medphi demo --json")
WHAT_IT_IS = (
    "A tiny model in Phi-3's form and made-up conversations, both made by this project:\n"
    "no patient, invented drugs, no advice. Nothing is fetched."
)


def demo(
    out: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="The directory to make [default: the next runs/demo]."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Train, keep, fuse, write notes and export, on the embedded sample.

    A tiny base learns from made-up conversations; a note is written before and after for one that
    was held out; the adapter is kept and fused; base and adapter become a Core ML bundle, which is
    verified and run; what is stored is counted. About two minutes.
    """
    # MLX comes with it, which no --help should wait for.
    from mlx_medphi.demo import run_demo

    with Progress(quiet=as_json) as progress:
        told = (lambda event: None) if as_json else _Teller(progress)
        result = run_demo(out or _next_free(Path("runs/demo")), on_event=told)
    if as_json:
        print_json({**vars(result), "same_notes": result.same_notes})
    else:
        print(stored_text(result))
    return 0


class _Teller:
    """Says what has been reached; training's own events go to the progress."""

    def __init__(self, progress: Callable[[Any], None]) -> None:
        from mlx_medphi.demo import Exported, Notes, Prepared
        from mlx_medphi.model.fuse import FuseReport

        self._progress = progress
        self._texts: dict[type, Callable[[Any], str]] = {
            Prepared: prepared_text,
            Notes: notes_text,
            FuseReport: fused_text,
            Exported: exported_text,
        }

    def __call__(self, event: Any) -> None:
        text = self._texts.get(type(event))
        if text is None:
            self._progress(event)
        else:
            print(text(event), flush=True)


def prepared_text(prepared: Prepared) -> str:
    """What the demo starts from."""
    return (
        f"{WHAT_IT_IS}\n\n"
        f"base: {prepared.parameters:,} parameters, {size(prepared.base_bytes)}\n"
        f"sample: {prepared.train_rows} conversations to learn from, {prepared.held_out} held out "
        "with names and drugs that training never sees"
    )


def notes_text(notes: Notes) -> str:
    """The first held-out conversation's note, and how many facts are right in all of them."""
    score = f"of {len(notes.notes)} held-out conversations, {notes.formed} got a note"
    if notes.formed:
        score += f"; {notes.right} of {notes.facts} facts right ({notes.right / notes.facts:.0%})"
    else:
        score += " (the base writes letters, lists and answers; it has never seen a note)"
    if notes.moment == "fused":
        return f"written by the fused model: {score}"
    note = notes.notes[0].strip() or "(nothing)"
    shown = f"note {notes.moment} training:\n{indent(note, '  ')}\n{score}\n"
    if notes.moment == "before":
        conversation = indent(notes.examples[0].conversation.text(), "  ")
        return f"\na conversation that is held out:\n{conversation}\n\n{shown}"
    return shown


def fused_text(report: FuseReport) -> str:
    """What fusing did."""
    return f"fused into the base:\n{indent(fuse_text(report), '  ')}"


def exported_text(exported: Exported) -> str:
    """The bundle, and whether its saved program writes the adapted model's note."""
    same = "the same" if exported.same else "NOT the same"
    return (
        f"exported for Core ML:\n{indent(bundle_text(exported.bundle), '  ')}\n"
        f"  the saved package, run here by the interpreter, writes {same} first note"
    )


def stored_text(result: DemoResult) -> str:
    """What is on the disk now, and what to try next."""
    run, report = result.out, result.report
    same = "every note the same" if result.same_notes else "not every note the same"
    return "\n".join(
        [
            f"fused == adapted: {same}",
            "",
            "what is stored:",
            f"  base     {report.base_bytes:>10,} bytes of weights",
            f"  adapter  {result.adapter_bytes:>10,} bytes, {run}/medical_changes.safetensors",
            f"  fused    {report.fused_bytes:>10,} bytes of weights, {run}/fused",
            f"  bundle   {result.exported.bundle.nbytes:>10,} bytes, {run}/notes.medphi",
            f"loss {result.result.first_loss:.3f} before training, "
            f"{result.result.best_loss:.3f} after update {result.result.best_step}",
            f"all of it took {duration(result.seconds)}; look closer with:",
            f"  medphi adapter inspect {run}/medical_changes.safetensors",
            f"  medphi generate --model {run}/fused --conversation FILE",
            f"  medphi verify {run}/notes.medphi --layers",
        ]
    )


def _next_free(path: Path) -> Path:
    """`path`, or with the first number that makes it a new one."""
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
