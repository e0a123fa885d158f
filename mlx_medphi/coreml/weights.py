"""The weights of a package: for each layer the form it is stored in, and its bytes when asked for.

A quantised layer keeps the codes it was trained with. Planning reads scales and biases; everything
else passes through a few rows at a time when the weight file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.blobs import Part
from mlx_medphi.coreml.codes import Form, Tally
from mlx_medphi.coreml.weight_blocks import (
    BLOCK_GROUPS,
    Blocks,
    StoredCodes,
    carried_blocks,
    half_blocks,
    quantised_blocks,
    row_ranges,
    unpacked_blocks,
)
from mlx_medphi.errors import ExportError
from mlx_medphi.model.layout import linear_shapes
from mlx_medphi.model.weights import Checkpoint, StoredTensor

__all__ = ["EMBEDDING", "HEAD", "Weight", "Weights", "export_bits", "plan_weights", "plain_bits"]

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
CARRIED_BITS = (4, 8)


@dataclass(frozen=True)
class Weight:
    """One layer's weight as the package stores it.

    Attributes:
        layer: its name in the checkpoint, without ".weight".
        shape: (out, in), or (n,) of a norm.
        bits: 16, 8 or 4 as stored.
        group: inputs per scale; None for float16.
        form: how codes become numbers.
        parts: "weight", or "data", "scale" and perhaps "offset", in the order of `blocks`.
        error: for codes carried over, max |value − MLX's| / max |MLX's| of a group, the largest of
            all groups: a bound for all codes, from scales and biases alone, which holds before a
            value is itself rounded to float16. None where no codes were carried over.
        subnormal: scales carried over that have fewer digits than float16 usually has.
        blocks: the packed bytes of each part, row block by row block.
    """

    layer: str
    shape: tuple[int, ...]
    bits: int
    group: int | None
    form: Form
    parts: Mapping[str, Part]
    error: float | None
    subnormal: int
    blocks: Callable[[], Blocks]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


@dataclass(frozen=True)
class Weights:
    """All weights of a package, `layers` in the order in which the model uses them."""

    layers: Mapping[str, Weight]

    @property
    def nbytes(self) -> int:
        """Bytes of all constants, without what a file puts between them."""
        return sum(weight.nbytes for weight in self.layers.values())

    def parts(self) -> tuple[Part, ...]:
        """The constants in the order of `layers`."""
        return tuple(part for weight in self.layers.values() for part in weight.parts.values())

    @property
    def exceptions(self) -> dict[str, Form]:
        """Quantised layers in another form than is usual for them, and that form.

        Usual is "integer offset", and for an embedding that came with 4 bits "no offset".
        """
        usual = {"float16", "integer offset"}
        return {
            name: weight.form
            for name, weight in self.layers.items()
            if weight.form not in (usual | {"no offset"} if name == EMBEDDING else usual)
        }

    @property
    def subnormal_scales(self) -> int:
        """Scales with fewer digits than float16 usually has."""
        return sum(weight.subnormal for weight in self.layers.values())

    @property
    def worst_error(self) -> float | None:
        """The largest `Weight.error`; None where no codes were carried over."""
        errors = [weight.error for weight in self.layers.values() if weight.error is not None]
        return max(errors, default=None)


def export_bits(checkpoint: Checkpoint, config: ExportConfig) -> Literal[4, 8, 16]:
    """Bits of the projections: 16, 8 or 4.

    Raises:
        ExportError: a quantised base has other bits than are asked for, or groups where one scale
            per row is asked for.
    """
    base = checkpoint.config.quantization
    if base is None:
        return 4 if config.bits is None else config.bits
    if config.bits == 16:
        return 16
    if config.bits not in (None, base.bits):
        raise ExportError(
            f"{checkpoint.path}: is quantised to {base.bits} bits, {config.bits} are asked for; "
            "other codes would not be the model an adapter was trained on: leave out bits "
            f"(--bits) to keep its own, or export the model it was made from to {config.bits}"
        )
    if config.scheme == "channel":
        raise ExportError(
            f"{checkpoint.path}: has a scale for every {base.group_size} weights, scheme 'channel' "
            "one for each row; leave out the scheme (--scheme), or export the model it was "
            "quantised from"
        )
    if base.bits == 4:
        return 4
    return 8 if base.bits == 8 else 16


def plain_bits(layer: str, bits: int, config: ExportConfig) -> int:
    """Bits of one layer of a plain base whose projections get `bits`."""
    if bits == 16:
        return 16
    return {EMBEDDING: config.embedding_bits, HEAD: config.head_bits}.get(layer, bits)


def plan_weights(checkpoint: Checkpoint, config: ExportConfig) -> Weights:
    """How each layer of a checkpoint is stored.

    Quantised layers of 4 and 8 bits keep their codes, those of other bits become float16. A plain
    layer becomes float16 too, unless the scheme is "channel": then it is quantised on the way, one
    scale for each row. For one scale per group, quantise a plain checkpoint first.

    Raises:
        ExportError: the settings do not fit the base, or a scale or value is beyond float16; what
            is not read yet is checked when its blocks are made.
    """
    bits = export_bits(checkpoint, config)
    by_rows = checkpoint.config.quantization is None and config.scheme == "channel"
    shapes, forms = linear_shapes(checkpoint.config), checkpoint.quantized_layers
    layers: dict[str, Weight] = {}
    for layer in _execution_order(checkpoint):
        tensor = checkpoint.tensors[f"{layer}.weight"]
        if layer in forms:
            codes = StoredCodes.of(checkpoint, layer)
            keeps = codes.bits in CARRIED_BITS and not _is_half(layer, config)
            layers[layer] = _carried(codes) if keeps else _unpacked(codes)
        elif by_rows and layer in shapes and not _is_half(layer, config):
            layers[layer] = _by_rows(layer, tensor, plain_bits(layer, bits, config))
        else:
            layers[layer] = _half(layer, tensor.info.shape, partial(half_blocks, layer, tensor))
    return Weights(MappingProxyType(layers))


def _is_half(layer: str, config: ExportConfig) -> bool:
    """Whether the settings want a layer in float16."""
    own = {EMBEDDING: config.embedding_bits, HEAD: config.head_bits}
    return 16 in (config.bits, own.get(layer))


def _execution_order(checkpoint: Checkpoint) -> list[str]:
    names = [EMBEDDING]
    for i in range(checkpoint.config.num_hidden_layers):
        block = (
            "input_layernorm", "self_attn.qkv_proj", "self_attn.o_proj",
            "post_attention_layernorm", "mlp.gate_up_proj", "mlp.down_proj",
        )  # fmt: skip
        names += [f"model.layers.{i}.{name}" for name in block]
    tied = checkpoint.config.tie_word_embeddings
    return [*names, "model.norm", *([] if tied else [HEAD])]


def _carried(codes: StoredCodes) -> Weight:
    """A layer whose codes stay as they are; its form is decided by its scales and biases."""
    outputs, inputs = codes.shape
    # Embeddings of 4 bits are not looked up everywhere; a byte each is.
    wide = codes.layer == EMBEDDING
    tally = _survey(codes, Tally(signed=wide))
    form = tally.form
    bits = 8 if wide or form == "no offset" else codes.bits
    data = "int8" if form == "no offset" else f"uint{bits}"
    small = (outputs, inputs // codes.group)
    parts = {"data": (data, codes.shape), "scale": ("float16", small)}
    if form != "no offset":
        parts["offset"] = ("float16" if form == "float16 offset" else data, small)
    return Weight(
        codes.layer, codes.shape, bits, codes.group, form, _parts(codes.layer, parts), tally.error,
        tally.subnormal, partial(carried_blocks, codes, form, bits),
    )  # fmt: skip


def _survey(codes: StoredCodes, tally: Tally) -> Tally:
    """Look at all groups of a layer."""
    ranges = list(row_ranges(codes.shape[0], codes.shape[1] // codes.group, BLOCK_GROUPS))
    for start, stop in ranges:
        tally.add(codes.carried(start, stop))
        if tally.form == "float16 offset":
            break
    else:
        return tally
    # No block can mend that; what counts now is how close offsets in float16 come.
    tally.error, tally.subnormal = 0.0, 0
    for start, stop in ranges:
        groups = codes.carried(start, stop)
        tally.error = max(tally.error, float(groups.errors(groups.offset()).max()))
        tally.subnormal += groups.subnormal
    return tally


def _by_rows(layer: str, tensor: StoredTensor, bits: int) -> Weight:
    """A plain layer that gets one scale and one offset for each row."""
    outputs, inputs = tensor.info.shape
    kind = f"uint{bits}"
    parts = {
        "data": (kind, (outputs, inputs)),
        "scale": ("float16", (outputs, 1)),
        "offset": (kind, (outputs, 1)),
    }
    return Weight(
        layer, (outputs, inputs), bits, inputs, "integer offset", _parts(layer, parts), None, 0,
        partial(quantised_blocks, layer, tensor, bits),
    )  # fmt: skip


def _unpacked(codes: StoredCodes) -> Weight:
    return _half(codes.layer, codes.shape, partial(unpacked_blocks, codes))


def _half(layer: str, shape: tuple[int, ...], blocks: Callable[[], Blocks]) -> Weight:
    parts = _parts(layer, {"weight": ("float16", shape)})
    return Weight(layer, shape, 16, None, "float16", parts, None, 0, blocks)


def _parts(layer: str, parts: Mapping[str, tuple[str, tuple[int, ...]]]) -> Mapping[str, Part]:
    named = {name: Part(f"{layer}.{name}", *form) for name, form in parts.items()}
    return MappingProxyType(named)
