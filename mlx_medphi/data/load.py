"""Find out what a path holds, and read it.

Nothing is guessed: a csv is known by its header, a folder by what lies in it, and what is not
known is an error that lists the forms that are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mlx_medphi.data import aci_bench, jsonl, mts_dialog, primock57
from mlx_medphi.data.examples import Example
from mlx_medphi.data.reading import describe_header, read_header
from mlx_medphi.errors import DataError, UsageError, capped

__all__ = ["load_examples"]

_LOG = logging.getLogger(__name__)

_KNOWN = (
    "an MTS-Dialog csv (ID, section_header, section_text, dialogue), an ACI-Bench csv (dataset, "
    "encounter_id, dialogue, note), a PriMock57 folder (transcripts/ and notes/), a .jsonl file, "
    "or a folder of csv or .jsonl files"
)
# The 400 machine summaries with human scores come beside MTS-Dialog and hold no conversations to
# train on; neither does ACI-Bench's metadata.
_ACCOMPANYING = (
    ("FactualPrecision", "FactualRecall", "HallucinationRate", "OmissionRate"),
    ("Reference Summary", "Automatic Summary"),
    aci_bench.METADATA_COLUMNS,
)


def load_examples(source: str | Path | Sequence[str | Path]) -> list[Example]:
    """Read every example of a file, a folder, or a list of them.

    A row that comes twice with the same content, as the originals inside MTS-Dialog's augmented
    files do, is kept once.

    Raises:
        UsageError: a path does not exist or nothing was given.
        DataError: the content is of no known form or malformed, or two rows share an id.
    """
    paths = [source] if isinstance(source, (str, Path)) else list(source)
    if not paths:
        raise UsageError(f"no data was given. Expected {_KNOWN}.")
    examples: list[Example] = []
    for path in paths:
        examples += _load_path(Path(path))
    return _each_once(examples)


def _load_path(path: Path) -> list[Example]:
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder. Check the path.")
    if path.is_dir():
        return _load_folder(path)
    if path.suffix.lower() == ".jsonl":
        return jsonl.read(path)
    if path.suffix.lower() == ".csv":
        reader = _csv_reader(path)
        if reader is None:
            raise DataError(f"{path}: it accompanies a data set and holds no conversations.")
        return reader(path)
    kind = f"a {path.suffix} file" if path.suffix else "a file without an ending"
    raise DataError(f"{path}: {kind} is not read. Expected {_KNOWN}.")


def _load_folder(folder: Path) -> list[Example]:
    if (folder / "transcripts").is_dir() and (folder / "notes").is_dir():
        return primock57.read(folder)
    examples: list[Example] = []
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    for path in files:
        if path.suffix.lower() == ".jsonl":
            examples += jsonl.read(path)
        elif path.suffix.lower() == ".csv":
            reader = _csv_reader(path)
            if reader is None:
                _LOG.info("%s: left out, it accompanies the data set", path)
            else:
                examples += reader(path)
    if not examples:
        below = [p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
        hint = f" It has the folders {capped(below)}: name one of them." if below else ""
        raise DataError(f"{folder}: no data in this folder. Expected {_KNOWN}.{hint}")
    return examples


def _csv_reader(path: Path) -> Callable[[Path], list[Example]] | None:
    """The reader for a csv; None for one that only accompanies a data set."""
    names = read_header(path)
    header = set(names)
    if header >= set(aci_bench.COLUMNS):
        return aci_bench.read
    if any(header >= set(columns) for columns in _ACCOMPANYING):
        return None
    # The nearest form names what is missing, so that one renamed column gets a clear message.
    forms: Iterable[tuple[Sequence[str], Callable[[Path], list[Example]]]] = (
        (mts_dialog.COLUMNS, mts_dialog.read),
        (aci_bench.COLUMNS, aci_bench.read),
    )
    columns, reader = max(forms, key=lambda form: len(header & set(form[0])))
    if len(header & set(columns)) < 2:
        raise DataError(
            f"{path}: none of the known csv headers. Found "
            f"{describe_header(names, (*mts_dialog.COLUMNS, *aci_bench.COLUMNS))}; expected "
            f"{', '.join(mts_dialog.COLUMNS)} or {', '.join(aci_bench.COLUMNS)}."
        )
    return reader


def _each_once(examples: list[Example]) -> list[Example]:
    kept: dict[str, Example] = {}
    clashes: list[str] = []
    repeated = 0
    for example in examples:
        first = kept.setdefault(example.id, example)
        if first is example:
            continue
        if first == example:
            repeated += 1
        else:
            clashes.append(example.id)
    if clashes:
        raise DataError(
            f"{len(clashes)} rows share an id with a different row: {capped(clashes)}. Give each "
            "row its own id, or load the files one by one."
        )
    if repeated:
        _LOG.info("%d rows came twice with the same content and are kept once", repeated)
    return list(kept.values())
