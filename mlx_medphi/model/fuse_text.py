"""The text on which a fused model is compared with the adapted one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_medphi.data.examples import Example
from mlx_medphi.data.synthetic import sample
from mlx_medphi.errors import FuseError
from mlx_medphi.model.hub import resolve_model
from mlx_medphi.model.weights import open_checkpoint
from mlx_medphi.text.chat import encode_examples
from mlx_medphi.text.tokenizer import Tokenizer

__all__ = ["text_rows"]

# Enough for the most positions that are compared, with any tokenizer.
SAMPLE_ROWS, SAMPLE_SEED = 24, 0
LONGEST_ROW = 1024


def text_rows(base: str | Path, examples: Sequence[Example] | None = None) -> list[list[int]]:
    """Token rows of examples in the words of a base's tokenizer.

    Args:
        base: a checkpoint directory, a single-file model, or a hub id.
        examples: conversations and notes; None takes the project's own synthetic sample.

    Raises:
        FuseError: no example fits the model's context.
    """
    checkpoint = open_checkpoint(resolve_model(base))
    tokenizer = Tokenizer.load(checkpoint.directory)
    if examples is None:
        examples = sample(SAMPLE_ROWS, SAMPLE_SEED, held_out=True)
    longest = min(LONGEST_ROW, checkpoint.config.max_position_embeddings)
    rows = [row.ids for row in encode_examples(tokenizer, examples, longest).examples]
    if not rows:
        raise FuseError(
            f"{checkpoint.path}: none of {len(examples)} examples fits {longest} tokens, so the "
            "fused model cannot be measured; give other examples"
        )
    return rows
