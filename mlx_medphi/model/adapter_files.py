"""Read an adapter from any of its files, and write the two that this library makes.

The single file holds mlx-lm's tensor names and all facts in its metadata. The directory holds the
same file as `adapters.safetensors` for mlx-lm and mlx-swift-lm, the same numbers under PEFT's names
as `adapter_model.safetensors`, and one `adapter_config.json` with the settings of both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_medphi import __version__
from mlx_medphi.config import PROJECTIONS
from mlx_medphi.errors import AdapterError
from mlx_medphi.files import atomic_directory, atomic_path, write_json
from mlx_medphi.model.adapter_formats import (
    CONFIG_NAME,
    MLX_NAME,
    PEFT_NAME,
    Adapter,
    Form,
    LowRank,
    Origin,
    Scaling,
    assemble,
    base_label,
    check_scaling,
    differences,
    layer_name,
    load_tensors,
    read_json,
    uneven_layers,
    unknown_names,
    weights_hash,
)
from mlx_medphi.model.peft import peft_config, peft_tensors, read_peft
from mlx_medphi.model.shards import MLX_DTYPES, array_piece, header_bytes, write_pieces

__all__ = ["FORMAT", "is_file_path", "read_adapter", "write_directory", "write_file"]

FORMAT, VERSION = "medphi-adapter", 1
SUFFIX = ".safetensors"
# Files of an adapter directory that a newer adapter may replace; any other stops it.
REPLACEABLE = {CONFIG_NAME, MLX_NAME, PEFT_NAME, "README.md", ".DS_Store"}

_DTYPES = {str(dtype).removeprefix("mlx.core."): dtype for dtype in MLX_DTYPES.values()}
_TENSOR = re.compile(
    rf"(model\.layers\.\d+\.(?:{'|'.join(map(re.escape, PROJECTIONS))}))\.(lora_a|lora_b|m)"
)


def is_file_path(path: Path) -> bool:
    """Whether a path names a single adapter file rather than a directory."""
    return path.suffix == SUFFIX


def read_adapter(path: Path, model: nn.Module | None = None) -> Adapter:
    """Read an adapter and check everything that can be checked without its base.

    Args:
        path: a single file, or a directory of mlx-lm, of PEFT, or of both.
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
        form: Form = "mlx-lm and PEFT directory" if both else "mlx-lm directory"
        return replace(_read_mlx(path, config), form=form)
    if for_peft:
        return read_peft(path, config, model)
    expected = f"{MLX_NAME} is not there" if for_mlx else "it is neither mlx-lm's nor PEFT's"
    raise AdapterError(f"{config_path}: {expected}; save the adapter again")


