"""The slot pack: an adapter in the form a Core ML program with adapter slots takes at run time.

One file holds eight float16 tensors, two for each projection of a block: `loraA_m` (layers, rank,
in) and `loraB_m` (layers, out, rank), with m one of `MODULES`. The scale is folded into B, layers
without a change are zeros, and so is what fills the rank up to the slot's; none of that costs
precision.
Facts are text in the file's metadata; `pack_metadata` makes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_medphi import __version__
from mlx_medphi.config import PROJECTIONS
from mlx_medphi.model.adapter_formats import Adapter, Form, LowRank, Origin, Scaling, layer_name

__all__ = [
    "MODULES",
    "PACK_DTYPE",
    "PACK_FORMAT",
    "PACK_KIND",
    "SlotArray",
    "SlotPack",
    "pack_adapter",
    "pack_metadata",
    "slot_names",
    "slot_sites",
]

PACK_KIND, PACK_VERSION = "medphi-slots-", 1
PACK_FORMAT = f"{PACK_KIND}{PACK_VERSION}"

MODULES: Mapping[str, str] = {
    key.partition(".")[2].removesuffix("_proj"): key for key in PROJECTIONS
}
"""Name of a projection in slots -> its name in a checkpoint: qkv, o, gate_up and down."""

PACK_DTYPE = "F16"
SlotArray = npt.NDArray[np.float16]


@dataclass(frozen=True)
class SlotPack:
    """An adapter as slot arrays, and what it says about itself.

    Attributes:
        name: what the app calls it.
        arrays: slot name -> float16 array, all eight.
        rank: the adapter's own rank; what lies above it in the arrays is zero.
        base_id: hub id or folder name of the base.
        base_fingerprint: which base, see `fingerprint.py`; None: nobody knows.
        base_fingerprint_stated: whether the adapter's own file named the base; otherwise it is the
            base that the package was made from.
        base_quantization: how that base is quantised, as in mlx-lm's config.json; None: plain.
        source_format: the form the adapter was read from.
        tokenizer_sha256: of the tokenizer.json it goes with.
        chat_template_sha256: of that tokenizer's chat template.
        dropout: what it was trained with.
        package_version: the mlx_medphi that made it.
        training: facts of the training run, as JSON values.
    """

    name: str
    arrays: Mapping[str, SlotArray]
    rank: int
    base_id: str
    base_fingerprint: str | None
    source_format: Form
    tokenizer_sha256: str
    chat_template_sha256: str
    base_fingerprint_stated: bool = True
    base_quantization: Mapping[str, Any] | None = None
    dropout: float = 0.0
    package_version: str = __version__
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rank_slot(self) -> int:
        """The rank of the slots that it fills."""
        return int(self.arrays["loraA_qkv"].shape[1])


def slot_names(module: str) -> tuple[str, str]:
    """The names of a projection's two slots."""
    return f"loraA_{module}", f"loraB_{module}"


def slot_sites(arrays: Mapping[str, SlotArray]) -> list[tuple[int, str]]:
    """(layer, module) of every change in slot arrays, in order; an all-zero pair is none."""
    sites = []
    for module in MODULES:
        a, b = (np.any(arrays[name] != 0, axis=(1, 2)) for name in slot_names(module))
        sites += [(int(layer), module) for layer in np.flatnonzero(a | b)]
    return sorted(sites, key=lambda site: (site[0], list(MODULES).index(site[1])))


def pack_metadata(pack: SlotPack) -> dict[str, str]:
    """A pack's facts as the file's metadata, sorted by name."""
    sites = slot_sites(pack.arrays)
    values = {
        "base_fingerprint_stated": pack.base_fingerprint_stated,
        "base_quantization": pack.base_quantization,
        "dropout": pack.dropout,
        "layers": sorted({layer for layer, _ in sites}),
        "modules": [module for module in MODULES if module in {m for _, m in sites}],
        "rank": pack.rank,
        "rank_slot": pack.rank_slot,
        "scale_folded": True,
        "training": pack.training,
    }
    texts = {
        "base_fingerprint": pack.base_fingerprint,
        "base_id": pack.base_id,
        "chat_template_sha256": pack.chat_template_sha256,
        "dtype": PACK_DTYPE,
        "format": PACK_FORMAT,
        "name": pack.name,
        "package_version": pack.package_version,
        "source_format": pack.source_format,
        "tensors_sha256": _arrays_hash(pack.arrays),
        "tokenizer_sha256": pack.tokenizer_sha256,
    }
    plain = {key: json.dumps(value, sort_keys=True) for key, value in values.items()}
    return dict(sorted({**plain, **{k: text for k, text in texts.items() if text}}.items()))


def pack_adapter(pack: SlotPack) -> Adapter:
    """The adapter that a pack holds, with its own rank and the scale 1 that is left in it."""
    layers = {}
    for layer, module in slot_sites(pack.arrays):
        a, b = (pack.arrays[name][layer] for name in slot_names(module))
        layers[layer_name(layer, MODULES[module])] = LowRank(
            mx.array(np.ascontiguousarray(a[: pack.rank].T)),
            mx.array(np.ascontiguousarray(b[:, : pack.rank].T)),
        )
    origin = Origin(
        pack.base_id,
        pack.base_fingerprint,
        pack.base_quantization,
        pack.package_version,
        pack.training,
    )
    scaling = Scaling(pack.rank, 1.0, False, pack.dropout)
    return Adapter(layers, scaling, len(pack.arrays["loraA_qkv"]), origin, "slot pack")


def _arrays_hash(arrays: Mapping[str, SlotArray]) -> str:
    """SHA-256 of the tensors' bytes in the order of their names: of all that follows the header."""
    digest = hashlib.sha256()
    for _, array in sorted(arrays.items()):
        digest.update(np.ascontiguousarray(array, "<f2").data)
    return digest.hexdigest()
