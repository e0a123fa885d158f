"""Quantised models: as MLX and mlx-lm make them, read, made and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_medphi.errors import CheckpointError
from mlx_medphi.model.checkpoint import load, save_model
from mlx_medphi.model.phi3 import named_parameters
from mlx_medphi.model.weights import open_checkpoint

# One float32 sum in another order.
LOGITS_ATOL = 1e-5
# A width of 96 holds no whole groups of 64.
NARROW = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
FORMATS = [(4, 32), (4, 64), (8, 32), (8, 64)]


def ids_of(folder: Path) -> mx.array:
    return mx.load(str(folder / "reference.safetensors"))["ids"]


def logits(model: Any, ids: mx.array) -> np.ndarray:
    return np.array(model(ids).astype(mx.float32))


def mlx_lm_quantized(folder: Path, out: Path, bits: int, group: int, predicate: Any = None) -> Any:
    """mlx-lm's own conversion of a checkpoint, saved with its tokenizer; the model it made."""
    from mlx_lm.utils import load_model, quantize_model, save_config
    from mlx_lm.utils import save_model as save_theirs

    model, config = load_model(folder)
    model, config = quantize_model(model, config, group, bits, quant_predicate=predicate)
    out.mkdir()
    save_theirs(out, model)
    save_config(config, out / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (out / name).write_bytes((folder / name).read_bytes())
    return model


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_each_tensor_is_quantised_as_mlx_does_it(phi3: Path, bits: int, group: int) -> None:
    stored = mx.load(str(phi3 / "mini-4k" / "model.safetensors"))
    model, _ = load(phi3 / "mini-4k", quantize=(bits, group))
    found = named_parameters(model)
    narrow = NARROW if group == 64 else []
    for name, weight in stored.items():
        layer = name.removesuffix(".weight")
        if weight.ndim == 1 or layer in narrow:
            expected = {name: weight}
        else:
            parts = mx.quantize(weight, group_size=group, bits=bits)
            expected = dict(zip((name, f"{layer}.scales", f"{layer}.biases"), parts, strict=True))
        for key, array in expected.items():
            assert found[key].dtype == array.dtype
            np.testing.assert_array_equal(np.array(found[key]), np.array(array), err_msg=key)
    quantization = model.config.quantization
    assert quantization is not None
    assert (quantization.bits, quantization.group_size) == (bits, group)
    assert [name for name in NARROW if quantization.of(name) is None] == narrow


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("folder", ["mini-4k", "gqa"])
def test_quantising_on_load_equals_mlx_lms_conversion(
    phi3: Path, tmp_path: Path, folder: str, bits: int, group: int
) -> None:
    theirs = mlx_lm_quantized(phi3 / folder, tmp_path / "theirs", bits, group)
    ours, _ = load(phi3 / folder, quantize=(bits, group))
    found, expected = named_parameters(ours), named_parameters(theirs)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert mx.array_equal(found[name], array).item(), name
    converted, _ = load(tmp_path / "theirs")
    ids = ids_of(phi3 / folder)
    np.testing.assert_array_equal(logits(converted, ids), logits(ours, ids))


@pytest.mark.parametrize("folder", ["mini-4k", "gqa", "longrope-long"])  # where mlx-lm is right
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32)])
def test_mlx_lm_loads_a_quantised_model_that_is_saved(
    phi3: Path, tmp_path: Path, folder: str, bits: int, group: int
) -> None:
    from mlx_lm.utils import load_model

    model, tokenizer = load(phi3 / folder, dtype="float32", quantize=(bits, group))
    save_model(model, tokenizer, tmp_path / "out")
    ids = ids_of(phi3 / folder)
    theirs, _ = load_model(tmp_path / "out")
    np.testing.assert_allclose(logits(theirs, ids), logits(model, ids), rtol=0, atol=LOGITS_ATOL)
    again, _ = load(tmp_path / "out")
    np.testing.assert_array_equal(logits(again, ids), logits(model, ids))
    assert again.config == model.config


