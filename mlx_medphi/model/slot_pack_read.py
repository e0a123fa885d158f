"""Read a slot pack strictly: whatever a program would be given has been looked at before."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mlx_medphi.errors import AdapterError
from mlx_medphi.files import SafetensorsHeader, read_safetensors_header
from mlx_medphi.model.adapter_formats import Form, Scaling, check_scaling, differences
from mlx_medphi.model.config import MAX_LAYERS
from mlx_medphi.model.slot_pack import (
    MODULES,
    PACK_DTYPE,
    PACK_FORMAT,
    PACK_KIND,
    SlotArray,
    SlotPack,
    pack_metadata,
    slot_names,
    slot_sites,
)

__all__ = ["read_pack"]

# What every pack says; `base_fingerprint` is there too unless nobody knows it.
FACTS = (
    "base_fingerprint_stated", "base_id", "base_quantization", "chat_template_sha256", "dropout",
    "dtype", "format", "layers", "modules", "name", "package_version", "rank", "rank_slot",
    "scale_folded", "source_format", "tensors_sha256", "tokenizer_sha256", "training",
)  # fmt: skip
_JSON_FACTS = (
    "base_fingerprint_stated", "base_quantization", "dropout", "layers", "modules", "rank",
    "rank_slot", "scale_folded", "training",
)  # fmt: skip

_HASH = re.compile(r"[0-9a-f]{64}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}(-q\d{1,2}g\d{1,4})?")


def read_pack(path: Path) -> SlotPack:
    """Read a slot pack and check all of it.

    Raises:
        AdapterError: missing, damaged, of a newer format, or it contradicts itself; all that is
            wrong is in one message.
    """
    path = Path(path)
    header = read_safetensors_header(path, AdapterError)
    found = header.metadata.get("format", "")
    if found != PACK_FORMAT:
        newer = found.startswith(PACK_KIND)
        raise AdapterError(
            f"{path}: is no slot pack that this library knows (format {found!r}, expected "
            f"{PACK_FORMAT!r}); {'install a newer mlx_medphi' if newer else 'export it again'}"
        )
    problems = _shape_problems(header)
    if not problems:
        arrays = _read_arrays(path, header)
        pack, problems = _described(header.metadata, arrays)
        if pack is not None and not problems:
            return pack
    raise differences(path, "is not a whole slot pack", problems, "Copy or export it again.")


def _shape_problems(header: SafetensorsHeader) -> list[str]:
    """What the header alone shows; without problems all shapes belong to one model and one slot."""
    names = {name for module in MODULES for name in slot_names(module)}
    tensors = header.tensors
    problems = [f"{name}: missing" for name in names - tensors.keys()]
    problems += [f"{name}: is no slot" for name in tensors.keys() - names]
    problems += [
        f"{name}: {info.dtype} of shape {info.shape}, expected {PACK_DTYPE} of three extents"
        for name, info in tensors.items()
        if info.dtype != PACK_DTYPE or len(info.shape) != 3 or 0 in info.shape
    ]
    if problems:
        return problems
    layers, rank, hidden = tensors["loraA_qkv"].shape
    if layers > MAX_LAYERS:
        return [f"{layers} layers, no Phi-3 has more than {MAX_LAYERS}"]
    for module in MODULES:
        a, b = (tensors[name].shape for name in slot_names(module))
        # The inputs of two projections and the outputs of the others are the model's width.
        inputs = hidden if module in ("qkv", "gate_up") else a[2]
        outputs = b[1] if module in ("qkv", "gate_up") else hidden
        for name, shape, expected in zip(
            slot_names(module),
            (a, b),
            ((layers, rank, inputs), (layers, outputs, rank)),
            strict=True,
        ):
            if shape != expected:
                problems.append(f"{name}: shape {shape}, the other slots ask for {expected}")
    return problems


def _read_arrays(path: Path, header: SafetensorsHeader) -> dict[str, SlotArray]:
    arrays = {}
    try:
        with path.open("rb") as handle:
            for name, info in header.tensors.items():
                handle.seek(header.data_start + info.begin)
                flat = np.frombuffer(handle.read(info.nbytes), "<f2")
                arrays[name] = flat.reshape(info.shape).astype(np.float16, copy=False)
    except (OSError, ValueError) as exc:
        raise AdapterError(f"{path}: cannot be read ({exc})") from exc
    return arrays


def _described(
    metadata: Mapping[str, str], arrays: Mapping[str, SlotArray]
) -> tuple[SlotPack | None, list[str]]:
    """A pack from a file's metadata and tensors, and everything that does not hold together."""
    missing = [f"{name}: missing in the metadata" for name in FACTS if name not in metadata]
    if missing:
        return None, missing
    try:
        facts = {key: json.loads(metadata[key]) for key in _JSON_FACTS}
    except (RecursionError, ValueError) as exc:
        return None, [f"its metadata is malformed ({exc})"]
    problems = _fact_problems(facts, metadata)
    if problems:
        return None, problems
    form: Any = metadata["source_format"]  # checked to be a Form
    pack = SlotPack(
        name=metadata["name"],
        arrays=arrays,
        rank=facts["rank"],
        base_id=metadata["base_id"],
        base_fingerprint=metadata.get("base_fingerprint"),
        source_format=form,
        tokenizer_sha256=metadata["tokenizer_sha256"],
        chat_template_sha256=metadata["chat_template_sha256"],
        base_fingerprint_stated=facts["base_fingerprint_stated"],
        base_quantization=facts["base_quantization"],
        dropout=facts["dropout"],
        package_version=metadata["package_version"],
        training=facts["training"],
    )
    # The facts that follow from the tensors are not believed but made again.
    made = pack_metadata(pack)
    problems += [
        f"{key}: its metadata says {metadata[key][:40]}, its tensors {made[key][:40]}"
        for key in ("layers", "modules", "rank_slot")
        if json.loads(metadata[key]) != json.loads(made[key])
    ]
    if metadata["tensors_sha256"] != made["tensors_sha256"]:
        problems.append("its values are not those it was written with: the file is damaged")
    return pack, problems + _value_problems(pack)


