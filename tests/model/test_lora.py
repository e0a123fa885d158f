"""LoRA, rsLoRA and DoRA layers against their formulas, on plain and quantised bases."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest
from adapter_cases import SAME, adapted, base, fill, ids, logits
from mlx.utils import tree_flatten

from mlx_medphi.config import PROJECTIONS, LoRAConfig
from mlx_medphi.errors import AdapterError
from mlx_medphi.model.lora import (
    LoRALinear,
    adapted_layers,
    apply_lora,
    base_weight,
    remove_lora,
    weight_shape,
)

KINDS = ("lora", "rslora", "dora")
IN, OUT = 96, 40


def linear(dtype: mx.Dtype = mx.float32, inputs: int = IN) -> nn.Linear:
    layer = nn.Linear(inputs, OUT, bias=False)
    weight = 0.1 * mx.random.normal((OUT, inputs), key=mx.random.key(5))
    layer.weight = weight.astype(dtype)
    return layer


def wrapped(layer: nn.Module, kind: str = "lora", size: float = 0.3, **config: Any) -> LoRALinear:
    """A wrapped layer whose B is not zero and whose magnitudes moved."""
    settings = LoRAConfig(
        **{"rank": 6, "dropout": 0.0, "fine_tune_type": kind, **config}  # type: ignore[arg-type]
    )
    found = LoRALinear.from_base(layer, settings, mx.random.key(0))
    key = mx.random.key(7)
    found.lora_b = size * mx.random.normal(found.lora_b.shape, key=key)
    if found.is_dora:
        found.m = found.m * (1 + 0.2 * mx.random.normal(found.m.shape, key=key))
    return found


def inputs(dtype: mx.Dtype = mx.float32, width: int = IN) -> mx.array:
    return mx.random.normal((2, 5, width), key=mx.random.key(11)).astype(dtype)


def double(array: mx.array) -> npt.NDArray[np.float64]:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def dense(layer: LoRALinear) -> npt.NDArray[np.float64]:
    """W' by the definition, in double precision, with the whole product in memory."""
    weight = double(base_weight(layer.linear))
    weight = weight + layer.scale * (double(layer.lora_a) @ double(layer.lora_b)).T
    if layer.is_dora:
        weight = weight * (double(layer.m) / np.linalg.norm(weight, axis=1))[:, None]
    return weight


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_layer_computes_what_its_base_computes(kind: str) -> None:
    layer = LoRALinear.from_base(
        linear(),
        LoRAConfig(rank=4, fine_tune_type=kind),
        mx.random.key(0),  # type: ignore[arg-type]
    )
    x = inputs()
    np.testing.assert_allclose(double(layer(x)), double(layer.linear(x)), rtol=0, atol=SAME)
    assert np.abs(double(layer.lora_a)).max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_its_formula(kind: str) -> None:
    layer = wrapped(linear(), kind)
    x = inputs()
    expected = double(x) @ dense(layer).T
    assert np.abs(expected - double(layer.linear(x))).max() > 0.1  # B = 0 would prove nothing
    np.testing.assert_allclose(double(layer(x)), expected, rtol=0, atol=SAME)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_weight_is_the_formula(kind: str) -> None:
    layer = wrapped(linear(), kind)
    np.testing.assert_allclose(double(layer.fused_weight()), dense(layer), rtol=0, atol=1e-6)


def test_rslora_multiplies_by_alpha_over_the_root_of_the_rank() -> None:
    plain, stable = (wrapped(linear(), kind, rank=9, scale=2.0) for kind in ("lora", "rslora"))
    assert plain.scale == 2.0
    assert stable.scale == pytest.approx(18 / 9**0.5)  # alpha = scale · rank = 18


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_keep_their_dtype_while_the_masters_are_float32(
    kind: str, dtype: mx.Dtype
) -> None:
    layer = wrapped(linear(dtype), kind)
    x = inputs(dtype)
    assert layer(x).dtype == dtype
    assert layer(x, mx.random.key(1)).dtype == dtype
    masters = dict(tree_flatten(layer.trainable_parameters()))
    assert {masters[name].dtype for name in ("lora_a", "lora_b")} == {mx.float32}
    # The old rule: float32 factors pull every product of a half-precision input to float32.
    assert ((x @ layer.lora_a) @ layer.lora_b).dtype == mx.float32
    # A half-precision result is within its own rounding of the formula, outputs being about 3.
    expected = double(x) @ dense(layer).T
    step = 2.0 ** (-7 if dtype == mx.bfloat16 else -10)
    assert np.abs(double(layer(x)) - expected).max() < 4 * step * np.abs(expected).max()


