"""Changes of separate q, k, v or gate, up layers, merged into Phi-3's fused projections.

The merged change stacks the factors A and puts the factors B on a block diagonal, so its product is
exactly that of the parts. A part without change gets zeros and, for DoRA, the length of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from mlx_medphi.model.adapter_formats import LowRank, layer_index, layer_key, layer_name
from mlx_medphi.model.lora import LoRALinear, base_weight, projection

__all__ = ["SEPARATE", "merge_parts", "padded"]

# In the order in which Phi-3 stacks their rows.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
SEPARATE = {part: fused for fused, parts in FUSED.items() for part in parts}
"""The name of a separate layer -> the projection it is a part of."""

Parts = Mapping[str, LowRank | None]


def merge_parts(
    modules: Mapping[str, LowRank], model: nn.Module | None, problems: list[str]
) -> dict[str, LowRank]:
    """The same changes with every separate part merged into its projection.

    Args:
        modules: layer name -> change, fused and separate ones, all with the same scale.
        model: the base, which knows the parts that have no change; may be None when all have one.
        problems: gets a line for what cannot be merged.
    """
    layers = {name: change for name, change in modules.items() if layer_key(name) not in SEPARATE}
    separate = modules.keys() - layers.keys()
    for name in sorted({layer_name(layer_index(n), SEPARATE[layer_key(n)]) for n in separate}):
        index, key = layer_index(name), layer_key(name)
        parts = {part: modules.get(layer_name(index, part)) for part in FUSED[key]}
        if name in layers:
            problems.append(f"{name}: changed both as a whole and in its parts")
            continue
        sizes = _sizes(parts, model)
        magnitudes = None if sizes is None else _magnitudes(name, parts, sizes, model)
        if sizes is None or magnitudes is None:
            lacking = [part for part, change in parts.items() if change is None]
            problems.append(f"{name}: no change of {' and '.join(lacking)}, so only the base tells")
            continue
        layers[name] = _merged(parts, sizes, magnitudes)
    return layers


def padded(change: LowRank, rank: int) -> LowRank:
    """The same change with rows and columns of zeros up to `rank`."""
    missing = rank - change.a.shape[1]
    if not missing:
        return change
    a, b = mx.pad(change.a, [(0, 0), (0, missing)]), mx.pad(change.b, [(0, missing), (0, 0)])
    return replace(change, a=a, b=b)


def _merged(parts: Parts, sizes: list[int], magnitudes: list[mx.array]) -> LowRank:
    columns, rows, begin = [], [], 0
    for change, size in zip(parts.values(), sizes, strict=True):
        if change is not None:
            columns.append(change.a)  # (in, r of this part)
            rows.append(mx.pad(change.b, [(0, 0), (begin, sum(sizes) - begin - size)]))
        begin += size
    m = mx.concatenate(magnitudes) if magnitudes else None
    return LowRank(mx.concatenate(columns, axis=1), mx.concatenate(rows, axis=0), m)


def _sizes(parts: Parts, model: nn.Module | None) -> list[int] | None:
    """Output rows of each part: from its own B, or from the base where there is none."""
    own = [None if change is None else int(change.b.shape[1]) for change in parts.values()]
    if model is not None:
        config = model.config
        key = config.num_key_value_heads * config.head_dim
        query, inner = config.num_attention_heads * config.head_dim, config.intermediate_size
        other: list[int | None] = [query, key, key] if len(own) == 3 else [inner, inner]
    elif len(own) == 2:  # gate and up are equally wide
        other = [own[1], own[0]]
    else:  # and so are keys and values
        other = [None, own[2], own[1]]
    sizes = [size if size is not None else known for size, known in zip(own, other, strict=True)]
    whole = [size for size in sizes if size is not None]
    return whole if len(whole) == len(sizes) else None


def _magnitudes(
    name: str, parts: Parts, sizes: list[int], model: nn.Module | None
) -> list[mx.array] | None:
    """DoRA's magnitudes part by part; empty without DoRA, None where only the base could tell."""
    if all(change is None or change.m is None for change in parts.values()):
        return []
    if any(change is None for change in parts.values()) and model is None:
        return None
    magnitudes, begin = [], 0
    for change, size in zip(parts.values(), sizes, strict=True):
        if change is not None and change.m is not None:
            magnitudes.append(change.m.astype(mx.float32))
        elif model is not None:
            layer = projection(model, name)
            weight = base_weight(layer.linear if isinstance(layer, LoRALinear) else layer)
            magnitudes.append(mx.linalg.norm(weight[begin : begin + size], axis=1))
        begin += size
    return magnitudes
