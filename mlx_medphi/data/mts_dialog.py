"""MTS-Dialog csv files: short conversations, each with one section of a note.

Source: Ben Abacha, Yim, Fan, Lin, EACL 2023; repository abachaa/MTS-Dialog, CC BY 4.0. What the
files really hold, and is handled here: CRLF inside fields of the training split and LF elsewhere;
misspelt speaker tags (`Docotr_2`, `Gest_family`); a dot for the colon; tags in the middle of a
line; a stray quote before the first tag; lines that are only a dot or a recorder's `Sp 3`; ids
that restart in each split; and, in the augmented files, ids such as `TR=EN-FR-EN 234`.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlx_medphi.data.examples import Conversation, Example, Note, clean_text
from mlx_medphi.data.reading import CsvRow, Faults, read_csv

__all__ = ["COLUMNS", "SOURCE", "read", "read_dialogue"]

SOURCE = "mts-dialog"
COLUMNS = ("ID", "section_header", "section_text", "dialogue")

# Official file names, and what the splits are called in publications.
_SPLITS = (
    ("trainingset", "train"),
    ("validationset", "valid"),
    ("testset-1", "test1"),
    ("testset-2", "test2"),
)
_AUGMENTED_ID = re.compile(r"TR=(?P<route>[A-Za-z-]+) (?P<row>\d+)")
_MIDDLE_TAG = re.compile(
    r"(?<=[.?!])[ \t]+(?=(?:Doctor|Patient|Guest_family|Guest_clinician)(?:_\d)?:[ \t]+\S)"
)


def read(path: Path) -> list[Example]:
    """Read one MTS-Dialog csv; the split follows from the official file name, else there is none.

    Raises:
        DataError: the file is not such a csv, or rows are empty or have an id twice.
    """
    split = _split_of(path)
    faults = Faults(path)
    examples: list[Example] = []
    seen: set[str] = set()
    for row in read_csv(path, COLUMNS):
        example = _example(row, split or path.stem, split)
        where = f"line {row.line} (ID {row.fields['ID'].strip()[:40]})"
        if not row.fields["ID"].strip():
            faults.add(where, "the ID is empty")
        elif example.id in seen:
            faults.add(where, "the ID occurs twice")
        if not example.note.text:
            faults.add(where, "the note (section_text) is empty")
        if not example.conversation.turns:
            faults.add(where, "the dialogue is empty")
        seen.add(example.id)
        examples.append(example)
    faults.raise_if_any("Expected an ID, a note and a dialogue in every row.")
    return examples


def read_dialogue(text: str) -> Conversation:
    """Read a dialogue field: one `Speaker: words` line per turn, with the quirks named above."""
    text = re.sub(r"^[\"“”']+(?=[A-Za-z_]+\d?:)", "", clean_text(text))
    lines: list[str] = []
    for line in text.split("\n"):
        # A line without a letter or digit, or with a bare numbered voice, says nothing.
        if not re.search(r"\w", line) or re.fullmatch(r"\s*[Ss]p\s*\d+\s*", line):
            continue
        lines += _MIDDLE_TAG.split(line)
    return Conversation.from_text("\n".join(lines))


def _example(row: CsvRow, part: str, split: str | None) -> Example:
    number = row.fields["ID"].strip()
    augmented = _AUGMENTED_ID.fullmatch(number)
    original = f"{SOURCE}/{part}/{_padded(augmented['row'] if augmented else number)}"
    return Example(
        id=f"{original}+{augmented['route']}" if augmented else original,
        source=SOURCE,
        conversation=read_dialogue(row.fields["dialogue"]),
        note=Note(
            clean_text(row.fields["section_text"]),
            " ".join(row.fields["section_header"].split()) or None,
        ),
        split=split,
        group=original,
        augmented=augmented is not None,
    )


def _padded(number: str) -> str:
    digits = number.isascii() and number.isdigit()
    return number.lstrip("0").zfill(4) if digits else number


def _split_of(path: Path) -> str | None:
    name = path.stem.lower()
    return next((split for part, split in _SPLITS if part in name), None)
