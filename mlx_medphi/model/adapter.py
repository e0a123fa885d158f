"""Adapters on a model and in files: save, load, inspect, convert.

An adapter belongs to one base. A file that does not fit is refused with the list of differences,
and the model stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_medphi.config import PROJECTIONS, LoRAConfig
from mlx_medphi.errors import AdapterError
from mlx_medphi.model.adapter_files import is_file_path, read_adapter
from mlx_medphi.model.adapter_formats import (
    Adapter,
    Form,
    LowRank,
    Origin,
    Scaling,
    base_label,
    differences,
    layer_index,
    layer_key,
    weights_hash,
)
from mlx_medphi.model.adapter_write import (
    check_directory,
    check_file,
    write_directory,
    write_file,
)
from mlx_medphi.model.fingerprint import short_fingerprint
from mlx_medphi.model.lora import LoRALinear, adapted_layers, projection, weight_shape, wrap
from mlx_medphi.model.phi3 import Phi3ForCausalLM

__all__ = [
    "AdapterInfo",
    "adapter_info",
    "adapter_of",
    "convert_adapter",
    "load_adapter",
    "save_adapter",
]

FILE_DTYPE, DIRECTORY_DTYPE = "float16", "float32"


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter says about itself.

    Attributes:
        path: the file or directory.
        form: which of the readable forms it has.
        fine_tune_type: "lora" or "dora"; rsLoRA is LoRA with another scale.
        rank: inner size of the factors.
        scale: what their product is multiplied by.
        alpha: scale times rank, PEFT's `lora_alpha`.
        dropout: the dropout it was trained with.
        keys: adapted projections of a block.
        layers: adapted blocks.
        num_layers: blocks from the last one down to the first adapted one.
        parameters: numbers in all tensors.
        tensors: number of tensors.
        dtypes: the dtypes they are stored in.
        bytes: size of the file, or of all files of the directory.
        weights_sha256: hash of the tensors, the same in every file that holds the same numbers.
        base_name: hub id or folder name of the base.
        base_fingerprint: which base it belongs to; None: the file does not say.
        base_quantization: how that base is quantised; None: not at all, or the file does not say.
        package_version: the mlx_medphi that wrote it; None: another program.
        training: facts of the training run.
    """

    path: Path
    form: Form
    fine_tune_type: str
    rank: int
    scale: float
    alpha: float
    dropout: float
    keys: tuple[str, ...]
    layers: tuple[int, ...]
    num_layers: int
    parameters: int
    tensors: int
    dtypes: tuple[str, ...]
    bytes: int
    weights_sha256: str
    base_name: str | None
    base_fingerprint: str | None
    base_quantization: Mapping[str, Any] | None
    package_version: str | None
    training: Mapping[str, Any]


