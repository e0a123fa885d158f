"""Which examples share a row, and how wide rows are.

Rows have one of at most four widths, chosen from the lengths before the first step, because every
width is one more compiled trace that is kept for the whole run.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["MAX_WIDTHS", "Bin", "best_fit", "choose_widths", "one_each"]

MAX_WIDTHS = 4
WIDTH_STEP = 32
# Rows near this share of all lengths set the main width; longer ones go to a wider one.
_MAIN_PERCENTILE = 97
# Another width is another trace; it has to save this share of all positions.
_WORTH_A_WIDTH = 0.02
# One width does where the longest row is hardly longer than the main width.
_NEARLY = 1.25
# Widths are chosen on at most this many lengths, evenly spaced over the sorted ones.
_SURVEY = 1000


@dataclass(frozen=True)
class Bin:
    """One row: its width and the examples in it, in the order in which they are laid out."""

    width: int
    members: tuple[int, ...]


def best_fit(lengths: Sequence[int], order: Iterable[int], widths: Sequence[int]) -> list[Bin]:
    """Put each example where it leaves the least room, or into a new row that just holds it.

    Args:
        lengths: tokens per example.
        order: the examples to place, longest first for a tight fit.
        widths: ascending; the last holds the longest example.
    """
    members: list[list[int]] = []
    sizes: list[int] = []
    free: list[tuple[int, int]] = []  # (room left, bin), ascending
    for example in order:
        length = lengths[example]
        at = bisect_left(free, (length, -1))
        if at < len(free):
            room, bin = free.pop(at)
            members[bin].append(example)
        else:
            bin = len(members)
            room = widths[bisect_left(widths, length)]
            members.append([example])
            sizes.append(room)
        insort(free, (room - length, bin))
    return [Bin(width, tuple(row)) for width, row in zip(sizes, members, strict=True)]


def one_each(lengths: Sequence[int], order: Iterable[int], widths: Sequence[int]) -> list[Bin]:
    """One row per example, as narrow as it can be."""
    return [Bin(widths[bisect_left(widths, lengths[at])], (at,)) for at in order]


def choose_widths(
    lengths: Sequence[int], regimes: Sequence[bool], rows: int, pack: bool
) -> tuple[int, ...]:
    """At most four widths, ascending: one for the longest, one for most, more where they pay.

    Args:
        lengths: tokens per example.
        regimes: examples of different regimes never share a row.
        rows: rows per micro-batch; an incomplete one is filled with empty rows.
        pack: whether examples share rows.
    """
    place = best_fit if pack else one_each
    survey = _longest_first(lengths)
    groups = [[at for at in survey if regimes[at] == regime] for regime in (False, True)]

    def positions(widths: Sequence[int]) -> int:
        total = 0
        for group in groups:
            used = Counter(bin.width for bin in place(lengths, group, widths))
            total += sum(-(-count // rows) * rows * width for width, count in used.items())
        return total

    top = _rounded(max(lengths))
    main = _rounded(_percentile(lengths, _MAIN_PERCENTILE))
    widths = [main, top] if pack and top > main * _NEARLY else [top]
    percents = (*range(5, 100, 5), _MAIN_PERCENTILE, 98, 99)
    candidates = {_rounded(_percentile(lengths, percent)) for percent in percents}
    best = positions(widths)
    while len(widths) < MAX_WIDTHS:
        tried = [
            (positions(sorted({*widths, w})), w) for w in sorted(candidates.difference(widths))
        ]
        if not tried or min(tried)[0] > best * (1 - _WORTH_A_WIDTH):
            break
        best, added = min(tried)
        insort(widths, added)
    return tuple(widths)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    order = sorted(range(len(lengths)), key=lambda at: lengths[at], reverse=True)
    if len(order) <= _SURVEY:
        return order
    return [order[at] for at in np.linspace(0, len(order) - 1, _SURVEY).round().astype(int)]


def _percentile(lengths: Sequence[int], percent: int) -> int:
    return int(np.percentile(lengths, percent, method="higher"))


def _rounded(length: int) -> int:
    return -(-length // WIDTH_STEP) * WIDTH_STEP
