from __future__ import annotations

import time

import pytest

from mlx_medphi.data.leaks import find_overlaps, near_duplicates, normalised

WORDS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november".split()
)
NOTE = " ".join(WORDS[:10])
TALK = "Doctor: " + " ".join(WORDS) + "."


def test_normalised_keeps_letters_and_digits_only() -> None:
    assert normalised("B.P. 120/80 — Ünder\n") == ("b", "p", "120", "80", "nder")


def test_an_equal_note_of_eight_words_leaks_whatever_the_dialogue(example) -> None:
    train = [example("t", "Doctor: One thing.", NOTE.upper() + "!")]
    (found,) = find_overlaps(train, [example("e", "Doctor: Another.", NOTE)])
    assert (found.train_id, found.evaluation_id, found.part, found.share) == ("t", "e", "note", 1.0)
    assert found.is_leak


def test_equal_notes_below_eight_words_prove_nothing(example) -> None:
    seven = " ".join(WORDS[:7])
    train = [example("t", "Doctor: One.", seven), example("u", "Doctor: Three.", "None.")]
    assert (
        find_overlaps(
            train, [example("e", "Doctor: Two.", seven), example("f", "Doctor: Four.", "None.")]
        )
        == []
    )


def test_equal_dialogues_of_any_length_leak_and_tags_do_not_hide_them(example) -> None:
    train = [example("t", "Doctor: Any allergies?\nPatient: No.", "None.")]
    (found,) = find_overlaps(train, [example("e", "Patient: Any allergies?\nDoctor: no", "NKDA")])
    assert (found.part, found.share) == ("dialogue", 1.0)


# 14 words hold seven 8-grams; each replaced word at the end breaks one of them.
@pytest.mark.parametrize(
    ("broken", "share"), [(0, 1.0), (1, 6 / 7), (2, 5 / 7), (4, 3 / 7), (5, None)]
)
def test_the_share_counts_the_evaluation_rows_own_grams(example, broken, share) -> None:
    kept = WORDS[: len(WORDS) - broken]
    train = [example("t", "Doctor: oh " + " ".join(kept) + " and much more was said here", "x")]
    found = find_overlaps(train, [example("e", TALK, "y")])
    assert [o.share for o in found] == ([] if share is None else [share])
    if found:
        assert found[0].is_leak == (share >= 0.8)


def test_a_share_of_exactly_four_fifths_is_a_leak(example) -> None:
    # Twelve words hold five 8-grams, and the last word breaks one.
    train = [example("t", "Doctor: " + " ".join(WORDS[:11]), "x")]
    (found,) = find_overlaps(train, [example("e", "Doctor: " + " ".join(WORDS[:12]), "y")])
    assert found.share == 0.8 and found.is_leak


def test_every_training_row_that_leaks_into_two_rows_is_paired_with_both(example) -> None:
    rows = [example(name, TALK, name) for name in "abc"]
    assert [(o.train_id, o.evaluation_id) for o in find_overlaps(rows[:1], rows[1:])] == [
        ("a", "b"),
        ("a", "c"),
    ]


def test_near_duplicates_keep_the_first_of_each_kind(example) -> None:
    rows = [
        example("a", TALK, TALK),
        example("b", TALK, "Another note."),
        # Seven 8-grams of eight in common, both ways and in both parts.
        example("c", TALK + "\nPatient: ok", TALK + " indeed"),
        example("d", TALK, TALK),
        example("e", "Doctor: Something else.", TALK),
    ]
    assert [(o.train_id, o.evaluation_id) for o in near_duplicates(rows)] == [
        ("c", "a"),
        ("d", "a"),
    ]


def test_a_dropped_row_does_not_stand_for_a_later_one(example) -> None:
    words = [f"w{i}" for i in range(40)]
    # Twenty 8-grams each; neighbours share 17 of them, the first and the third only 14.
    texts = ["Doctor: " + " ".join(words[shift : shift + 27]) for shift in (0, 3, 6)]
    rows = [example(name, text, text) for name, text in zip("abc", texts, strict=True)]
    assert [(o.train_id, o.evaluation_id) for o in near_duplicates(rows)] == [("b", "a")]


def test_a_short_dialogue_inside_a_long_one_is_no_duplicate(example) -> None:
    rows = [example("a", TALK, NOTE), example("b", TALK + (" and so on we went" * 9), NOTE)]
    assert near_duplicates(rows) == []


@pytest.mark.slow
def test_a_greeting_that_opens_every_row_does_not_make_the_search_quadratic(example) -> None:
    greeting = "Doctor: " + " ".join(f"hello{i}" for i in range(60))
    rows = [
        example(
            f"{n:04d}", greeting + "\nPatient: " + " ".join(f"w{n}x{i}" for i in range(60)), f"n{n}"
        )
        for n in range(1500)
    ]
    start = time.perf_counter()
    assert near_duplicates(rows) == []
    # Comparing each pair's shared grams takes over 20 s here; indexed by rare grams, under 1 s.
    assert time.perf_counter() - start < 8
