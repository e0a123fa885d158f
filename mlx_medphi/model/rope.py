"""Rotary position embedding, plain and LongRoPE, on the first `rotary_dim` of a head's numbers."""

from __future__ import annotations

import mlx.core as mx

from mlx_medphi.model.config import Phi3Config

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding:
    """Rotates queries and keys by their positions.

    `freqs` are wavelengths: position t turns pair i by t / freqs[i], as `mx.fast.rope` wants it.
    LongRoPE divides the rotation speed by one of two sets of factors and stretches the result by
    `attention_factor` (transformers: modeling_rope_utils, `_compute_longrope_parameters`).
    """

    def __init__(self, config: Phi3Config) -> None:
        self.dims = config.rotary_dim
        steps = mx.arange(0, self.dims, 2, dtype=mx.float32) / self.dims
        plain = mx.power(mx.array(config.rope_theta, dtype=mx.float32), steps)
        self.short = self.long = plain
        self.attention_factor = 1.0
        if config.longrope is not None:
            self.short = plain * mx.array(config.longrope.short_factor, dtype=mx.float32)
            self.long = plain * mx.array(config.longrope.long_factor, dtype=mx.float32)
            self.attention_factor = config.longrope.attention_factor
        # A lazy array belongs to the thread that made it; a model may be used in another.
        mx.eval(self.short, self.long)

    def __call__(self, x: mx.array, offset: int, long_factors: bool) -> mx.array:
        """Rotate x (B, H, T, D), whose first row stands at `offset`; same shape and dtype."""
        if self.attention_factor != 1.0:
            # The same as scaling cos and sin; the dimensions that do not turn stay.
            head, rest = x[..., : self.dims], x[..., self.dims :]
            head = head * self.attention_factor
            x = head if rest.shape[-1] == 0 else mx.concatenate([head, rest], axis=-1)
        freqs = self.long if long_factors else self.short
        return mx.fast.rope(
            x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs
        )
