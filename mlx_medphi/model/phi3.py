"""Phi-3 on MLX. Parameter names equal the checkpoint's, so no map between them exists.

Logits equal those of transformers' `Phi3ForCausalLM`; tests compare them on seven checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_medphi.errors import GenerationError
from mlx_medphi.model.cache import Cache, LayerCache
from mlx_medphi.model.config import Phi3Config
from mlx_medphi.model.lora import project
from mlx_medphi.model.rope import RotaryEmbedding
from mlx_medphi.model.weights import Checkpoint

__all__ = ["Phi3ForCausalLM", "attention_mask", "named_parameters", "parameter_count"]

Mask = mx.array | str | None
# One dropout key for each of a block's four projections; without dropout there are none.
Keys = Sequence[mx.array | None]
NO_KEYS: Keys = (None, None, None, None)


def attention_mask(queries: int, offset: int, window: int | None) -> Mask:
    """Which keys each query sees: key j is seen by query i when i - window < j <= i.

    Args:
        queries: number of new tokens T.
        offset: tokens read before them.
        window: sliding window in tokens, or None.

    Returns:
        None (one query sees all), "causal", or a bool array (T, offset + T).
    """
    if window is None or offset + queries <= window:
        return "causal" if queries > 1 else None
    rows = mx.arange(offset, offset + queries)[:, None]
    columns = mx.arange(offset + queries)[None, :]
    return (columns <= rows) & (columns > rows - window)


class Attention(nn.Module):
    """Grouped-query attention with one fused projection for queries, keys and values."""

    def __init__(self, config: Phi3Config) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.scale = config.head_dim, config.head_dim**-0.5
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def __call__(
        self,
        x: mx.array,
        rope: RotaryEmbedding,
        mask: Mask,
        long_factors: bool,
        cache: LayerCache | None,
        keys: Keys = NO_KEYS,
    ) -> mx.array:
        batch, length, _ = x.shape
        qkv = project(self.qkv_proj, x, keys[0])
        split = [self.heads * self.head_dim, (self.heads + self.kv_heads) * self.head_dim]
        q, k, v = (
            part.reshape(batch, length, -1, self.head_dim).transpose(0, 2, 1, 3)  # (B, H, T, D)
            for part in mx.split(qkv, split, axis=-1)
        )
        offset = cache.offset if cache is not None else 0
        q, k = rope(q, offset, long_factors), rope(k, offset, long_factors)
        if cache is not None:
            k, v = cache.append(k, v)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)
        out = out.transpose(0, 2, 1, 3).reshape(batch, length, -1)  # (B, T, H·D)
        return project(self.o_proj, out, keys[1])


class MLP(nn.Module):
    """down(silu(gate) · up), gate and up in one projection."""

    def __init__(self, config: Phi3Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array, keys: Keys = NO_KEYS) -> mx.array:
        gate, up = mx.split(project(self.gate_up_proj, x, keys[2]), 2, axis=-1)
        return project(self.down_proj, nn.silu(gate) * up, keys[3])


class Block(nn.Module):
    """One transformer block; `key` draws the dropout masks of its four projections."""

    def __init__(self, config: Phi3Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self,
        x: mx.array,
        rope: RotaryEmbedding,
        mask: Mask,
        long_factors: bool,
        cache: LayerCache | None = None,
        key: mx.array | None = None,
    ) -> mx.array:
        keys = NO_KEYS if key is None else list(mx.random.split(key, 4))
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, long_factors, cache, keys)
        return x + self.mlp(self.post_attention_layernorm(x), keys)


class Phi3Model(nn.Module):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: Phi3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Phi3ForCausalLM(nn.Module):
    """Phi-3 with its head.

    Attributes:
        config: the architecture, with the quantisation the weights have now.
        source: the files the weights came from; None for a model made from nothing.
        fingerprint: which base this is (see `fingerprint.py`); empty for a model made from nothing.
    """

    source: Checkpoint | None = None
    fingerprint: str = ""

    def __init__(self, config: Phi3Config) -> None:
        super().__init__()
        self.config = config
        self.model = Phi3Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._rope = RotaryEmbedding(config)

    def __call__(self, ids: mx.array, cache: Cache | None = None) -> mx.array:
        """Logits of every position.

        Args:
            ids: (B, T) token ids, int32.
            cache: keys and values of the tokens before them.

        Returns:
            (B, T, V) logits in the model's dtype.

        Raises:
            GenerationError: the cache was made with LongRoPE's short factors and the sequence now
                needs the long.
        """
        offset = cache.offset if cache is not None else 0
        length = offset + ids.shape[1]
        needs_long = self.config.uses_long_factors(length)
        long_factors = needs_long if cache is None else cache.long_factors
        if needs_long and not long_factors:
            raise GenerationError(
                f"{length} tokens need LongRoPE's long factors, the cache holds keys made with the "
                f"short ones (up to {self.config.switch_length}); read the sequence again with a "
                "new cache"
            )
        h = self.model.embed_tokens(ids)
        mask = attention_mask(ids.shape[1], offset, self.config.sliding_window)
        for i, block in enumerate(self.model.layers):
            h = block(h, self._rope, mask, long_factors, cache.layers[i] if cache else None)
        return self.head(self.model.norm(h))

    def hidden(
        self,
        ids: mx.array,
        mask: mx.array,
        long_factors: bool,
        keys: Sequence[mx.array] | None = None,
        run_block: Callable[..., mx.array] | None = None,
    ) -> mx.array:
        """Normalised hidden states for training.

        Args:
            ids: (B, T) token ids.
            mask: (B, 1, T, T) bool, true where query and key may meet.
            long_factors: which LongRoPE factors rotate every segment of these rows.
            keys: one random key for each block, or None without dropout.
            run_block: called as run_block(block, h, rope, mask, long_factors, None, key) in place
                of the block itself; gradient checkpointing enters here.

        Returns:
            (B, T, hidden) in the model's dtype.
        """
        h = self.model.embed_tokens(ids)
        for i, block in enumerate(self.model.layers):
            inputs = (h, self._rope, mask, long_factors, None, None if keys is None else keys[i])
            h = block(*inputs) if run_block is None else run_block(block, *inputs)
        normed: mx.array = self.model.norm(h)
        return normed

    def head(self, h: mx.array) -> mx.array:
        """Logits (…, V) of normalised hidden states (…, hidden)."""
        tied = self.config.tie_word_embeddings
        logits: mx.array = self.model.embed_tokens.as_linear(h) if tied else self.lm_head(h)
        return logits


def named_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Every parameter by its checkpoint name."""
    return dict(cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())))


def parameter_count(model: nn.Module) -> int:
    """Number of weights; a packed integer counts as those it holds, scales do not count."""
    count = 0
    for _, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            count += module.weight.size * 32 // module.bits
        elif isinstance(module, (nn.Linear, nn.Embedding, nn.RMSNorm)):
            count += module.weight.size
    return count
