"""Chats to token ids and loss mask, made together so that they cannot disagree.

Where an example is longer than it may be, its conversation is shortened by the rule of
`shorten.py`, and nothing else: a note is never cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlx_medphi.data.examples import Conversation, Example, Message
from mlx_medphi.data.prompt import chat_messages, prompt_parts
from mlx_medphi.errors import DataError, GenerationError
from mlx_medphi.text.shorten import Shortened, shorten
from mlx_medphi.text.tokenizer import Tokenizer

__all__ = [
    "Encoded",
    "EncodedExample",
    "EncodedPrompt",
    "EncodedSet",
    "encode_chat",
    "encode_example",
    "encode_examples",
    "encode_prompt",
]


@dataclass(frozen=True)
class Encoded:
    """Ids of a chat and, per id, 1 where it is trained on, else 0."""

    ids: list[int]
    loss_mask: list[int]


@dataclass(frozen=True)
class EncodedExample:
    """An example as tokens, with what had to be left out of its conversation."""

    id: str
    ids: list[int]
    loss_mask: list[int]
    left_out_turns: int = 0
    left_out_words: int = 0


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as tokens; it ends where the model goes on to write the note."""

    ids: list[int]
    left_out_turns: int = 0
    left_out_words: int = 0


@dataclass(frozen=True)
class EncodedSet:
    """Many examples as tokens.

    Args:
        examples: those that can be trained on, in the order given.
        shortened: ids of the examples whose conversation lost turns or words.
        refused: (id, reason) of the examples left out.
    """

    examples: tuple[EncodedExample, ...]
    shortened: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], generation: bool = False
) -> Encoded:
    """Ids and loss mask of a chat.

    The ids are those of the checkpoint's own chat template, except that words which look like one
    of its tokens stay words. Trained on are the text of every assistant message and its `<|end|>`.

    Args:
        generation: end in `<|assistant|>`, for the model to go on, not in the closing token.

    Raises:
        DataError: a role that the template cannot write, or text that is not UTF-8.

    >>> tokenizer = Tokenizer.load("tests/fixtures/phi3/mini-4k")
    >>> chat = (Message("user", "Doctor: Any pain?"), Message("assistant", "No pain."))
    >>> encoded = encode_chat(tokenizer, chat)
    >>> trained = [i for i, m in zip(encoded.ids, encoded.loss_mask) if m]
    >>> tokenizer.decode(trained, skip_special=False)
    'No pain.<|end|>'
    """
    return Encoded(*tokenizer.encode_pieces(tokenizer.template.pieces(messages, generation)))


def encode_example(tokenizer: Tokenizer, example: Example, max_length: int) -> EncodedExample:
    """An example as at most `max_length` tokens, its conversation shortened where needed.

    A chat row that is not in the project's own prompt form has its longest user message shortened
    in the same way, line by line.

    Raises:
        DataError: no note or no conversation, a role or text that cannot be written, or a note and
            prompt that leave no room for any of the conversation. The message names the row.
    """
    messages = chat_messages(example)
    if not any(m.role == "assistant" and m.content.strip() for m in messages):
        raise DataError(
            f"{example.id}: no note to train on. Expected text in an assistant message; give the "
            "row a note or leave it out."
        )
    try:
        if example.messages is None:
            at, body = 0, _conversation_body(example.conversation, example.note.section)
        else:
            at, body = _longest_user_message(tokenizer, messages)
        encoded, short = _fit(tokenizer, messages, at, body, max_length)
    except _NoRoom as exc:
        raise DataError(f"{example.id}: {exc} Allow more tokens, or leave the row out.") from exc
    except DataError as exc:
        raise DataError(f"{example.id}: {exc}") from exc
    return EncodedExample(
        example.id, encoded.ids, encoded.loss_mask, short.left_out_turns, short.left_out_words
    )