def save_adapter(
    model: Phi3ForCausalLM,
    path: str | Path,
    *,
    dtype: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> AdapterInfo:
    """Save a model's adapter, complete or not at all.

    Args:
        model: a model with an adapter.
        path: a name ending in .safetensors makes one self-describing file; any other name makes a
            directory that mlx-lm, mlx-swift-lm and PEFT load. An older adapter there is replaced;
            anything else there is an error and stays.
        dtype: how the factors are stored; None means "float16" in a file (50 MB for rank 16 on all
            of Phi-3-mini; each factor is rounded by at most 0.05 %) and "float32" in a directory.
        training: facts to keep with it, as JSON values.

    Raises:
        AdapterError: no adapter, values that are not finite, other files in the way, a full disk.
    """
    path = Path(path)
    default = FILE_DTYPE if is_file_path(path) else DIRECTORY_DTYPE
    adapter = adapter_of(model)
    if adapter is None:
        raise AdapterError(f"{path}: nothing to save, this model has no adapter; train one first")
    origin = changed(adapter.origin, training=dict(training or {}))
    _write(changed(adapter, origin=origin), path, dtype or default, replace=True)
    return adapter_info(path)


def load_adapter(
    model: Phi3ForCausalLM, path: str | Path, *, allow_other_base: bool = False
) -> AdapterInfo:
    """Put an adapter on a model; the base is frozen and only the adapter trains.

    A model that carries an adapter of the same form gets the new values.

    Args:
        model: the base.
        path: a single file, or a directory of mlx-lm, of PEFT, or of both.
        allow_other_base: accept an adapter that says it belongs to another base of the same shape.

    Raises:
        AdapterError: the adapter is damaged or does not fit; the model is unchanged.
    """
    path = Path(path)
    adapter = read_adapter(path, model)
    own = dict(adapted_layers(model))
    problems = _misfits(adapter, model) + _conflicts(adapter, own)
    foreign = [] if allow_other_base else _other_base(adapter, model)
    if problems or foreign:
        name = adapter.origin.base_name or "another model"
        advice = (
            "The model has an adapter already: load it on the bare base."
            if own and not foreign
            else f"It was trained on {name}: load that base"
            + ("." if problems else ", or try it on this one (allow_other_base=True).")
        )
        raise differences(path, "does not fit this model", problems + foreign, advice)
    if not own:
        model.freeze()
        scaling = adapter.scaling
        config = LoRAConfig(
            scaling.rank, scaling.scale, scaling.dropout, fine_tune_type=scaling.fine_tune_type
        )
        for name in adapter.layers:
            own[name] = wrap(model, name, config, mx.random.key(0))
    for name, change in adapter.layers.items():
        for part, array in change.arrays.items():
            # float32 whatever is stored: training goes on from here.
            own[name][part] = mx.contiguous(array.astype(mx.float32))
        mx.eval(own[name].trainable_parameters())
    return _info(adapter, path)


def adapter_info(path: str | Path) -> AdapterInfo:
    """Read what an adapter says about itself, and check it as far as that goes without its base.

    Raises:
        AdapterError: missing, damaged or inconsistent.
    """
    return _info(read_adapter(Path(path)), Path(path))


def convert_adapter(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    model: Phi3ForCausalLM | None = None,
    replace: bool = False,
) -> AdapterInfo:
    """Write an adapter in another form, with the same numbers.

    Args:
        source: any form that can be read.
        target: a name ending in .safetensors makes the single file, any other the directory.
        dtype: how the factors are stored; None keeps the source's.
        model: the base; needed only for PEFT adapters that leave out a part of a fused projection.
        replace: whether an older adapter at the target is replaced; anything else never is.

    Raises:
        AdapterError: the source is damaged, or the target exists or cannot be written.
    """
    source, target = Path(source), Path(target)
    if source.exists() and any(
        place.exists() and source.samefile(place) for place in (target, target.parent)
    ):
        raise AdapterError(
            f"{target}: is the adapter to convert, or a part of it; choose another name"
        )
    # Before anything is read: the source may be large.
    (check_file if is_file_path(target) else check_directory)(target, replace=replace)
    _write(read_adapter(source, model), target, dtype, replace)
    return adapter_info(target)


def adapter_of(model: Phi3ForCausalLM) -> Adapter | None:
    """The adapter a model carries, sharing its arrays; None without one."""
    layers = dict(adapted_layers(model))
    if not layers:
        return None
    first = next(iter(layers.values()))
    scaling = Scaling(first.rank, first.scale, first.is_dora, first.dropout)
    source, quantization = model.source, model.config.quantization
    origin = Origin(
        base_name=None if source is None else base_label(str(source.path.absolute())),
        base_fingerprint=model.fingerprint or None,
        base_quantization=None if quantization is None else quantization.to_mlx(),
    )
    changes = {
        name: LowRank(layer.lora_a, layer.lora_b, layer.m if layer.is_dora else None)
        for name, layer in layers.items()
    }
    return Adapter(changes, scaling, len(model.model.layers), origin)


def _write(adapter: Adapter, path: Path, dtype: str | None, replace: bool) -> None:
    (write_file if is_file_path(path) else write_directory)(adapter, path, dtype, replace=replace)


def _misfits(adapter: Adapter, model: Phi3ForCausalLM) -> list[str]:
    """Tensors that no projection of this model can take."""
    problems = []
    blocks = len(model.model.layers)
    for name, change in adapter.layers.items():
        if layer_index(name) >= blocks or layer_key(name) not in PROJECTIONS:
            problems.append(f"{name}: this model has blocks 0 to {blocks - 1} only")
            continue
        layer = projection(model, name)
        base = layer.linear if isinstance(layer, LoRALinear) else layer
        outputs, inputs = weight_shape(base)
        rank = adapter.scaling.rank
        expected = {"lora_a": (inputs, rank), "lora_b": (rank, outputs), "m": (outputs,)}
        for part, array in change.arrays.items():
            if array.shape != expected[part]:
                problems.append(
                    f"{name}.{part}: shape {array.shape}, model expects {expected[part]}"
                )
    return problems


def _conflicts(adapter: Adapter, own: Mapping[str, LoRALinear]) -> list[str]:
    """Differences from the adapter the model carries already."""
    if not own:
        return []
    layer = next(iter(own.values()))
    pairs = {
        "rank": (adapter.scaling.rank, layer.rank),
        "scale": (adapter.scaling.scale, layer.scale),
        "fine_tune_type": (adapter.scaling.fine_tune_type, "dora" if layer.is_dora else "lora"),
    }
    problems = [
        f"{name}: {found}, the model's adapter has {expected}"
        for name, (found, expected) in pairs.items()
        if found != expected
    ]
    problems += [f"{name}: not adapted in this model" for name in adapter.layers.keys() - own]
    problems += [f"{name}: adapted in this model only" for name in own.keys() - adapter.layers]
    return problems


def _other_base(adapter: Adapter, model: Phi3ForCausalLM) -> list[str]:
    """What shows that the adapter was trained on another base; nothing when either does not say."""
    theirs, ours = adapter.origin.base_fingerprint, model.fingerprint
    if not theirs or not ours or theirs == ours:
        return []
    problems = [
        f"base fingerprint: {short_fingerprint(theirs)}, this model has {short_fingerprint(ours)}"
    ]
    quantization = model.config.quantization
    expected = None if quantization is None else quantization.to_mlx()
    found = adapter.origin.base_quantization
    if found != expected:
        problems.append(f"base quantisation: {_bits(found)}, this model is {_bits(expected)}")
    return problems


def _bits(quantization: Mapping[str, Any] | None) -> str:
    if quantization is None:
        return "not quantised"
    return f"{quantization.get('bits')} bits in groups of {quantization.get('group_size')}"


def _info(adapter: Adapter, path: Path) -> AdapterInfo:
    tensors = adapter.tensors()
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    scaling, origin = adapter.scaling, adapter.origin
    return AdapterInfo(
        path=path,
        form=adapter.form,
        fine_tune_type=scaling.fine_tune_type,
        rank=scaling.rank,
        scale=scaling.scale,
        alpha=scaling.scale * scaling.rank,
        dropout=scaling.dropout,
        keys=adapter.keys,
        layers=adapter.indices,
        num_layers=adapter.num_layers,
        parameters=sum(array.size for array in tensors.values()),
        tensors=len(tensors),
        dtypes=tuple(sorted({str(a.dtype).removeprefix("mlx.core.") for a in tensors.values()})),
        bytes=sum(file.stat().st_size for file in files),
        weights_sha256=weights_hash(tensors),
        base_name=origin.base_name,
        base_fingerprint=origin.base_fingerprint,
        base_quantization=origin.base_quantization,
        package_version=origin.package_version,
        training=origin.training,
    )
