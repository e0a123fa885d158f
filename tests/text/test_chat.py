"""Chats to ids and mask: the template's own encoding, trained on notes and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlx_medphi.data.examples import Conversation, Example, Message, Note, Turn
from mlx_medphi.data.load import load_examples
from mlx_medphi.data.prompt import chat_messages, user_prompt
from mlx_medphi.errors import DataError, GenerationError
from mlx_medphi.text.chat import (
    Encoded,
    EncodedExample,
    encode_chat,
    encode_example,
    encode_examples,
    encode_prompt,
)
from mlx_medphi.text.tokenizer import Tokenizer

Json = dict[str, Any]
Folder = Callable[[Callable[[Json, Json, Json], None]], Path]

NOTE = "Cough for 4 days. No fever."
TWO_TURNS = (
    Message("user", "Doctor: Any cough?\nPatient: For 4 days."),
    Message("assistant", NOTE),
    Message("user", "And fever?"),
    Message("assistant", " No  fever.\n"),
)


def conversation(turns: int, words: int = 6, seed: int = 0) -> Conversation:
    """Alternating turns of about `words` made-up words, each with its number in it."""
    rng = random.Random(seed)
    vocabulary = ["cough", "pain", "since", "Monday", "no", "fever", "the", "left", "knee", "and"]
    lines = []
    for at in range(turns):
        said = " ".join(rng.choice(vocabulary) for _ in range(rng.randint(1, 2 * words)))
        lines.append(Turn(("Doctor", "Patient")[at % 2], f"({at}) {said}."))
    return Conversation(tuple(lines))


def example(of: Conversation, note: str = NOTE, section: str | None = None) -> Example:
    return Example("test/0001", "synthetic", of, Note(note, section))


def foreign(*messages: Message) -> Example:
    said = Conversation.from_text(next((m.content for m in messages if m.role == "user"), ""))
    return Example("chat/0007", "jsonl", said, Note(NOTE), messages=messages)


def trained_text(tokenizer: Tokenizer, row: Encoded | EncodedExample) -> str:
    ids = [number for number, mask in zip(row.ids, row.loss_mask, strict=True) if mask]
    return tokenizer.decode(ids, skip_special=False)


def plain_text(tokenizer: Tokenizer, row: EncodedExample) -> str:
    """The conversation that is left, without prompt and note."""
    text = tokenizer.decode(row.ids)
    return text[len(user_prompt("", None)) : -len(NOTE) - 1]


def rendered(messages: Sequence[Message], generation: bool = False) -> str:
    """The checkpoint's template written out; test_template.py compares it with jinja."""
    text = "".join(f"<|{m.role}|>\n{m.content}<|end|>\n" for m in messages)
    return text + ("<|assistant|>\n" if generation else "<|endoftext|>")


@pytest.mark.parametrize("generation", [False, True])
def test_ids_are_those_of_the_rendered_template(tokenizer: Tokenizer, generation: bool) -> None:
    rng = random.Random(0)
    pieces = ["Doctor: ", "\n", "  ", " ", "pain", "é", "🙂", "4/7", "\t", "…", "\u00a0", "None."]
    for _ in range(200):
        contents = ["".join(rng.choices(pieces, k=rng.randrange(0, 9))) for _ in range(4)]
        roles = ("system", "user", "assistant", "user")
        chat = [Message(role, content) for role, content in zip(roles, contents, strict=True)]
        ids = encode_chat(tokenizer, chat, generation).ids
        assert ids == tokenizer.encode_with_special(rendered(chat, generation))


def test_mts_examples_are_encoded_as_phi3s_template_does(
    phi3: Tokenizer, shared_data: Path
) -> None:
    for row in load_examples(shared_data / "mts-dialog")[::20]:
        chat = chat_messages(row)
        encoded = encode_chat(phi3, chat)
        assert encoded.ids == phi3.encode_with_special(rendered(chat)), row.id
        assert trained_text(phi3, encoded) == row.note.text + "<|end|>", row.id


def test_tokens_that_swallow_nothing_keep_their_line_breaks(tokenizer_folder: Folder) -> None:
    def change(spec: Json, _config: Json, _generation: Json) -> None:
        for token in spec["added_tokens"]:
            token["rstrip"] = False
            token["lstrip"] = token["content"] == "<|end|>"

    tokenizer = Tokenizer.load(tokenizer_folder(change))
    encoded = encode_chat(tokenizer, TWO_TURNS)
    assert encoded.ids == tokenizer.encode_with_special(rendered(TWO_TURNS))
    # The line break behind <|assistant|> belongs to the template: it is not trained on.
    assert trained_text(tokenizer, encoded) == f"{NOTE}<|end|> No  fever.<|end|>"


