"""The embedded sample: short conversations and the notes about them, made by this project.

The same count, seed and choice give the same examples on every machine, and every fact of a note
stands in its conversation. Nobody in it exists, the drugs are invented, and nothing in it is
advice.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from mlx_medphi.data import synthetic_words as words
from mlx_medphi.data.examples import Conversation, Example, Note, Turn
from mlx_medphi.errors import DataError

__all__ = [
    "Facts",
    "conversation_turns",
    "draw_facts",
    "facts",
    "note_text",
    "parse_note",
    "sample",
]

SOURCE = "synthetic"


@dataclass(frozen=True)
class Facts:
    """What one synthetic conversation is about, in the words that it and its note use."""

    name: str
    age: str
    complaint: str
    onset: str
    allergy: str
    drug: str
    dose: str
    frequency: str
    duration: str
    follow_up: str


def sample(count: int, seed: int, *, held_out: bool = False) -> list[Example]:
    """Make examples, for training or held out from it.

    Args:
        count: how many; the first ones do not depend on it.
        seed: other seeds give other conversations.
        held_out: draw from the names and drugs that the training sample never uses.

    Raises:
        DataError: `count` is negative.

    >>> sample(1, seed=0)[0].id, sample(1, seed=0, held_out=True)[0].id
    ('synthetic/0/0000', 'synthetic-held-out/0/0000')
    """
    if count < 0:
        raise DataError(f"a synthetic sample of {count} examples. Expected 0 or more.")
    rng = random.Random(f"{SOURCE}/{'held-out' if held_out else 'train'}/{seed}")
    label = f"{SOURCE}-held-out" if held_out else SOURCE
    return [
        _example(f"{label}/{seed}/{row:04d}", draw_facts(rng, held_out=held_out), rng)
        for row in range(count)
    ]


def facts(example: Example) -> Facts:
    """Read the facts of a synthetic example back out of its note.

    Raises:
        DataError: the note does not have the form of the sample.
    """
    found = parse_note(example.note.text)
    if found is None:
        raise DataError(
            f"{example.id}: the note is not of the synthetic sample's form. Expected an example "
            "made by sample()."
        )
    return found


def draw_facts(rng: random.Random, *, held_out: bool | None = False) -> Facts:
    """Draw one set of facts; `held_out` None draws from all names and drugs."""
    first, last = _share(words.FIRST_NAMES, held_out), _share(words.LAST_NAMES, held_out)
    return Facts(
        name=f"{rng.choice(first)} {rng.choice(last)}",
        age=str(rng.choice(words.AGES)),
        complaint=rng.choice(words.COMPLAINTS),
        onset=rng.choice(words.ONSETS),
        allergy=rng.choice(words.ALLERGIES),
        drug=rng.choice(_share(words.DRUGS, held_out)),
        dose=rng.choice(words.DOSES),
        frequency=rng.choice(words.FREQUENCIES),
        duration=rng.choice(words.DURATIONS),
        follow_up=rng.choice(words.FOLLOW_UPS),
    )


def conversation_turns(of: Facts, rng: random.Random) -> tuple[Turn, ...]:
    """Tell `of` in eight to twelve short turns, each fact phrased in one of several ways."""
    values = vars(of)
    lines: list[tuple[str, str]] = []

    def say(speaker: str, patterns: tuple[str, ...]) -> None:
        text = rng.choice(patterns).format(**values)
        if lines and lines[-1][0] == speaker:
            lines[-1] = (speaker, f"{lines[-1][1]} {text}")
        else:
            lines.append((speaker, text))

    say("Doctor", words.ASK_NAME)
    if rng.random() < 0.5:
        say("Patient", words.TELL_NAME_AND_AGE)
    else:
        say("Patient", words.TELL_NAME)
        say("Doctor", words.ASK_AGE)
        say("Patient", words.TELL_AGE)
    say("Doctor", words.ASK_COMPLAINT)
    say("Patient", words.TELL_COMPLAINT)
    say("Doctor", words.ASK_ALLERGY)
    say("Patient", words.TELL_NO_ALLERGY if of.allergy == "none" else words.TELL_ALLERGY)
    if rng.random() < 0.6:
        say("Doctor", words.PRESCRIBE)
    else:
        say("Doctor", words.PRESCRIBE_SHORT)
        say("Patient", words.ASK_HOW_LONG)
        say("Doctor", words.TELL_HOW_LONG)
    say("Doctor", words.FOLLOW_UP)
    say("Patient", words.THANK)
    return tuple(Turn(speaker=speaker, text=text) for speaker, text in lines)


def note_text(of: Facts) -> str:
    """The note: two headings, prose, exactly the facts."""
    return (
        f"Subjective: {of.name}, aged {of.age}, reports {of.complaint} for {of.onset}. "
        f"Allergies: {of.allergy}.\n"
        f"Plan: {of.drug} {of.dose} {of.frequency} for {of.duration}. Review in {of.follow_up}."
    )


_NOTE = re.compile(
    r"Subjective: (?P<name>.+?), aged (?P<age>\d+), "
    r"reports (?P<complaint>.+?) for (?P<onset>.+?)\. "
    r"Allergies: (?P<allergy>.+?)\.\s+"
    r"Plan: (?P<drug>\S+) (?P<dose>\d+ mg) (?P<frequency>.+?) for (?P<duration>\d+ \w+)\. "
    r"Review in (?P<follow_up>.+?)\."
)


def parse_note(text: str) -> Facts | None:
    """The facts a note states, or None when it does not have the synthetic form."""
    match = _NOTE.fullmatch(text.strip())
    return Facts(**match.groupdict()) if match else None


def _example(row_id: str, of: Facts, rng: random.Random) -> Example:
    return Example(
        id=row_id,
        source=SOURCE,
        conversation=Conversation(conversation_turns(of, rng)),
        note=Note(note_text(of)),
    )


def _share(entries: tuple[str, ...], held_out: bool | None) -> tuple[str, ...]:
    if held_out is None:
        return entries
    return entries[-words.HELD_OUT_COUNT :] if held_out else entries[: -words.HELD_OUT_COUNT]