def test_the_low_rank_path_needs_no_float32_copy_of_the_activations() -> None:
    layer = wrapped(linear(mx.bfloat16, 1024), rank=4)
    x = mx.zeros((4096, 1024), dtype=mx.bfloat16)
    mx.eval(x, layer.parameters())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(layer(x))
    # x in float32 alone would be 16.8 MB; the layer needs less than x itself, 8.4 MB.
    assert mx.get_peak_memory() - before < x.nbytes


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_quantised_bases_of_all_bits_have_the_right_shape_and_norm(bits: int, kind: str) -> None:
    quantized = nn.QuantizedLinear.from_linear(linear(), 32, bits)
    assert weight_shape(quantized) == (OUT, IN)
    layer = wrapped(quantized, kind)
    assert layer.lora_a.shape == (IN, 6)
    x = inputs()
    np.testing.assert_allclose(double(layer(x)), double(x) @ dense(layer).T, rtol=0, atol=SAME)
    if kind == "dora":
        fresh = LoRALinear.from_base(quantized, LoRAConfig(fine_tune_type="dora"), mx.random.key(0))
        weight = mx.dequantize(*(quantized[p] for p in ("weight", "scales", "biases")), 32, bits)
        lengths = np.linalg.norm(double(weight), axis=1)
        np.testing.assert_allclose(double(fresh.m), lengths, rtol=1e-6)
    # The old rule gave another width for bits that do not divide 32.
    old = quantized.weight.shape[1] * (32 // bits)
    assert (old == IN) == (32 % bits == 0)


def test_the_weight_of_a_half_precision_quantised_layer_is_not_rounded_again() -> None:
    layer = nn.QuantizedLinear.from_linear(linear(mx.bfloat16), 32, 4)
    assert layer.scales.dtype == mx.bfloat16
    x = inputs()  # float32: the layer then multiplies by its weights without rounding them
    expected = double(x) @ double(base_weight(layer)).T
    np.testing.assert_allclose(double(layer(x)), expected, rtol=0, atol=SAME)


@pytest.mark.parametrize("size", [0.0, 0.01, 0.3, 3.0])
def test_dora_norm_without_the_product_equals_the_dense_norm(size: float) -> None:
    layer = wrapped(linear(), "dora", size)
    weight = double(base_weight(layer.linear))
    changed = weight + layer.scale * (double(layer.lora_a) @ double(layer.lora_b)).T
    expected = double(layer.m) / np.linalg.norm(changed, axis=1)
    np.testing.assert_allclose(double(layer.magnitude_ratio()), expected, rtol=5e-6)


def test_a_small_change_of_magnitude_is_not_rounded_as_a_ratio() -> None:
    layer = LoRALinear.from_base(
        linear(mx.bfloat16), LoRAConfig(fine_tune_type="dora"), mx.random.key(0)
    )
    x, start = mx.random.normal((4096, IN), key=mx.random.key(2)).astype(mx.bfloat16), layer.m
    plain = double(layer.linear(x))

    def error(y: npt.NDArray[np.float64], ratio: float) -> float:
        return float(abs((y * plain).sum() / (plain * plain).sum() - ratio))

    new, old = [], []
    for ratio in (0.997, 0.998, 1.002, 1.003, 1.004, 1.006, 1.01):
        layer.m = start * ratio
        new.append(error(double(layer(x)), ratio))
        rounded = layer.magnitude_ratio().astype(mx.bfloat16) * layer.linear(x)
        old.append(error(double(rounded), ratio))
    # What is left is the rounding of the result; the old rule's steps of 0.0078 come on top.
    assert max(new) < 0.002 and max(old) > 0.0034


def test_dora_gradient_takes_the_norm_as_a_constant() -> None:
    layer = wrapped(linear(), "dora")
    x = inputs()
    ratio, m = mx.stop_gradient(layer.magnitude_ratio()), layer.m

    def through_layer(b: mx.array, magnitude: mx.array) -> mx.array:
        layer.lora_b, layer.m = b, magnitude
        return mx.square(layer(x)).sum()

    def by_hand(b: mx.array, magnitude: mx.array) -> mx.array:
        plain = layer.linear(x) + layer.scale * (x @ layer.lora_a) @ b
        return mx.square(ratio / m * magnitude * plain).sum()

    start = (layer.lora_b, layer.m)
    found = mx.grad(through_layer, argnums=(0, 1))(*start)
    expected = mx.grad(by_hand, argnums=(0, 1))(*start)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(double(a), double(b), rtol=2e-4, atol=2e-4)


def test_a_row_of_zeros_stays_zero_under_dora() -> None:
    layer = linear()
    layer.weight[3] = 0.0
    found = LoRALinear.from_base(layer, LoRAConfig(fine_tune_type="dora"), mx.random.key(0))
    y = double(found(inputs()))
    assert np.isfinite(y).all() and not y[..., 3].any()
    assert np.isfinite(double(found.fused_weight())).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_a_function_of_its_key_alone(kind: str) -> None:
    layer = wrapped(linear(), kind, dropout=0.4)
    x, key = inputs(), mx.random.key(3)
    first = double(layer(x, key))
    mx.random.seed(99)  # the global generator has no say
    mx.random.normal((7,))
    assert np.array_equal(first, double(layer(x, key)))
    assert not np.array_equal(first, double(layer(x, mx.random.key(4))))
    without = double(layer(x))
    assert not np.array_equal(first, without)
    np.testing.assert_allclose(without, double(x) @ dense(layer).T, rtol=0, atol=SAME)


def test_no_dropout_with_a_key_is_no_dropout() -> None:
    layer = wrapped(linear(), dropout=0.0)
    assert np.array_equal(double(layer(inputs(), mx.random.key(0))), double(layer(inputs())))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_drops_what_peft_drops(kind: str) -> None:
    layer = wrapped(linear(), kind, dropout=0.4)
    x, key = inputs(), mx.random.key(3)
    keep = double(mx.random.bernoulli(0.6, x.shape, key=key))
    dropped = double(x) * keep / 0.6
    weight, product = double(base_weight(layer.linear)), double(layer.lora_a) @ double(layer.lora_b)
    expected = double(x) @ weight.T + layer.scale * dropped @ product
    if kind == "dora":
        ratio = double(layer.magnitude_ratio())
        expected = double(x) @ weight.T + (ratio - 1) * (dropped @ weight.T)
        expected += ratio * layer.scale * (dropped @ product)
    np.testing.assert_allclose(double(layer(x, key)), expected, rtol=0, atol=SAME)


def test_dropout_keeps_the_mean() -> None:
    layer = wrapped(linear(), dropout=0.5)
    x = inputs()
    keys = mx.random.split(mx.random.key(0), 2000)
    change = np.mean([double(layer(x, key) - layer.linear(x)) for key in keys], axis=0)
    expected = double(layer(x)) - double(layer.linear(x))
    # 2000 draws: the mean is within about 4 standard errors of the change without dropout.
    assert np.abs(change - expected).max() < 0.15 * np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{}, {"quantize": (4, 32)}], ids=["plain", "4bit"])