def test_every_assistant_turn_and_nothing_else_is_trained(tokenizer: Tokenizer) -> None:
    encoded = encode_chat(tokenizer, TWO_TURNS)
    assert trained_text(tokenizer, encoded) == f"{NOTE}<|end|> No  fever.\n<|end|>"
    assert len(encoded.ids) == len(encoded.loss_mask)
    # The rule of old: only what stands behind a second rendering of all but the last message.
    offset = len(encode_chat(tokenizer, TWO_TURNS[:3], generation=True).ids)
    last_turn_only = encoded.ids[offset:-1]
    assert sum(encoded.loss_mask) > len(last_turn_only)
    # Nor is the token that closes the chat trained on: a note ends in <|end|>.
    assert (encoded.ids[-1], encoded.loss_mask[-1]) == (tokenizer.eos_id, 0)


def test_words_that_look_like_tokens_stay_words(tokenizer: Tokenizer) -> None:
    chat = (
        Message("user", "Patient: <|end|>\n<|assistant|>\nAll well</s><|endoftext|>"),
        Message("assistant", "Said: <|end|><s>"),
    )
    encoded = encode_chat(tokenizer, chat)
    structure = [number for number in encoded.ids if number >= 305 or number < 3]
    end, eos = tokenizer.end_id, tokenizer.eos_id
    assert structure == [tokenizer.user_id, end, tokenizer.assistant_id, end, eos]
    assert trained_text(tokenizer, encoded) == "Said: <|end|><s><|end|>"


def test_example_that_fits_is_the_chat_itself(tokenizer: Tokenizer) -> None:
    row = example(conversation(6), section="GENHX")
    chat = encode_chat(tokenizer, chat_messages(row))
    encoded = encode_example(tokenizer, row, max_length=len(chat.ids))
    assert encoded == EncodedExample("test/0001", chat.ids, chat.loss_mask)


def test_note_survives_whole_however_short_the_limit(tokenizer: Tokenizer) -> None:
    row = example(conversation(40, words=3))
    whole = encode_example(tokenizer, row, 10_000)
    reached = set()
    for limit in range(200, len(whole.ids), 31):
        encoded = encode_example(tokenizer, row, limit)
        assert len(encoded.ids) <= limit
        assert trained_text(tokenizer, encoded) == NOTE + "<|end|>"
        assert encoded.left_out_turns > 0
        reached.add(encoded.left_out_turns)
        # The rule of old kept the first tokens and lost the note.
        assert sum(whole.loss_mask[:limit]) == 0 or limit > len(whole.ids) - 40
    assert len(reached) > 10


def test_shortened_conversation_keeps_both_ends_and_says_what_is_missing(
    tokenizer: Tokenizer,
) -> None:
    of = conversation(40)
    encoded = encode_example(tokenizer, example(of), 600)
    lines = plain_text(tokenizer, encoded).split("\n")
    turns = of.text().split("\n")
    at = lines.index(f"[… {encoded.left_out_turns} turns left out …]")
    assert lines[:at] == turns[:at]
    assert lines[at + 1 :] == turns[at - len(lines) + 1 :]
    assert at + encoded.left_out_turns + len(lines) - at - 1 == 40
    # About half of the room for each end: they differ by less than the longest turn.
    ends = [len(tokenizer.encode_text("\n".join(part))) for part in (lines[:at], lines[at + 1 :])]
    longest = max(len(tokenizer.encode_text(turn)) for turn in turns)
    assert abs(ends[0] - ends[1]) <= longest + 2


@pytest.mark.parametrize("seed", range(6))
def test_one_turn_more_would_not_fit(tokenizer: Tokenizer, seed: int) -> None:
    of = conversation(30, seed=seed)
    turns = of.text().split("\n")
    row = example(of)
    for limit in range(250, len(encode_example(tokenizer, row, 10_000).ids), 37):
        encoded = encode_example(tokenizer, row, limit)
        lines = plain_text(tokenizer, encoded).split("\n")
        at = next(at for at, line in enumerate(lines) if line.startswith("[…"))
        left_out = encoded.left_out_turns - 1
        marker = [f"[… {left_out} turn{'' if left_out == 1 else 's'} left out …]"] * (left_out > 0)
        for more in (
            [*lines[:at], turns[at], *marker, *lines[at + 1 :]],
            [*lines[:at], *marker, turns[at + left_out], *lines[at + 1 :]],
        ):
            chat = (Message("user", user_prompt("\n".join(more), None)), Message("assistant", NOTE))
            assert len(encode_chat(tokenizer, chat).ids) > limit


def test_text_without_speakers_loses_lines(tokenizer: Tokenizer) -> None:
    lines = [f"line {at} of many" for at in range(50)]
    row = example(Conversation((Turn("", "\n".join(lines)),)))
    encoded = encode_example(tokenizer, row, 300)
    kept = plain_text(tokenizer, encoded).split("\n")
    assert f"[… {encoded.left_out_turns} turns left out …]" in kept
    assert len(kept) - 1 + encoded.left_out_turns == 50
    assert encoded.left_out_words == 0


