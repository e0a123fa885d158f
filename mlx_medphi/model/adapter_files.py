"""Read an adapter from any of its files, and check it as far as that goes without its base.

The single file holds mlx-lm's tensor names and all facts in its metadata. The directory holds the
same file as `adapters.safetensors` for mlx-lm and mlx-swift-lm, the same numbers under PEFT's names
as `adapter_model.safetensors`, and one `adapter_config.json` with the settings of both.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_medphi.config import PROJECTIONS
from mlx_medphi.errors import AdapterError
from mlx_medphi.files import read_safetensors_header
from mlx_medphi.model.adapter_formats import (
    CONFIG_NAME,
    FILE_FORMAT,
    FILE_VERSION,
    LAYER_NUMBER,
    MLX_NAME,
    PEFT_NAME,
    SUFFIX,
    Adapter,
    Form,
    LowRank,
    Origin,
    Scaling,
    assemble,
    base_label,
    check_scaling,
    differences,
    layer_index,
    layer_name,
    load_tensors,
    read_json,
    uneven_layers,
    unknown_names,
    weights_hash,
)
from mlx_medphi.model.config import MAX_LAYERS
from mlx_medphi.model.peft import read_peft
from mlx_medphi.model.slot_pack import PACK_KIND, pack_adapter
from mlx_medphi.model.slot_pack_read import read_pack

__all__ = ["is_file_path", "read_adapter", "recorded_base"]

_TENSOR = re.compile(
    rf"(model\.layers\.{LAYER_NUMBER}\.(?:{'|'.join(map(re.escape, PROJECTIONS))}))"
    r"\.(lora_a|lora_b|m)"
)


def is_file_path(path: Path) -> bool:
    """Whether a path names a single adapter file rather than a directory."""
    return path.suffix == SUFFIX


def read_adapter(path: Path, model: nn.Module | None = None) -> Adapter:
    """Read an adapter and check everything that can be checked without its base.

    Args:
        path: a single file of this library, for training or a slot pack; or a directory of mlx-lm,
            of PEFT, or of both.
        model: the base; only a PEFT adapter that leaves out a part of a fused projection needs it.

    Raises:
        AdapterError: missing, damaged or inconsistent; all that is wrong is in one message.
    """
    path = Path(path)
    if path.is_file():
        return _read_file(path)
    if not path.is_dir():
        raise AdapterError(f"{path}: no such file or directory")
    config_path = path / CONFIG_NAME
    if not config_path.exists():
        inner = path / "adapter"
        hint = f"; did you mean {inner}?" if (inner / CONFIG_NAME).exists() else ""
        raise AdapterError(f"{path}: holds no {CONFIG_NAME}, so it is no adapter directory{hint}")
    config = read_json(config_path)
    for_mlx = "lora_parameters" in config or "fine_tune_type" in config
    for_peft = "peft_type" in config
    if for_mlx and (path / MLX_NAME).exists():
        both = for_peft and (path / PEFT_NAME).exists()
        if both:  # the copy for PEFT is not read, but a cut one shows that the writing was cut
            read_safetensors_header(path / PEFT_NAME, AdapterError)
        form: Form = "mlx-lm and PEFT directory" if both else "mlx-lm directory"
        return replace(_read_mlx(path, config), form=form)
    if for_peft:
        return read_peft(path, config, model)
    expected = f"{MLX_NAME} is not there" if for_mlx else "it is neither mlx-lm's nor PEFT's"
    raise AdapterError(f"{config_path}: {expected}; save the adapter again")


def recorded_base(path: Path) -> str | None:
    """The fingerprint of the base that an adapter names; None when it does not say.

    Raises:
        AdapterError: its file is damaged.
    """
    file = path / MLX_NAME if path.is_dir() else path
    if not file.is_file():
        return None
    return read_safetensors_header(file, AdapterError).metadata.get("base_fingerprint")


def _read_file(path: Path) -> Adapter:
    header = read_safetensors_header(path, AdapterError)
    if header.metadata.get("format", "").startswith(PACK_KIND):
        return pack_adapter(read_pack(path))
    tensors, metadata, problems = load_tensors(path)
    if metadata.get("format") != FILE_FORMAT:
        beside = path.parent / CONFIG_NAME
        hint = f"give the directory {path.parent}" if beside.exists() else "save the adapter again"
        raise AdapterError(
            f"{path}: its metadata does not say rank and scale (format {metadata.get('format')!r}, "
            f"expected {FILE_FORMAT!r}); {hint}"
        )
    return _described(path, tensors, metadata, problems)


def _described(
    path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str], problems: list[str]
) -> Adapter:
    """An adapter from a file that carries its own facts."""
    try:
        facts = {key: json.loads(metadata[key]) for key in _FACTS}
        scaling = Scaling(
            facts["rank"], facts["scale"], metadata["fine_tune_type"] == "dora", facts["dropout"]
        )
        expected = {layer_name(index, key) for index in facts["layers"] for key in facts["keys"]}
        model_layers, version = int(facts["model_layers"]), int(facts["version"])
        quantized = facts["base_quantization"]
        if not isinstance(facts["training"], dict) or not isinstance(quantized, (dict, type(None))):
            raise TypeError("training and base_quantization are objects")
        if metadata["fine_tune_type"] not in ("lora", "dora"):
            raise ValueError("fine_tune_type is lora or dora")
        alpha = float(json.loads(metadata["alpha"]))
    except (KeyError, OverflowError, RecursionError, TypeError, ValueError) as exc:
        raise AdapterError(f"{path}: its metadata is incomplete or malformed ({exc})") from exc
    if version > FILE_VERSION:
        raise AdapterError(
            f"{path}: written in version {version} of its format, this library knows "
            f"version {FILE_VERSION}; install a newer mlx_medphi"
        )
    check_scaling(scaling, problems)
    layers = {} if problems else _layers(path, tensors, scaling, problems)
    if not problems and not math.isclose(alpha, scaling.scale * scaling.rank, rel_tol=1e-6):
        problems.append(f"scale is {scaling.scale}, alpha / rank is {alpha / scaling.rank:g}")
    if layers and not max(map(layer_index, layers)) < model_layers <= MAX_LAYERS:
        problems.append(f"model_layers is {model_layers}, expected a number of blocks")
    if len(tensors) != facts["tensors"]:
        problems.append(f"{len(tensors)} tensors, its metadata says {facts['tensors']}")
    if not set(layers) <= expected:
        problems.append("tensors of layers or keys that its metadata does not name")
    if not problems and weights_hash(tensors) != metadata.get("weights_sha256"):
        problems.append("its values are not those it was written with: the file is damaged")
    if problems:
        raise differences(path, "is not a whole adapter", problems, "Copy or save it again.")
    origin = Origin(
        metadata.get("base_name"),
        metadata.get("base_fingerprint"),
        facts["base_quantization"],
        metadata.get("package_version"),
        facts["training"],
    )
    return Adapter(layers, scaling, model_layers, origin)


_FACTS = (
    "version", "rank", "scale", "dropout", "keys", "layers", "model_layers", "tensors",
    "base_quantization", "training",
)  # fmt: skip


def _read_mlx(path: Path, config: Mapping[str, Any]) -> Adapter:
    file = path / MLX_NAME
    kind, settings = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(settings, Mapping):
        raise AdapterError(
            f"{path / CONFIG_NAME}: fine_tune_type is {kind!r} and lora_parameters a "
            f"{type(settings).__name__}; expected 'lora' or 'dora', and an object with rank, scale"
        )
    scaling = Scaling(
        settings.get("rank", 0),
        settings.get("scale", 0),
        kind == "dora",
        settings.get("dropout", 0.0),
    )
    tensors, metadata, problems = load_tensors(file)
    check_scaling(scaling, problems)
    if problems:
        raise differences(path, "is not a usable adapter", problems, "Save the adapter again.")
    if metadata.get("format") == FILE_FORMAT:
        adapter = _described(file, tensors, metadata, problems)
        # A setting changed by hand would mean one thing to mlx-lm and another here.
        for name in ("rank", "scale", "dora"):
            here, there = getattr(scaling, name), getattr(adapter.scaling, name)
            if here != there:
                problems.append(f"{name}: {here} in {CONFIG_NAME}, {there} in {MLX_NAME}")
        if problems:
            raise differences(path, "contradicts itself", problems, "Save the adapter again.")
        return adapter
    layers = _layers(file, tensors, scaling, problems)
    adapter = Adapter(layers, scaling, 0, Origin())
    if layers:
        indices = adapter.indices
        problems += uneven_layers(layers, range(indices[0], indices[-1] + 1))
    if problems:
        raise differences(path, "is not a whole adapter", problems, "Save the adapter again.")
    # mlx-lm adapts the last blocks, so the last one it names is the base's last.
    origin = Origin(base_name=base_label(config.get("model")))
    return replace(adapter, model_layers=adapter.indices[-1] + 1, origin=origin)


def _layers(
    path: Path, tensors: Mapping[str, mx.array], scaling: Scaling, problems: list[str]
) -> dict[str, LowRank]:
    parts: dict[str, dict[str, mx.array]] = {}
    unknown = []
    for name, array in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            unknown.append(name)
        else:
            parts.setdefault(match[1], {})[match[2]] = array
    problems += unknown_names(unknown)
    if not tensors and not problems:
        raise AdapterError(f"{path}: holds no tensors, so there is no adapter in it")
    return assemble(parts, scaling, problems)
