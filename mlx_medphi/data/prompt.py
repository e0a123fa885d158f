"""The note prompt, in the one place that knows it.

`parse_user_prompt` is the exact inverse of `user_prompt`, so prepared files need no second copy of
a conversation.
"""

from __future__ import annotations

import re

from mlx_medphi.data.examples import Example, Message
from mlx_medphi.errors import DataError

__all__ = ["chat_messages", "parse_user_prompt", "prompt_parts", "user_prompt"]

_RULE = "for this conversation. Use only what was said."
_WHOLE = f"Write the clinical note {_RULE}\n\n"
_SECTION = re.compile(
    rf"Write the (?P<section>[^\n]+) section of the clinical note {re.escape(_RULE)}\n\n"
)


def prompt_parts(section: str | None) -> tuple[str, str]:
    """What stands before and after the conversation in the user's message.

    Args:
        section: the part of the note to write, as `GENHX`; None for the whole note.

    Raises:
        DataError: the section is empty or has a line break.
    """
    if section is None:
        return _WHOLE, ""
    if not section.strip() or section != section.strip() or "\n" in section or "\r" in section:
        raise DataError(
            "a section name is empty, padded with spaces, or longer than one line. Expected one "
            "line such as GENHX, or no section for the whole note."
        )
    return f"Write the {section} section of the clinical note {_RULE}\n\n", ""


def user_prompt(conversation_text: str, section: str | None) -> str:
    """The user's message that asks for a note, or for one section of it."""
    before, after = prompt_parts(section)
    return before + conversation_text + after


def parse_user_prompt(text: str) -> tuple[str, str | None] | None:
    """The (conversation text, section) that `user_prompt` was given, or None for any other text.

    >>> parse_user_prompt(user_prompt("Doctor: Hello.", "GENHX"))
    ('Doctor: Hello.', 'GENHX')
    """
    if text.startswith(_WHOLE):
        return text[len(_WHOLE) :], None
    match = _SECTION.match(text)
    return (text[match.end() :], match.group("section")) if match else None


def chat_messages(example: Example) -> tuple[Message, ...]:
    """The chat an example is trained on: its own messages, or prompt and note."""
    if example.messages is not None:
        return example.messages
    prompt = user_prompt(example.conversation.text(), example.note.section)
    return (Message("user", prompt), Message("assistant", example.note.text))
