"""The usual form of weights that are still to be quantised, for sizes before they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.blobs import Part
from mlx_medphi.coreml.codes import Form
from mlx_medphi.coreml.weights import EMBEDDING, Weight, Weights, plain_bits, plan_weights
from mlx_medphi.model.weights import Checkpoint

__all__ = ["assumed_weights"]


def assumed_weights(
    checkpoint: Checkpoint, config: ExportConfig, forms: Mapping[str, tuple[int, int]]
) -> Weights:
    """As `plan_weights` after quantising, with the usual offsets; no blocks can be read.

    Args:
        checkpoint: as it is stored.
        config: the settings.
        forms: (bits, group size) of each layer that will be in other codes than the checkpoint's.

    Raises:
        ExportError: as `plan_weights`.
    """
    layers = {
        name: _quantised(weight, *forms[name])
        if name in forms and plain_bits(name, forms[name][0], config) < 16
        else weight
        for name, weight in plan_weights(checkpoint, config).layers.items()
    }
    return Weights(MappingProxyType(layers))


def _quantised(weight: Weight, bits: int, group: int) -> Weight:
    outputs, inputs = weight.shape
    small, kind = (outputs, inputs // group), f"uint{bits}"
    forms = {
        "data": (kind, weight.shape), "scale": ("float16", small), "offset": (kind, small),
    }  # fmt: skip
    form: Form = "integer offset"
    if weight.layer == EMBEDDING and bits == 4:  # a byte for each code, which needs no offset
        bits, form = 8, "no offset"
        forms = {"data": ("int8", weight.shape), "scale": ("float16", small)}
    parts = {name: Part(f"{weight.layer}.{name}", *entry) for name, entry in forms.items()}
    return replace(weight, bits=bits, group=group, form=form, parts=parts)
