"""Adapters as the arrays that a Core ML program takes, and everything that speaks against it.

An adapter changes a projection by scale · x A B with A (in, r) and B (r, out). The program takes
Aᵀ (r, in) and scale · Bᵀ (out, r) in float16, stacked over all layers for the slots. Zeros are
exact: empty slots are the base, and a rank below the slot's is filled up with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_medphi.config import MAX_RANK
from mlx_medphi.errors import AdapterError
from mlx_medphi.model.adapter_formats import Adapter, differences, layer_index, layer_name
from mlx_medphi.model.config import Phi3Config
from mlx_medphi.model.fingerprint import quantized_as, short_fingerprint
from mlx_medphi.model.layout import linear_shapes
from mlx_medphi.model.slot_pack import MODULES, SlotArray, slot_names

__all__ = [
    "MODULES",
    "AdapterBase",
    "check_adapters",
    "function_name",
    "layer_factors",
    "slot_arrays",
    "slot_rank",
    "slot_shapes",
    "zero_slots",
]

DEFAULT_RANK, SMALLEST_RANK = 16, 8
LARGEST = 65504.0
"""The largest float16."""

WAY_OUT = "Fold such an adapter in (adapters='fused'), or export with the base it was trained on."


@dataclass(frozen=True)
class AdapterBase:
    """What adapters are exported for.

    Attributes:
        config: the architecture.
        fingerprint: of the checkpoint as it lies on the disk.
        quantize: (bits, group size) that the export gives a plain checkpoint, 0 for one scale per
            row; None where its own numbers are carried over.
    """

    config: Phi3Config
    fingerprint: str
    quantize: tuple[int, int] | None = None


def function_name(function: str, adapter: str) -> str:
    """The name of `function` with an adapter built in, e.g. "decode_soap_notes"."""
    return f"{function}_{adapter.replace('-', '_')}"


def slot_shapes(config: Phi3Config, rank: int) -> dict[str, tuple[int, int, int]]:
    """Slot name -> (layers, rank, in) of A or (layers, out, rank) of B, all eight."""
    layers, linear = config.num_hidden_layers, linear_shapes(config)
    shapes = {}
    for module, key in MODULES.items():
        a, b = slot_names(module)
        outputs, inputs = linear[layer_name(0, key)]
        shapes[a], shapes[b] = (layers, rank, inputs), (layers, outputs, rank)
    return shapes


def slot_rank(adapters: Iterable[Adapter], wanted: int | None = None) -> int:
    """The rank of the slots: what is wanted, else the smallest of 8, 16, 32 … that holds all.

    Raises:
        AdapterError: no slot is large enough.
    """
    if wanted is not None:
        return wanted
    ranks = [adapter.scaling.rank for adapter in adapters]
    if not ranks:
        return DEFAULT_RANK
    if max(ranks) > MAX_RANK:
        raise AdapterError(
            f"an adapter has rank {max(ranks)}, slots have {MAX_RANK} at most; "
            "fold it in (adapters='fused')"
        )
    return max(SMALLEST_RANK, 1 << (max(ranks) - 1).bit_length())


def zero_slots(config: Phi3Config, rank: int) -> dict[str, SlotArray]:
    """Empty slots: the base itself."""
    return {name: np.zeros(shape, np.float16) for name, shape in slot_shapes(config, rank).items()}


def slot_arrays(adapter: Adapter, config: Phi3Config, rank: int) -> dict[str, SlotArray]:
    """An adapter as slot arrays, the scale folded into B; untouched layers are zeros.

    Args:
        adapter: one that `check_adapters` accepted.
        config: the architecture.
        rank: of the slots.

    Raises:
        AdapterError: it cannot be held by these slots; all reasons are in one message.
    """
    if problems := _form_problems(adapter, config, rank) or _range_problems(adapter):
        raise differences("The adapter", "does not fit the slots", problems, WAY_OUT)
    arrays = zero_slots(config, rank)
    own = adapter.scaling.rank
    for module, key in MODULES.items():
        a, b = (arrays[name] for name in slot_names(module))
        for layer in range(config.num_hidden_layers):
            if layer_name(layer, key) in adapter.layers:
                a[layer, :own], b[layer, :, :own] = _factors(adapter, layer_name(layer, key))
    return arrays


def layer_factors(adapter: Adapter, layer: str) -> tuple[SlotArray, SlotArray]:
    """The factors of one of `adapter.layers` in its own rank: A (r, in) and B (out, r), float16.

    Raises:
        AdapterError: DoRA, or a value that float16 does not hold.
    """
    if problems := _kind_problems(adapter) or _range_problems(adapter, [layer]):
        raise differences("The adapter", "cannot be exported", problems, WAY_OUT)
    return _factors(adapter, layer)


def check_adapters(
    adapters: Mapping[str, Adapter], base: AdapterBase, rank: int | None = None
) -> list[str]:
    """Refuse adapters that this package cannot hold beside its base.

    Args:
        adapters: name -> adapter.
        base: what they are exported for.
        rank: of the slots; None without slots.

    Returns:
        What the user should know about adapters that are accepted, one line each.

    Raises:
        AdapterError: everything that is wrong with any of them, and the way out.
    """
    problems, notes = [], []
    for name, adapter in adapters.items():
        # Values are looked at where the shapes make sense.
        found = _form_problems(adapter, base.config, rank) or _range_problems(adapter)
        foreign, remarks = _base_problems(adapter, base)
        problems += [f"{name}: {line}" for line in found + foreign]
        notes += [f"{name}: {line}" for line in remarks]
    if problems:
        raise differences("This package", "cannot hold its adapters", problems, WAY_OUT)
    return notes


def _factors(adapter: Adapter, layer: str) -> tuple[SlotArray, SlotArray]:
    change, scale = adapter.layers[layer], np.float32(adapter.scaling.scale)
    a, b = (np.array(part.astype(mx.float32)).T for part in (change.a, change.b))
    # The product is rounded once, from float32.
    return a.astype(np.float16, order="C"), (scale * b).astype(np.float16, order="C")


def _kind_problems(adapter: Adapter) -> list[str]:
    if not adapter.scaling.dora:
        return []
    return ["DoRA rescales rows of the base, which no pair of factors beside it can do"]


def _form_problems(adapter: Adapter, config: Phi3Config, rank: int | None) -> list[str]:
    """What kind, rank, layers and shapes show."""
    problems, own = _kind_problems(adapter), adapter.scaling.rank
    if rank is not None and own > rank:
        problems.append(f"rank is {own}, the slots have {rank}: export with slot_rank={own}")
    linear, blocks = linear_shapes(config), config.num_hidden_layers
    for name, change in adapter.layers.items():
        if layer_index(name) >= blocks:
            problems.append(f"{name}: this model has blocks 0 to {blocks - 1} only")
            continue
        outputs, inputs = linear[name]
        for part, array, expected in (
            ("lora_a", change.a, (inputs, own)),
            ("lora_b", change.b, (own, outputs)),
        ):
            if array.shape != expected:
                problems.append(f"{name}.{part}: shape {array.shape}, model expects {expected}")
    return problems


def _range_problems(adapter: Adapter, layers: Iterable[str] | None = None) -> list[str]:
    """Values of some layers, all by default, that float16 does not hold."""
    problems = []
    for name in adapter.layers if layers is None else layers:
        change = adapter.layers[name]
        for part, array, scale in (
            ("lora_a", change.a, 1.0),
            ("lora_b", change.b, adapter.scaling.scale),
        ):
            largest = scale * float(np.abs(np.array(array.astype(mx.float32))).max())
            if not largest < LARGEST:  # not a number is in no order
                times = f" times the scale of {scale:g}" if scale != 1 else ""
                problems.append(
                    f"{name}.{part}: its largest value{times} is {largest:.6g}, float16 holds less "
                    f"than {LARGEST:g}"
                )
    return problems


def _base_problems(adapter: Adapter, base: AdapterBase) -> tuple[list[str], list[str]]:
    """What shows that the adapter was trained on another base, and what is worth a note."""
    theirs, ours = adapter.origin.base_fingerprint, base.fingerprint
    if theirs is None:
        return [], ["does not say which base it was trained on; taken to be this one"]
    if theirs == ours:
        if base.quantize is None:
            return [], []
        return [], [f"was trained on the plain weights, here they have {_bits(base.quantize)}"]
    trained = quantized_as(theirs, ours)
    if trained is None:
        names = f"{short_fingerprint(theirs)}, this base has {short_fingerprint(ours)}"
        return [f"base fingerprint: {names}"], []
    if trained == base.quantize:
        return [], []
    bits, group = trained
    here = "the plain weights" if base.quantize is None else _bits(base.quantize)
    return [
        f"was trained on this base with {_bits(trained)}, the package has {here}: export with "
        f"bits={bits}, group_size={group}"
    ], []


def _bits(quantize: tuple[int, int]) -> str:
    bits, group = quantize
    return f"{bits} bits " + (f"in groups of {group}" if group else "and one scale per row")
