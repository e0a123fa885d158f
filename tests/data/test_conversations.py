from __future__ import annotations

import pytest

from mlx_medphi.data.examples import Conversation, Example, Note, Turn, clean_text
from mlx_medphi.data.prompt import chat_messages
from mlx_medphi.errors import DataError


def test_text_and_from_text_are_inverse() -> None:
    turns = (
        Turn("", "Recorded on the ward.\n\nSecond line"),
        Turn("Doctor", "Patient: is that a tag? No."),
        Turn("Guest_family_2", "two  spaces stay"),
        Turn("Doctor", "…"),
    )
    assert Conversation.from_text(Conversation(turns).text()) == Conversation(turns)


def test_continuation_lines_join_the_turn_before() -> None:
    text = "Doctor: Take it\r\ntwice a day.\r\n\r\nPlan: rest\rPatient: OK."
    assert Conversation.from_text(text).turns == (
        Turn("Doctor", "Take it twice a day. Plan: rest"),
        Turn("Patient", "OK."),
    )


def test_words_on_the_line_after_a_tag_belong_to_it_and_bare_tags_are_dropped() -> None:
    text = "Doctor:\nHow are you?\nPatient:\n\nDoctor: Hello?"
    assert Conversation.from_text(text).text() == "Doctor: How are you?\nDoctor: Hello?"


def test_plain_text_is_one_turn_without_a_speaker() -> None:
    assert Conversation.from_text(" a visit\nin words ").turns == (Turn("", "a visit\nin words"),)


@pytest.mark.parametrize("text", ["", " \n\t\n", "Doctor:"])
def test_nothing_said_means_no_turns(text: str) -> None:
    assert Conversation.from_text(text).turns == ()


def test_one_word_and_two_hundred_turns_are_conversations() -> None:
    assert Conversation.from_text("Help").turns == (Turn("", "Help"),)
    long = "\n".join(f"{'Doctor' if i % 2 else 'Patient'}: turn {i}" for i in range(200))
    assert len(Conversation.from_text(long).turns) == 200
    assert Conversation.from_text(long).text() == long


def test_words_leave_the_tags_out() -> None:
    assert Conversation.from_text("Doctor: Hi.\nPatient: Hello.").words() == "Hi.\nHello."


def test_invisible_characters_become_spaces_or_nothing() -> None:
    assert clean_text("\ufeffa\u202fb\u00a0c\td\u200be \r\nf\r") == "a b c de\nf"


def test_a_turn_refuses_a_speaker_it_cannot_read_back_without_naming_them() -> None:
    with pytest.raises(DataError, match="canonical") as caught:
        Turn("Jane Example", "hello")
    assert "Jane" not in str(caught.value)


def test_a_turn_of_a_speaker_refuses_line_breaks_without_quoting_them() -> None:
    with pytest.raises(DataError, match="line break") as caught:
        Turn("Doctor", "secret\nwords")
    assert "secret" not in str(caught.value)


def test_no_text_of_a_patient_is_shown_by_an_object() -> None:
    conversation = Conversation.from_text("Doctor: How is Zoe?\nPatient: Zoe has a cough.")
    example = Example("a/1", "jsonl", conversation, Note("Zoe coughs.", "GENHX"))
    shown = repr([example, *conversation.turns, example.note, *chat_messages(example)])
    assert "Zoe" not in shown and "Example('a/1', Conversation(2 turns, 7 words)" in shown
