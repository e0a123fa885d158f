"""How long examples are in tokens, and which would be shortened at a given length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_medphi.data.examples import Example
from mlx_medphi.data.prompt import chat_messages
from mlx_medphi.text.chat import encode_chat
from mlx_medphi.text.tokenizer import Tokenizer

__all__ = ["Lengths", "LengthSummary", "measure_lengths"]


@dataclass(frozen=True)
class LengthSummary:
    """Mean, median and percentiles; a percentile is the count of an actual example."""

    count: int
    mean: float
    median: float
    p90: int
    p95: int
    p99: int
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> LengthSummary:
        """Summarise token counts; all zeros when there are none."""
        if not lengths:
            return cls(0, 0.0, 0.0, 0, 0, 0, 0)
        upper = [int(np.percentile(lengths, p, method="higher")) for p in (90, 95, 99, 100)]
        return cls(len(lengths), float(np.mean(lengths)), float(np.median(lengths)), *upper)


@dataclass(frozen=True)
class Lengths:
    """Token counts of a set of examples.

    Args:
        conversation: the conversations alone.
        note: the notes alone.
        example: whole training examples, prompt and chat tokens included.
        over: limit -> ids of the examples longer than it, which would be shortened.
    """

    conversation: LengthSummary
    note: LengthSummary
    example: LengthSummary
    over: dict[int, tuple[str, ...]]


def measure_lengths(
    tokenizer: Tokenizer, examples: Iterable[Example], limits: Sequence[int] = (1024, 2048, 4096)
) -> Lengths:
    """Count the tokens of every example.

    Raises:
        DataError: text that is not UTF-8, or a chat row with a role the template cannot write.
    """
    conversations: list[int] = []
    notes: list[int] = []
    whole: list[tuple[str, int]] = []
    for example in examples:
        conversations.append(len(tokenizer.encode_text(example.conversation.text())))
        notes.append(len(tokenizer.encode_text(example.note.text)))
        whole.append((example.id, len(encode_chat(tokenizer, chat_messages(example)).ids)))
    return Lengths(
        conversation=LengthSummary.of(conversations),
        note=LengthSummary.of(notes),
        example=LengthSummary.of([length for _, length in whole]),
        over={limit: tuple(id for id, length in whole if length > limit) for limit in limits},
    )
