"""The shortening rule by itself, on texts whose tokens are easy to count."""

from __future__ import annotations

import random
import re

import pytest

from mlx_medphi.text.shorten import Shortened, shorten


def count(text: str) -> int:
    """One token per word and per line break, in a frame of three."""
    return 3 + len(re.findall(r"\S+|\n", text))


def turns_of(*lengths: int) -> list[str]:
    return [
        " ".join(f"t{at}w{word}" for word in range(length)) for at, length in enumerate(lengths)
    ]


def test_text_that_fits_is_untouched() -> None:
    turns = turns_of(3, 4, 5)
    text = "\n".join(turns)
    assert shorten(turns, "turn", count, count(text)) == Shortened(text)


def test_turns_leave_from_the_middle() -> None:
    turns = turns_of(*[4] * 9)
    # Four turns of 4 words, their line breaks, the marker of 6 words, the frame.
    short = shorten(turns, "turn", count, 3 + 4 * 5 + 6)
    assert short is not None
    assert short.text.split("\n") == [*turns[:2], "[… 5 turns left out …]", *turns[-2:]]
    assert (short.left_out_turns, short.left_out_words) == (5, 0)


def test_each_end_gets_about_half_of_the_room() -> None:
    # The opening turns are long and the closing ones short.
    turns = turns_of(*[10] * 10, *[2] * 50)
    short = shorten(turns, "turn", count, 3 + 6 + 100)
    assert short is not None
    head, tail = re.split(r"\n\[.*\]\n", short.text)
    assert abs(count(head) - count(tail)) <= 11


def test_one_end_takes_what_the_other_cannot_use() -> None:
    turns = turns_of(7, 14, *[2] * 12)
    short = shorten(turns, "turn", count, 39)
    assert short is not None
    # The second turn no longer fits once both ends have about as much.
    assert short.text.split("\n") == [turns[0], "[… 6 turns left out …]", *turns[-7:]]


def test_single_overlong_turn_loses_words_from_its_middle() -> None:
    short = shorten(turns_of(100), "turn", count, 3 + 26)
    assert short is not None
    words = " ".join([*turns_of(10)[0].split(), "[…", "80", "words", "left", "out", "…]"])
    assert short.text.startswith(words + " t0w90 ")
    assert (short.left_out_turns, short.left_out_words) == (0, 80)
    assert count(short.text) == 29


def test_overlong_turn_beside_short_ones_gets_what_they_leave() -> None:
    turns = turns_of(3, 500, 3)
    short = shorten(turns, "turn", count, 200)
    assert short is not None
    assert short.text.startswith(turns[0] + "\n") and short.text.endswith("\n" + turns[2])
    assert short.left_out_turns == 0
    assert 195 <= count(short.text) <= 200


def test_two_overlong_turns_share_the_room() -> None:
    short = shorten(turns_of(500, 500), "turn", count, 200)
    assert short is not None
    first, second = short.text.split("\n")
    assert abs(count(first) - count(second)) <= 2
    assert short.left_out_words == 1000 - (count(first) + count(second) - 2 * 3 - 2 * 6)


def test_line_breaks_inside_an_overlong_turn_are_kept() -> None:
    turn = "\n".join(turns_of(*[5] * 40))
    short = shorten([turn], "turn", count, 60)
    assert short is not None
    assert short.text.startswith("\n".join(turns_of(5, 5)) + "\n")


@pytest.mark.parametrize("room", [0, 3, 5, 9, 10])
def test_nothing_comes_back_when_hardly_a_word_could_stay(room: int) -> None:
    assert shorten(turns_of(50), "turn", count, room) is None
    assert shorten(turns_of(50, 50, 50), "turn", count, room) is None


def test_result_always_fits_and_accounts_for_every_turn() -> None:
    rng = random.Random(0)
    for _ in range(300):
        turns = turns_of(*(rng.choice((1, 2, 5, 9, 40)) for _ in range(rng.randint(1, 20))))
        room = rng.randint(4, count("\n".join(turns)))
        short = shorten(turns, "line", count, room)
        if short is None:
            assert room < 3 + 6 + 2 * (6 + 3) + 3
            continue
        assert count(short.text) <= room
        kept = [line for line in short.text.split("\n") if "lines left" not in line]
        kept = [line for line in kept if "1 line left" not in line]
        assert len(kept) + short.left_out_turns == len(turns)
        words = sum(len(re.sub(r"\[…[^]]*\]", "", line).split()) for line in kept)
        of_kept = [turn for turn in turns if any(line.split()[0] in turn.split() for line in kept)]
        assert words + short.left_out_words == sum(len(turn.split()) for turn in of_kept)


def test_tokens_that_join_across_lines_are_counted_exactly() -> None:
    # Every second line break is free, so costs of single turns are too high; then too low.
    def less(text: str) -> int:
        return count(text) - text.count("\n") // 2

    def more(text: str) -> int:
        return count(text) + text.count("\n") // 2

    turns = turns_of(*[4] * 60)
    for counting in (less, more):
        for room in range(40, counting("\n".join(turns)), 11):
            short = shorten(turns, "turn", counting, room)
            assert short is not None
            assert counting(short.text) <= room
            assert counting(short.text) > room - 8


def test_nothing_comes_back_when_lines_together_never_fit() -> None:
    def jump(text: str) -> int:
        return count(text) + (1000 if text.count("\n") > 1 else 0)

    assert shorten(turns_of(4, 4, 4, 4), "turn", jump, 30) is None