def _read_file(path: Path) -> Adapter:
    tensors, metadata, problems = load_tensors(path)
    if metadata.get("format") != FORMAT:
        beside = path.parent / CONFIG_NAME
        hint = f"give the directory {path.parent}" if beside.exists() else "save the adapter again"
        raise AdapterError(
            f"{path}: its metadata does not say rank and scale (format {metadata.get('format')!r}, "
            f"expected {FORMAT!r}); {hint}"
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
        model_layers = int(facts["model_layers"])
    except (KeyError, TypeError, ValueError) as exc:
        raise AdapterError(f"{path}: its metadata is incomplete or malformed ({exc})") from exc
    if facts["version"] > VERSION:
        raise AdapterError(
            f"{path}: written in version {facts['version']} of its format, this library knows "
            f"version {VERSION}; install a newer mlx_medphi"
        )
    layers = _layers(path, tensors, scaling, problems)
    if len(tensors) != facts["tensors"] or not set(layers) <= expected:
        problems.append(f"{len(tensors)} tensors, its metadata says {facts['tensors']}")
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
    if metadata.get("format") == FORMAT:
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


def write_file(adapter: Adapter, path: Path, dtype: str | None) -> None:
    """Write the single file, or leave what was there untouched.

    Args:
        adapter: what to write.
        path: a name ending in .safetensors.
        dtype: "float16", "bfloat16" or "float32" for the factors, None keeps theirs; magnitudes of
            DoRA stay in float32, because what was learned is a small part of each.

    Raises:
        AdapterError: values beyond the dtype's range, or the file cannot be written.
    """
    stored = _stored(adapter, path, dtype)
    try:
        with atomic_path(path) as temporary:
            _write(temporary, stored.tensors(), _metadata(stored))
    except OSError as exc:
        raise _not_written(path, exc) from exc


def write_directory(adapter: Adapter, path: Path, dtype: str | None) -> None:
    """Write the directory for mlx-lm, mlx-swift-lm and PEFT, or leave what was there untouched.

    Raises:
        AdapterError: values beyond the dtype's range, the directory holds other files than an
            adapter's, or it cannot be written.
    """
    if path.is_file():
        raise AdapterError(f"{path}: is a file; a name ending in {SUFFIX} makes the single file")
    others = sorted({file.name for file in path.iterdir()} - REPLACEABLE) if path.is_dir() else []
    if others:
        raise differences(
            path, "holds other files than an adapter's", others, "Choose another directory."
        )
    stored = _stored(adapter, path, dtype)
    tensors = stored.tensors()
    try:
        with atomic_directory(path, replace=True) as temporary:
            _write(temporary / MLX_NAME, tensors, _metadata(stored))
            _write(temporary / PEFT_NAME, peft_tensors(tensors), {"format": "pt"})
            write_json(temporary / CONFIG_NAME, _config(stored))
    except OSError as exc:
        raise _not_written(path, exc) from exc


def _stored(adapter: Adapter, path: Path, dtype: str | None) -> Adapter:
    """The adapter with its factors in the dtype they are stored in."""
    if dtype is None:
        return adapter
    if dtype not in _DTYPES or _DTYPES[dtype] == mx.uint32:
        raise AdapterError(f"dtype is {dtype!r}, expected 'float16', 'bfloat16' or 'float32'")
    target = _DTYPES[dtype]
    layers = {}
    for name, change in adapter.layers.items():
        a, b = change.a.astype(target), change.b.astype(target)
        if not (mx.isfinite(a).all() & mx.isfinite(b).all()).item():
            raise AdapterError(
                f"{path}: {name} holds values that are not finite in {dtype}; "
                "save with dtype='float32', and check the training if that fails too"
            )
        layers[name] = LowRank(a, b, None if change.m is None else change.m.astype(mx.float32))
    return replace(adapter, layers=layers)


def _write(path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    pieces = [array_piece(name, array) for name, array in tensors.items()]
    specs = [spec for piece in pieces for spec in piece.tensors]
    write_pieces(path, header_bytes(specs, metadata), pieces)


def _metadata(adapter: Adapter) -> dict[str, str]:
    scaling, origin = adapter.scaling, adapter.origin
    tensors = adapter.tensors()
    values = {
        "version": VERSION,
        "rank": scaling.rank,
        "scale": scaling.scale,
        "alpha": scaling.scale * scaling.rank,
        "dropout": scaling.dropout,
        "keys": adapter.keys,
        "layers": adapter.indices,
        "num_layers": adapter.num_layers,
        "model_layers": adapter.model_layers,
        "tensors": len(tensors),
        "base_quantization": origin.base_quantization,
        "training": origin.training,
    }
    texts = {
        "format": FORMAT,
        "fine_tune_type": scaling.fine_tune_type,
        "base_name": origin.base_name,
        "base_fingerprint": origin.base_fingerprint,
        "weights_sha256": weights_hash(tensors),
        "package_version": __version__,
    }
    plain = {key: json.dumps(value, sort_keys=True) for key, value in values.items()}
    return {**plain, **{key: text for key, text in texts.items() if text}}


def _config(adapter: Adapter) -> dict[str, Any]:
    """adapter_config.json: for mlx-lm and mlx-swift-lm, then for PEFT, then our own facts."""
    scaling = adapter.scaling
    mlx = {
        "fine_tune_type": scaling.fine_tune_type,
        "num_layers": adapter.num_layers,
        "lora_parameters": {
            "rank": scaling.rank,
            "scale": scaling.scale,
            "dropout": scaling.dropout,
            "keys": list(adapter.keys),
        },
    }
    facts = {**asdict(adapter.origin), "package_version": __version__}
    facts["weights_sha256"] = weights_hash(adapter.tensors())
    return {**mlx, **peft_config(adapter), "medphi": facts}


def _not_written(path: Path, exc: OSError) -> AdapterError:
    reason = exc.strerror or str(exc)
    return AdapterError(f"{path}: cannot be written ({reason}); what was there is unchanged")
