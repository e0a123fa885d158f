"""What every reader returns: conversations, notes, and the examples that pair them.

`Conversation.from_text(conversation.text())` gives the same turns back (without their times), so a
conversation survives being written into a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlx_medphi.data.speakers import CANONICAL_SPEAKERS, is_canonical, split_tag
from mlx_medphi.errors import DataError

__all__ = ["Conversation", "Example", "Message", "Note", "Role", "Turn", "clean_text"]

Role = Literal["system", "user", "assistant"]

# Tabs and the spaces that only typesetters see become plain spaces; zero-width marks go.
# Found in the sources: tabs (PriMock57 notes), U+202F and U+200B (ACI-Bench).
_INVISIBLE = {ord(space): " " for space in "\t\u00a0\u2007\u2009\u202f"} | {
    ord(mark): None for mark in "\u200b\u2060\ufeff"
}


def clean_text(text: str) -> str:
    """Line breaks as LF, invisible characters as plain spaces or nothing, no space at line ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_INVISIBLE)
    return "\n".join(line.rstrip() for line in text.split("\n")).strip()


@dataclass(frozen=True, repr=False)
class Turn:
    """What one speaker said before the next one spoke.

    Args:
        speaker: a canonical name such as `Doctor` or `Guest_family_2`; empty for plain text.
        text: the words, on one line unless the speaker is empty.
        start: seconds from the start of the recording, where the source says so.
        end: seconds, likewise.

    Raises:
        DataError: the speaker is not canonical, or the text of a named speaker has a line break.
    """

    speaker: str
    text: str
    start: float | None = None
    end: float | None = None

    def __repr__(self) -> str:
        return f"Turn({self.speaker or 'text'}, {_words(self.text)})"

    def __post_init__(self) -> None:
        if not self.speaker:
            return
        if not is_canonical(self.speaker):
            raise DataError(
                "a turn's speaker is not a canonical name. Expected one of "
                f"{', '.join(CANONICAL_SPEAKERS)}, with or without a number as in Doctor_2, or "
                "nothing for plain text. speakers.canonical_speaker() translates common tags."
            )
        if "\n" in self.text or "\r" in self.text:
            raise DataError(
                f"a turn of {self.speaker} holds a line break. Expected one line per turn: join "
                "its lines with spaces, or read the whole text with Conversation.from_text()."
            )


@dataclass(frozen=True, repr=False)
class Conversation:
    """The turns of one conversation, in order."""

    turns: tuple[Turn, ...]

    def __repr__(self) -> str:
        return f"Conversation({len(self.turns)} turns, {_words(self.words())})"

    def text(self) -> str:
        """One line per turn, `Speaker: words`; plain text stands as it is."""
        return "\n".join(f"{t.speaker}: {t.text}" if t.speaker else t.text for t in self.turns)

    def words(self) -> str:
        """What was said, without the speaker tags, one line per turn."""
        return "\n".join(turn.text for turn in self.turns)

    @classmethod
    def from_text(cls, text: str) -> Conversation:
        """Read a conversation with one tagged turn per line.

        A line without a known speaker goes on with the turn before it; lines before the first tag
        become one turn without a speaker; tags with nothing behind them are dropped.

        >>> Conversation.from_text("Dr: How are you?\\nPatient: Fine,\\nthanks.").text()
        'Doctor: How are you?\\nPatient: Fine, thanks.'
        """
        head: list[str] = []
        spoken: list[tuple[str, list[str]]] = []
        for line in clean_text(text).split("\n"):
            tagged = split_tag(line)
            if tagged:
                spoken.append((tagged[0], [tagged[1]]))
            elif spoken:
                spoken[-1][1].append(line.strip())
            else:
                head.append(line)
        turns = [Turn("", "\n".join(head).strip())]
        turns += [Turn(who, " ".join(part for part in parts if part)) for who, parts in spoken]
        return cls(tuple(turn for turn in turns if turn.text))


@dataclass(frozen=True, repr=False)
class Note:
    """A note, or the part of one that `section` names as the source does (`GENHX`)."""

    text: str
    section: str | None = None

    def __repr__(self) -> str:
        return f"Note({self.section or 'whole'}, {_words(self.text)})"


@dataclass(frozen=True, repr=False)
class Message:
    """One message of a chat."""

    role: Role
    content: str

    def __repr__(self) -> str:
        return f"Message({self.role}, {_words(self.content)})"


@dataclass(frozen=True, repr=False)
class Example:
    """A conversation with the note written about it.

    Args:
        id: stable and unique over all sources, as `mts-dialog/train/0863`.
        source: where it comes from: `mts-dialog`, `primock57`, `aci-bench`, `synthetic`, `jsonl`.
        conversation: what was said.
        note: what was written.
        split: the source's own part: `train`, `valid`, `test1`, `day3`; None when it has none.
        group: rows of one group never sit on two sides of a split; None means the row is alone.
        messages: set only for chat rows that are not in the project's own prompt form; they are
            trained on as they are.
        augmented: whether the row was made from another by machine, as by back-translation.
    """

    id: str
    source: str
    conversation: Conversation
    note: Note
    split: str | None = None
    group: str | None = None
    messages: tuple[Message, ...] | None = None
    augmented: bool = False

    def __repr__(self) -> str:
        return f"Example({self.id!r}, {self.conversation!r}, {self.note!r})"


def _words(text: str) -> str:
    """What a notebook or a traceback may show of a text: how long it is."""
    return f"{len(text.split())} words"
