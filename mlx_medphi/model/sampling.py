"""Which token comes next: greedy, or drawn with a temperature, top-p and min-p.

The order is transformers': repetition penalty, temperature, top-p, min-p. A draw is a function of
(seed, number of the token), so it neither reads nor moves MLX's global random state.
"""

# Own code, because mlx_lm.sample_utils draws from that global state, cuts top-p before the
# temperature, and takes two seconds to import (it loads transformers; measured with 0.32.2).

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_medphi.config import GenerateConfig

__all__ = ["adjusted_logits", "next_token"]

# Tokens of the note that count as recent. The conversation does not count: names and doses are
# there to be repeated.
RECENT = 64


def next_token(logits: mx.array, config: GenerateConfig, written: Sequence[int]) -> mx.array:
    """The id that follows, a scalar.

    Args:
        logits: (V,) after the last token.
        config: how to choose.
        written: the ids of the note so far; their number picks the random key.
    """
    scores = adjusted_logits(logits, config, written)
    if config.temperature == 0:
        return mx.argmax(scores)
    words = np.random.SeedSequence([config.seed, len(written)]).generate_state(2, np.uint32)
    return mx.random.categorical(scores, key=mx.array(words))


def adjusted_logits(logits: mx.array, config: GenerateConfig, written: Sequence[int]) -> mx.array:
    """Logits (V,) in float32 after penalty, temperature and cuts; what is cut is -inf."""
    scores = logits.astype(mx.float32)
    recent = sorted(set(written[-RECENT:]))
    if config.repetition_penalty != 1 and recent:
        at = mx.array(recent)
        held, penalty = scores[at], config.repetition_penalty
        scores[at] = mx.where(held < 0, held * penalty, held / penalty)
    if config.temperature == 0:
        return scores
    scores = scores / config.temperature
    if config.top_p < 1:
        scores = mx.where(_in_top_p(scores, config.top_p), scores, -mx.inf)
    if config.min_p > 0:
        # Probabilities relative to the largest are differences of logits.
        low = scores.max() + mx.log(mx.array(config.min_p))
        scores = mx.where(scores >= low, scores, -mx.inf)
    return scores


def _in_top_p(scores: mx.array, top_p: float) -> mx.array:
    """Which ids (V,) belong to the smallest set, likeliest first, that holds `top_p`."""
    order = mx.argsort(-scores)
    probabilities = mx.softmax(scores)[order]
    before = mx.cumsum(probabilities) - probabilities
    kept = mx.zeros(scores.shape, dtype=mx.bool_)
    kept[order] = before < top_p
    return kept
