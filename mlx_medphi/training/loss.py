"""The loss of one micro-batch: a sum over supervised positions, never a mean.

Sums can be added over micro-batches of unequal length; dividing once at the end gives the mean
over tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_medphi.model.phi3 import Phi3ForCausalLM

__all__ = ["loss_sum", "run_checkpointed", "segment_mask"]


def segment_mask(segments: mx.array, window: int | None) -> mx.array:
    """Which positions may meet in rows that hold several examples.

    Args:
        segments: (R, P) number of the example at each position, -1 for padding.
        window: sliding window in tokens, or None.

    Returns:
        (R, 1, P, P) bool. Padding sees padding, so no row of a softmax is empty.
    """
    place = mx.arange(segments.shape[1])
    distance = place[:, None] - place[None, :]
    near = distance >= 0
    if window is not None:
        near = near & (distance < window)
    same = segments[:, :, None] == segments[:, None, :]
    return (same & near)[:, None]


def loss_sum(
    model: Phi3ForCausalLM,
    ids: mx.array,
    segments: mx.array,
    positions: mx.array,
    targets: mx.array,
    weights: mx.array,
    key: mx.array | None = None,
    *,
    long_factors: bool,
    grad_checkpoint: bool,
) -> mx.array:
    """Summed cross entropy of the supervised targets, float32.

    The head runs only where a target is: `positions` are the flat places of the tokens before them.

    Args:
        ids: (R, P) token ids.
        segments: (R, P) example numbers, -1 for padding.
        positions: (K,) flat positions in R·P.
        targets: (K,) token ids.
        weights: (K,) 1 for a target, 0 for a filler slot.
        key: random key for dropout, or None for none.
        long_factors: which LongRoPE factors these rows need.
        grad_checkpoint: recompute each block in the backward pass.
    """
    mask = segment_mask(segments, model.config.sliding_window)
    keys = None if key is None else list(mx.random.split(key, len(model.model.layers)))
    run = run_checkpointed if grad_checkpoint else None
    h = model.hidden(ids, mask, long_factors, keys, run)
    rows = h.reshape(-1, h.shape[-1])[positions]  # (K, hidden)
    logits = model.head(rows).astype(mx.float32)  # bf16 logits cost up to 0.07 nats per token
    return (weights * nn.losses.cross_entropy(logits, targets)).sum()


def run_checkpointed(block: nn.Module, h: mx.array, *rest: Any) -> mx.array:
    """Run a block so that the backward pass computes it again, with the same dropout masks.

    The trainable leaves are arguments, or they would get no gradient; keys and masks are closed
    over, because `mx.checkpoint` takes no gradient through integer arrays.
    """

    def run(parameters: dict[str, Any], x: mx.array) -> mx.array:
        block.update(parameters)
        result: mx.array = block(x, *rest)
        return result

    parameters = block.trainable_parameters()
    checkpointed: Callable[..., mx.array] = mx.checkpoint(run)
    try:
        return checkpointed(parameters, h)
    finally:
        block.update(parameters)
