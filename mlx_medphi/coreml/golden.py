"""Golden logits: what MLX says to a few prompts, kept in the bundle for every later comparison.

The prompts are made of the project's synthetic conversations. The logits are MLX's, from the very
weights that were exported, once for the base and once for each adapter; they are computed in
float32 wherever that fits the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_medphi.data.synthetic import sample
from mlx_medphi.model.adapter import load_adapter
from mlx_medphi.model.cache import Cache
from mlx_medphi.model.lora import remove_lora
from mlx_medphi.model.phi3 import Phi3ForCausalLM
from mlx_medphi.model.quantize import dtype_of
from mlx_medphi.text.tokenizer import Tokenizer

__all__ = ["Case", "Golden", "Prompt", "make_golden", "make_prompts", "rows_of"]

Logits = npt.NDArray[np.float32]

CONTINUED = 8
"""Tokens that MLX adds to the prompt greedily; the package must add the same."""

EXTRA_TOKENS = 24
# A prompt that fills the context is checked while it costs no more than this many multiply-adds.
EDGE_BUDGET = 2e11
EDGE_ROWS = 4


@dataclass(frozen=True)
class Prompt:
    """Tokens to read and the positions to compare at.

    Attributes:
        name: "note" or "edge".
        ids: the tokens.
        rows: positions in ids, ascending, whose logits are compared besides the continuation's.
        continued: how many tokens are added greedily.
    """

    name: str
    ids: tuple[int, ...]
    rows: tuple[int, ...]
    continued: int


@dataclass(frozen=True)
class Case:
    """One prompt under one adapter.

    Attributes:
        prompt: what is read.
        adapter: name of the adapter; None: the base.
        continuation: the tokens MLX adds greedily.
        logits: (n, vocab) float32, one row for each of `rows`.
    """

    prompt: Prompt
    adapter: str | None
    continuation: tuple[int, ...]
    logits: Logits

    @property
    def name(self) -> str:
        """As in the certificate: prompt and adapter."""
        return f"{self.prompt.name}-{self.adapter or 'base'}"

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and continuation; the last token is never read, only predicted."""
        return (self.prompt.ids + self.continuation)[: len(self.prompt.ids) + self.fed]

    @property
    def fed(self) -> int:
        """Tokens of the continuation that are read."""
        return max(len(self.continuation) - 1, 0)

    @property
    def rows(self) -> tuple[int, ...]:
        """Positions in `ids` that the logits belong to."""
        return tuple(sorted({*self.prompt.rows, *range(len(self.prompt.ids) - 1, len(self.ids))}))


@dataclass(frozen=True)
class Golden:
    """All cases of a bundle, and the dtype that MLX computed them in."""

    cases: tuple[Case, ...]
    dtype: str = "float32"

    def of(self, adapter: str | None) -> Iterator[Case]:
        """The cases of one adapter, or of the base."""
        return (case for case in self.cases if case.adapter == adapter)


def make_prompts(
    tokenizer: Tokenizer, context: int, prefill: int, parameters: int
) -> tuple[Prompt, ...]:
    """The prompts for one package.

    "note" ends within a block of `prefill`, so that a whole and a padded block and single steps
    occur. "edge" fills the context to its last slot.

    Args:
        tokenizer: the checkpoint's.
        context: slots of the cache.
        prefill: tokens of a block.
        parameters: size of the model; a large one gets a short prompt, few rows and no edge.
    """
    small = parameters * context <= EDGE_BUDGET
    length = min((2 if small else 1) * prefill + EXTRA_TOKENS, context - CONTINUED)
    ids = _text(tokenizer, length)
    step = max(1, prefill // 4) if small else prefill
    prompts = [Prompt("note", ids, tuple(range(step - 1, length, step)), CONTINUED)]
    if small and context > length + CONTINUED:
        rows = range(context - EDGE_ROWS, context)
        prompts.append(Prompt("edge", _text(tokenizer, context), tuple(rows), 0))
    return tuple(prompts)


def _text(tokenizer: Tokenizer, length: int) -> tuple[int, ...]:
    """A user's turn of synthetic conversations, exactly `length` tokens with its frame."""
    frame = [tokenizer.end_id, tokenizer.assistant_id]
    ids: list[int] = []
    for example in sample(1 + length // 16, seed=11):
        ids += tokenizer.encode_text(example.conversation.text())
        if len(ids) >= length:
            break
    return (tokenizer.user_id, *ids[: length - 3], *frame)


def make_golden(
    model: Phi3ForCausalLM,
    prompts: Sequence[Prompt],
    adapters: Mapping[str, Path],
    *,
    with_base: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Golden:
    """Ask MLX.

    Args:
        model: the exported weights, without adapter; left without one.
        prompts: what to ask.
        adapters: name -> file or directory.
        with_base: whether the base itself is asked.
        progress: called with (prompts answered, prompts in all).

    Raises:
        AdapterError: an adapter does not fit the model.
    """
    asked: list[str | None] = [None] if with_base else []
    asked += adapters
    cases: list[Case] = []
    total = len(asked) * len(prompts)
    for name in asked:
        if name is not None:
            load_adapter(model, adapters[name], allow_other_base=True)
        for prompt in prompts:
            if progress is not None:
                progress(len(cases), total)
            cases.append(_ask(model, prompt, name))
        remove_lora(model)
    if progress is not None:
        progress(total, total)
    return Golden(tuple(cases), _dtype_of(model))


def _dtype_of(model: Phi3ForCausalLM) -> str:
    """The dtype a model computes in."""
    return str(dtype_of(model)).removeprefix("mlx.core.")


def rows_of(model: Phi3ForCausalLM, case: Case) -> Logits:
    """What a model says at the rows of a case, (n, vocab) float32."""
    logits = _read(model, case.ids, Cache(model.config, len(case.ids)))
    return np.ascontiguousarray(logits[list(case.rows)])


def _ask(model: Phi3ForCausalLM, prompt: Prompt, adapter: str | None) -> Case:
    # All that will be read: LongRoPE chooses its factors by that.
    cache = Cache(model.config, len(prompt.ids) + max(prompt.continued - 1, 0))
    logits = [_read(model, prompt.ids, cache)]
    continuation: list[int] = []
    while len(continuation) < prompt.continued:
        continuation.append(int(np.argmax(logits[-1][-1])))
        if len(continuation) < prompt.continued:
            logits.append(_read(model, continuation[-1:], cache))
    case = Case(prompt, adapter, tuple(continuation), np.concatenate(logits))
    return replace(case, logits=np.ascontiguousarray(case.logits[list(case.rows)]))


def _read(model: Phi3ForCausalLM, ids: Sequence[int], cache: Cache) -> Logits:
    out = model(mx.array([list(ids)], dtype=mx.int32), cache)[0].astype(mx.float32)
    return np.array(out, dtype=np.float32)
