"""A checkpoint's files: found, and every tensor checked against config.json before any is read.

Read are safetensors in the Hugging Face layout, whole or in shards, plain or quantised by MLX, and
this library's own single file, whose metadata holds the text of config.json. Anything missing,
left over, or of another shape or dtype is one error that names file, tensor, found and expected.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_medphi.errors import CheckpointError, capped
from mlx_medphi.files import SafetensorsHeader, TensorInfo, read_safetensors_header
from mlx_medphi.model.config import Phi3Config
from mlx_medphi.model.layout import TensorForm, expected_tensors, quantized_layers

__all__ = ["CONFIG_KEY", "Checkpoint", "StoredTensor", "open_checkpoint"]

CONFIG_KEY = "config"
"""The metadata entry of a single-file model that holds the text of its config.json."""

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Weights of these kinds run code when they are read, or belong to other programs.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".h5", ".onnx")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its file, its header entry, and the offset of its first byte there."""

    file: Path
    info: TensorInfo
    offset: int


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint whose tensor data has not been read.

    Attributes:
        path: the directory or the single file.
        config: the architecture.
        raw_config: config.json as it was written.
        tensors: the tensors the model uses, sorted by name.
    """

    path: Path
    config: Phi3Config
    raw_config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def directory(self) -> Path:
        """Where the tokenizer lies."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors the model uses."""
        return sum(tensor.info.nbytes for tensor in self.tensors.values())

    @property
    def quantized_layers(self) -> dict[str, tuple[int, int]]:
        """(bits, group size) of each quantised layer."""
        return quantized_layers(self.config, {n: t.info for n, t in self.tensors.items()})


def open_checkpoint(path: Path) -> Checkpoint:
    """Find and check a checkpoint.

    Args:
        path: a directory with config.json and safetensors, or a single-file model.

    Raises:
        CheckpointError: anything missing, damaged, or not what config.json says.
    """
    path = Path(path)
    if path.is_dir():
        config_path = path / "config.json"
        if (path / "adapter_config.json").exists() and not config_path.exists():
            raise CheckpointError(
                f"{path}: holds an adapter, not a model; name its base as the model and this "
                "folder as the adapter"
            )
        raw = _read_json(config_path)
        stored = dict(_directory_tensors(path))
        where = str(config_path)
    elif path.suffix == ".safetensors":
        header = read_safetensors_header(path, CheckpointError)
        raw = _embedded_config(path, header)
        stored = dict(_stored(path, header))
        where = f"{path}, metadata {CONFIG_KEY!r}"
    else:
        found = "is not a .safetensors file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path}: {found}; expected a model directory or a .safetensors file")
    config = Phi3Config.from_hf(raw, where)
    stored = {name: tensor for name, tensor in stored.items() if _is_used(name, config)}
    _check(path, config, stored)
    return Checkpoint(path, config, raw, dict(sorted(stored.items())))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path}: not valid JSON in UTF-8") from exc


def _embedded_config(path: Path, header: SafetensorsHeader) -> Any:
    text = header.metadata.get(CONFIG_KEY)
    if text is None:
        raise CheckpointError(
            f"{path}: its metadata holds no {CONFIG_KEY!r}, so it does not describe a model by "
            "itself; give the directory it lies in"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path}: metadata {CONFIG_KEY!r} is not valid JSON") from exc


def _stored(path: Path, header: SafetensorsHeader) -> Iterator[tuple[str, StoredTensor]]:
    for name, info in header.tensors.items():
        yield name, StoredTensor(path, info, header.data_start + info.begin)


def _directory_tensors(directory: Path) -> Iterator[tuple[str, StoredTensor]]:
    single, index = directory / SINGLE_NAME, directory / INDEX_NAME
    if index.exists():
        yield from _sharded_tensors(directory, index)
    elif single.exists():
        yield from _stored(single, read_safetensors_header(single, CheckpointError))
    else:
        raise CheckpointError(_nothing_to_load(directory))


def _nothing_to_load(directory: Path) -> str:
    names = [file.name for file in directory.iterdir()]
    others = [name for name in names if name.endswith(OTHER_WEIGHTS)]
    tensors = [name for name in names if name.endswith(".safetensors")]
    text = f"{directory}: neither {SINGLE_NAME} nor {INDEX_NAME} is here"
    if tensors:
        return f"{text}, though {capped(tensors)} is; fetch or write the missing file"
    if others:
        return f"{text}, only {capped(others)}; only safetensors can be loaded: convert the weights"
    return f"{text}; fetch the weights again"


def _sharded_tensors(directory: Path, index: Path) -> Iterator[tuple[str, StoredTensor]]:
    raw = _read_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, Mapping) else None
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index}: holds no 'weight_map' from tensor names to files")
    # A name with a path in it could point anywhere on this machine.
    bad = {str(f) for f in weight_map.values() if not _is_plain_name(f)}
    if bad:
        raise CheckpointError(
            f"{index}: shard names must be .safetensors files beside it, found {capped(bad)}"
        )
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} of the {len(shards)} files that {INDEX_NAME} lists are "
            f"missing: {capped(missing)}; fetch or write them again"
        )
    headers = {name: read_safetensors_header(directory / name, CheckpointError) for name in shards}
    held = {(tensor, name) for name, header in headers.items() for tensor in header.tensors}
    listed = set(weight_map.items())
    if held != listed:
        lost = [f"{tensor} is listed in {name}, which lacks it" for tensor, name in listed - held]
        extra = [f"{tensor} is in {name}, not listed there" for tensor, name in held - listed]
        raise CheckpointError(f"{index} and its shards differ: {capped(lost + extra)}")
    for name, header in headers.items():
        yield from _stored(directory / name, header)


def _is_plain_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not any(mark in name for mark in ("/", "\\", ":", "\0"))
    )


def _is_used(name: str, config: Phi3Config) -> bool:
    if name.endswith("rotary_emb.inv_freq"):  # old exports store what config.json already says
        return False
    return not (config.tie_word_embeddings and name.startswith("lm_head."))


def _check(path: Path, config: Phi3Config, stored: Mapping[str, StoredTensor]) -> None:
    # A number alone must not decide how long the list of expected tensors is.
    if config.num_hidden_layers > len(stored):
        raise CheckpointError(
            f"{path} does not fit its config.json: num_hidden_layers is "
            f"{config.num_hidden_layers}, the weights are {len(stored)} tensors; a block alone has "
            "six"
        )
    expected = expected_tensors(config, {name: tensor.info for name, tensor in stored.items()})
    problems = [
        f"{name}: missing, expected {form}" for name, form in expected.items() if name not in stored
    ]
    for name, tensor in stored.items():
        info, form = tensor.info, expected.get(name)
        if form is None or info.shape != form.shape or info.dtype not in form.dtypes:
            found = f"{name} in {tensor.file.name}: found {TensorForm(info.shape, (info.dtype,))}"
            problems.append(f"{found}, expected {form or 'no such tensor'}")
    if problems:
        count = f"{len(problems)} tensor{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(f"{path} does not fit its config.json ({count}): {capped(problems)}")
