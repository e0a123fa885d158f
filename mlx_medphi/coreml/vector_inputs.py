"""The questions of a vectors file, for one tokenizer; `vectors.py` answers them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlx_medphi.coreml import vector_cases as cases
from mlx_medphi.data.examples import Message
from mlx_medphi.data.prompt import user_prompt
from mlx_medphi.text.chat import encode_chat
from mlx_medphi.text.tokenizer import Tokenizer

__all__ = ["Case", "inputs"]

Case = dict[str, Any]

# Prompts at least this long are also asked for in less room.
LONG = 100


def inputs(tokenizer: Tokenizer) -> dict[str, list[Case]]:
    """Group -> its cases, without their answers; see `vectors.py` for the groups."""
    return {
        "encode": [{"name": name, "text": text} for name, text in cases.texts()],
        "special": list(_special_inputs(tokenizer)),
        "decode": list(_id_inputs(tokenizer)),
        "chat": list(_chat_inputs(tokenizer)),
        "note": list(_note_inputs(tokenizer)),
    }


def _special_inputs(tokenizer: Tokenizer) -> Iterator[Case]:
    for at, text in enumerate(cases.LOOKALIKES):
        yield {"name": f"look-alike {at}", "text": text}
    for name, messages in _known_chats(tokenizer):
        text = "".join(piece.text for piece in tokenizer.template.pieces(messages))
        yield {"name": f"{name}, rendered", "text": text}


def _id_inputs(tokenizer: Tokenizer) -> Iterator[Case]:
    yield {"name": "no ids", "ids": []}
    for at, text in enumerate(
        ("\U0001f600 \u6f22 \xe9 a", " a\n\nb ", "\U0001f468\u200d\U0001f469")
    ):
        ids = tokenizer.encode_text(text)
        yield {"name": f"text {at}", "ids": ids}
        yield {"name": f"text {at}, cut at the end", "ids": ids[:-1]}
        yield {"name": f"text {at}, cut at the start", "ids": ids[1:]}
        yield {"name": f"text {at}, backwards", "ids": ids[::-1]}
        yield {"name": f"text {at}, ended inside", "ids": [*ids[:-2], tokenizer.end_id, *ids[-2:]]}
    for text in ("<|end|>", "<|user|>\n a</s> b<s>c<unk>"):
        yield {"name": f"added tokens of {text!r}", "ids": tokenizer.encode_with_special(text)}
    yield from ({"name": n, "ids": ids} for n, ids in cases.random_ids(tokenizer.vocab_size))


def _known_chats(tokenizer: Tokenizer) -> Iterator[tuple[str, tuple[Message, ...]]]:
    for name, messages in cases.chats():
        if tokenizer.template.knows_system or all(m.role != "system" for m in messages):
            yield name, messages


def _chat_inputs(tokenizer: Tokenizer) -> Iterator[Case]:
    for name, messages in _known_chats(tokenizer):
        plain = [{"role": m.role, "content": m.content} for m in messages]
        for generation in (False, True):
            yield {"name": name, "messages": plain, "generation": generation}


def _note_inputs(tokenizer: Tokenizer) -> Iterator[Case]:
    for name, conversation, section in cases.conversations():
        turns = [{"speaker": turn.speaker, "text": turn.text} for turn in conversation.turns]
        prompt = Message("user", user_prompt(conversation.text(), section))
        whole = len(encode_chat(tokenizer, [prompt], generation=True).ids)
        # As it is, and with too little room for a third of it.
        for room in (whole, whole * 2 // 3) if whole > LONG else (whole,):
            case = {"name": f"{name} in {room}", "turns": turns, "section": section}
            yield {**case, "max_length": room + 32, "reserve": 32}
