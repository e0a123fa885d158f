"""The rule by which a conversation is shortened to a number of tokens.

Whole turns are left out from the middle: opening and closing turns are kept in alternation, so that
each end gets about half of the room, and a line `[… N turns left out …]` stands where the others
were. A turn that alone would take more than half of the room loses words from its own middle in the
same way. One turn more would not fit.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Shortened", "shorten"]

_WORD = re.compile(r"\s*\S+")


@dataclass(frozen=True)
class Shortened:
    """A text that fits, and how much was left out of it."""

    text: str
    left_out_turns: int = 0
    left_out_words: int = 0


def shorten(
    turns: Sequence[str], noun: str, count: Callable[[str], int], room: int
) -> Shortened | None:
    """Leave out turns, and words of overlong turns, until `count` of the text is at most `room`.

    Args:
        turns: the text's turns or lines; joined with line breaks they are the text.
        noun: what the marker line calls one of them.
        count: tokens that a text takes in its place, its surroundings included.
        room: how many tokens it may take.

    Returns:
        The longest text the rule allows, or None when hardly a word of it could stay.
    """
    whole = "\n".join(turns)
    if count(whole) <= room:
        return Shortened(whole)
    empty = count("")

    def cost(text: str) -> int:
        return count("\n" + text) - empty

    costs = [cost(turn) for turn in turns]
    marker = cost(_marker(len(turns), noun)) if len(turns) > 1 else 0
    # The first line needs no line break, which each of the costs includes.
    free = room - empty - marker + cost("")
    while free > 0:
        most = free // 2 if len(turns) > 1 else free
        head, tail, spare = _ends([min(tokens, most) for tokens in costs], free, marker)
        kept = [*range(head), *range(len(turns) - tail, len(turns))]
        overlong = [at for at in kept if costs[at] > most]
        cuts: dict[int, Shortened] = {}
        for at in overlong:
            # What whole turns leave over goes to those that lose words.
            cut = _without_words(turns[at], cost, most + spare // len(overlong))
            if cut is None:
                return None
            cuts[at] = cut
        short = _join(turns, noun, (head, tail), cuts)
        over = count(short.text) - room
        if over <= 0:
            return short if cuts else _grown(turns, noun, costs, (head, tail), count, room)
        # Single costs add up to the whole unless tokens join across a line break.
        free -= over
    return None


def _ends(costs: Sequence[int], free: int, marker: int) -> tuple[int, int, int]:
    """How many opening and closing turns fit, and the tokens that stay unused."""
    if sum(costs) <= free + marker:
        return len(costs), 0, free + marker - sum(costs)
    head = tail = used_head = used_tail = 0
    while head + tail < len(costs):
        opening, closing = costs[head], costs[len(costs) - 1 - tail]
        spare = free - used_head - used_tail
        # The end that has less so far goes first; the other may take what is left.
        if opening <= spare and (used_head <= used_tail or closing > spare):
            head, used_head = head + 1, used_head + opening
        elif closing <= spare:
            tail, used_tail = tail + 1, used_tail + closing
        else:
            break
    return head, tail, free - used_head - used_tail


def _join(
    turns: Sequence[str], noun: str, ends: tuple[int, int], cuts: Mapping[int, Shortened]
) -> Shortened:
    head, tail = ends
    texts = [cuts[at].text if at in cuts else turn for at, turn in enumerate(turns)]
    left_out = len(turns) - head - tail
    if left_out:
        texts[head : len(turns) - tail] = [_marker(left_out, noun)]
    return Shortened("\n".join(texts), left_out, sum(c.left_out_words for c in cuts.values()))


def _grown(
    turns: Sequence[str],
    noun: str,
    costs: Sequence[int],
    ends: tuple[int, int],
    count: Callable[[str], int],
    room: int,
) -> Shortened:
    """The text with each further turn that fits after all: a shorter marker line leaves room."""
    short = _join(turns, noun, ends, {})
    while True:  # ends at the latest before the whole text, which did not fit
        more = [(ends[0] + 1, ends[1]), (ends[0], ends[1] + 1)]
        if sum(costs[: ends[0]]) > sum(costs[len(costs) - ends[1] :]):
            more.reverse()
        for longer in more:
            candidate = _join(turns, noun, longer, {})
            if count(candidate.text) <= room:
                ends, short = longer, candidate
                break
        else:
            return short


def _without_words(text: str, cost: Callable[[str], int], most: int) -> Shortened | None:
    """The text without the words of its middle, or None when fewer than two could stay."""
    words = _WORD.findall(text)

    def keeping(kept: int) -> str:
        head = (kept + 1) // 2
        gap = " " + _marker(len(words) - kept, "word")
        return "".join([*words[:head], gap, *words[len(words) - kept + head :]]).lstrip()

    kept = bisect_right(range(len(words)), most, key=lambda number: cost(keeping(number))) - 1
    # A speaker's tag is a word too: one word alone would say nothing.
    return Shortened(keeping(kept), 0, len(words) - kept) if kept >= 2 else None


def _marker(number: int, noun: str) -> str:
    return f"[… {number} {noun}{'' if number == 1 else 's'} left out …]"
