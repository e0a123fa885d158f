"""The text on which a fused model is compared with the adapted one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_medphi.data.examples import Example
from mlx_medphi.data.prompt import chat_messages
from mlx_medphi.data.synthetic import sample
from mlx_medphi.errors import FuseError
from mlx_medphi.model.hub import resolve_model
from mlx_medphi.model.weights import open_checkpoint
from mlx_medphi.text.chat import encode_chat
from mlx_medphi.text.tokenizer import Tokenizer

__all__ = ["text_rows"]

# Enough for the most positions that are compared, with any tokenizer.
SAMPLE_ROWS, SAMPLE_SEED = 24, 0
LONGEST_ROW = 1024


def text_rows(base: str | Path, examples: Sequence[Example] | None = None) -> list[list[int]]:
    """Token rows of examples in the words of a base's tokenizer, cut where its context ends.

    Args:
        base: a checkpoint directory, a single-file model, or a hub id.
        examples: conversations and notes; None takes the project's own synthetic sample.

    Raises:
        FuseError: there is no example.
    """
    checkpoint = open_checkpoint(resolve_model(base))
    tokenizer = Tokenizer.load(checkpoint.directory)
    if examples is None:
        examples = sample(SAMPLE_ROWS, SAMPLE_SEED, held_out=True)
    longest = min(LONGEST_ROW, checkpoint.config.max_position_embeddings)
    if not examples:
        raise FuseError("no examples were given, so the fused model cannot be measured; give some")
    # The two models are compared on every token, so half a conversation serves as well.
    return [encode_chat(tokenizer, chat_messages(row)).ids[:longest] for row in examples]
