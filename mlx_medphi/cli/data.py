"""`medphi data prepare` and `medphi data stats`: published files to training rows, and counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mlx_medphi as mp
from mlx_medphi.cli.options import JsonOption
from mlx_medphi.cli.show import examples, number_of, print_json, table

if TYPE_CHECKING:
    from mlx_medphi.data.splits import PrepareReport
    from mlx_medphi.text.lengths import Lengths

__all__ = ["app"]

app = typer.Typer(
    name="data",
    help="Read conversations and notes, and prepare them for training.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
SHOWN_ROWS = 10


@app.command(
    epilog=examples(
        "medphi data prepare mts-dialog/ --out data/mts",
        "medphi data prepare mts-dialog/ primock57/ --out data/both --valid-day 3 --test-day 4",
        "medphi data prepare notes.jsonl --out data/mine --accept-identifiers",
    )
)
def prepare(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SRC", help="Files or folders as they were published.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")],
    seed: Annotated[int, typer.Option(min=0, help="Decides which rows are drawn.")] = 0,
    valid_fraction: Annotated[
        float, typer.Option(help="Share drawn for validation where a source has no such rows.")
    ] = 0.1,
    test_fraction: Annotated[
        float, typer.Option(help="Share drawn for the test where a source has no split.")
    ] = 0.1,
    valid_day: Annotated[
        int | None, typer.Option(help="PriMock57 day to validate on [default: last but one].")
    ] = None,
    test_day: Annotated[
        int | None, typer.Option(help="PriMock57 day to test on [default: last].")
    ] = None,
    hold_out: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="A source of which every row is test; repeatable."),
    ] = None,
    augmented: Annotated[
        bool, typer.Option("--augmented", help="Keep rows that were made from others by machine.")
    ] = False,
    accept_identifiers: Annotated[
        bool,
        typer.Option(
            "--accept-identifiers", help="Go on although personal identifiers were found."
        ),
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a folder that this command made.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Make train, valid and test rows without leaks from MTS-Dialog, PriMock57, ACI-Bench or JSONL.

    Every row that is left out is listed with its reason in prepare.json. It stops when personal
    identifiers are found, unless told to go on; the screen knows patterns, not people, so finding
    none proves nothing.
    """
    plan = mp.SplitPlan(
        seed=seed,
        valid_fraction=valid_fraction,
        test_fraction=test_fraction,
        valid_day=valid_day,
        test_day=test_day,
        hold_out=tuple(hold_out or ()),
    )
    splits = mp.prepare(
        mp.load_examples(list(sources)),
        plan=plan,
        include_augmented=augmented,
        accept_identifiers=accept_identifiers,
    )
    folder = mp.write_splits(splits, out, replace=replace)
    if as_json:
        print_json({"out": folder, "report": splits.report})
    else:
        print(prepared_text(splits.report, folder))
    return 0


def prepared_text(report: PrepareReport, folder: Path) -> str:
    """What was kept, what was left out and why, and what the screen found."""
    sides = ("train", "valid", "test")
    rows = [[source, *(counts[side] for side in sides)] for source, counts in report.counts.items()]
    total = ["in all", *(sum(counts[side] for counts in report.counts.values()) for side in sides)]
    lines = [table([["rows", *sides], *rows, *([total] if len(rows) > 1 else [])]), ""]
    lines.append(f"{number_of(report.given, 'row')} read, {len(report.dropped):,} left out")
    lines += [f"  {count:,} {reason}" for reason, count in report.dropped_by_reason.items()]
    leaks = [row for row in report.dropped if row.partners]
    for row in leaks[:SHOWN_ROWS]:
        share = "" if row.share is None else f", {row.share:.0%} of its 8-grams"
        lines.append(f"    {row.id}: {row.reason} with {', '.join(row.partners[:3])}{share}")
    if len(leaks) > SHOWN_ROWS:
        lines.append(f"    … and {len(leaks) - SHOWN_ROWS:,} more; prepare.json lists every row")
    lines.append(_screened(report))
    lines += ["", *report.attribution] if report.attribution else []
    lines += ["", f"{folder}: train.jsonl, valid.jsonl, test.jsonl, prepare.json"]
    lines.append(f"data hash {report.data_hash}")
    return "\n".join(lines)


def _screened(report: PrepareReport) -> str:
    screening = report.screening
    if screening is None:
        return "personal identifiers: not screened"
    found = ", ".join(f"{name} {count}" for name, count in screening.counts.items() if count)
    if not found:
        return "personal identifiers: none found by patterns (names and places can be missed)"
    return f"personal identifiers, accepted: {found} in {number_of(len(screening.row_ids), 'row')}"


@app.command(
    epilog=examples(
        "medphi data stats data/mts",
        "medphi data stats data/mts --tokenizer models/phi-3-mini --max-length 1024",
    )
)
def stats(
    source: Annotated[
        Path, typer.Argument(metavar="DIR", help="A prepared folder, or published files.")
    ],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", "--model", metavar="DIR", help="A checkpoint directory, to count tokens."
        ),
    ] = None,
    max_length: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Count rows longer than this; repeatable [default: 1024, 2048, 4096]."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Rows, turns and words; with a tokenizer also tokens, and rows that would be shortened."""
    limits = tuple(max_length or (1024, 2048, 4096))
    sides = _sides(source)
    summaries = {side: mp.summarise(rows) for side, rows in sides.items()}
    lengths: dict[str, Lengths] = {}
    if tokenizer is not None:
        loaded = mp.Tokenizer.load(tokenizer)
        lengths = {side: mp.measure_lengths(loaded, rows, limits) for side, rows in sides.items()}
    if as_json:
        sides_json = {
            side: {"summary": summaries[side], "tokens": lengths.get(side)} for side in sides
        }
        print_json({"source": source, "sides": sides_json})
        return 0
    print(_summary_table(summaries))
    for side, measured in lengths.items():
        print(f"\n{side}, tokens\n{_length_table(measured)}")
        for limit, ids in measured.over.items():
            rows = number_of(measured.example.count, "row")
            print(f"  longer than {limit:,}: {len(ids):,} of {rows}")
    return 0


def _sides(source: Path) -> dict[str, Any]:
    if any((source / f"{side}.jsonl").is_file() for side in ("train", "valid", "test")):
        splits = mp.read_splits(source)
        sides = {"train": splits.train, "valid": splits.valid, "test": splits.test}
        return {side: rows for side, rows in sides.items() if rows}
    return {"all": mp.load_examples(source)}


def _summary_table(summaries: dict[str, Any]) -> str:
    head = [
        "",
        "rows",
        "turns, median",
        "words said, median",
        "95 %",
        "max",
        "words of note, median",
        "95 %",
        "max",
    ]
    rows = [
        [
            side,
            f"{s.rows:,}",
            f"{s.turns.median:g}",
            *_spread(s.conversation_words),
            *_spread(s.note_words),
        ]
        for side, s in summaries.items()
    ]
    return table([head, *rows])


def _spread(spread: Any) -> list[str]:
    return [f"{spread.median:g}", f"{spread.p95:,}", f"{spread.maximum:,}"]


def _length_table(lengths: Lengths) -> str:
    head = ["", "mean", "median", "90 %", "95 %", "99 %", "max"]
    parts = {
        "conversation": lengths.conversation,
        "note": lengths.note,
        "whole row": lengths.example,
    }
    rows = [
        [name, *(f"{value:,.0f}" for value in (p.mean, p.median, p.p90, p.p95, p.p99, p.max))]
        for name, p in parts.items()
    ]
    return table([head, *rows], indent=2)
