"""How much text a set of examples holds, counted in rows, turns and words.

Lengths in tokens need a tokenizer and are counted elsewhere; never estimate them from these.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_medphi.data.examples import Example

__all__ = ["Spread", "Summary", "spread", "summarise"]


@dataclass(frozen=True)
class Spread:
    """Mean, median, 95th percentile (nearest rank) and maximum of some counts."""

    mean: float
    median: float
    p95: int
    maximum: int


@dataclass(frozen=True)
class Summary:
    """Counts of one set; words are what stands between spaces, speaker tags not counted."""

    rows: int
    turns: Spread
    conversation_words: Spread
    note_words: Spread
    sections: Mapping[str, int]


def spread(counts: Sequence[int]) -> Spread:
    """The spread of `counts`; all zero when there are none."""
    if not counts:
        return Spread(0.0, 0.0, 0, 0)
    ordered = sorted(counts)
    middle = len(ordered) // 2
    median = (ordered[middle] + ordered[-middle - 1]) / 2
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return Spread(sum(ordered) / len(ordered), median, p95, ordered[-1])


def summarise(examples: Sequence[Example]) -> Summary:
    """Count rows, turns, words and note sections."""
    sections = Counter(e.note.section for e in examples if e.note.section is not None)
    return Summary(
        rows=len(examples),
        turns=spread([len(e.conversation.turns) for e in examples]),
        conversation_words=spread([len(e.conversation.words().split()) for e in examples]),
        note_words=spread([len(e.note.text.split()) for e in examples]),
        sections=dict(sections.most_common()),
    )
