"""How the command line shows things: one-line errors, aligned tables, readable sizes, JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

__all__ = ["duration", "examples", "fail", "number_of", "print_json", "size", "table"]

RED, PLAIN = "\033[31m", "\033[0m"


def fail(message: str, code: int) -> int:
    """Write an error to the error stream, its first line red on a terminal; returns `code`."""
    first, _, rest = message.partition("\n")
    line = f"error: {first}"
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        line = f"{RED}{line}{PLAIN}"
    print(f"{line}\n{rest}" if rest else line, file=sys.stderr)
    return code


def examples(*commands: str) -> str:
    """The end of a verb's help: commands as a person types them."""
    # \b keeps the help formatter from joining the lines.
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def print_json(value: Any) -> None:
    """Write one JSON document: dataclasses as objects, paths as text."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    """What the JSON writer does not know; dataclasses inside lists come here one by one."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def table(rows: Sequence[Sequence[object]], *, indent: int = 0) -> str:
    """Rows as aligned columns: the first column to the left, the others to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in texts) for at in range(len(texts[0]))] if texts else []
    lines = [
        " " * indent
        + "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in texts
    ]
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes in decimal units, as disks and the App Store count them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """A time as `42 s`, `3 min 05 s` or `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number_of(count: int, noun: str) -> str:
    """`1 row`, `2 rows`, `1,201 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
