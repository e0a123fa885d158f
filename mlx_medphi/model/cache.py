"""Keys and values of the tokens already read, one store for each block.

Every key is kept, also behind a sliding window: the mask hides it, and a note is short.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_medphi.model.config import Phi3Config

__all__ = ["Cache", "LayerCache"]

GROWTH = 256  # tokens: growing seldom keeps copies rare


class LayerCache:
    """Keys and values of one block, (B, kv heads, tokens, head_dim)."""

    def __init__(self) -> None:
        self.offset = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store new rows (B, kv heads, T, head_dim) and return everything stored so far."""
        end = self.offset + keys.shape[2]
        if self.keys is None or self.values is None or end > self.keys.shape[2]:
            room = -(-end // GROWTH) * GROWTH
            self.keys, self.values = (
                _grown(old, new, room, self.offset)
                for old, new in ((self.keys, keys), (self.values, values))
            )
        self.keys[:, :, self.offset : end] = keys
        self.values[:, :, self.offset : end] = values
        self.offset = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Cache:
    """The caches of all blocks of one model and one sequence.

    LongRoPE rotates a whole sequence with one set of factors, chosen by its length. Keys made with
    the other set cannot be used again, so a cache belongs to one set: `long_factors`.
    """

    def __init__(self, config: Phi3Config, length: int) -> None:
        """Make empty caches for a sequence of `length` tokens, its prompt included."""
        self.long_factors = config.uses_long_factors(length)
        self.layers = [LayerCache() for _ in range(config.num_hidden_layers)]

    @property
    def offset(self) -> int:
        """Tokens read so far."""
        return self.layers[0].offset

    def arrays(self) -> list[mx.array]:
        """Everything stored, for evaluation."""
        return [a for layer in self.layers for a in (layer.keys, layer.values) if a is not None]


def _grown(old: mx.array | None, new: mx.array, room: int, used: int) -> mx.array:
    batch, heads, _, dim = new.shape
    grown = mx.zeros((batch, heads, room, dim), dtype=new.dtype)
    if old is not None:
        grown[:, :, :used] = old[:, :, :used]
    return grown
