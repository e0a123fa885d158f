"""Which tensors a Phi-3 of a given shape consists of, plain or quantised by MLX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_medphi.files import TensorInfo
from mlx_medphi.model.config import Phi3Config

__all__ = ["FLOATS", "TensorForm", "expected_tensors", "linear_shapes", "quantized_layers"]

FLOATS = ("F32", "F16", "BF16")
"""The dtypes weights are computed in, by their safetensors names."""


@dataclass(frozen=True)
class TensorForm:
    """A tensor's shape and the dtypes it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.shape} {' or '.join(self.dtypes)}"


def linear_shapes(config: Phi3Config) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer that can be quantised: projections, embedding and head."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes = {"model.embed_tokens": (config.vocab_size, hidden)}
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        shapes[f"model.layers.{i}.self_attn.qkv_proj"] = (queries + 2 * keys, hidden)
        shapes[f"model.layers.{i}.self_attn.o_proj"] = (hidden, queries)
        shapes[f"model.layers.{i}.mlp.gate_up_proj"] = (2 * inner, hidden)
        shapes[f"model.layers.{i}.mlp.down_proj"] = (hidden, inner)
    return shapes


def quantized_layers(
    config: Phi3Config, stored: Mapping[str, TensorInfo]
) -> dict[str, tuple[int, int]]:
    """(bits, group size) of the layers that are stored quantised.

    As in mlx-lm: those config.json names one by one, and of the others those that have scales.
    """
    if config.quantization is None:
        return {}
    layers = {}
    for name, (_, inputs) in linear_shapes(config).items():
        form = config.quantization.of(name)
        if form is None or inputs % form[1]:
            continue
        weight = stored.get(f"{name}.weight")
        packed = weight is not None and weight.dtype == "U32"
        if packed or f"{name}.scales" in stored or name in config.quantization.layers:
            layers[name] = form
    return layers


def expected_tensors(config: Phi3Config, stored: Mapping[str, TensorInfo]) -> dict[str, TensorForm]:
    """The form of every tensor the model needs; `stored` tells which layers are quantised."""
    norms = ["model.norm"]
    for i in range(config.num_hidden_layers):
        norms += [f"model.layers.{i}.{n}_layernorm" for n in ("input", "post_attention")]
    expected = {f"{name}.weight": TensorForm((config.hidden_size,), FLOATS) for name in norms}
    quantized = quantized_layers(config, stored)
    for name, (outputs, inputs) in linear_shapes(config).items():
        if name not in quantized:
            expected[f"{name}.weight"] = TensorForm((outputs, inputs), FLOATS)
            continue
        bits, group = quantized[name]
        expected[f"{name}.weight"] = TensorForm((outputs, inputs * bits // 32), ("U32",))
        for part in ("scales", "biases"):
            expected[f"{name}.{part}"] = TensorForm((outputs, inputs // group), FLOATS)
    return expected
