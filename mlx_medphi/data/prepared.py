"""Prepared folders: train.jsonl, valid.jsonl, test.jsonl, and prepare.json that tells of them.

mlx-lm's chat data set reads the same files. A folder appears whole or not at all, and reading one
back checks its content against the hash that was recorded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_medphi.data import jsonl
from mlx_medphi.data.assign import SIDES
from mlx_medphi.data.examples import Example
from mlx_medphi.data.identifiers import Screening
from mlx_medphi.data.leaks import Overlap
from mlx_medphi.data.reading import read_text
from mlx_medphi.data.sources import attribution
from mlx_medphi.data.splits import Dropped, PrepareReport, Splits, content_hash, count_rows
from mlx_medphi.errors import DataError, UsageError, capped
from mlx_medphi.files import atomic_directory, json_hash, write_json

__all__ = ["REPORT_FILE", "read_splits", "report_from_dict", "report_to_dict", "write_splits"]

REPORT_FILE = "prepare.json"
_MADE_BY = "mlx_medphi data prepare"
_FORMAT = 1
_FILES = frozenset({REPORT_FILE, *(f"{side}.jsonl" for side in SIDES)})


def write_splits(splits: Splits, out_dir: str | Path, *, replace: bool = False) -> Path:
    """Write a prepared folder.

    A side without rows gets no file, because mlx-lm stops at an empty one.

    Args:
        splits: what `prepare` returned.
        out_dir: the folder to make; an empty one may exist.
        replace: allow a folder that this function made before, and nothing else in it.

    Returns:
        The folder.

    Raises:
        UsageError: the folder exists and is not ours to replace.
        DataError: a row would not come back equal, or the disk refused; nothing was changed.
    """
    out = Path(out_dir)
    _check_free(out, replace)
    rows = {side: _checked_rows(getattr(splits, side)) for side in SIDES}
    try:
        with atomic_directory(out, replace=True) as folder:
            for side in SIDES:
                if rows[side]:
                    text = "".join(line + "\n" for line in rows[side])
                    (folder / f"{side}.jsonl").write_text(text, encoding="utf-8", newline="\n")
            write_json(folder / REPORT_FILE, report_to_dict(splits.report))
    except OSError as exc:
        raise DataError(
            f"{out}: cannot be written ({exc.strerror or exc}). What was there before is untouched."
        ) from exc
    return out


def read_splits(directory: str | Path) -> Splits:
    """Read a prepared folder, or any folder of train.jsonl, valid.jsonl and test.jsonl.

    Without prepare.json the report says only what can be seen: counts and hashes.

    Raises:
        UsageError: there is no such folder, or no train.jsonl, valid.jsonl or test.jsonl in it.
        DataError: a file is malformed, or is not what prepare.json recorded.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder. Make it with medphi data prepare.")
    paths = {side: folder / f"{side}.jsonl" for side in SIDES}
    if not any(path.is_file() for path in paths.values()):
        raise UsageError(
            f"{folder}: no train.jsonl, valid.jsonl or test.jsonl. Expected a folder made by "
            "medphi data prepare."
        )
    sides = {s: tuple(jsonl.read(p)) if p.is_file() else () for s, p in paths.items()}
    hashes: dict[str, str] = {side: content_hash(rows) for side, rows in sides.items()}
    recorded = folder / REPORT_FILE
    if recorded.is_file():
        report = _read_report(recorded)
        changed = [f"{side}.jsonl" for side in SIDES if report.hashes.get(side) != hashes[side]]
        if changed:
            raise DataError(
                f"{folder}: {capped(changed)} changed since {REPORT_FILE} was written. Prepare the "
                f"folder again, or delete {REPORT_FILE} to use the rows as they are."
            )
    else:
        kept = [row for rows in sides.values() for row in rows]
        report = PrepareReport(
            seed=0,
            given=len(kept),
            counts=count_rows(sides),
            dropped=(),
            leaked_evaluation=(),
            borderline=(),
            screening=None,
            identifiers_accepted=False,
            hashes=hashes,
            data_hash=json_hash(hashes),
            attribution=attribution(row.source for row in kept),
        )
    return Splits(sides["train"], sides["valid"], sides["test"], report)


def report_to_dict(report: PrepareReport) -> dict[str, Any]:
    """The report as prepare.json holds it."""
    return {
        "made_by": _MADE_BY,
        "format": _FORMAT,
        "dropped_by_reason": report.dropped_by_reason,
        **asdict(report),
    }


def report_from_dict(content: Mapping[str, Any]) -> PrepareReport:
    """The inverse of `report_to_dict`.

    Raises:
        KeyError, TypeError: something is missing or of another kind.
    """
    screening = content["screening"]
    return PrepareReport(
        seed=content["seed"],
        given=content["given"],
        counts=content["counts"],
        dropped=tuple(
            Dropped(row["id"], row["reason"], tuple(row["partners"]), row["share"])
            for row in content["dropped"]
        ),
        leaked_evaluation=tuple(content["leaked_evaluation"]),
        borderline=tuple(Overlap(**row) for row in content["borderline"]),
        screening=None
        if screening is None
        else Screening(screening["counts"], {k: tuple(v) for k, v in screening["rows"].items()}),
        identifiers_accepted=content["identifiers_accepted"],
        hashes=content["hashes"],
        data_hash=content["data_hash"],
        attribution=tuple(content["attribution"]),
    )


def _checked_rows(examples: Sequence[Example]) -> list[str]:
    """One JSON line per example, each proven to read back equal."""
    lines: list[str] = []
    lost: list[str] = []
    for example in examples:
        # ASCII, because mlx-lm opens the file in whatever encoding the machine is set to.
        line = json.dumps(jsonl.row_from_example(example))
        if jsonl.example_from_row(json.loads(line), example.id, "") != example:
            lost.append(example.id)
        lines.append(line)
    if lost:
        raise DataError(
            f"{len(lost)} rows would not read back as they are: {capped(lost)}. Expected turns "
            "without spaces around them or line breaks in them; make conversations with "
            "Conversation.from_text()."
        )
    return lines


def _check_free(out: Path, replace: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: a file is there. Choose another folder.")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    if not _is_ours(out):
        raise UsageError(f"{out}: not empty, and not a prepared folder. Choose another folder.")
    if names - _FILES:
        raise UsageError(
            f"{out}: besides a prepared folder's files it holds {capped(names - _FILES)}. Move "
            "them away, or choose another folder."
        )
    if not replace:
        raise UsageError(f"{out}: already prepared. Choose another folder, or say --replace.")


def _is_ours(out: Path) -> bool:
    path = out / REPORT_FILE
    if not path.is_file():
        return False
    try:
        content = json.loads(read_text(path))
    except (DataError, ValueError):
        return False
    return isinstance(content, dict) and content.get("made_by") == _MADE_BY


def _read_report(path: Path) -> PrepareReport:
    try:
        return report_from_dict(json.loads(read_text(path)))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise DataError(
            f"{path}: not a report of medphi data prepare. Prepare the folder again, or delete it "
            "to use the rows as they are."
        ) from exc
