"""PriMock57: role-played consultations as two TextGrid channels and a note.

Source: Papadopoulos Korfiatis et al., ACL 2022; repository babylonhealth/primock57, CC BY 4.0.
The role comes from the file name, because the tier is called `Speaker` in nearly every file. What
the transcribers were unsure of is kept; what nobody could hear becomes `[inaudible]`, since
deleting it would make fluent sentences that were never said. The two channels overlap: utterances
are sorted by their start and neighbours of one speaker are joined.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_medphi.data.examples import Conversation, Example, Note, Turn, clean_text
from mlx_medphi.data.reading import read_text
from mlx_medphi.errors import DataError, capped

__all__ = ["INAUDIBLE", "SOURCE", "Utterance", "merge", "parse_textgrid", "read"]

SOURCE = "primock57"
INAUDIBLE = "[inaudible]"

_NAME = re.compile(r"day(\d+)_consultation(\d+)")
_ROLES = {"doctor": "Doctor", "patient": "Patient"}
_NUMBER = r"([0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)"
_INTERVAL = re.compile(
    rf"intervals \[(\d+)\]:\s*xmin = {_NUMBER}\s+xmax = {_NUMBER}\s+"
    # Praat doubles a quote inside a label.
    r"text = \"((?:[^\"]|\"\")*)\"[ \t]*(?:\n|$)"
)
_GAP = re.compile(r"<(?:UNIN|INAUDIBLE_SPEECH)\s*/>")
_UNSURE = re.compile(r"</?UNSURE>")
_TAG = re.compile(r"</?[A-Z_]{3,}\s*/?>")


@dataclass(frozen=True)
class Utterance:
    """One labelled interval: who, the words, and its times in seconds."""

    speaker: str
    text: str
    start: float
    end: float


def read(folder: Path) -> list[Example]:
    """Read a folder that holds `transcripts/*.TextGrid` and `notes/*.json`.

    Raises:
        DataError: a channel or a note is missing, cut short or malformed.
    """
    notes = {path.stem: path for path in sorted((folder / "notes").glob("*.json"))}
    grids = {path.stem: path for path in sorted((folder / "transcripts").glob("*.TextGrid"))}
    _check_complete(folder, set(notes), set(grids))
    return [_example(name, path, grids) for name, path in notes.items()]


def parse_textgrid(path: Path, speaker: str) -> list[Utterance]:
    """The utterances of a one-tier long-form TextGrid, gaps left out, tags resolved.

    Raises:
        DataError: the file is not such a TextGrid, or holds fewer intervals than it declares.
    """
    text = read_text(path).replace("\r\n", "\n")
    if not text.startswith('File type = "ooTextFile"\nObject class = "TextGrid"'):
        raise DataError(
            f"{path}: not a long-form Praat TextGrid. Expected its first lines to be "
            'File type = "ooTextFile" and Object class = "TextGrid".'
        )
    sizes = re.findall(r"intervals: size = (\d+)", text)
    if len(sizes) != 1:
        raise DataError(f"{path}: {len(sizes)} interval tiers, expected 1 per speaker's file.")
    found = _INTERVAL.findall(text)
    # As text: the file may declare any number, of any length.
    counted = [str(number) for number in range(1, len(found) + 1)]
    if [number for number, *_ in found] != counted or sizes[0] != str(len(found)):
        raise DataError(
            f"{path}: {len(found)} whole intervals, expected {sizes[0]:.20} (intervals: size). The "
            "file is cut short or damaged: fetch it again."
        )
    utterances: list[Utterance] = []
    for number, start, end, label in found:
        words = _spoken(path, int(number), label.replace('""', '"'))
        if words:
            utterances.append(Utterance(speaker, words, float(start), float(end)))
    return utterances


def merge(utterances: list[Utterance]) -> Conversation:
    """Put both channels in order of their start times and join neighbours of one speaker.

    A joined turn starts with its first utterance and ends when its last speaker stops.
    """
    turns: list[Turn] = []
    for item in sorted(utterances, key=lambda u: (u.start, u.end, u.speaker)):
        last = turns[-1] if turns else None
        if last is not None and last.speaker == item.speaker:
            end = max(last.end or 0.0, item.end)
            turns[-1] = Turn(last.speaker, f"{last.text} {item.text}", last.start, end)
        else:
            turns.append(Turn(item.speaker, item.text, item.start, item.end))
    return Conversation(tuple(turns))


def _spoken(path: Path, number: int, label: str) -> str:
    text = _UNSURE.sub("", _GAP.sub(f" {INAUDIBLE} ", label))
    if _TAG.search(text):
        raise DataError(
            f"{path}: interval {number} has an unknown tag. Expected <UNSURE>…</UNSURE>, <UNIN/> "
            "or <INAUDIBLE_SPEECH/>. Remove or rename it."
        )
    text = re.sub(rf"{re.escape(INAUDIBLE)}(?:\s+{re.escape(INAUDIBLE)})+", INAUDIBLE, text)
    # The marker gets spaces on both sides; punctuation behind it moves back.
    return re.sub(r"(?<=\]) (?=[,.?!;:])", "", " ".join(clean_text(text).split()))


def _check_complete(folder: Path, notes: set[str], grids: set[str]) -> None:
    expected = {f"{name}_{role}" for name in notes for role in _ROLES}
    problems = []
    if not notes:
        problems.append("no notes/*.json")
    if odd := [name for name in notes if not _NAME.fullmatch(name)]:
        problems.append(f"notes not named dayD_consultationNN: {capped(odd)}")
    if expected - grids:
        problems.append(f"transcripts missing: {capped(expected - grids)}")
    if grids - expected:
        problems.append(f"transcripts without a note: {capped(grids - expected)}")
    if problems:
        raise DataError(
            f"{folder}: {'; '.join(problems)}. Expected notes/NAME.json with "
            "transcripts/NAME_doctor.TextGrid and transcripts/NAME_patient.TextGrid for each."
        )


def _example(name: str, note_path: Path, grids: dict[str, Path]) -> Example:
    match = _NAME.fullmatch(name)
    assert match is not None
    utterances: list[Utterance] = []
    for role, speaker in _ROLES.items():
        utterances += parse_textgrid(grids[f"{name}_{role}"], speaker)
    conversation = merge(utterances)
    if not conversation.turns:
        raise DataError(f"{note_path}: neither transcript of this consultation holds any words.")
    return Example(
        id=f"{SOURCE}/{name}",
        source=SOURCE,
        conversation=conversation,
        note=_read_note(note_path, day=int(match[1]), consultation=int(match[2])),
        split=f"day{int(match[1])}",
        group=f"{SOURCE}/{name}",
    )


def _read_note(path: Path, day: int, consultation: int) -> Note:
    try:
        content: Any = json.loads(read_text(path))
    except json.JSONDecodeError as exc:
        raise DataError(f"{path}: line {exc.lineno} is not JSON ({exc.msg}).") from exc
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{path}: nested too deep, or a number in it is too long.") from exc
    if not isinstance(content, dict) or not isinstance(content.get("note"), str):
        raise DataError(f'{path}: no text under "note". Expected a JSON object with the note.')
    text = clean_text(content["note"])
    if not text:
        raise DataError(f"{path}: the note is empty. Write it or remove the consultation.")
    named = {"day": day, "consultation": consultation}
    found = {key: content.get(key, number) for key, number in named.items()}
    # Not quoted: what is no number may be any text.
    if odd := [key for key, value in found.items() if type(value) is not int]:
        raise DataError(f"{path}: {' and '.join(odd)} is not a number. Correct or remove it.")
    if found != named:
        raise DataError(
            f"{path}: it says day {found['day']}, consultation {found['consultation']}; its name "
            f"says day {day}, consultation {consultation}. Correct one of them."
        )
    return Note(text)