def encode_examples(
    tokenizer: Tokenizer, examples: Iterable[Example], max_length: int
) -> EncodedSet:
    """All examples as at most `max_length` tokens each; those that cannot be so are listed."""
    encoded: list[EncodedExample] = []
    refused: list[tuple[str, str]] = []
    for example in examples:
        try:
            encoded.append(encode_example(tokenizer, example, max_length))
        except DataError as exc:
            refused.append((example.id, str(exc)))
    shortened = [row.id for row in encoded if row.left_out_turns or row.left_out_words]
    return EncodedSet(tuple(encoded), tuple(shortened), tuple(refused))


def encode_prompt(
    tokenizer: Tokenizer,
    conversation: Conversation,
    section: str | None,
    max_length: int,
    reserve: int,
) -> EncodedPrompt:
    """The prompt that asks for a note, shortened so that `reserve` tokens stay free for it.

    Args:
        section: the part of the note to write, as `GENHX`; None for the whole note.
        max_length: tokens of prompt and note together.
        reserve: tokens kept free for the note.

    Raises:
        GenerationError: an empty conversation, or no room for any of it.
    """
    try:
        body = _conversation_body(conversation, section)
        messages = (Message("user", body.content),)
        encoded, short = _fit(tokenizer, messages, 0, body, max_length - reserve, generation=True)
    except _NoRoom as exc:
        raise GenerationError(
            f"{exc} The limit is {max_length} tokens less {reserve} for the note: lower max_tokens "
            "(--max-tokens), or give a shorter conversation."
        ) from exc
    except DataError as exc:
        raise GenerationError(str(exc)) from exc
    return EncodedPrompt(encoded.ids, short.left_out_turns, short.left_out_words)


class _NoRoom(DataError):
    """Too long even without the conversation; what to do about it is for the caller to say."""


@dataclass(frozen=True)
class _Body:
    """A user message whose turns may be left out: before + turns, one per line, + after."""

    before: str
    turns: tuple[str, ...]
    after: str
    noun: str

    @property
    def content(self) -> str:
        return self.around("\n".join(self.turns))

    def around(self, text: str) -> str:
        return self.before + text + self.after


def _conversation_body(conversation: Conversation, section: str | None) -> _Body:
    turns: list[str] = []
    for turn in conversation.turns:
        line = Conversation((turn,)).text()
        # Text without speakers is one turn; its lines are as near to turns as can be told.
        turns += [line] if turn.speaker else line.split("\n")
    if not any(turn.strip() for turn in turns):
        raise DataError("the conversation is empty. Expected at least one turn.")
    before, after = prompt_parts(section)
    return _Body(before, tuple(turns), after, "turn")


def _longest_user_message(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[int, _Body]:
    users = [at for at, message in enumerate(messages) if message.role == "user"]
    if not users:
        raise DataError("no user message. Expected a conversation before the note.")
    longest = max(users, key=lambda at: len(tokenizer.encode_text(messages[at].content)))
    return longest, _Body("", tuple(messages[longest].content.split("\n")), "", "line")


def _fit(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    at: int,
    body: _Body,
    limit: int,
    generation: bool = False,
) -> tuple[Encoded, Shortened]:
    """The chat in at most `limit` tokens, message `at` (which is `body`) shortened where needed."""
    encoded = encode_chat(tokenizer, messages, generation)
    if len(encoded.ids) <= limit:
        return encoded, Shortened(body.content)

    # Text between two added tokens is encoded by itself, so one message can be counted alone.
    def count(text: str) -> int:
        return len(encode_chat(tokenizer, (Message("user", body.around(text)),)).ids)

    beside = len(encoded.ids) - count("\n".join(body.turns))
    short = shorten(body.turns, body.noun, count, limit - beside)
    if short is None:
        raise _NoRoom(
            f"{len(encoded.ids)} tokens where {limit} are allowed, and what may not be cut takes "
            f"{beside + count('')}."
        )
    cut = (*messages[:at], Message("user", body.around(short.text)), *messages[at + 1 :])
    return encode_chat(tokenizer, cut, generation), short
