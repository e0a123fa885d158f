"""Text and csv files read strictly, with the place of every fault.

All faults of a file are reported together, and no message quotes what a field holds.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_medphi.errors import DataError, UsageError

__all__ = ["CsvRow", "Faults", "describe_header", "read_csv", "read_header", "read_text"]

_UTF8_BOM = b"\xef\xbb\xbf"


class Faults:
    """Collects what is wrong with a file, so that one run names it all.

    >>> faults = Faults(Path("a.csv"))
    >>> faults.add("line 3", "the note is empty")
    >>> len(faults.found)
    1
    """

    def __init__(self, path: Path, limit: int = 10) -> None:
        self.path = path
        self.limit = limit
        self.found: list[str] = []

    def add(self, where: str, what: str) -> None:
        self.found.append(f"{where}: {what}")

    def raise_if_any(self, advice: str) -> None:
        """Raise one DataError with the first faults, in file order, and how many more there are."""
        if not self.found:
            return
        shown = "\n".join(f"  {fault}" for fault in self.found[: self.limit])
        more = len(self.found) - self.limit
        tail = f"\n  … and {more} more" if more > 0 else ""
        rows = "fault" if len(self.found) == 1 else "faults"
        raise DataError(f"{self.path}: {len(self.found)} {rows}. {advice}\n{shown}{tail}")


@dataclass(frozen=True)
class CsvRow:
    """One record: the line it starts on, counted from 1, and its fields by column name."""

    line: int
    fields: Mapping[str, str]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark, line ends as they are.

    Raises:
        UsageError: the file does not exist.
        DataError: it cannot be read, or holds bytes that are not UTF-8 (named by line and byte).
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as exc:
        raise UsageError(f"{path}: no such file. Check the path.") from exc
    except OSError as exc:
        raise DataError(f"{path}: cannot be read ({exc.strerror or exc}).") from exc
    skipped = len(_UTF8_BOM) if data.startswith(_UTF8_BOM) else 0
    try:
        return data[skipped:].decode("utf-8")
    except UnicodeDecodeError as exc:
        position = exc.start + skipped
        line = data.count(b"\n", 0, position) + 1
        raise DataError(
            f"{path}: byte {position} (line {line}) is 0x{data[position]:02x}, which is not UTF-8. "
            "Save the file as UTF-8."
        ) from exc


def read_header(path: Path) -> list[str]:
    """The column names of a csv file; empty for an empty file."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        with _long_fields():
            return [name.strip() for name in next(reader, [])]
    except csv.Error as exc:
        raise DataError(f"{path}: line {reader.line_num}: not csv ({exc}).") from exc


def read_csv(path: Path, columns: Sequence[str]) -> list[CsvRow]:
    """Read a csv file (RFC 4180) that has at least `columns`, in any order.

    Raises:
        DataError: a column is missing, a row has too few or too many fields, a quote is left open,
            or there are no rows.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[CsvRow] = []
    faults = Faults(path)
    header: list[str] = []
    start = 1
    try:
        with _long_fields():
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header, columns)
            start = reader.line_num + 1
            for record in reader:
                if record and len(record) != len(header):
                    faults.add(f"line {start}", f"{len(record)} fields, expected {len(header)}")
                elif record:
                    rows.append(CsvRow(start, dict(zip(header, record, strict=True))))
                start = reader.line_num + 1
    except csv.Error as exc:
        raise DataError(
            f"{path}: the row that starts on line {start} is not csv ({exc}). Expected fields with "
            "line breaks or commas in double quotes, every quote closed. A file that was cut off "
            "looks like this too: fetch it again."
        ) from exc
    faults.raise_if_any("Expected one field per column in every row; quote fields with commas.")
    if not rows:
        raise DataError(f"{path}: no rows below the header. Expected one row per conversation.")
    return rows


def describe_header(header: Sequence[str], known: Sequence[str]) -> str:
    """What a header holds, in words that name known columns only.

    The first line of a file without header is a conversation.
    """
    if not any(header):
        return "nothing"
    found = [name for name in dict.fromkeys(known) if name in header]
    count = "1 column" if len(header) == 1 else f"{len(header)} columns"
    return f"{count}, {', '.join(found) if found else 'none of them known'}" + (
        " among them" if found and len(found) < len(header) else ""
    )


def _check_header(path: Path, header: list[str], columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in header]
    if missing:
        raise DataError(
            f"{path}: column {', '.join(missing)} missing. Found "
            f"{describe_header(header, columns)}; expected {', '.join(columns)}. Rename or add the "
            "column."
        )
    places: dict[str, list[str]] = {}
    for place, name in enumerate(header, start=1):
        places.setdefault(name, []).append(str(place))
    twice = [" and ".join(found) for found in places.values() if len(found) > 1]
    if twice:
        raise DataError(
            f"{path}: columns {', '.join(twice[:10])} have the same name. Remove or rename one."
        )


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the csv module's limit of 131,072 characters to a field, which is the whole process's.

    A field cannot be longer than its file, which is in memory already.
    """
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)
