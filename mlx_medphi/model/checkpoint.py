"""Load a base model and its tokenizer, and save one for any Phi-3 loader.

Every tensor is checked before the first is read, and each is read, cast and quantised by itself, so
that no second copy of the model exists at any time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlx_medphi.errors import CheckpointError, TokenizerError, capped
from mlx_medphi.files import atomic_directory, write_json
from mlx_medphi.model.fingerprint import fingerprint
from mlx_medphi.model.hub import resolve_model
from mlx_medphi.model.lora import adapted_layers
from mlx_medphi.model.phi3 import Phi3ForCausalLM, named_parameters
from mlx_medphi.model.quantize import check_format, dtype_of, quantize_model, wrap_quantized
from mlx_medphi.model.shards import array_piece, header_bytes, write_pieces
from mlx_medphi.model.weights import Checkpoint, open_checkpoint
from mlx_medphi.text.tokenizer import Tokenizer

__all__ = ["build_model", "load", "open_tokenizer", "save_model"]

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# What a config.json says about its own files, and the forms that `to_hf` writes anew.
STALE_KEYS = (
    "_name_or_path", "auto_map", "dtype", "head_dim", "quantization", "quantization_config",
    "rope_parameters", "torch_dtype", "transformers_version",
)  # fmt: skip


def load(
    path_or_repo: str | Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: tuple[int, int] | None = None,
    offline: bool = False,
) -> tuple[Phi3ForCausalLM, Tokenizer]:
    """Load a Phi-3 model and its tokenizer.

    Args:
        path_or_repo: a checkpoint directory, a single-file model, or a hub id `owner/name`.
        adapter: an adapter file or directory to put on the model.
        revision: branch, tag or commit of a hub id.
        dtype: "float32", "float16" or "bfloat16" to compute in; None keeps what is stored.
        quantize: (bits, group size) to quantise the weights to, e.g. (4, 64).
        offline: never use the network.

    Returns:
        The model, whose `source` and `fingerprint` tell where it came from, and its tokenizer.

    Raises:
        CheckpointError: anything missing, damaged, or not what config.json says.
        TokenizerError: the tokenizer's files are missing or damaged.
        HubError: the model could not be fetched.
        AdapterError: the adapter does not belong to this model.
    """
    _check_dtype(dtype)
    if quantize is not None:
        check_format(quantize)
    checkpoint = open_checkpoint(resolve_model(path_or_repo, revision=revision, offline=offline))
    tokenizer = open_tokenizer(checkpoint)
    model = build_model(checkpoint, dtype=dtype, quantize=quantize)
    if adapter is not None:
        from mlx_medphi.model.adapter import load_adapter

        load_adapter(model, Path(adapter))
    return model, tokenizer


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer beside a checkpoint.

    Raises:
        TokenizerError: its files are missing or damaged.
        CheckpointError: it belongs to another model.
    """
    if checkpoint.path.is_file() and not (checkpoint.directory / "tokenizer.json").exists():
        raise TokenizerError(
            f"{checkpoint.path}: a single file holds no tokenizer; put tokenizer.json, "
            "tokenizer_config.json and generation_config.json of its base beside it"
        )
    tokenizer = Tokenizer.load(checkpoint.directory)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.directory}: the tokenizer has {tokenizer.vocab_size} ids, the model "
            f"{checkpoint.config.vocab_size}; the two are not from the same checkpoint"
        )
    return tokenizer


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}, expected one of {', '.join(sorted(DTYPES))}")


def build_model(
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    quantize: tuple[int, int] | None = None,
) -> Phi3ForCausalLM:
    """The model of an opened checkpoint, its weights in memory.

    Raises:
        CheckpointError: the weights cannot be read, or not be quantised as asked.
    """
    with _random_state_kept():
        model = Phi3ForCausalLM(checkpoint.config)
        wrap_quantized(model, checkpoint.quantized_layers)
    try:
        model.load_weights(_lazy_weights(checkpoint, dtype))
        if quantize is not None:
            quantize_model(model, quantize)
        # One at a time: what a tensor was cast or quantised from is freed before the next is read.
        for array in named_parameters(model).values():
            mx.eval(array)
    except RuntimeError as exc:
        raise CheckpointError(f"{checkpoint.path}: cannot be read ({exc})") from exc
    model.source = checkpoint
    model.fingerprint = fingerprint(checkpoint, quantize)
    return model


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """New layers draw numbers that are thrown away; the caller's sequence must not move."""
    state = cast("list[mx.array]", mx.random.state)
    high, low = cast("list[int]", state[0].tolist())
    try:
        yield
    finally:
        mx.random.seed((high << 32) | low)


def _lazy_weights(checkpoint: Checkpoint, dtype: str | None) -> list[tuple[str, mx.array]]:
    weights = []
    for file in checkpoint.files:
        arrays = cast("dict[str, mx.array]", mx.load(str(file)))
        for name, stored in checkpoint.tensors.items():
            if stored.file != file:
                continue
            array = arrays[name]
            weights.append((name, _cast(array, dtype)))
    return weights


def _cast(array: mx.array, dtype: str | None) -> mx.array:
    # Packed integers are no numbers to cast.
    return array if dtype is None or array.dtype == mx.uint32 else array.astype(DTYPES[dtype])


def save_model(
    model: Phi3ForCausalLM,
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    dtype: str | None = None,
    replace: bool = False,
) -> None:
    """Write a checkpoint directory that transformers, mlx-lm and `load` read.

    The tokenizer's files are copied byte for byte. The directory appears complete or not at all.

    Args:
        model: a model without adapter, plain or quantised.
        tokenizer: its tokenizer.
        directory: the directory to make.
        dtype: "float32", "float16" or "bfloat16" to store plain weights in; None keeps theirs.
        replace: whether an existing directory is replaced.

    Raises:
        CheckpointError: the model carries an adapter, or the directory exists or is not writable.
    """
    directory = Path(directory)
    adapted = [name for name, _ in adapted_layers(model)]
    if adapted:
        raise CheckpointError(
            f"{directory}: the model carries an adapter ({capped(adapted, 3)}); save the "
            "adapter by itself or fuse it first"
        )
    _check_dtype(dtype)
    weights = {name: _cast(array, dtype) for name, array in named_parameters(model).items()}
    stored = dtype or str(dtype_of(model)).removeprefix("mlx.core.")
    try:
        with atomic_directory(directory, replace=replace) as temporary:
            for name, source in tokenizer.files.items():
                shutil.copyfile(source, temporary / name)
            write_json(temporary / "config.json", config_json(model, tokenizer, stored))
            # transformers refuses files without a format it knows, and knows "pt" in all versions.
            pieces = [array_piece(name, array) for name, array in sorted(weights.items())]
            header = header_bytes([s for p in pieces for s in p.tensors], {"format": "pt"})
            write_pieces(temporary / "model.safetensors", header, pieces)
    except FileExistsError as exc:
        raise CheckpointError(f"{directory}: exists already; choose another name") from exc
    except (OSError, RuntimeError) as exc:
        raise CheckpointError(f"{directory}: cannot be written ({exc})") from exc


def config_json(model: Phi3ForCausalLM, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """config.json for a model: what its own said, with the architecture in the old form."""
    own = {} if model.source is None else dict(model.source.raw_config)
    tokens = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    kept = {key: value for key, value in own.items() if key not in STALE_KEYS}
    return {**tokens, **kept, **model.config.to_hf(), "torch_dtype": dtype}
