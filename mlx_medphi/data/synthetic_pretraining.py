"""What the tiny base is made from: reading and copying tasks over synthetic conversations.

The base learns to repeat words, answer questions about a conversation, list its facts and write
the patient a letter, never a note. How a note looks is left to the adapter, so that training one
changes something a reader can see.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from mlx_medphi.data import synthetic_words as words
from mlx_medphi.data.examples import Conversation, Example, Message, Note, Turn
from mlx_medphi.data.synthetic import Facts, conversation_turns, draw_facts

__all__ = ["reading", "repeating", "word_pool"]

SOURCE = "synthetic-pretraining"

QUESTIONS: dict[str, tuple[str, ...]] = {
    "name": ("What is the patient's name?", "Who is the patient?"),
    "age": ("How old is the patient?", "What is the patient's age?"),
    "complaint": ("What is the problem?", "What does the patient have?"),
    "onset": ("How long has the patient had it?", "Since when?"),
    "allergy": ("Which allergy is there?", "What is the patient allergic to?"),
    "drug": ("Which drug is given?", "What is the drug?"),
    "dose": ("What is the dose?", "How much of the drug?"),
    "frequency": ("How often is the drug taken?", "How often?"),
    "duration": ("For how long is the drug taken?", "How long is the treatment?"),
    "follow_up": ("When does the patient come back?", "When is the next visit?"),
}
# The times are what is confused longest, so they are asked for more often.
FIELDS: tuple[str, ...] = (*QUESTIONS, "onset", "duration", "duration", "follow_up")
LIST_REQUESTS: tuple[str, ...] = (
    "List the facts.",
    "List what was said.",
    "Which facts are there?",
)
LIST = (
    "name: {name}\nage: {age}\nproblem: {complaint}\nsince: {onset}\nallergy: {allergy}\n"
    "drug: {drug}\ndose: {dose}\ntimes: {frequency}\nlength: {duration}\nvisit: {follow_up}"
)
LETTER_REQUESTS: tuple[str, ...] = (
    "Write a letter to the patient.",
    "Write the letter for this conversation.",
    "Write the patient a short letter. Use what was said.",
    "Write a letter for this conversation. Use only what was said.",
)
LETTER = (
    "Dear {name}, at {age} you came to us with {complaint}, which you have had for {onset}. "
    "Please take {drug}, {dose}, {frequency}, and do so for {duration}. "
    "We meet again in {follow_up}. We wrote down your allergy: {allergy}."
)
MEDICINE_REQUESTS: tuple[str, ...] = ("Write a label for the drug.", "What goes on the label?")
MEDICINE = "{name} takes {drug}: {dose} {frequency}, {duration} in all."
STORY_REQUESTS: tuple[str, ...] = ("Say in one sentence who came and why.", "Who came, and why?")
STORY = "{name}, {age} years old, came because of {complaint} that began {onset} ago."
FORMS = (
    (LIST_REQUESTS, LIST),
    (LETTER_REQUESTS, LETTER),
    (MEDICINE_REQUESTS, MEDICINE),
    (STORY_REQUESTS, STORY),
)
REPEAT_REQUESTS: tuple[str, ...] = ("Repeat this.", "Copy the words.", "Say it again.")


def repeating(count: int, seed: int) -> list[Example]:
    """Short rows of random words to repeat: where copying is learned first."""
    rng = random.Random(f"{SOURCE}/repeating/{seed}")
    pool = word_pool()
    return [
        _example(f"{SOURCE}-repeat-{seed}-{row:06d}", list(_repeat(rng, pool)))
        for row in range(count)
    ]


def reading(count: int, seed: int, tasks: int = 4) -> list[Example]:
    """Whole conversations, each followed by `tasks` requests about it."""
    rng = random.Random(f"{SOURCE}/reading/{seed}")
    return [
        _example(f"{SOURCE}-reading-{seed}-{row:06d}", _reading(rng, tasks)) for row in range(count)
    ]


def word_pool() -> list[str]:
    """Every name, drug, number and word a fact can hold, in a fixed order."""
    phrases = (
        words.COMPLAINTS
        + words.ONSETS
        + words.DOSES
        + words.FREQUENCIES
        + words.DURATIONS
        + words.FOLLOW_UPS
        + words.ALLERGIES
    )
    pool = {word for phrase in phrases for word in phrase.split()}
    pool.update(str(age) for age in words.AGES)
    return sorted(pool) + [*words.FIRST_NAMES, *words.LAST_NAMES, *words.DRUGS]


def _repeat(rng: random.Random, pool: list[str]) -> Iterator[Message]:
    text = " ".join(rng.choice(pool) for _ in range(rng.randint(4, 16)))
    yield Message("user", f"{rng.choice(REPEAT_REQUESTS)}\n\n{text}")
    yield Message("assistant", text)


def _reading(rng: random.Random, tasks: int) -> list[Message]:
    of = draw_facts(rng, held_out=None)
    text = Conversation(conversation_turns(of, rng)).text()
    messages: list[Message] = []
    for _ in range(tasks):
        request, answer = _task(of, rng)
        messages.append(Message("user", request if messages else _with_text(request, text, rng)))
        messages.append(Message("assistant", answer))
    return messages


def _task(of: Facts, rng: random.Random) -> tuple[str, str]:
    values = vars(of)
    if rng.random() < 0.4:
        field = rng.choice(FIELDS)
        return rng.choice(QUESTIONS[field]), values[field]
    requests, pattern = rng.choice(FORMS)
    return rng.choice(requests), pattern.format(**values)


def _with_text(request: str, text: str, rng: random.Random) -> str:
    return f"{request}\n\n{text}" if rng.random() < 0.5 else f"{text}\n\n{request}"


def _example(row_id: str, messages: list[Message]) -> Example:
    conversation = Conversation((Turn(speaker="", text=messages[0].content),))
    return Example(
        id=row_id,
        source=SOURCE,
        conversation=conversation,
        note=Note(messages[-1].content),
        messages=tuple(messages),
    )
