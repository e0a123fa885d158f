"""What an adapter is, whatever file it comes from, and the checks that all of its forms share.

Three forms are read: this library's own single file, mlx-lm's directory and PEFT's directory; what
is written as a directory is the last two at once. In memory there is one form, `Adapter`.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

import mlx.core as mx

from mlx_medphi.config import PROJECTIONS
from mlx_medphi.errors import AdapterError
from mlx_medphi.files import read_safetensors_header
from mlx_medphi.model.shards import array_bytes

__all__ = [
    "ADAPTER_DTYPES",
    "CONFIG_NAME",
    "FILE_FORMAT",
    "FILE_VERSION",
    "LAYER_NUMBER",
    "MLX_NAME",
    "PEFT_NAME",
    "SUFFIX",
    "Adapter",
    "Form",
    "LowRank",
    "Origin",
    "Scaling",
    "assemble",
    "base_label",
    "check_scaling",
    "differences",
    "is_number",
    "layer_index",
    "layer_key",
    "layer_name",
    "load_tensors",
    "read_json",
    "uneven_layers",
    "unknown_names",
    "weights_hash",
]

CONFIG_NAME = "adapter_config.json"
MLX_NAME = "adapters.safetensors"
PEFT_NAME = "adapter_model.safetensors"
SUFFIX = ".safetensors"
FILE_FORMAT, FILE_VERSION = "medphi-adapter", 1
LAYER_NUMBER = r"(?:0|[1-9]\d{0,3})"
"""A block's number in tensor names: below MAX_LAYERS, as lists of all blocks are made from it."""
ADAPTER_DTYPES = ("F32", "F16", "BF16")

Form = Literal[
    "medphi file", "slot pack", "mlx-lm and PEFT directory", "mlx-lm directory", "PEFT directory"
]

_LAYER = re.compile(rf"model\.layers\.({LAYER_NUMBER})\.(\w+\.\w+)")


@dataclass(frozen=True)
class LowRank:
    """The change of one projection: `a` (in, r), `b` (r, out) and, for DoRA, `m` (out,)."""

    a: mx.array
    b: mx.array
    m: mx.array | None = None

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The tensors by the last part of mlx-lm's names."""
        parts = {"lora_a": self.a, "lora_b": self.b}
        return parts if self.m is None else {**parts, "m": self.m}


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from; what a foreign file does not say is None.

    Attributes:
        base_name: hub id or folder name of the base, never a path.
        base_fingerprint: which base it is, see `fingerprint.py`.
        base_quantization: the base's quantisation as mlx-lm's config.json has it; None: plain.
        package_version: the mlx_medphi that wrote the file.
        training: facts of the training run, as JSON values.
    """

    base_name: str | None = None
    base_fingerprint: str | None = None
    base_quantization: Mapping[str, Any] | None = None
    package_version: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scaling:
    """How strong an adapter is: its rank, what A B is multiplied by, DoRA or not, and dropout."""

    rank: int
    scale: float
    dora: bool
    dropout: float = 0.0

    @property
    def fine_tune_type(self) -> Literal["lora", "dora"]:
        return "dora" if self.dora else "lora"


@dataclass(frozen=True)
class Adapter:
    """A set of low-rank changes of one Phi-3.

    Attributes:
        layers: checkpoint name of each adapted projection -> its change.
        scaling: rank, scale and kind, the same for all layers.
        model_layers: how many blocks the base has.
        origin: where it comes from.
        form: the kind of file it was read from.
    """

    layers: Mapping[str, LowRank]
    scaling: Scaling
    model_layers: int
    origin: Origin
    form: Form = "medphi file"

    @property
    def indices(self) -> tuple[int, ...]:
        """The adapted blocks, in order."""
        return tuple(sorted({layer_index(name) for name in self.layers}))

    @property
    def keys(self) -> tuple[str, ...]:
        """The adapted projections of a block, in the order they are computed."""
        found = {layer_key(name) for name in self.layers}
        return tuple(key for key in PROJECTIONS if key in found)

    @property
    def num_layers(self) -> int:
        """Blocks from the last one down to the first adapted one: a real count, never -1."""
        return self.model_layers - self.indices[0]

    @property
    def is_even(self) -> bool:
        """Whether every adapted block has the same adapted projections."""
        return len(self.layers) == len(self.indices) * len(self.keys)

    def tensors(self) -> dict[str, mx.array]:
        """All tensors by mlx-lm's names, sorted."""
        named = {
            f"{name}.{part}": array
            for name, change in self.layers.items()
            for part, array in change.arrays.items()
        }
        return dict(sorted(named.items()))


def layer_name(index: int, key: str) -> str:
    """The checkpoint name of a projection."""
    return f"model.layers.{index}.{key}"


def layer_index(name: str) -> int:
    match = _LAYER.fullmatch(name)
    assert match is not None, name
    return int(match[1])


def layer_key(name: str) -> str:
    match = _LAYER.fullmatch(name)
    assert match is not None, name
    return match[2]