def test_a_wrapped_model_starts_as_its_base_and_trains_only_the_factors(
    kind: str, how: dict[str, Any]
) -> None:
    model = base(**how)
    before = logits(model)
    apply_lora(model, LoRAConfig(rank=4, dropout=0.0, fine_tune_type=kind))  # type: ignore[arg-type]
    np.testing.assert_allclose(logits(model), before, rtol=0, atol=SAME)
    leaves = {name.rsplit(".", 1)[-1] for name, _ in tree_flatten(model.trainable_parameters())}
    assert leaves == {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
    fill(model)
    assert np.abs(logits(model) - before).max() > 0.1
    remove_lora(model)
    assert next(adapted_layers(model), None) is None
    assert np.array_equal(logits(model), before)


def test_num_layers_counts_from_the_last_block() -> None:
    model = adapted(num_layers=1, keys=["self_attn.qkv_proj", "mlp.down_proj"])
    assert [name for name, _ in adapted_layers(model)] == [
        "model.layers.1.self_attn.qkv_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_a_site_starts_the_same_whatever_else_is_adapted() -> None:
    few, all_of_them = base(), base()
    apply_lora(few, LoRAConfig(rank=4, keys=("mlp.down_proj",), num_layers=1), seed=5)
    apply_lora(all_of_them, LoRAConfig(rank=4), seed=5)
    starts = {name: double(layer.lora_a) for name, layer in adapted_layers(all_of_them)}
    for name, layer in adapted_layers(few):
        assert np.array_equal(double(layer.lora_a), starts[name])
    same_shape = [starts[f"model.layers.{i}.self_attn.qkv_proj"] for i in (0, 1)]
    assert not np.array_equal(*same_shape)


def test_keys_that_match_nothing_name_what_exists() -> None:
    # The names of mlx-lm's sample configuration, which train nothing on Phi-3 there.
    keys = ("self_attn.q_proj", "self_attn.v_proj")
    with pytest.raises(AdapterError) as caught:
        apply_lora(base(), LoRAConfig(keys=keys))
    assert all(name in str(caught.value) for name in (*keys, *PROJECTIONS))


def test_more_layers_than_there_are_is_an_error() -> None:
    with pytest.raises(AdapterError, match="num_layers is 3, this model has 2 layers"):
        apply_lora(base(), LoRAConfig(num_layers=3))


def test_a_second_adapter_on_a_model_is_an_error() -> None:
    model = adapted()
    with pytest.raises(AdapterError, match="already has an adapter"):
        apply_lora(model, LoRAConfig())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_compiled_forward_pass_sees_new_values(kind: str) -> None:
    model = adapted(fine_tune_type=kind)
    compiled = mx.compile(lambda tokens: model(tokens), inputs=model.state)
    np.testing.assert_allclose(np.array(compiled(ids())), logits(model), rtol=0, atol=SAME)
    fill(model, size=0.2, seed=9)
    np.testing.assert_allclose(np.array(compiled(ids())), logits(model), rtol=0, atol=SAME)