def _fact_problems(facts: Mapping[str, Any], metadata: Mapping[str, str]) -> list[str]:
    """Values of the metadata that no pack has."""
    problems: list[str] = []
    check_scaling(Scaling(facts["rank"], 1.0, False, facts["dropout"]), problems)
    fingerprint = metadata.get("base_fingerprint")
    possible = {
        "base_fingerprint": fingerprint is None or _FINGERPRINT.fullmatch(fingerprint),
        "base_fingerprint_stated": isinstance(facts["base_fingerprint_stated"], bool),
        "base_quantization": isinstance(facts["base_quantization"], (dict, type(None))),
        "chat_template_sha256": _HASH.fullmatch(metadata["chat_template_sha256"]),
        "dtype": metadata["dtype"] == PACK_DTYPE,
        "scale_folded": facts["scale_folded"] is True,
        "source_format": metadata["source_format"] in get_args(Form),
        "tokenizer_sha256": _HASH.fullmatch(metadata["tokenizer_sha256"]),
        "training": isinstance(facts["training"], dict),
    }
    return problems + [
        f"{key}: {metadata.get(key, '')[:40]!r} is not possible"
        for key, fits in possible.items()
        if not fits
    ]


def _value_problems(pack: SlotPack) -> list[str]:
    """Numbers that the program must not be given."""
    problems = [
        f"{name}: holds values that are not finite"
        for name, array in pack.arrays.items()
        if not np.isfinite(array).all()
    ]
    if pack.rank > pack.rank_slot:
        return [*problems, f"rank is {pack.rank}, its slots have {pack.rank_slot}"]
    for module in MODULES:
        a, b = slot_names(module)
        above = np.any(pack.arrays[a][:, pack.rank :]), np.any(pack.arrays[b][:, :, pack.rank :])
        if any(above):
            problems.append(f"{module}: values above its rank of {pack.rank}")
    if not slot_sites(pack.arrays):
        problems.append("holds only zeros, so there is no adapter in it")
    return problems
