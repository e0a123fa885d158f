"""MLX's affine quantisation of a loaded model, layer for layer as mlx-lm's `convert` does it."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from mlx_medphi.errors import CheckpointError
from mlx_medphi.model.config import BITS, GROUPS, Quantization
from mlx_medphi.model.layout import linear_shapes
from mlx_medphi.model.phi3 import Phi3ForCausalLM

__all__ = ["check_format", "quantize_model", "wrap_quantized"]


def check_format(quantize: tuple[int, int]) -> None:
    """Refuse what MLX cannot write.

    Raises:
        CheckpointError: (bits, group size) is not an affine format.
    """
    if not isinstance(quantize, tuple) or len(quantize) != 2:
        raise CheckpointError(
            f"quantize is {quantize!r}, expected bits and group size such as (4, 64)"
        )
    bits, group = quantize
    if bits not in BITS or group not in GROUPS:
        raise CheckpointError(
            f"cannot quantise to {bits} bits in groups of {group}; bits are one of {BITS}, "
            f"groups one of {GROUPS}"
        )


def quantize_model(model: Phi3ForCausalLM, quantize: tuple[int, int]) -> None:
    """Quantise embedding, projections and head in place; norms stay.

    A layer whose width is no multiple of the group stays as it is, and `model.config` says so.

    Args:
        model: an unquantised model; lazy weights are read layer by layer when they are evaluated.
        quantize: (bits, group size).

    Raises:
        CheckpointError: an impossible format, a model already quantised, or no layer fits.
    """
    check_format(quantize)
    if model.config.quantization is not None:
        raise CheckpointError(
            f"the model is already quantised to {model.config.quantization.bits} bits; "
            "load it as it is, or quantise the model it was made from"
        )
    bits, group = quantize
    shapes = linear_shapes(model.config)
    layers = {name: quantize for name, (_, inputs) in shapes.items() if inputs % group == 0}
    if not layers:
        raise CheckpointError(f"no layer of this model has a width that groups of {group} divide")
    wrap_quantized(model, layers)
    unquantized = {name: None for name in shapes if name not in layers}
    model.config = replace(model.config, quantization=Quantization(bits, group, unquantized))


def wrap_quantized(model: Phi3ForCausalLM, layers: dict[str, tuple[int, int]]) -> None:
    """Turn the named layers into quantised ones, each with its own (bits, group size)."""

    def form(name: str, _module: nn.Module) -> bool | dict[str, int]:
        if name not in layers:
            return False
        bits, group = layers[name]
        return {"bits": bits, "group_size": group}

    nn.quantize(model, class_predicate=form)


def dtype_of(model: Phi3ForCausalLM) -> mx.Dtype:
    """The dtype of the model's activations: its embedding's, or the scales' of a quantised one."""
    embedding = model.model.embed_tokens
    dtype: mx.Dtype = (embedding.scales if "scales" in embedding else embedding.weight).dtype
    return dtype
