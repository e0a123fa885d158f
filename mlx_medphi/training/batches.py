"""Rows as tokens, and every micro-batch of a run planned before its first update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_medphi.config import TrainConfig
from mlx_medphi.data.examples import Example
from mlx_medphi.errors import TrainingError
from mlx_medphi.files import json_hash
from mlx_medphi.model.phi3 import Phi3ForCausalLM
from mlx_medphi.text.chat import EncodedSet, encode_examples
from mlx_medphi.text.packing import MicroBatch, Plan, evaluation_batches, plan
from mlx_medphi.text.tokenizer import Tokenizer

__all__ = ["RunData"]


@dataclass(frozen=True)
class RunData:
    """Rows as tokens and the plan of every micro-batch, known before the first update."""

    train: EncodedSet
    valid: EncodedSet
    plan: Plan
    valid_batches: tuple[MicroBatch, ...]
    updates: int
    micro_batches: int
    accumulation: int
    hash: str

    @classmethod
    def prepare(
        cls,
        model: Phi3ForCausalLM,
        tokenizer: Tokenizer,
        train_examples: Sequence[Example],
        valid_examples: Sequence[Example],
        config: TrainConfig,
    ) -> RunData:
        length = min(config.max_length, model.config.max_position_embeddings)
        rows = encode_examples(tokenizer, train_examples, length)
        valid = encode_examples(tokenizer, valid_examples, length)
        if not rows.examples:
            why = f": {rows.refused[0][1]}" if rows.refused else ""
            raise TrainingError(f"none of {len(train_examples)} training rows can be used{why}")
        if valid_examples and not valid.examples:
            raise TrainingError(
                f"none of {len(valid_examples)} validation rows can be used: {valid.refused[0][1]}"
            )
        threshold = model.config.switch_length
        valid_batches = (
            evaluation_batches(
                valid.examples, rows=config.batch_size, pack=config.pack, long_threshold=threshold
            )
            if valid.examples
            else ()
        )
        layout, micro_batches = _plan_for(rows, config, threshold)
        return cls(
            train=rows,
            valid=valid,
            plan=layout,
            valid_batches=valid_batches,
            updates=-(-micro_batches // config.grad_accumulation_steps),
            micro_batches=micro_batches,
            accumulation=config.grad_accumulation_steps,
            hash=json_hash(
                [[r.id, r.ids, r.loss_mask] for part in (rows, valid) for r in part.examples]
            ),
        )

    def batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of update `step` (from 1); the last update takes what is left."""
        first = (step - 1) * self.accumulation
        last = min(first + self.accumulation, self.micro_batches)
        found: list[MicroBatch] = []
        while first < last:
            epoch, start = self.plan.locate(first)
            for batch in self.plan.epoch(epoch, start):
                found.append(batch)
                first += 1
                if first == last:
                    break
        return found


def _plan_for(rows: EncodedSet, config: TrainConfig, threshold: int | None) -> tuple[Plan, int]:
    """The plan, and how many of its micro-batches the run takes."""
    epochs = math.ceil(config.epochs) if config.iters is None else 1
    wanted = 0 if config.iters is None else config.iters * config.grad_accumulation_steps
    layout = plan(
        rows.examples,
        rows=config.batch_size,
        seed=config.seed,
        epochs=epochs,
        micro_batches=wanted,
        pack=config.pack,
        long_threshold=threshold,
    )
    # A share of an epoch is a share of its micro-batches.
    share = round(sum(layout.micro_batches) * config.epochs / epochs)
    return layout, wanted or max(1, share)
