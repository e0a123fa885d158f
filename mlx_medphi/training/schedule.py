"""Learning rate: a straight warm-up, then a cosine down to a share of the peak."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_medphi.config import TrainConfig

__all__ = ["cosine_schedule"]


def cosine_schedule(config: TrainConfig, updates: int) -> Callable[[mx.array], mx.array]:
    """A function from the number of updates already applied to the rate of the next one.

    The first update has rate peak / warm-up steps, so none is wasted at zero; the last ends at
    `final_learning_rate` of the peak.
    """
    warm = max(1, math.ceil(config.warmup * updates))
    peak, end = config.learning_rate, config.final_learning_rate * config.learning_rate

    def rate(applied: mx.array) -> mx.array:
        step = applied.astype(mx.float32)
        done = mx.clip((step - warm + 1) / max(1, updates - warm), 0.0, 1.0)
        falling = end + (peak - end) * 0.5 * (1 + mx.cos(math.pi * done))
        return mx.where(step < warm, peak * (step + 1) / warm, falling)

    return rate
