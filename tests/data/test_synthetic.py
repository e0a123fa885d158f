"""The embedded sample and the tiny base's corpus: the same every time, true to their facts."""

from __future__ import annotations

import re

import pytest

from mlx_medphi.data import synthetic_pretraining as pretraining
from mlx_medphi.data import synthetic_words as words
from mlx_medphi.data.examples import Conversation, Example, Note, Turn
from mlx_medphi.data.prompt import parse_user_prompt
from mlx_medphi.data.synthetic import facts, note_text, parse_note, sample
from mlx_medphi.errors import DataError

ROWS = 300


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return sample(ROWS, seed=0) + sample(ROWS, seed=0, held_out=True)


def test_the_same_seed_gives_the_same_examples() -> None:
    assert sample(20, seed=3) == sample(20, seed=3)
    assert sample(20, seed=3)[:5] == sample(5, seed=3)
    assert pretraining.reading(5, seed=3) == pretraining.reading(5, seed=3)
    assert pretraining.repeating(5, seed=3) == pretraining.repeating(5, seed=3)


def test_the_sample_is_the_one_the_demo_was_tuned_on() -> None:
    first = sample(1, seed=0)[0]
    assert first.id == "synthetic/0/0000"
    assert first.note.text == (
        "Subjective: Vera Porter, aged 33, reports a stiff neck for five days. Allergies: eggs.\n"
        "Plan: Morvatin 300 mg every evening for 12 days. Review in two weeks."
    )


def test_other_seeds_give_other_examples() -> None:
    texts = {e.conversation.text() for seed in range(4) for e in sample(20, seed)}
    assert len(texts) == 80


def test_every_fact_stands_in_the_note_and_in_the_conversation(rows: list[Example]) -> None:
    for example in rows:
        said, written = example.conversation.text(), example.note.text
        for field, value in vars(facts(example)).items():
            assert _has(written, value), (example.id, field)
            if (field, value) != ("allergy", "none"):
                assert _has(said, value), (example.id, field)


def test_no_allergy_in_the_note_means_that_none_was_named(rows: list[Example]) -> None:
    without = [e for e in rows if facts(e).allergy == "none"]
    assert without
    named = set(words.ALLERGIES) - {"none"}
    assert not [e.id for e in without if any(_has(e.conversation.text(), a) for a in named)]


def test_a_note_holds_nothing_but_its_facts(rows: list[Example]) -> None:
    assert [e.id for e in rows if note_text(facts(e)) != e.note.text] == []


def test_conversations_are_short_and_take_turns(rows: list[Example]) -> None:
    for example in rows:
        speakers = [turn.speaker for turn in example.conversation.turns]
        assert 8 <= len(speakers) <= 12
        assert speakers == ["Doctor", "Patient"] * (len(speakers) // 2)


def test_a_conversation_survives_being_read_back(rows: list[Example]) -> None:
    assert all(Conversation.from_text(e.conversation.text()) == e.conversation for e in rows)


def test_held_out_names_and_drugs_never_occur_in_the_training_sample(rows: list[Example]) -> None:
    seen = {word for e in rows[:ROWS] for word in _names(e)}
    held_out = {word for e in rows[ROWS:] for word in _names(e)}
    assert held_out == {
        *words.FIRST_NAMES[-words.HELD_OUT_COUNT :],
        *words.LAST_NAMES[-words.HELD_OUT_COUNT :],
        *words.DRUGS[-words.HELD_OUT_COUNT :],
    }
    assert not seen & held_out


def test_examples_say_that_they_are_synthetic(rows: list[Example]) -> None:
    assert {e.source for e in rows} == {"synthetic"}
    assert len({e.id for e in rows}) == len(rows)
    assert all(e.id.startswith("synthetic") for e in rows)


def test_every_phrasing_occurs(rows: list[Example]) -> None:
    said = "\n".join(e.conversation.text() for e in rows)
    for name in ("ASK_NAME", "ASK_AGE", "ASK_COMPLAINT", "ASK_ALLERGY", "ASK_HOW_LONG", "THANK"):
        for phrase in getattr(words, name):
            assert phrase in said


def test_facts_of_a_foreign_note_are_an_error() -> None:
    foreign = Example("x/1", "jsonl", Conversation((Turn("Doctor", "Hello."),)), Note("Well."))
    with pytest.raises(DataError, match="x/1"):
        facts(foreign)


def test_a_negative_count_is_an_error() -> None:
    with pytest.raises(DataError, match="-1"):
        sample(-1, seed=0)


def test_the_base_never_reads_a_note_or_the_note_prompt() -> None:
    for example in [*pretraining.reading(ROWS, seed=0), *pretraining.repeating(ROWS, seed=0)]:
        for message in example.messages or ():
            assert parse_note(message.content) is None
            assert parse_user_prompt(message.content) is None
            assert "Subjective" not in message.content and "Plan:" not in message.content


def test_answers_about_a_conversation_are_read_from_it() -> None:
    phrasings = {text for texts in pretraining.QUESTIONS.values() for text in texts}
    answered = 0
    for example in pretraining.reading(ROWS, seed=0):
        messages = example.messages or ()
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            asked = [text for text in phrasings if text in question.content.split("\n\n")]
            if asked and answer.content != "none":
                assert _has(messages[0].content, answer.content)
                answered += 1
    assert answered > ROWS


def test_what_is_to_be_repeated_is_repeated() -> None:
    for example in pretraining.repeating(50, seed=0):
        question, answer = example.messages or ()
        assert question.content.split("\n\n")[1] == answer.content


def _has(text: str, value: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None


def _names(example: Example) -> set[str]:
    found = facts(example)
    return {*found.name.split(), found.drug}
