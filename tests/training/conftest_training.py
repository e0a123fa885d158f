"""A two-layer Phi-3 with its own tokenizer, small rows, and micro-batches made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_medphi.config import LoRAConfig
from mlx_medphi.data.examples import Conversation, Example, Note
from mlx_medphi.model.checkpoint import load
from mlx_medphi.model.lora import adapted_layers, apply_lora
from mlx_medphi.model.phi3 import Phi3ForCausalLM
from mlx_medphi.text.packing import MicroBatch
from mlx_medphi.text.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures" / "phi3"

Base = Callable[..., Phi3ForCausalLM]


@pytest.fixture
def base() -> Base:
    """A fresh float32 model of a fixture folder."""

    def make(name: str = "mini-4k", **options: object) -> Phi3ForCausalLM:
        options.setdefault("dtype", "float32")
        return load(FIXTURES / name, **options)[0]  # type: ignore[arg-type]

    return make


@pytest.fixture
def adapted(base: Base) -> Base:
    """The same with an adapter whose second factor is not zero: a zero one proves nothing."""

    def make(name: str = "mini-4k", lora: LoRAConfig | None = None) -> Phi3ForCausalLM:
        model = base(name)
        apply_lora(model, lora or LoRAConfig(rank=4, dropout=0.0))
        for i, (_, layer) in enumerate(adapted_layers(model)):
            layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(i))
        return model

    return make


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.load(FIXTURES / "mini-4k")


def small_rows() -> list[Example]:
    """Twelve rows of one to three short turns, some 100 to 200 tokens each."""
    parts = ("knee", "left ear", "back", "throat")
    made = []
    for n in range(12):
        part = parts[n % 4]
        turns = ["Doctor: What is wrong?", f"Patient: My {part} hurts.", f"Doctor: For {n} days?"]
        conversation = Conversation.from_text("\n".join(turns[: 1 + n % 3]))
        made.append(Example(f"made/{n}", "jsonl", conversation, Note(f"Pain, {part}, {n} days.")))
    return made


@pytest.fixture
def rows() -> list[Example]:
    return small_rows()


def micro_batch(
    ids: np.ndarray, spans: list[tuple[int, int]], *, long: bool = False, slots: int = 64
) -> MicroBatch:
    """One example in each row, supervised where its position lies in its span."""
    rows, width = ids.shape
    places = [(row, at) for row, (start, end) in enumerate(spans) for at in range(start, end)]
    idx, tgt = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    weight = np.zeros(slots, np.float32)
    for slot, (row, at) in enumerate(places):
        idx[slot], tgt[slot], weight[slot] = row * width + at - 1, ids[row, at], 1.0
    return MicroBatch(
        ids=ids.astype(np.int32),
        seg=np.zeros((rows, width), np.int32),
        idx=idx,
        tgt=tgt,
        weight=weight,
        long=long,
        tokens_real=ids.size,
        tokens_supervised=len(places),
        examples=tuple(range(rows)),
    )