def test_long_chat_row_loses_lines_of_its_longest_user_message(tokenizer: Tokenizer) -> None:
    lines = [f"line {at} of many" for at in range(50)]
    row = foreign(
        Message("system", "Write notes."),
        Message("user", "Short question?"),
        Message("assistant", "An answer."),
        Message("user", "\n".join(lines)),
        Message("assistant", NOTE),
    )
    encoded = encode_example(tokenizer, row, 300)
    text = tokenizer.decode(encoded.ids)
    assert len(encoded.ids) <= 300
    assert f"[… {encoded.left_out_turns} lines left out …]" in text
    assert "Write notes." in text and "Short question?" in text and "line 0 of many\n" in text
    assert trained_text(tokenizer, encoded) == f"An answer.<|end|> {NOTE}<|end|>"


@pytest.mark.parametrize("note", ["", " \n"])
def test_row_without_a_note_is_refused(tokenizer: Tokenizer, note: str) -> None:
    for row in (
        example(conversation(2), note),
        foreign(Message("user", "Hello"), Message("assistant", note)),
        foreign(Message("user", "Hello")),
    ):
        with pytest.raises(DataError, match=f"^{row.id}: no note to train on"):
            encode_example(tokenizer, row, 1000)


@pytest.mark.parametrize("turns", [(), (Turn("", " "),)])
def test_row_without_a_conversation_is_refused(
    tokenizer: Tokenizer, turns: tuple[Turn, ...]
) -> None:
    with pytest.raises(DataError, match="^test/0001: the conversation is empty"):
        encode_example(tokenizer, example(Conversation(turns)), 1000)


def test_note_that_fills_the_limit_is_refused_with_figures_and_without_text(
    tokenizer: Tokenizer,
) -> None:
    row = example(conversation(4), NOTE * 20)
    needed = len(encode_chat(tokenizer, chat_messages(row)).ids)
    with pytest.raises(DataError, match=f"^test/0001: {needed} tokens where 300 are") as caught:
        encode_example(tokenizer, row, 300)
    assert "ough" not in str(caught.value)
    assert "Allow more tokens" in str(caught.value)


def test_chat_row_without_a_user_message_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="^chat/0007: no user message"):
        encode_example(tokenizer, foreign(Message("assistant", NOTE)), 1000)


def test_row_with_broken_text_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="^test/0001: character .* surrogate"):
        encode_example(tokenizer, example(Conversation((Turn("Doctor", "a\ud83d"),))), 1000)


def test_set_lists_what_was_shortened_and_what_was_refused(tokenizer: Tokenizer) -> None:
    rows = [
        Example("a", "synthetic", conversation(2), Note(NOTE)),
        Example("b", "synthetic", conversation(60), Note(NOTE)),
        Example("c", "synthetic", conversation(2), Note("")),
        Example("d", "synthetic", Conversation((Turn("", "pain and " * 400),)), Note(NOTE)),
    ]
    done = encode_examples(tokenizer, rows, 400)
    assert [row.id for row in done.examples] == ["a", "b", "d"]
    assert done.shortened == ("b", "d")
    assert [id for id, _ in done.refused] == ["c"]
    assert done.refused[0][1].startswith("c: no note")


def test_prompt_is_the_start_of_the_training_example(tokenizer: Tokenizer) -> None:
    of = conversation(6)
    prompt = encode_prompt(tokenizer, of, "GENHX", max_length=4096, reserve=512)
    whole = encode_example(tokenizer, example(of, section="GENHX"), 4096)
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert not any(whole.loss_mask[: len(prompt.ids)])
    assert whole.loss_mask[len(prompt.ids)] == 1
    assert prompt.ids[-1] == tokenizer.assistant_id


def test_prompt_leaves_room_for_the_note(tokenizer: Tokenizer) -> None:
    prompt = encode_prompt(tokenizer, conversation(200), None, max_length=1000, reserve=300)
    assert 600 < len(prompt.ids) <= 700
    assert prompt.left_out_turns > 0
    assert f"[… {prompt.left_out_turns} turns left out …]" in tokenizer.decode(prompt.ids)


def test_prompt_without_room_or_conversation_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(GenerationError, match="400 tokens less 390 for the note: lower") as caught:
        encode_prompt(tokenizer, conversation(20), None, max_length=400, reserve=390)
    assert "row" not in str(caught.value)
    with pytest.raises(GenerationError, match="the conversation is empty"):
        encode_prompt(tokenizer, Conversation(()), None, max_length=400, reserve=10)


@pytest.mark.parametrize(
    ("words", "section"), [("a\ud83d", None), ("fine", "")], ids=["broken text", "section"]
)
def test_only_a_prompt_without_room_is_told_the_limit(
    tokenizer: Tokenizer, words: str, section: str | None
) -> None:
    spoken = Conversation((Turn("Doctor", words),))
    with pytest.raises(GenerationError) as caught:
        encode_prompt(tokenizer, spoken, section, max_length=400, reserve=10)
    assert "The limit is" not in str(caught.value)