def test_layers_with_bits_of_their_own_are_read(phi3: Path, tmp_path: Path) -> None:
    def predicate(path: str, _module: Any) -> bool | dict[str, int]:
        if path == "lm_head":
            return {"bits": 8, "group_size": 32}
        return path != "model.layers.0.self_attn.qkv_proj"

    theirs = mlx_lm_quantized(phi3 / "mini-4k", tmp_path / "mixed", 4, 64, predicate)
    checkpoint = open_checkpoint(tmp_path / "mixed")
    layers = checkpoint.quantized_layers
    assert layers["lm_head"] == (8, 32)
    assert layers["model.embed_tokens"] == (4, 64)
    assert "model.layers.0.self_attn.qkv_proj" not in layers
    model, tokenizer = load(tmp_path / "mixed")
    ids = ids_of(phi3 / "mini-4k")
    np.testing.assert_allclose(logits(model, ids), logits(theirs, ids), rtol=0, atol=LOGITS_ATOL)
    save_model(model, tokenizer, tmp_path / "again")
    np.testing.assert_array_equal(logits(load(tmp_path / "again")[0], ids), logits(model, ids))


def test_eight_bits_change_the_logits_little(each_folder: Path) -> None:
    ids = ids_of(each_folder)
    plain = logits(load(each_folder, dtype="float32")[0], ids)
    eight = logits(load(each_folder, dtype="float32", quantize=(8, 32))[0], ids)
    # 8 bits keep a weight to 1/500 of its group's range; logits have a spread of about 1.
    assert np.abs(eight - plain).max() < 0.1
    assert np.abs(eight - plain).max() > 0


def test_a_quantised_model_is_cast_in_its_scales_only(phi3: Path, tmp_path: Path) -> None:
    save_model(*load(phi3 / "gqa", quantize=(4, 32)), tmp_path / "out")
    model, _ = load(tmp_path / "out", dtype="float16")
    dtypes = {name.rpartition(".")[2]: a.dtype for name, a in named_parameters(model).items()}
    assert dtypes["scales"] == dtypes["biases"] == mx.float16
    assert model.model.embed_tokens.weight.dtype == mx.uint32


def spoil(folder: Path, name: str, change: Any) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    changed = change(weights.pop(name))
    if changed is not None:
        weights[name] = changed
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("lm_head.scales", lambda a: None, r"lm_head.scales: missing, expected \(320, 1\) F32"),
        ("lm_head.scales", lambda a: a[:, :0], r"found \(320, 0\) F32, expected \(320, 1\)"),
        ("lm_head.weight", lambda a: a[:, :4], r"found \(320, 4\) U32, expected \(320, 8\) U32"),
        (
            "lm_head.weight",
            lambda a: mx.ones((320, 64)),
            r"found \(320, 64\) F32, expected \(320, 8",
        ),
        ("lm_head.biases", lambda a: a.astype(mx.int32), r"found \(320, 1\) I32, expected"),
    ],
)
def test_a_damaged_quantised_layer_is_named(
    phi3: Path, tmp_path: Path, name: str, change: Any, words: str
) -> None:
    model, tokenizer = load(phi3 / "mini-4k", quantize=(4, 64))
    save_model(model, tokenizer, tmp_path / "out")
    spoil(tmp_path / "out", name, change)
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path / "out")


def test_other_bits_in_the_config_than_in_the_file_are_named(phi3: Path, tmp_path: Path) -> None:
    model, tokenizer = load(phi3 / "mini-4k", quantize=(4, 64))
    save_model(model, tokenizer, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization"]["bits"] = 8
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"found \(192, 8\) U32, expected \(192, 16\) U32"):
        load(tmp_path / "out")


def test_a_quantised_model_is_not_quantised_again(phi3: Path, tmp_path: Path) -> None:
    model, tokenizer = load(phi3 / "mini-4k", quantize=(4, 64))
    save_model(model, tokenizer, tmp_path / "out")
    with pytest.raises(CheckpointError, match="already quantised to 4 bits"):
        load(tmp_path / "out", quantize=(8, 64))


@pytest.mark.parametrize("quantize", [(7, 64), (4, 16), (0, 0)])
def test_an_impossible_format_is_refused_before_anything_is_read(
    tmp_path: Path, quantize: tuple[int, int]
) -> None:
    with pytest.raises(CheckpointError, match="cannot quantise to"):
        load(tmp_path / "nothing", quantize=quantize)


def test_a_group_that_fits_no_layer_is_refused(phi3: Path) -> None:
    with pytest.raises(CheckpointError, match="no layer of this model"):
        load(phi3 / "mini-4k", quantize=(4, 128))
