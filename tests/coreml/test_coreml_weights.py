"""A package's weights are the checkpoint's: the same codes where it has some, in some form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from weight_cases import (
    DOWN,
    NORM,
    QKV,
    given,
    group_errors,
    make_checkpoint,
    mlx_values,
    numbers,
    stored_bytes,
    stored_values,
)

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.weights import export_bits, plan_weights
from mlx_medphi.errors import CheckpointError, ExportError
from mlx_medphi.model.weights import open_checkpoint

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
BLOCK = "model.layers.0"
LINEAR = [
    EMBEDDING,
    QKV,
    f"{BLOCK}.self_attn.o_proj",
    f"{BLOCK}.mlp.gate_up_proj",
    DOWN,
    HEAD,
]
# A value in float16 is off by half its last digit at most, in its subnormal range by 2^-25.
HALF_ROUNDING, HALF_STEP = 2.0**-11, 2.0**-25
# What float32 leaves out of a sum that MLX makes in it.
FLOAT32 = 1e-6


def test_layers_come_in_the_order_in_which_the_model_uses_them(tmp_path: Path) -> None:
    weights = plan_weights(make_checkpoint(tmp_path / "base"), ExportConfig())
    assert list(weights.layers) == [
        EMBEDDING, f"{BLOCK}.input_layernorm", QKV, f"{BLOCK}.self_attn.o_proj",
        f"{BLOCK}.post_attention_layernorm", f"{BLOCK}.mlp.gate_up_proj", DOWN, "model.norm", HEAD,
    ]  # fmt: skip
    parts = weights.parts()
    assert [part.id for part in parts][:6] == [
        f"{EMBEDDING}.data", f"{EMBEDDING}.scale", f"{NORM}.weight",
        f"{QKV}.data", f"{QKV}.scale", f"{QKV}.offset",
    ]  # fmt: skip
    assert weights.nbytes == sum(part.nbytes for part in parts)
    assert weights.nbytes == sum(
        len(data) for w in weights.layers.values() for data in stored_bytes(w).values()
    )


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("form", [(4, 32), (4, 64), (8, 32), (8, 64)])
def test_quantised_layers_keep_mlxs_values(
    tmp_path: Path, form: tuple[int, int], dtype: str
) -> None:
    sizes = {"intermediate_size": 128} if form[1] == 64 else {}
    base = make_checkpoint(tmp_path / "base", quantize=form, dtype=dtype, **sizes)
    weights = plan_weights(base, ExportConfig())
    for layer in LINEAR:
        weight = weights.layers[layer]
        wide = layer == EMBEDDING and form[0] == 4
        assert (weight.bits, weight.group) == (8 if wide else form[0], form[1])
        assert weight.form == ("no offset" if wide else "integer offset")
        kinds = {name: part.dtype for name, part in weight.parts.items()}
        kind = f"uint{form[0]}"
        assert kinds == (
            {"data": "int8", "scale": "float16"}
            if wide
            else {"data": kind, "scale": "float16", "offset": kind}
        )
        errors = group_errors(weight, mlx_values(base, layer))
        assert weight.error is not None
        assert errors.max() <= weight.error + FLOAT32
        limit = {"F16": 2.0**-10, "BF16": 2.0**-8, "F32": 2.0**-11}[dtype]
        assert weight.error <= 1.01 * limit
    assert weights.exceptions == {}
    errors = [w.error for w in weights.layers.values() if w.error is not None]
    assert len(errors) == len(LINEAR)
    assert weights.worst_error == max(errors)


def test_the_error_is_reached_by_a_group_with_both_outer_codes(tmp_path: Path) -> None:
    codes, scales, biases = given((64, 96), 32, 0.0123, -0.09, bits=4)
    codes[:, 0::32], codes[:, 1::32] = 0, 15
    base = make_checkpoint(tmp_path / "base", dtype="F32", given={DOWN: (codes, scales, biases)})
    weight = plan_weights(base, ExportConfig()).layers[DOWN]
    found = group_errors(weight, mlx_values(base, DOWN)).max()
    assert weight.error == pytest.approx(found, abs=FLOAT32)
    assert weight.error > 10 * FLOAT32


@pytest.mark.parametrize(
    ("bias", "form", "kinds"),
    [
        (-8.0, "integer offset", ["uint4", "float16", "uint4"]),
        (40.0, "no offset", ["int8", "float16"]),
        (-100.0, "no offset", ["int8", "float16"]),
        (300.0, "float16 offset", ["uint4", "float16", "float16"]),
        (-7.5, "float16 offset", ["uint4", "float16", "float16"]),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_one_group_without_a_code_for_zero_changes_its_layers_form(
    tmp_path: Path, bias: float, form: str, kinds: list[str], sign: int
) -> None:
    step = sign / 64
    codes, scales, biases = given((64, 96), 32, step, -8 * step)
    biases[-1, -1] = bias * step
    base = make_checkpoint(tmp_path / "base", given={DOWN: (codes, scales, biases)})
    weights = plan_weights(base, ExportConfig())
    weight = weights.layers[DOWN]
    assert weight.form == form
    assert weight.bits == (8 if form == "no offset" else 4)
    assert [part.dtype for part in weight.parts.values()] == kinds
    # All these numbers are float16, and 1/64 a power of two: nothing may be lost but the part of
    # an offset that float16 has no digits for, which at 300 it has.
    np.testing.assert_array_equal(stored_values(weight), mlx_values(base, DOWN))
    assert weight.error == 0.0
    expected = {} if form == "integer offset" else {DOWN: form}
    assert weights.exceptions == expected


@pytest.mark.parametrize("bias", [-8.0, 40.0, 300.0, -7.5])
def test_an_embedding_of_4_bits_takes_a_byte_for_each_code(tmp_path: Path, bias: float) -> None:
    codes, scales, biases = given((40, 64), 32, 1 / 64, bias / 64)
    base = make_checkpoint(tmp_path / "base", given={EMBEDDING: (codes, scales, biases)})
    weights = plan_weights(base, ExportConfig())
    weight = weights.layers[EMBEDDING]
    near = bias in (-8.0, 40.0)
    assert weight.form == ("no offset" if near else "float16 offset")
    assert weight.parts["data"].dtype == ("int8" if near else "uint8")
    assert weight.bits == 8
    assert weights.exceptions == ({} if near else {EMBEDDING: "float16 offset"})
    np.testing.assert_array_equal(stored_values(weight), mlx_values(base, EMBEDDING))


@pytest.mark.parametrize("quantize", [(4, 32), (8, 32)])
def test_constant_groups_and_zeros_are_kept_exactly(
    tmp_path: Path, quantize: tuple[int, int]
) -> None:
    weight = 0.02 * np.random.default_rng(1).standard_normal((64, 96))
    weight[1, :32], weight[2, 32:64], weight[3] = 0.37, -0.37, 0
    weight[5, :32], weight[7, 64:] = 1e-5, -1e-5
    embedding = weight[:40, :64]
    base = make_checkpoint(
        tmp_path / "base", quantize=quantize, floats={DOWN: weight, EMBEDDING: embedding}
    )
    weights = plan_weights(base, ExportConfig())
    assert weights.exceptions == {}
    for layer, plain in ((DOWN, weight), (EMBEDDING, embedding)):
        assert group_errors(weights.layers[layer], mlx_values(base, layer)).max() <= 2.0**-10
        found, half = stored_values(weights.layers[layer]), plain.astype(np.float16)
        np.testing.assert_array_equal(found[3], 0)
        np.testing.assert_array_equal(found[1, :32], half[1, :32])
        np.testing.assert_array_equal(found[2, 32:64], half[2, 32:64])
        # 1e-5 is below the normal range of float16.
        np.testing.assert_allclose(found[5, :32], 1e-5, atol=HALF_STEP)
    np.testing.assert_allclose(stored_values(weights.layers[DOWN])[7, 64:], -1e-5, atol=HALF_STEP)
    assert weights.worst_error is not None and weights.worst_error <= 2.0**-10


def test_small_scales_are_counted(tmp_path: Path) -> None:
    step = np.full((64, 3), 1 / 64)
    step[3, 1], step[4, 2] = 3e-5, -1e-6
    codes, scales, biases = given((64, 96), 32, step, -8 * step)
    base = make_checkpoint(tmp_path / "base", dtype="F32", given={DOWN: (codes, scales, biases)})
    weights = plan_weights(base, ExportConfig())
    weight = weights.layers[DOWN]
    assert (weight.subnormal, weights.subnormal_scales) == (2, 2)
    assert weight.form == "integer offset"
    errors = group_errors(weight, mlx_values(base, DOWN))
    assert weight.error is not None and weight.error >= errors.max() > HALF_ROUNDING
    trained = given((64, 96), 32, step, -7.6 * step)
    other = make_checkpoint(tmp_path / "other", dtype="F32", given={DOWN: trained})
    again = plan_weights(other, ExportConfig()).layers[DOWN]
    assert (again.form, again.subnormal) == ("float16 offset", 2)


def test_half_bytes_meet_at_no_border_between_blocks(tmp_path: Path) -> None:
    # Three groups a row, and 21,845 rows a block if that were not made even.
    rows = 21851
    base = make_checkpoint(tmp_path / "base", hidden_size=96, vocab_size=rows)
    weight = plan_weights(base, ExportConfig()).layers[HEAD]
    assert len(list(weight.blocks())) > 1
    raw = stored_bytes(weight)
    arrays = mx.load(str(base.path / "model.safetensors"))
    scales, biases = (
        np.array(arrays[f"{HEAD}.{n}"]).astype(np.float64) for n in ("scales", "biases")
    )
    zero = np.rint(-biases / scales)
    expected = np.where(scales < 0, 15 - zero, zero)
    found = numbers(raw["offset"], "uint4", (rows, 3))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(
        np.frombuffer(raw["scale"], np.float16).reshape(rows, 3), np.abs(scales)
    )
    codes = np.frombuffer(raw["data"], np.uint8).reshape(rows, 3, 16)
    mirrored = np.where(scales < 0, 255, 0).astype(np.uint8)[..., None]
    theirs = np.array(arrays[f"{HEAD}.weight"]).view(np.uint8).reshape(rows, 3, 16)
    np.testing.assert_array_equal(codes, theirs ^ mirrored)


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_other_bits_become_float16(tmp_path: Path, bits: int) -> None:
    base = make_checkpoint(tmp_path / "base", quantize=(bits, 32))
    assert export_bits(base, ExportConfig()) == 16
    weights = plan_weights(base, ExportConfig())
    for layer in LINEAR:
        check_float16(weights.layers[layer], mlx_values(base, layer))
    assert weights.worst_error is None and weights.exceptions == {}


def check_float16(weight: Any, expected: np.ndarray) -> None:
    assert (weight.form, weight.bits, weight.group, weight.error) == ("float16", 16, None, None)
    assert [(name, part.dtype) for name, part in weight.parts.items()] == [("weight", "float16")]
    np.testing.assert_array_equal(stored_values(weight), expected.astype(np.float16))


@pytest.mark.parametrize(
    ("settings", "half"),
    [
        ({"bits": 16}, LINEAR),
        ({"embedding_bits": 16}, [EMBEDDING]),
        ({"head_bits": 16}, [HEAD]),
        ({"bits": 4, "head_bits": 16, "embedding_bits": 16}, [EMBEDDING, HEAD]),
        ({"bits": 4}, []),
    ],
)
def test_settings_unpack_layers_to_float16(
    tmp_path: Path, settings: dict[str, Any], half: list[str]
) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="BF16")
    weights = plan_weights(base, ExportConfig(**settings))
    assert export_bits(base, ExportConfig(**settings)) == settings.get("bits", 4)
    for layer in LINEAR:
        weight = weights.layers[layer]
        if layer in half:
            check_float16(weight, mlx_values(base, layer))
        else:
            assert weight.form == ("no offset" if layer == EMBEDDING else "integer offset")
    assert weights.layers[HEAD].bits == (16 if HEAD in half else 4)


def test_layers_keep_bits_of_their_own(tmp_path: Path) -> None:
    exceptions = {HEAD: (8, 64), DOWN: (6, 32), EMBEDDING: (8, 32)}
    base = make_checkpoint(tmp_path / "base", exceptions=exceptions)
    layers = plan_weights(base, ExportConfig()).layers
    found = {name: (layers[name].bits, layers[name].group) for name in LINEAR}
    assert found == {name: (4, 32) for name in LINEAR} | {
        HEAD: (8, 64),
        DOWN: (16, None),
        EMBEDDING: (8, 32),
    }
    assert layers[EMBEDDING].form == "integer offset"
    for layer in (HEAD, EMBEDDING):
        assert group_errors(layers[layer], mlx_values(base, layer)).max() <= 2.0**-10


@pytest.mark.parametrize("quantize", [(4, 32), None])
def test_a_tied_head_is_the_embedding(tmp_path: Path, quantize: tuple[int, int] | None) -> None:
    base = make_checkpoint(tmp_path / "base", quantize=quantize, tie_word_embeddings=True)
    weights = plan_weights(base, ExportConfig())
    assert HEAD not in weights.layers
    assert list(weights.layers)[-1] == "model.norm"
    assert EMBEDDING in weights.layers


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_plain_layers_become_float16(tmp_path: Path, dtype: str) -> None:
    base = make_checkpoint(tmp_path / "base", quantize=None, dtype=dtype)
    weights = plan_weights(base, ExportConfig(bits=16))
    for layer, weight in weights.layers.items():
        check_float16(weight, mlx_values(base, layer))
    assert weights.layers[NORM].shape == (64,)


def test_norms_of_a_quantised_base_become_float16(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="BF16")
    weight = plan_weights(base, ExportConfig()).layers[NORM]
    check_float16(weight, mlx_values(base, NORM))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_quantised_by_themselves(tmp_path: Path, bits: Any, dtype: str) -> None:
    # Odd widths and heights: half bytes run on from row to row.
    base = make_checkpoint(
        tmp_path / "base", quantize=None, dtype=dtype, intermediate_size=33, hidden_size=12,
        vocab_size=41,
    )  # fmt: skip
    weights = plan_weights(base, ExportConfig(bits=bits, scheme="channel"))
    assert weights.exceptions == {}
    for layer in LINEAR:
        weight, plain = weights.layers[layer], mlx_values(base, layer)
        own = 8 if layer in (EMBEDDING, HEAD) else bits
        assert (weight.bits, weight.group, weight.form) == (own, plain.shape[1], "integer offset")
        assert weight.error is None
        assert weight.parts["scale"].shape == weight.parts["offset"].shape == (len(plain), 1)
        span = np.maximum(plain.max(axis=1), 0) - np.minimum(plain.min(axis=1), 0)
        # One step at most: half of one, and what moving the grid onto zero leaves out at an end.
        limit = span / (2**own - 1) * (1 + 2**own * HALF_ROUNDING)
        assert (np.abs(stored_values(weight) - plain) <= limit[:, None]).all()
    check_float16(weights.layers[NORM], mlx_values(base, NORM))
    kept = ExportConfig(bits=bits, scheme="channel", embedding_bits=16)
    check_float16(plan_weights(base, kept).layers[EMBEDDING], mlx_values(base, EMBEDDING))


def test_bits_are_four_unless_base_or_settings_say_otherwise(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", quantize=None)
    eight = make_checkpoint(tmp_path / "eight", quantize=(8, 32))
    assert export_bits(plain, ExportConfig()) == 4
    assert export_bits(plain, ExportConfig(bits=8)) == 8
    assert export_bits(eight, ExportConfig()) == 8
    assert export_bits(eight, ExportConfig(bits=8)) == 8
    assert export_bits(eight, ExportConfig(bits=16, scheme="channel")) == 16


@pytest.mark.parametrize(
    ("quantize", "settings", "words"),
    [
        ((4, 32), {"bits": 8}, ["4 bits", "8", "--bits"]),
        ((8, 32), {"bits": 4}, ["8 bits", "4", "--bits"]),
        ((4, 32), {"scheme": "channel"}, ["every 32 weights", "--scheme"]),
    ],
)
def test_a_quantised_base_is_not_quantised_again(
    tmp_path: Path, quantize: tuple[int, int], settings: dict[str, Any], words: list[str]
) -> None:
    base = make_checkpoint(tmp_path / "base", quantize=quantize)
    with pytest.raises(ExportError) as caught:
        plan_weights(base, ExportConfig(**settings))
    for word in [str(base.path), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan, 70000.0])
@pytest.mark.parametrize("part", [1, 2])
def test_scales_and_biases_beyond_float16_are_refused(
    tmp_path: Path, number: float, part: int
) -> None:
    layer = list(given((64, 96), 32, 1 / 64, -1 / 8))
    layer[part][63, 2] = number
    codes, scales, biases = layer
    base = make_checkpoint(tmp_path / "base", dtype="F32", given={DOWN: (codes, scales, biases)})
    with pytest.raises(ExportError, match="mlp.down_proj") as caught:
        plan_weights(base, ExportConfig())
    assert "65504" in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "number"),
    [("F32", 70000.0), ("BF16", 1e30), ("F16", np.inf), ("F32", np.nan), ("F16", np.nan)],
)
@pytest.mark.parametrize("settings", [{"bits": 16}, {"scheme": "channel"}])
@pytest.mark.parametrize("layer", [QKV, "model.norm"])
def test_plain_weights_beyond_float16_are_refused(
    tmp_path: Path, dtype: str, number: float, settings: dict[str, Any], layer: str
) -> None:
    shape = (64,) if layer == "model.norm" else (192, 64)
    values = np.zeros(shape)
    values[(-1,) * len(shape)] = -number
    base = make_checkpoint(tmp_path / "base", quantize=None, dtype=dtype, floats={layer: values})
    weight = plan_weights(base, ExportConfig(**settings)).layers[layer]
    with pytest.raises(ExportError, match=layer) as caught:
        stored_bytes(weight)
    assert "65504" in str(caught.value)
    assert f"{mlx_number(dtype, number):g}" in str(caught.value)


def mlx_number(dtype: str, number: float) -> float:
    kept = mx.array(number).astype(
        {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}[dtype]
    )
    return float(np.array(kept.astype(mx.float32)))


def test_values_beyond_float16_are_refused_when_they_are_unpacked(tmp_path: Path) -> None:
    codes, scales, biases = given((64, 96), 32, 10000, 0)
    base = make_checkpoint(tmp_path / "base", dtype="F32", given={DOWN: (codes, scales, biases)})
    weight = plan_weights(base, ExportConfig(bits=16)).layers[DOWN]
    with pytest.raises(ExportError, match="mlp.down_proj"):
        stored_bytes(weight)


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", quantize=None)
    weights = plan_weights(base, ExportConfig(bits=16))
    file = base.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="became shorter"):
        for weight in weights.layers.values():
            stored_bytes(weight)


def test_planning_reads_no_more_than_it_must(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    # Codes are neither needed nor looked at where all scales have their digits.
    file = base.path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    for tensor in base.tensors.values():
        if tensor.info.dtype == "U32":
            raw[tensor.offset : tensor.offset + tensor.info.nbytes] = bytes(tensor.info.nbytes)
    before = plan_weights(base, ExportConfig())
    file.write_bytes(raw)
    after = plan_weights(open_checkpoint(base.path), ExportConfig())
    assert [w.error for w in after.layers.values()] == [w.error for w in before.layers.values()]
