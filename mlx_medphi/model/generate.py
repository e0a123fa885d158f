"""Write a note for a conversation, token by token.

`generate_ids` gives what transformers gives for the same ids: keys and values are kept between
tokens, and where a sequence outgrows LongRoPE's short factors it is read again with the long ones.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, cast

import mlx.core as mx

from mlx_medphi.config import GenerateConfig
from mlx_medphi.data.examples import Conversation
from mlx_medphi.errors import GenerationError
from mlx_medphi.model.cache import Cache
from mlx_medphi.model.phi3 import Phi3ForCausalLM
from mlx_medphi.model.sampling import next_token
from mlx_medphi.text.chat import EncodedPrompt, encode_prompt
from mlx_medphi.text.tokenizer import Tokenizer

__all__ = ["NoteStream", "generate_ids", "generate_note", "stream_note"]

logger = logging.getLogger(__name__)

# Tokens of a prompt read at once: their attention scores and not the whole prompt's are in memory.
PREFILL = 512
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def generate_note(
    model: Phi3ForCausalLM,
    tokenizer: Tokenizer,
    conversation: Conversation | str,
    *,
    section: str | None = None,
    config: GenerateConfig | None = None,
    shorten: bool = True,
) -> str:
    """The whole note; see `stream_note`.

    >>> model, tokenizer = load("microsoft/Phi-3-mini-4k-instruct")  # doctest: +SKIP
    >>> generate_note(model, tokenizer, "Doctor: Any fever?\\nPatient: No.")  # doctest: +SKIP
    'The patient has no fever.'
    """
    note = stream_note(
        model, tokenizer, conversation, section=section, config=config, shorten=shorten
    )
    return "".join(note).rstrip()


def stream_note(
    model: Phi3ForCausalLM,
    tokenizer: Tokenizer,
    conversation: Conversation | str,
    *,
    section: str | None = None,
    config: GenerateConfig | None = None,
    shorten: bool = True,
) -> NoteStream:
    """Start writing a note; iterate over the result for its text, piece by piece.

    Args:
        model: a model, with or without an adapter.
        tokenizer: its tokenizer.
        conversation: a conversation, or its text with one `Speaker: words` line per turn.
        section: the part of the note to write, e.g. "GENHX"; None for the whole note.
        config: how to choose tokens, and how many at most.
        shorten: leave out turns of a conversation that is too long for the model's context, as in
            training; how many is logged as a warning and stands in the result. False: an error.

    Raises:
        GenerationError: a conversation without words, or too long where `shorten` is false.
    """
    config = config or GenerateConfig()
    if isinstance(conversation, str):
        conversation = Conversation.from_text(conversation)
    if not isinstance(conversation, Conversation):
        raise GenerationError(
            f"a conversation is a Conversation or its text, found {type(conversation).__name__}; "
            "of an example take example.conversation"
        )
    if not conversation.words().strip():
        raise GenerationError("the conversation has no words; expected at least one turn of speech")
    context = model.config.max_position_embeddings
    if config.max_tokens >= context:
        raise GenerationError(
            f"max_tokens is {config.max_tokens}, the model's context holds {context} tokens for "
            "conversation and note together; lower max_tokens (--max-tokens)"
        )
    prompt = encode_prompt(tokenizer, conversation, section, context, config.max_tokens)
    if prompt.left_out_turns or prompt.left_out_words:
        lost = f"{prompt.left_out_turns} of its {len(conversation.turns)} turns"
        if prompt.left_out_words:
            lost += f" and {prompt.left_out_words} words of others"
        limits = (
            f"the model's context of {context} tokens, {config.max_tokens} of them for the note"
        )
        if not shorten:
            raise GenerationError(
                f"the conversation does not fit {limits}: {lost} would have to be left out; allow "
                "that, lower max_tokens (--max-tokens), or use a model with a longer context"
            )
        logger.warning("the conversation does not fit %s: %s are left out", limits, lost)
    return NoteStream(model, tokenizer, prompt, config)


class NoteStream(Iterator[str]):
    """A note while it is written: an iterator over pieces of text that join to the note.

    A piece never holds part of a character, and the note does not begin with a space.

    Attributes:
        left_out_turns: turns of the conversation that did not fit.
        left_out_words: words left out of turns that by themselves were too long.
        prompt_tokens: length of the prompt.
        ids: the ids written so far.
        finish_reason: None while writing, then "stop", or "length" if `max_tokens` cut the note.
    """

    def __init__(
        self,
        model: Phi3ForCausalLM,
        tokenizer: Tokenizer,
        prompt: EncodedPrompt,
        config: GenerateConfig,
    ) -> None:
        self.left_out_turns = prompt.left_out_turns
        self.left_out_words = prompt.left_out_words
        self.prompt_tokens = len(prompt.ids)
        self.ids: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self._max_tokens = config.max_tokens
        self._ids = generate_ids(
            model, prompt.ids, config, tokenizer.stop_ids, vocabulary=tokenizer.vocab_size
        )
        self._text = tokenizer.stream()
        self._begun = False

    def __next__(self) -> str:
        for token in self._ids:
            self.ids.append(token)
            piece = self._begin(self._text.step(token))
            if piece:
                return piece
        if self.finish_reason is None:
            self.finish_reason = "length" if len(self.ids) == self._max_tokens else "stop"
            if self.finish_reason == "length":
                logger.warning("the note was cut at max_tokens, %d", self._max_tokens)
            # What never got its last byte is no character.
            piece = self._begin(self._text.flush().rstrip(UNFINISHED))
            if piece:
                return piece
        raise StopIteration

    def _begin(self, piece: str) -> str:
        piece = piece if self._begun else piece.lstrip()
        self._begun = self._begun or bool(piece)
        return piece


def generate_ids(
    model: Phi3ForCausalLM,
    ids: Sequence[int],
    config: GenerateConfig | None = None,
    stop_ids: Collection[int] = (),
    *,
    vocabulary: int | None = None,
) -> Iterator[int]:
    """Continue a sequence; the id that stops it is not given out.

    Args:
        model: the model.
        ids: the prompt, at least one id.
        config: how to choose tokens, and how many at most.
        stop_ids: ids that end the sequence.
        vocabulary: ids of the tokenizer; the embedding's rows behind them stand for nothing and are
            never chosen. None: every row may be.

    Raises:
        GenerationError: an empty prompt, one that leaves no room for `max_tokens`, or logits that
            are not numbers.
    """
    config = config or GenerateConfig()
    context = model.config.max_position_embeddings
    if not ids:
        raise GenerationError("the prompt is empty; expected at least one token")
    if len(ids) + config.max_tokens > context:
        raise GenerationError(
            f"{len(ids)} tokens of prompt and {config.max_tokens} to write are more than the "
            f"{context} tokens of the model's context"
        )
    return _continue(model, list(ids), config, frozenset(stop_ids), vocabulary)


def _continue(
    model: Phi3ForCausalLM,
    ids: list[int],
    config: GenerateConfig,
    stop_ids: frozenset[int],
    vocabulary: int | None,
) -> Iterator[int]:
    begin = len(ids)
    cache = Cache(model.config, begin)
    known = None if vocabulary is None else mx.arange(model.config.vocab_size) < vocabulary
    for _ in range(config.max_tokens):
        if model.config.uses_long_factors(len(ids)) != cache.long_factors:
            # As transformers does: keys turned by the short factors cannot serve the long ones.
            cache = Cache(model.config, len(ids))
        logits = _read(model, ids, cache)
        finite = mx.isfinite(logits).all()
        if known is not None:
            logits = mx.where(known, logits, -mx.inf)
        token = next_token(logits, config, ids[begin:])
        mx.eval(token, finite)
        if not finite.item():
            raise GenerationError(
                f"the model's logits are not finite numbers after {len(ids)} tokens; its weights "
                "are damaged, or float16 is too narrow for them: load with bfloat16 or float32"
            )
        ids.append(cast("int", token.item()))
        if ids[-1] in stop_ids:
            return
        yield ids[-1]


def _read(model: Phi3ForCausalLM, ids: list[int], cache: Cache) -> mx.array:
    """Read the ids that the cache lacks and return the logits (V,) after the last."""
    for start in range(cache.offset, len(ids) - 1, PREFILL):
        model(mx.array([ids[start : min(start + PREFILL, len(ids) - 1)]]), cache)
        # The logits of these are never asked for, so the head is not computed.
        mx.eval(cache.arrays())
    return model(mx.array([ids[-1:]]), cache)[0, -1]
