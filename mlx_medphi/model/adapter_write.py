"""Write an adapter: the single file, or the directory for mlx-lm, mlx-swift-lm and PEFT.

Both appear complete or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_medphi import __version__
from mlx_medphi.errors import AdapterError
from mlx_medphi.files import (
    atomic_directory,
    atomic_path,
    read_safetensors_header,
    write_json,
)
from mlx_medphi.model.adapter_formats import (
    CONFIG_NAME,
    FILE_FORMAT,
    FILE_VERSION,
    MLX_NAME,
    PEFT_NAME,
    SUFFIX,
    Adapter,
    LowRank,
    differences,
    weights_hash,
)
from mlx_medphi.model.peft import peft_config, peft_tensors
from mlx_medphi.model.shards import MLX_DTYPES, array_piece, header_bytes, write_pieces

__all__ = ["check_directory", "check_file", "write_directory", "write_file"]

# Files of an adapter directory that a newer adapter may replace; any other stops it.
REPLACEABLE = {CONFIG_NAME, MLX_NAME, PEFT_NAME}
# Finder leaves this in every folder it shows.
NOBODYS = {".DS_Store"}

_DTYPES = {str(dtype).removeprefix("mlx.core."): dtype for dtype in MLX_DTYPES.values()}


def write_file(adapter: Adapter, path: Path, dtype: str | None, *, replace: bool) -> None:
    """Write the single file, or leave what was there untouched.

    Args:
        adapter: what to write.
        path: a name ending in .safetensors.
        dtype: "float16", "bfloat16" or "float32" for the factors, None keeps theirs; magnitudes of
            DoRA stay in float32, because what was learned is a small part of each.
        replace: whether an older adapter file there is replaced; any other file never is.

    Raises:
        AdapterError: something in the way, values beyond the dtype's range, or the file cannot be
            written.
    """
    check_file(path, replace=replace)
    stored = _stored(adapter, path, dtype)
    try:
        with atomic_path(path, replace=replace) as temporary:
            _write(temporary, stored.tensors(), _metadata(stored))
            check_file(path, replace=replace)
    except OSError as exc:
        raise _not_written(path, exc) from exc


def write_directory(adapter: Adapter, path: Path, dtype: str | None, *, replace: bool) -> None:
    """Write the directory for mlx-lm, mlx-swift-lm and PEFT, or leave what was there untouched.

    Args:
        adapter: what to write.
        path: a name that does not end in .safetensors.
        dtype: as in `write_file`.
        replace: whether an older adapter there is replaced; an empty directory always is, one with
            other files never.

    Raises:
        AdapterError: something in the way, values beyond the dtype's range, or the directory cannot
            be written.
    """
    check_directory(path, replace=replace)
    stored = _stored(adapter, path, dtype)
    tensors = stored.tensors()
    try:
        with atomic_directory(path, replace=replace or path.is_dir()) as temporary:
            _write(temporary / MLX_NAME, tensors, _metadata(stored))
            _write(temporary / PEFT_NAME, peft_tensors(tensors), {"format": "pt"})
            write_json(temporary / CONFIG_NAME, _config(stored))
            check_directory(path, replace=replace)
    except OSError as exc:
        raise _not_written(path, exc) from exc


def check_file(path: Path, *, replace: bool) -> None:
    """Refuse to write over anything but an adapter file of this library.

    Raises:
        AdapterError: says what is there.
    """
    if not os.path.lexists(path):
        return
    if path.is_dir():
        raise AdapterError(f"{path}: is a directory; a name without {SUFFIX} makes one of those")
    try:
        found = read_safetensors_header(path, AdapterError).metadata.get("format")
    except AdapterError as exc:
        raise AdapterError(f"{path}: is no adapter file and stays; choose another name") from exc
    if found != FILE_FORMAT:
        raise AdapterError(
            f"{path}: is no adapter file of this library (format {found!r}, expected "
            f"{FILE_FORMAT!r}) and stays; choose another name"
        )
    if not replace:
        raise _exists(path)


def check_directory(path: Path, *, replace: bool) -> None:
    """Refuse to replace anything but an adapter directory.

    Raises:
        AdapterError: says what is there.
    """
    if path.is_dir():
        names = {file.name for file in path.iterdir()} - NOBODYS
        others = sorted(names - REPLACEABLE)
        if others:
            raise differences(
                path, "holds other files than an adapter's", others, "Choose another directory."
            )
        if names and not replace:
            raise _exists(path)
    elif os.path.lexists(path):
        raise AdapterError(f"{path}: is a file; a name ending in {SUFFIX} makes the single file")


def _exists(path: Path) -> AdapterError:
    return AdapterError(
        f"{path}: holds an adapter already; choose another name, or replace it on purpose"
    )


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
    return changed(adapter, layers=layers)


def _write(path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    pieces = [array_piece(name, array) for name, array in tensors.items()]
    specs = [spec for piece in pieces for spec in piece.tensors]
    write_pieces(path, header_bytes(specs, metadata), pieces)


def _metadata(adapter: Adapter) -> dict[str, str]:
    scaling, origin = adapter.scaling, adapter.origin
    tensors = adapter.tensors()
    values = {
        "version": FILE_VERSION,
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
        "format": FILE_FORMAT,
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
