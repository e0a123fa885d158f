"""Adapters in a bundle: what they may be called, and the files in `adapters/`.

The same adapter gives the same bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_medphi.coreml.slots import AdapterBase, slot_arrays
from mlx_medphi.errors import AdapterError, UsageError
from mlx_medphi.files import atomic_path
from mlx_medphi.model.adapter_formats import SUFFIX, Adapter
from mlx_medphi.model.shards import Piece, TensorSpec, header_bytes, write_pieces
from mlx_medphi.model.slot_pack import PACK_DTYPE, SlotArray, SlotPack, pack_metadata, slot_sites

__all__ = ["PackFacts", "check_names", "make_pack", "pack_path", "write_pack"]


_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
# Names that functions and files of a bundle have already.
RESERVED = ("base", "decode", "main", "prefill")


@dataclass(frozen=True)
class PackFacts:
    """What the bundle knows and an adapter may not.

    Attributes:
        base_id: hub id or folder name of the base, never a path.
        tokenizer_sha256: of the bundle's tokenizer.json.
        chat_template_sha256: of its chat template.
    """

    base_id: str
    tokenizer_sha256: str
    chat_template_sha256: str


def check_names(names: Sequence[str]) -> None:
    """Refuse names that cannot be a file, a part of a function's name and a choice of the app.

    Raises:
        UsageError: lists every name that is impossible or taken.
    """
    problems = []
    seen: dict[str, str] = {}
    for name in names:
        # As functions and the file systems of Macs see it: no hyphen, no difference of case.
        key = name.replace("-", "_").lower()
        if not _NAME.fullmatch(name):
            problems.append(f"{name[:80]!r} is no adapter name")
        elif key in RESERVED:
            problems.append(f"{name!r} is taken by the model itself")
        elif key in seen:
            same = "comes twice" if seen[key] == name else f"is the same as {seen[key]!r}"
            problems.append(f"{name!r} {same}")
        seen.setdefault(key, name)
    if problems:
        raise UsageError(
            f"adapter names: {'; '.join(problems[:10])}. Each adapter needs its own: letters, "
            "digits, _ and -, a letter first, at most 64; case, and - against _, make no difference"
        )


def make_pack(
    name: str, adapter: Adapter, base: AdapterBase, rank: int, facts: PackFacts
) -> SlotPack:
    """An adapter as a slot pack.

    Args:
        name: what the app calls it.
        adapter: one that `check_adapters` accepted.
        base: what it is exported for.
        rank: of the slots.
        facts: of the bundle.

    Raises:
        UsageError: an impossible name.
        AdapterError: it cannot be held by these slots, or is all zeros.
    """
    check_names([name])
    arrays, origin = slot_arrays(adapter, base.config, rank), adapter.origin
    if not slot_sites(arrays):
        raise AdapterError(f"adapter {name}: is all zeros, which is the base itself; leave it out")
    return SlotPack(
        name=name,
        arrays=arrays,
        rank=adapter.scaling.rank,
        base_id=facts.base_id,
        base_fingerprint=origin.base_fingerprint or base.fingerprint,
        source_format=adapter.form,
        tokenizer_sha256=facts.tokenizer_sha256,
        chat_template_sha256=facts.chat_template_sha256,
        base_fingerprint_stated=origin.base_fingerprint is not None,
        base_quantization=origin.base_quantization,
        dropout=adapter.scaling.dropout,
        training=origin.training,
    )


def pack_path(adapters: Path, name: str) -> Path:
    """Where a bundle's folder of adapters keeps one of them."""
    return adapters / f"{name}{SUFFIX}"


def write_pack(path: Path, pack: SlotPack) -> None:
    """Write a pack complete or not at all; what is there already stays.

    Raises:
        AdapterError: the file exists or cannot be written.
    """
    if os.path.lexists(path):
        raise AdapterError(f"{path}: exists already; choose another name")
    pieces = [_piece(name, array) for name, array in sorted(pack.arrays.items())]
    header = header_bytes((spec for p in pieces for spec in p.tensors), pack_metadata(pack))
    try:
        with atomic_path(path, replace=False) as temporary:
            write_pieces(temporary, header, pieces)
    except OSError as exc:
        raise AdapterError(f"{path}: cannot be written ({exc.strerror or exc})") from exc


def _piece(name: str, array: SlotArray) -> Piece:
    def chunks() -> Iterable[bytes]:
        # Layer by layer: a slot of a large model is no second time in memory.
        return (np.ascontiguousarray(layer, "<f2").tobytes() for layer in array)

    return Piece((TensorSpec(name, PACK_DTYPE, tuple(array.shape)),), chunks)
