"""‖ΔW‖ of layers and the distance of adapters, against full matrices in double precision."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from adapter_cases import MINI, adapted, base, fill

from mlx_medphi.config import LoRAConfig
from mlx_medphi.errors import AdapterError
from mlx_medphi.model.adapter import load_adapter, save_adapter
from mlx_medphi.model.delta import Tally, adapter_diff
from mlx_medphi.model.lora import adapted_layers, apply_lora, base_weight
from mlx_medphi.model.phi3 import Phi3ForCausalLM

Matrix = npt.NDArray[np.float64]


def double(array: mx.array) -> Matrix:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def products(model: Phi3ForCausalLM) -> dict[str, Matrix]:
    """scale · A B of every layer."""
    return {
        name: layer.scale * double(layer.lora_a) @ double(layer.lora_b)
        for name, layer in adapted_layers(model)
    }


def cosine(a: Matrix, b: Matrix) -> float:
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


def tallies(model: Phi3ForCausalLM) -> list[Tally]:
    """The exact change of every adapted layer."""
    found = []
    for name, layer in adapted_layers(model):
        tally, fused = Tally(name), layer.fused_weight()
        tally.add(base_weight(layer.linear), fused, fused)
        found.append(tally)
    return found


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("how", [{}, {"quantize": (4, 32)}], ids=["plain", "4bit"])
def test_the_change_of_a_layer_is_relative_to_its_weight(kind: str, how: dict[str, Any]) -> None:
    model = adapted(how=how, fine_tune_type=kind)
    found = {change.name: change for change in (tally.result() for tally in tallies(model))}
    assert len(found) == 8
    for name, layer in adapted_layers(model):
        weight, fused = double(base_weight(layer.linear)), double(layer.fused_weight())
        expected = np.linalg.norm(fused - weight) / np.linalg.norm(weight)
        assert found[name].relative == pytest.approx(expected, rel=1e-5)
        assert expected > 0.05
        assert (found[name].error, found[name].kept) == (0, pytest.approx(1))
        assert found[name].cosine == pytest.approx(1)


def test_the_change_of_all_layers_is_that_of_one_long_weight() -> None:
    model = adapted()
    layers = [layer for _, layer in adapted_layers(model)]
    weights, fused = (
        np.concatenate([double(array).ravel() for array in arrays])
        for arrays in (
            [base_weight(layer.linear) for layer in layers],
            [layer.fused_weight() for layer in layers],
        )
    )
    whole = reduce(Tally.plus, tallies(model), Tally("all layers")).result()
    expected = np.linalg.norm(fused - weights) / np.linalg.norm(weights)
    assert (whole.name, whole.relative) == ("all layers", pytest.approx(expected, rel=1e-5))
    assert (whole.error, whole.cosine) == (0, pytest.approx(1))


def test_a_tally_measures_what_rounding_kept() -> None:
    draw = np.random.RandomState(0)
    weight, change, noise = (draw.standard_normal((6, 50)).astype(np.float32) for _ in range(3))
    wanted, stored = weight + change, weight + 0.8 * change + 0.5 * noise
    tally = Tally("x")
    for rows in (slice(0, 4), slice(4, 6)):  # as a file is written, block by block
        tally.add(*(mx.array(part[rows]) for part in (weight, wanted, stored)))
    found = tally.result()
    kept, length = (stored - weight).astype(np.float64), np.linalg.norm(change)
    assert found.name == "x"
    assert found.relative == pytest.approx(length / np.linalg.norm(weight), rel=1e-5)
    assert found.cosine == pytest.approx(cosine(change.astype(np.float64), kept), rel=1e-5)
    assert found.error == pytest.approx(np.linalg.norm(stored - wanted) / length, rel=1e-5)
    assert found.kept == pytest.approx((change * kept).sum() / length**2, rel=1e-5)


@pytest.mark.parametrize(
    ("stored", "expected"), [(0.0, (0.0, 1.0, 0.0, 1.0)), (0.5, (0.0, 0.0, 1.0, 1.0))]
)
def test_a_layer_that_was_to_stay(stored: float, expected: tuple[float, ...]) -> None:
    tally, weight = Tally("x"), mx.ones((2, 3))
    tally.add(weight, weight, weight + stored)
    found = tally.result()
    assert (found.relative, found.cosine, found.error, found.kept) == expected


def test_two_adapters_are_compared_layer_by_layer(tmp_path: Path) -> None:
    first = adapted(rank=4, scale=2.0)
    second = fill(adapted(rank=4, scale=0.5), size=0.05, seed=7)
    for (_, one), (_, two) in zip(adapted_layers(first), adapted_layers(second), strict=True):
        two.lora_b = two.lora_b + 0.5 * one.lora_b
    for name, model in (("a", first), ("b", second)):
        save_adapter(model, tmp_path / name, dtype="float32")
    found = adapter_diff(tmp_path / "a", tmp_path / "b")
    ours, theirs = products(first), products(second)
    assert [layer.name for layer in found.layers] == sorted(ours)
    for layer in found.layers:
        a, b = ours[layer.name], theirs[layer.name]
        assert layer.first == pytest.approx(np.linalg.norm(a), rel=1e-5)
        assert layer.second == pytest.approx(np.linalg.norm(b), rel=1e-5)
        assert layer.cosine == pytest.approx(cosine(a, b), abs=1e-5)
        assert 0.2 < layer.cosine < 0.8
    whole = [np.concatenate([m[name].ravel() for name in sorted(m)]) for m in (ours, theirs)]
    assert found.first == pytest.approx(np.linalg.norm(whole[0]), rel=1e-5)
    assert found.second == pytest.approx(np.linalg.norm(whole[1]), rel=1e-5)
    assert found.cosine == pytest.approx(cosine(*whole), abs=1e-5)
    assert found.exact


def test_an_adapter_is_no_distance_from_itself(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a", dtype="float32")
    save_adapter(adapted(), tmp_path / "b.safetensors", dtype="float32")
    found = adapter_diff(tmp_path / "a", tmp_path / "b.safetensors")
    assert found.first == found.second > 0
    assert {round(layer.cosine, 12) for layer in found.layers} == {1.0}


def test_a_layer_that_one_adapter_lacks_counts_as_no_change(tmp_path: Path) -> None:
    save_adapter(adapted(keys=["mlp.down_proj"]), tmp_path / "a")
    save_adapter(adapted(keys=["self_attn.o_proj"], num_layers=1), tmp_path / "b")
    found = {layer.name: layer for layer in adapter_diff(tmp_path / "a", tmp_path / "b").layers}
    assert len(found) == 3
    only_b = found["model.layers.1.self_attn.o_proj"]
    assert (only_b.first, only_b.cosine) == (0, 0) and only_b.second > 0


def test_dora_is_compared_without_its_magnitudes_and_says_so(tmp_path: Path) -> None:
    model = base()
    load_adapter(model, MINI / "peft_2")
    found = adapter_diff(MINI / "peft_2", MINI / "peft_2")
    assert not found.exact
    expected = products(model)
    assert found.layers[0].first == pytest.approx(
        np.linalg.norm(expected[found.layers[0].name]), rel=1e-5
    )


def test_adapters_of_models_of_other_shape_are_not_compared(tmp_path: Path) -> None:
    save_adapter(adapted(keys=["mlp.down_proj"]), tmp_path / "a")
    model = Phi3ForCausalLM(base().config)
    for block in model.model.layers:
        block.mlp.down_proj.weight = mx.zeros((64, 32))
    apply_lora(model, LoRAConfig(rank=2, keys=("mlp.down_proj",)))
    save_adapter(model, tmp_path / "b")
    with pytest.raises(AdapterError, match="maps 96 -> 64 in one and 32 -> 64 in the other"):
        adapter_diff(tmp_path / "a", tmp_path / "b")