def base_label(name: object) -> str | None:
    """A base's hub id or folder name; the rest of a path tells about the machine, not the model."""
    if not isinstance(name, str) or not name.strip("/"):
        return None
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", name + "/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return name if is_hub_id else Path(name).name


def differences(where: Path | str, what: str, problems: Iterable[str], advice: str) -> AdapterError:
    """One error that lists everything wrong with an adapter, at most ten lines of it."""
    lines = sorted(set(problems))
    shown = [f"  {line}" for line in lines[:10]]
    more = f"  … and {len(lines) - 10} more. " if len(lines) > 10 else "  "
    count = f"{len(lines)} difference{'s' if len(lines) > 1 else ''}"
    return AdapterError("\n".join([f"{where} {what} ({count}):", *shown, more + advice]))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        AdapterError: missing file, not JSON in UTF-8, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise AdapterError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    except (ValueError, RecursionError) as exc:
        raise AdapterError(f"{path}: not valid JSON in UTF-8; write the adapter again") from exc
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def load_tensors(path: Path) -> tuple[dict[str, mx.array], Mapping[str, str], list[str]]:
    """The tensors of an adapter file, its metadata, and what is wrong with single tensors.

    Raises:
        AdapterError: the file is missing, truncated or no safetensors file.
    """
    header = read_safetensors_header(path, AdapterError)
    problems = [
        f"{name}: dtype {info.dtype}, expected one of {', '.join(ADAPTER_DTYPES)}"
        for name, info in header.tensors.items()
        if info.dtype not in ADAPTER_DTYPES
    ]
    if problems:
        return {}, header.metadata, problems
    loaded: Any = mx.load(str(path))
    for name, array in loaded.items():
        if not mx.isfinite(array).all().item():
            problems.append(f"{name}: holds values that are not finite")
    return dict(loaded), header.metadata, problems


def check_scaling(scaling: Scaling, problems: list[str]) -> None:
    """Add what is impossible about rank, scale or dropout to `problems`."""
    if not isinstance(scaling.rank, int) or isinstance(scaling.rank, bool) or scaling.rank < 1:
        problems.append(f"rank is {scaling.rank!r}, expected a positive whole number")
    if not is_number(scaling.scale) or scaling.scale <= 0:
        problems.append(f"scale is {scaling.scale!r}, expected a positive number")
    if not is_number(scaling.dropout) or not 0 <= scaling.dropout <= 0.9:
        problems.append(f"dropout is {scaling.dropout!r}, expected a number between 0 and 0.9")


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value of a JSON file is a finite number that fits a float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def assemble(
    parts: Mapping[str, Mapping[str, mx.array]], scaling: Scaling, problems: list[str]
) -> dict[str, LowRank]:
    """Whole changes from loose tensors; what is missing or has another rank goes to `problems`.

    Args:
        parts: layer name -> {"lora_a": (in, r), "lora_b": (r, out), "m": (out,)}.
        scaling: what the configuration says.
    """
    layers = {}
    wanted = ("lora_a", "lora_b", "m") if scaling.dora else ("lora_a", "lora_b")
    for name, found in parts.items():
        complete = True
        for part in wanted:
            if part not in found:
                problems.append(f"{name}.{part}: missing")
                complete = False
        if not scaling.dora and "m" in found:
            problems.append(f"{name}.m: a DoRA magnitude, though the configuration says LoRA")
        if complete and _fits(name, found, scaling, problems):
            layers[name] = LowRank(found["lora_a"], found["lora_b"], found.get("m"))
    return layers


def _fits(name: str, found: Mapping[str, mx.array], scaling: Scaling, problems: list[str]) -> bool:
    a, b, m = found["lora_a"], found["lora_b"], found.get("m")
    before = len(problems)
    if a.ndim != 2 or a.shape[1] != scaling.rank:
        problems.append(f"{name}.lora_a: shape {a.shape}, expected (in, {scaling.rank})")
    if b.ndim != 2 or b.shape[0] != scaling.rank:
        problems.append(f"{name}.lora_b: shape {b.shape}, expected ({scaling.rank}, out)")
    elif m is not None and m.shape != (b.shape[1],):
        problems.append(f"{name}.m: shape {m.shape}, expected ({b.shape[1]},)")
    return len(problems) == before


def uneven_layers(names: Iterable[str], indices: Iterable[int]) -> list[str]:
    """Projections that some of the blocks in `indices` have and others lack: a part was lost."""
    present = set(names)
    keys = {layer_key(name) for name in present}
    expected = {layer_name(index, key) for index in indices for key in keys}
    return [f"{name}: missing, other layers have it" for name in sorted(expected - present)]


def weights_hash(tensors: Mapping[str, mx.array]) -> str:
    """SHA-256 of names, dtypes, shapes and values: equal for equal adapters in different files."""
    digest = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array_bytes(array))
    return digest.hexdigest()


def unknown_names(names: Iterable[str]) -> list[str]:
    """One line for tensors that belong to no projection of Phi-3."""
    return [
        f"{name}: not a change of one of Phi-3's projections ({', '.join(PROJECTIONS)})"
        for name in names
    ]
