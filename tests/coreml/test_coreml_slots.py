"""Slot arrays compute what LoRA layers compute; what slots cannot hold is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_medphi.config import PROJECTIONS
from mlx_medphi.coreml.slots import (
    MODULES,
    AdapterBase,
    check_adapters,
    function_name,
    layer_factors,
    slot_arrays,
    slot_rank,
    slot_shapes,
    zero_slots,
)
from mlx_medphi.errors import AdapterError
from mlx_medphi.model.adapter import load_adapter
from mlx_medphi.model.adapter_files import read_adapter
from mlx_medphi.model.adapter_formats import Adapter, LowRank, Origin
from mlx_medphi.model.checkpoint import build_model
from mlx_medphi.model.fingerprint import fingerprint
from mlx_medphi.model.lora import LoRALinear, projection
from mlx_medphi.model.unfused import padded
from mlx_medphi.model.weights import open_checkpoint

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MINI = FIXTURES / "phi3" / "mini-4k"
LORA, RSLORA, DORA = (MINI / f"peft_{i}" for i in range(3))
CONFIG = open_checkpoint(MINI).config
BASE = AdapterBase(CONFIG, fingerprint(MINI))

# A change is a sum of products of two numbers that are each rounded to float16 (2^-11); its error
# is compared with the largest change, and rounding errors of that many terms partly cancel.
HALF_ROUNDING = 2e-3


@pytest.mark.parametrize(
    "folder",
    [LORA, RSLORA, *(FIXTURES / "peft_theirs" / n for n in ("patterns", "unfused", "one_block"))],
    ids=lambda folder: folder.name,
)
def test_slot_arrays_change_activations_as_lora_layers_do(folder: Path) -> None:
    model = build_model(open_checkpoint(MINI))
    load_adapter(model, folder)
    arrays = slot_arrays(read_adapter(folder), CONFIG, 32)
    touched = 0
    for layer in range(CONFIG.num_hidden_layers):
        for module, key in MODULES.items():
            found = projection(model, f"model.layers.{layer}.{key}")
            a, b = arrays[f"loraA_{module}"][layer], arrays[f"loraB_{module}"][layer]
            if not isinstance(found, LoRALinear):
                assert not a.any() and not b.any()
                continue
            touched += 1
            x = mx.random.normal((5, a.shape[1]), key=mx.random.key(layer))
            expected = np.array(found(x) - found.linear(x))
            assert np.abs(expected).max() > 0.1
            change = (np.array(x, np.float64) @ a.T.astype(np.float64)) @ b.T.astype(np.float64)
            tolerance = HALF_ROUNDING * np.abs(expected).max()
            np.testing.assert_allclose(change, expected, rtol=0, atol=tolerance)
    assert touched == len(read_adapter(folder).layers)


def test_all_eight_slots_are_there_whatever_the_adapter_touches() -> None:
    arrays = slot_arrays(read_adapter(RSLORA), CONFIG, 16)
    assert {name: array.shape for name, array in arrays.items()} == slot_shapes(CONFIG, 16)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)}
    assert not arrays["loraA_gate_up"].any() and not arrays["loraB_down"].any()
    assert arrays["loraA_qkv"].any() and arrays["loraB_o"].any()


def test_slot_shapes_are_those_of_the_projections() -> None:
    model = build_model(open_checkpoint(MINI))
    assert list(MODULES.values()) == list(PROJECTIONS)
    for module, key in MODULES.items():
        out, inputs = projection(model, f"model.layers.1.{key}").weight.shape
        assert slot_shapes(CONFIG, 8)[f"loraA_{module}"] == (2, 8, inputs)
        assert slot_shapes(CONFIG, 8)[f"loraB_{module}"] == (2, out, 8)


def test_a_larger_slot_holds_the_same_numbers_and_zeros() -> None:
    adapter = read_adapter(LORA)  # rank 8
    small, large = slot_arrays(adapter, CONFIG, 8), slot_arrays(adapter, CONFIG, 16)
    for module in MODULES:
        a, b = large[f"loraA_{module}"], large[f"loraB_{module}"]
        np.testing.assert_array_equal(a[:, :8], small[f"loraA_{module}"])
        np.testing.assert_array_equal(b[:, :, :8], small[f"loraB_{module}"])
        assert not a[:, 8:].any() and not b[:, :, 8:].any()


def test_empty_slots_are_zeros_of_the_same_shapes() -> None:
    empty = zero_slots(CONFIG, 16)
    assert {name: array.shape for name, array in empty.items()} == slot_shapes(CONFIG, 16)
    assert not any(array.any() for array in empty.values())
    assert {array.dtype for array in empty.values()} == {np.dtype(np.float16)}


def test_layer_factors_are_the_slots_of_that_layer_in_its_own_rank() -> None:
    adapter = read_adapter(RSLORA)
    arrays = slot_arrays(adapter, CONFIG, 16)
    a, b = layer_factors(adapter, "model.layers.1.self_attn.o_proj")
    np.testing.assert_array_equal(a, arrays["loraA_o"][1, :4])
    np.testing.assert_array_equal(b, arrays["loraB_o"][1, :, :4])
    for order in (mx.array, lambda part: mx.contiguous(part.T).T):
        change = adapter.layers["model.layers.1.self_attn.o_proj"]
        parts = {"a": order(mx.contiguous(change.a)), "b": order(mx.contiguous(change.b))}
        other = changed(adapter, "model.layers.1.self_attn.o_proj", **parts)
        for factor in layer_factors(other, "model.layers.1.self_attn.o_proj"):
            assert factor.flags.c_contiguous  # what a constant's bytes are taken from
    with pytest.raises(AdapterError, match="DoRA.*\n.*fused"):
        layer_factors(read_adapter(DORA), "model.layers.0.mlp.down_proj")


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [([], 16), ([4], 8), ([8], 8), ([9], 16), ([4, 24], 32), ([64], 64), ([1024], 1024)],
)
def test_the_slot_rank_is_the_smallest_that_holds_every_adapter(
    ranks: list[int], expected: int
) -> None:
    adapters = [of_rank(read_adapter(RSLORA), rank) for rank in ranks]
    assert slot_rank(adapters) == expected
    assert slot_rank(adapters, wanted=24) == 24


def test_a_rank_beyond_all_slots_is_refused() -> None:
    huge = of_rank(read_adapter(LORA), 1025)
    with pytest.raises(AdapterError, match="rank 1025, slots have 1024 at most.*fused"):
        slot_rank([huge])


def test_function_names_are_identifiers() -> None:
    assert function_name("decode", "soap-notes_2") == "decode_soap_notes_2"


# --- refusals


def changed(adapter: Adapter, layer: str, **parts: mx.array) -> Adapter:
    return replace(
        adapter, layers={**adapter.layers, layer: replace(adapter.layers[layer], **parts)}
    )


def renamed(adapter: Adapter, layer: str, to: str) -> Adapter:
    layers = dict(adapter.layers)
    layers[to] = layers.pop(layer)
    return replace(adapter, layers=layers)


def of_rank(adapter: Adapter, rank: int) -> Adapter:
    layers = {name: padded(change, rank) for name, change in adapter.layers.items()}
    return replace(adapter, layers=layers, scaling=replace(adapter.scaling, rank=rank))


QKV = "model.layers.0.self_attn.qkv_proj"
REFUSED: dict[str, tuple[Callable[[], Adapter], str]] = {
    "dora": (lambda: read_adapter(DORA), "DoRA rescales rows of the base"),
    "layers": (
        lambda: renamed(read_adapter(LORA), QKV, "model.layers.2.self_attn.qkv_proj"),
        r"model\.layers\.2\.self_attn\.qkv_proj: this model has blocks 0 to 1 only",
    ),
    "inputs": (
        lambda: changed(read_adapter(LORA), QKV, a=mx.zeros((65, 8))),
        r"qkv_proj\.lora_a: shape \(65, 8\), model expects \(64, 8\)",
    ),
    "outputs": (
        lambda: changed(read_adapter(LORA), QKV, b=mx.ones((8, 191))),
        r"qkv_proj\.lora_b: shape \(8, 191\), model expects \(8, 192\)",
    ),
    "rank": (
        lambda: of_rank(read_adapter(LORA), 17),
        "rank is 17, the slots have 16: export with slot_rank=17",
    ),
    "infinite": (
        lambda: changed(read_adapter(LORA), QKV, a=mx.full((64, 8), float("inf"))),
        r"qkv_proj\.lora_a: its largest value is inf, float16 holds less than 65504",
    ),
    "not a number": (
        lambda: changed(read_adapter(LORA), QKV, b=mx.full((8, 192), float("nan"))),
        r"qkv_proj\.lora_b: its largest value times the scale of 2 is nan",
    ),
    "large": (
        lambda: changed(read_adapter(LORA), QKV, b=mx.full((8, 192), -32752.0)),
        r"qkv_proj\.lora_b: its largest value times the scale of 2 is 65504, float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_slots_cannot_hold_is_refused_with_the_reason_and_the_way_out(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(AdapterError, match=reason) as caught:
        check_adapters({"notes": make()}, BASE, 16)
    assert "  notes: " in str(caught.value)
    assert "adapters='fused'" in str(caught.value)
    with pytest.raises(AdapterError, match=reason):
        slot_arrays(make(), CONFIG, 16)


def test_the_largest_value_that_float16_holds_is_kept() -> None:
    adapter = changed(read_adapter(LORA), QKV, b=mx.full((8, 192), 32740.0))
    assert slot_arrays(adapter, CONFIG, 8)["loraB_qkv"][0].max() == np.float16(65480)


def test_everything_wrong_with_all_adapters_is_in_one_message() -> None:
    layers = changed(renamed(read_adapter(LORA), QKV, "model.layers.9.mlp.down_proj"),
                     "model.layers.1.mlp.down_proj", a=mx.zeros((1, 1)))  # fmt: skip
    other = replace(layers, origin=Origin(base_fingerprint="f" * 64))
    with pytest.raises(AdapterError) as caught:
        check_adapters({"one": read_adapter(DORA), "two": other, "good": read_adapter(LORA)}, BASE)
    text = str(caught.value)
    for part in ("one: DoRA", "two: model.layers.9", "two: model.layers.1", "two: base fingerprint",
                 "4 differences"):  # fmt: skip
        assert part in text
    assert "good" not in text


def trained_on(base: str | None) -> Adapter:
    return replace(read_adapter(LORA), origin=Origin(base_fingerprint=base))


OURS = BASE.fingerprint
OTHER = fingerprint(FIXTURES / "phi3" / "gqa")


@pytest.mark.parametrize(
    ("theirs", "quantize", "note"),
    [
        (OURS, None, None),
        (fingerprint(MINI, (4, 64)), (4, 64), None),
        (OURS, (4, 64), "trained on the plain weights, here they have 4 bits in groups of 64"),
        (OURS, (8, 0), "here they have 8 bits and one scale per row"),
        (None, None, "does not say which base"),
        (None, (4, 64), "does not say which base"),
    ],
)
def test_adapters_of_this_base_are_accepted_and_doubts_are_told(
    theirs: str | None, quantize: tuple[int, int] | None, note: str | None
) -> None:
    notes = check_adapters({"notes": trained_on(theirs)}, replace(BASE, quantize=quantize), 8)
    assert len(notes) == (note is not None)
    assert note is None or (notes[0].startswith("notes: ") and note in notes[0])


@pytest.mark.parametrize(
    ("theirs", "quantize", "reason"),
    [
        (OTHER, None, f"base fingerprint: {OTHER[:16]}…, this base has {OURS[:16]}…"),
        (f"{OTHER}-q4g64", (4, 64), f"base fingerprint: {OTHER[:16]}…-q4g64, this base"),
        (f"{OURS}-q4g64", (8, 64), "the package has 8 bits.*export with bits=4, group_size=64"),
        (f"{OURS}-q4g64", (4, 32), "groups of 64, the package has 4 bits in groups of 32"),
        (f"{OURS}-q8g32", None, "the package has the plain weights: export with bits=8, group_"),
    ],
)
def test_adapters_of_another_base_or_quantisation_are_refused(
    theirs: str, quantize: tuple[int, int] | None, reason: str
) -> None:
    with pytest.raises(AdapterError, match=reason) as caught:
        check_adapters({"notes": trained_on(theirs)}, replace(BASE, quantize=quantize), 8)
    assert "export with the base it was trained on" in str(caught.value)


def test_factors_in_bfloat16_are_read_by_value() -> None:
    adapter = read_adapter(LORA)
    layers = {
        name: LowRank(change.a.astype(mx.bfloat16), change.b.astype(mx.bfloat16))
        for name, change in adapter.layers.items()
    }
    half = slot_arrays(replace(adapter, layers=layers), CONFIG, 8)
    # bfloat16 has 8 bits: values move by at most 2^-8 of themselves.
    np.testing.assert_allclose(
        half["loraB_down"], slot_arrays(adapter, CONFIG, 8)["loraB_down"], rtol=2**-8, atol=1e-6
    )
