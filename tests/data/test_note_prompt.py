from __future__ import annotations

import pytest

from mlx_medphi.data.examples import Message
from mlx_medphi.data.prompt import chat_messages, parse_user_prompt, prompt_parts, user_prompt
from mlx_medphi.errors import DataError


@pytest.mark.parametrize("section", [None, "GENHX", "FAM/SOCHX", "x section of the clinical note"])
@pytest.mark.parametrize("text", ["Doctor: Hi.", "", "\n\n", "Write the clinical note", "a\n\nb "])
def test_parse_is_the_exact_inverse(section: str | None, text: str) -> None:
    assert parse_user_prompt(user_prompt(text, section)) == (text, section)


def test_a_prompt_inside_a_conversation_is_not_unpacked() -> None:
    inner = user_prompt("Doctor: Hi.", "CC")
    assert parse_user_prompt(user_prompt(inner, None)) == (inner, None)


@pytest.mark.parametrize(
    "text", ["", "Summarise this.", "Write the note", " " + user_prompt("a", None)]
)
def test_other_text_is_not_our_prompt(text: str) -> None:
    assert parse_user_prompt(text) is None


def test_parts_frame_the_conversation() -> None:
    before, after = prompt_parts("ROS")
    assert before + "said" + after == user_prompt("said", "ROS")
    assert "ROS" in before


@pytest.mark.parametrize("section", ["", " ", "A\nB", " CC", "A\rB"])
def test_a_section_that_would_not_read_back_is_refused(section: str) -> None:
    with pytest.raises(DataError, match="section"):
        user_prompt("said", section)


def test_chat_is_prompt_and_note_unless_the_row_has_its_own(example) -> None:
    row = example("a", "Doctor: Hi.", "A note.", section="CC")
    asked = Message("user", user_prompt("Doctor: Hi.", "CC"))
    assert chat_messages(row) == (asked, Message("assistant", "A note."))
    own = (Message("user", "q"), Message("assistant", "a"))
    assert chat_messages(example("b", messages=own)) == own
