"""Find rows that tell a model the answers of its own examination.

The rule: both texts become lower-case `[a-z0-9]+` tokens, the dialogue without speaker tags. A
training row leaks into an evaluation row when the evaluation note, of 8 words or more, equals the
training note or has at least 0.8 of its 8-grams in it; or when the dialogues are equal, or at
least 0.8 of the evaluation dialogue's 8-grams are in the training dialogue. A share of 0.4 to 0.8
is listed as borderline and kept. Comparing dialogues alone would miss most of MTS-Dialog's leaks:
its leaked notes were given newly written dialogues.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_medphi.data.examples import Example

__all__ = [
    "BORDERLINE",
    "LEAK",
    "NGRAM",
    "Overlap",
    "Part",
    "find_overlaps",
    "near_duplicates",
    "normalised",
]

NGRAM = 8
LEAK = 0.8
BORDERLINE = 0.4

Part = Literal["note", "dialogue"]


@dataclass(frozen=True)
class Overlap:
    """How much of an evaluation row's note or dialogue a training row contains.

    Args:
        train_id: the training row.
        evaluation_id: the evaluation row.
        part: which of the two texts is shared.
        share: the share of the evaluation text's distinct 8-grams found in the training text; 1.0
            when the two are equal.
    """

    train_id: str
    evaluation_id: str
    part: Part
    share: float

    @property
    def is_leak(self) -> bool:
        """Whether the row is excluded, rather than listed as borderline."""
        return self.share >= LEAK


def normalised(text: str) -> tuple[str, ...]:
    """Lower-case `[a-z0-9]+` tokens.

    >>> normalised("Dr. Smith's  note, 4/7")
    ('dr', 'smith', 's', 'note', '4', '7')
    """
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


def find_overlaps(train: Sequence[Example], evaluation: Sequence[Example]) -> list[Overlap]:
    """Every pair whose share is at least `BORDERLINE`, sorted by ids.

    The evaluation rows' rarer 8-grams are indexed once and each training row looks its own up, so
    the time grows with the text and not with the number of pairs.
    """
    found = [
        *_overlaps(train, evaluation, "note", BORDERLINE),
        *_overlaps(train, evaluation, "dialogue", BORDERLINE),
    ]
    return sorted(found, key=lambda o: (o.train_id, o.evaluation_id, o.part))


def near_duplicates(examples: Sequence[Example]) -> list[Overlap]:
    """Rows that repeat an earlier row: dialogue and note both equal or shared both ways.

    Each pair has the later row as `train_id` and the first of its kind as `evaluation_id`, so that
    dropping every `train_id` leaves one row of each kind. Equal notes with different dialogues are
    no duplicates: half of all short notes are `None.`
    """
    by_id = {example.id: example for example in examples}
    order = {example.id: index for index, example in enumerate(examples)}
    shares = {
        (o.train_id, o.evaluation_id): o.share
        for o in _overlaps(examples, examples, "dialogue", LEAK)
        if o.train_id != o.evaluation_id
    }
    first: dict[str, Overlap] = {}
    for (later, earlier), share in sorted(shares.items(), key=lambda item: order[item[0][1]]):
        back = shares.get((earlier, later), 0.0)
        # An earlier row that itself is a duplicate is dropped, so it cannot stand for this one.
        if order[earlier] > order[later] or later in first or earlier in first or back < LEAK:
            continue
        alike = _both_ways(by_id[later].note.text, by_id[earlier].note.text)
        if alike >= LEAK:
            first[later] = Overlap(later, earlier, "dialogue", min(share, back, alike))
    return list(first.values())


def _both_ways(one: str, other: str) -> float:
    """The smaller of the two shares of 8-grams; equal texts of any length give 1."""
    a, b = normalised(one), normalised(other)
    if a == b:
        return 1.0
    shared = len(_grams(a) & _grams(b))
    return shared / max(len(_grams(a)), len(_grams(b)), 1)


def _tokens(example: Example, part: Part) -> tuple[str, ...]:
    return normalised(example.note.text if part == "note" else example.conversation.words())


def _grams(tokens: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {tokens[i : i + NGRAM] for i in range(len(tokens) - NGRAM + 1)}


def _overlaps(
    train: Sequence[Example], evaluation: Sequence[Example], part: Part, least: float
) -> list[Overlap]:
    """Pairs whose share of one part is at least `least`."""
    # Short notes such as `None.` are equal by chance; equal dialogues are not.
    shortest = NGRAM if part == "note" else 1
    texts = [_tokens(example, part) for example in evaluation]
    grams = [_grams(tokens) for tokens in texts]
    by_text: dict[tuple[str, ...], list[int]] = {}
    for index, tokens in enumerate(texts):
        if len(tokens) >= shortest:
            by_text.setdefault(tokens, []).append(index)
    by_gram = _rare_grams(grams, least)
    found: list[Overlap] = []
    for example in train:
        tokens = _tokens(example, part)
        own = _grams(tokens)
        shares = dict.fromkeys(by_text.get(tokens, ()), 1.0)
        for index in {index for gram in own for index in by_gram.get(gram, ())}:
            share = len(own & grams[index]) / len(grams[index])
            if share >= least:
                shares.setdefault(index, share)
        found += [
            Overlap(example.id, evaluation[index].id, part, share)
            for index, share in shares.items()
        ]
    return found


def _rare_grams(
    grams: Sequence[set[tuple[str, ...]]], least: float
) -> dict[tuple[str, ...], list[int]]:
    """Index each text by its rarest 8-grams, just enough that no share of `least` is missed.

    A text of n 8-grams that shares k of them meets every choice of n - k + 1. Leaving out the most
    frequent ones keeps a greeting that opens every consultation from pairing every row with all.
    """
    frequency = Counter(gram for own in grams for gram in own)
    index: dict[tuple[str, ...], list[int]] = {}
    for position, own in enumerate(grams):
        enough = len(own) - math.ceil(least * len(own)) + 1
        for gram in sorted(own, key=lambda gram: (frequency[gram], gram))[:enough]:
            index.setdefault(gram, []).append(position)
    return index
