"""Checkpoints of one block made from given numbers, and slow readers of what is stored of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_medphi.coreml.weights import Weight
from mlx_medphi.model.layout import linear_shapes
from mlx_medphi.model.weights import Checkpoint, open_checkpoint

DTYPES = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
DOWN = "model.layers.0.mlp.down_proj"
QKV = "model.layers.0.self_attn.qkv_proj"
NORM = "model.layers.0.input_layernorm"

# Codes (out, in), scales and biases (out, groups) of a layer, as they are to be stored.
Given = tuple[np.ndarray, np.ndarray, np.ndarray]


def config(**changes: Any) -> dict[str, Any]:
    """config.json of one block, 64 wide, with 96 inner units."""
    return {
        "model_type": "phi3",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 4096,
        "vocab_size": 40,
        "tie_word_embeddings": False,
        **changes,
    }


def make_checkpoint(
    folder: Path,
    *,
    quantize: tuple[int, int] | None = (4, 32),
    dtype: str = "F16",
    floats: Mapping[str, np.ndarray] | None = None,
    given: Mapping[str, Given] | None = None,
    exceptions: Mapping[str, tuple[int, int]] | None = None,
    **changes: Any,
) -> Checkpoint:
    """A checkpoint of random weights, σ 0.02, quantised by MLX unless `quantize` is None.

    Args:
        folder: where to write it.
        quantize: (bits, group size).
        dtype: of plain weights, scales and biases.
        floats: weights of some layers to take in place of random ones.
        given: codes, scales and biases of some layers.
        exceptions: (bits, group size) of some layers.
        changes: entries of config.json.
    """
    raw = config(**changes)
    if quantize is not None:
        raw["quantization"] = {"bits": quantize[0], "group_size": quantize[1]}
        for layer, (bits, group) in (exceptions or {}).items():
            raw["quantization"][layer] = {"bits": bits, "group_size": group}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = linear_shapes(_parsed(raw))
    rng = np.random.default_rng(7)
    arrays: dict[str, mx.array] = {}
    for name in (NORM, NORM.replace("input", "post_attention"), "model.norm"):
        values = (floats or {}).get(name, 1 + 0.1 * rng.standard_normal(raw["hidden_size"]))
        arrays[f"{name}.weight"] = mx.array(values.astype(np.float32)).astype(DTYPES[dtype])
    for layer, shape in shapes.items():
        values = (floats or {}).get(layer, 0.02 * rng.standard_normal(shape))
        weight = mx.array(values.astype(np.float32)).astype(DTYPES[dtype])
        if quantize is None:
            arrays[f"{layer}.weight"] = weight
            continue
        bits, group = (exceptions or {}).get(layer, quantize)
        if layer in (given or {}):
            codes, scales, biases = (given or {})[layer]
            parts = (
                mx.array(words(codes, bits)),
                *(mx.array(p.astype(np.float32)).astype(DTYPES[dtype]) for p in (scales, biases)),
            )
        else:
            parts = mx.quantize(weight, group, bits)
        names = [f"{layer}.{name}" for name in ("weight", "scales", "biases")]
        arrays |= dict(zip(names, parts, strict=True))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return open_checkpoint(folder)


def _parsed(raw: dict[str, Any]) -> Any:
    from mlx_medphi.model.config import Phi3Config

    return Phi3Config.from_hf(raw)


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 4 or 8 bits as MLX packs them: the first in the lowest bits of a word."""
    places = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    split = codes.astype(np.uint32).reshape(codes.shape[0], -1, 32 // bits)
    return np.bitwise_or.reduce(split << places, axis=-1)


def given(
    shape: tuple[int, int], group: int, scale: Any, bias: Any, *, bits: int = 4, seed: int = 0
) -> Given:
    """Random codes with scales and biases that are given for all groups or for each."""
    rng = np.random.default_rng(seed)
    small = (shape[0], shape[1] // group)
    scales = np.broadcast_to(np.asarray(scale, np.float64), small).copy()
    biases = np.broadcast_to(np.asarray(bias, np.float64), small).copy()
    return rng.integers(0, 2**bits, shape), scales, biases


def stored_bytes(weight: Weight) -> dict[str, bytes]:
    """The bytes of each part of a weight, whose lengths are those its parts announce."""
    found = {name: b"" for name in weight.parts}
    for block in weight.blocks():
        for name, data in zip(weight.parts, block, strict=True):
            found[name] += data
    for name, part in weight.parts.items():
        assert len(found[name]) == part.nbytes, (weight.layer, name)
        assert part.id == f"{weight.layer}.{name}"
    return found


def numbers(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Packed numbers in float64, read one bit after the other where they are half bytes."""
    count = int(np.prod(shape))
    if dtype != "uint4":
        return np.frombuffer(data, dtype).astype(np.float64).reshape(shape)
    bits = np.array([byte >> k & 1 for byte in data for k in range(8)]).reshape(-1, 4)
    found = bits @ np.array([1, 2, 4, 8])
    assert not found[count:].any()
    return found[:count].astype(np.float64).reshape(shape)


def stored_values(weight: Weight) -> np.ndarray:
    """What Core ML makes of a weight, in float64: scale · (data − offset)."""
    raw = stored_bytes(weight)
    read = {n: numbers(raw[n], p.dtype, p.shape) for n, p in weight.parts.items()}
    if "weight" in read:
        return read["weight"]
    outputs, inputs = weight.shape
    repeats = inputs // read["scale"].shape[1]
    scale = np.repeat(read["scale"], repeats, axis=1)
    offset = np.repeat(read["offset"], repeats, axis=1) if "offset" in read else 0
    return scale * (read["data"] - offset)


def mlx_values(checkpoint: Checkpoint, layer: str) -> np.ndarray:
    """What MLX makes of a weight, in float32 at least."""
    arrays = mx.load(str(checkpoint.path / "model.safetensors"))
    weight = arrays[f"{layer}.weight"]
    form = checkpoint.quantized_layers.get(layer)
    if form is None:
        return np.array(weight.astype(mx.float32)).astype(np.float64)
    scales, biases = (arrays[f"{layer}.{n}"].astype(mx.float32) for n in ("scales", "biases"))
    made = mx.dequantize(weight, scales, biases, form[1], form[0])
    return np.array(made).astype(np.float64)


def group_errors(weight: Weight, expected: np.ndarray) -> np.ndarray:
    """max |stored − expected| / max |expected| of each group."""
    assert weight.group is not None
    off = np.abs(stored_values(weight) - expected).reshape(-1, weight.group).max(axis=1)
    size = np.abs(expected).reshape(-1, weight.group).max(axis=1)
    return off / np.where(size > 0, size, 1)
