"""A plain base is quantised on disk exactly as loading it quantised does."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from weight_cases import (
    DOWN,
    QKV,
    group_errors,
    make_checkpoint,
    mlx_values,
    stored_values,
)

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.staging import check_groups, quantise
from mlx_medphi.coreml.weights import plan_weights
from mlx_medphi.errors import ExportError
from mlx_medphi.model.checkpoint import build_model
from mlx_medphi.model.phi3 import named_parameters
from mlx_medphi.model.weights import Checkpoint

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
WIDE = {"intermediate_size": 128}


def staged(base: Checkpoint, folder: Path, **settings: Any) -> Checkpoint:
    folder.mkdir()
    return quantise(base, ExportConfig(**settings), folder)


def same_bits(found: mx.array, expected: mx.array) -> bool:
    return found.dtype == expected.dtype and bool(mx.array_equal(found, expected).item())


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (8, 32), (8, 64)])
def test_codes_scales_and_biases_are_those_of_a_model_quantised_on_loading(
    tmp_path: Path, bits: Any, group: Any, dtype: str
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256} if group == 128 else WIDE
    base = make_checkpoint(tmp_path / "base", quantize=None, dtype=dtype, **sizes)
    # Embedding and head have 8 bits where the projections have 4.
    eight = named_parameters(build_model(base, quantize=(8, group)))
    expected = named_parameters(build_model(base, quantize=(bits, group)))
    expected |= {k: v for k, v in eight.items() if k.startswith((EMBEDDING, HEAD))}
    made = staged(base, tmp_path / "staged", bits=bits, group_size=group)
    found = mx.load(str(made.path / "model.safetensors"))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert same_bits(found[name], array), name
    own = {layer: form for layer, form in made.quantized_layers.items() if form != (bits, group)}
    assert own == ({} if bits == 8 else {EMBEDDING: (8, group), HEAD: (8, group)})


@pytest.mark.parametrize("elements", [1, 100, 4096])
def test_blocks_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    base = make_checkpoint(tmp_path / "base", quantize=None)
    whole = mx.load(str(staged(base, tmp_path / "whole", group_size=32).path / "model.safetensors"))
    monkeypatch.setattr("mlx_medphi.model.shards.BLOCK_ELEMENTS", elements)
    blocks = mx.load(str(staged(base, tmp_path / "rows", group_size=32).path / "model.safetensors"))
    assert all(same_bits(blocks[name], array) for name, array in whole.items())
    assert blocks.keys() == whole.keys()


def test_the_staged_base_computes_what_the_quantised_one_does(tmp_path: Path, phi3: Path) -> None:
    from mlx_medphi.model.weights import open_checkpoint

    base = open_checkpoint(phi3 / "mini-4k")
    made = staged(base, tmp_path / "staged", bits=8, group_size=32)
    ids = mx.load(str(phi3 / "mini-4k" / "reference.safetensors"))["ids"]
    expected = build_model(base, quantize=(8, 32))(ids)
    assert same_bits(build_model(made)(ids), expected)


@pytest.fixture
def phi3() -> Path:
    """The folder of the reference checkpoints."""
    return Path(__file__).resolve().parents[1] / "fixtures" / "phi3"


@pytest.mark.parametrize(
    ("settings", "plain"),
    [
        ({"embedding_bits": 16}, [EMBEDDING]),
        ({"head_bits": 16, "bits": 8}, [HEAD]),
        ({"embedding_bits": 16, "head_bits": 16}, [EMBEDDING, HEAD]),
    ],
)
def test_embedding_and_head_stay_plain_where_they_get_16_bits(
    tmp_path: Path, settings: dict[str, Any], plain: list[str]
) -> None:
    base = make_checkpoint(tmp_path / "base", quantize=None, dtype="BF16")
    made = staged(base, tmp_path / "staged", group_size=32, **settings)
    found, before = (mx.load(str(c.path / "model.safetensors")) for c in (made, base))
    for layer in (EMBEDDING, HEAD):
        if layer in plain:
            assert layer not in made.quantized_layers
            assert same_bits(found[f"{layer}.weight"], before[f"{layer}.weight"])
        else:
            assert made.quantized_layers[layer] == (8, 32)
    weights = plan_weights(made, ExportConfig(group_size=32, **settings))
    assert [weights.layers[layer].form for layer in plain] == ["float16"] * len(plain)


def test_a_tied_head_is_not_written(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", quantize=None, tie_word_embeddings=True)
    made = staged(base, tmp_path / "staged", group_size=32)
    assert not [name for name in made.tensors if name.startswith("lm_head")]
    assert made.quantized_layers[EMBEDDING] == (8, 32)


def test_a_staged_base_is_exported_with_whole_offsets(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", quantize=None)
    made = staged(base, tmp_path / "staged", group_size=32)
    weights = plan_weights(made, ExportConfig(group_size=32))
    assert weights.exceptions == {}
    assert {w.bits for n, w in weights.layers.items() if n in (EMBEDDING, HEAD)} == {8}
    for layer in (EMBEDDING, QKV, DOWN, HEAD):
        weight = weights.layers[layer]
        assert group_errors(weight, mlx_values(made, layer)).max() <= 2.0**-10
        # The float16 base is as far away as its codes allow: half a step and what the grid's
        # move onto zero cuts off.
        plain = mlx_values(base, layer)
        off = np.abs(stored_values(weight) - plain).max()
        assert 0 < off <= np.ptp(plain) / (2**weight.bits - 1)


def test_progress_counts_the_bytes_of_the_new_file(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", quantize=None)
    (tmp_path / "staged").mkdir()
    seen: list[tuple[int, int]] = []
    made = quantise(
        base,
        ExportConfig(group_size=32),
        tmp_path / "staged",
        lambda done, total: seen.append((done, total)),
    )
    assert {total for _, total in seen} == {made.nbytes}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == made.nbytes
    assert len(seen) > len(made.tensors) / 2


@pytest.mark.parametrize(
    ("sizes", "group", "words"),
    [
        ({}, 64, ["1 layer:", f"{DOWN} (width 96)", "groups of 64", "group size of 32"]),
        ({}, 128, ["6 layers", f"{QKV} (width 64)", "group size of 32"]),
        ({"intermediate_size": 64}, 128, ["group size of 32 or 64"]),
        ({"intermediate_size": 40}, 32, [f"{DOWN} (width 40)", "no other", "channel"]),
    ],
)
def test_a_group_that_does_not_divide_a_width_is_refused(
    tmp_path: Path, sizes: dict[str, int], group: Any, words: list[str]
) -> None:
    base = make_checkpoint(tmp_path / "base", quantize=None, **sizes)
    with pytest.raises(ExportError) as caught:
        staged(base, tmp_path / "staged", group_size=group)
    for word in [str(base.path), *words]:
        assert word in str(caught.value)
    assert not list((tmp_path / "staged").iterdir())


def test_widths_of_layers_that_stay_plain_do_not_matter(tmp_path: Path) -> None:
    base = make_checkpoint(
        tmp_path / "base", quantize=None, hidden_size=40, intermediate_size=64, head_dim=32
    )
    with pytest.raises(ExportError, match="embed_tokens"):
        check_groups(base, ExportConfig(group_size=32))
    with pytest.raises(ExportError) as caught:
        check_groups(base, ExportConfig(group_size=32, embedding_bits=16, head_bits=16))
    assert "embed_tokens" not in str(caught.value) and "lm_head" not in str(caught.value)
    assert QKV in str(caught.value) and DOWN not in str(caught.value)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path, number: float, dtype: str) -> None:
    values = np.zeros((64, 96))
    values[63, 95] = number
    base = make_checkpoint(tmp_path / "base", quantize=None, dtype=dtype, floats={DOWN: values})
    with pytest.raises(ExportError, match=f"mlp.down_proj: holds {abs(number):g}"):
        staged(base, tmp_path / "staged", group_size=32)


def test_an_interruption_ends_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_checkpoint(tmp_path / "base", quantize=None)
    monkeypatch.setattr("mlx_medphi.model.shards.BLOCK_ELEMENTS", 1)

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    (tmp_path / "staged").mkdir()
    with pytest.raises(KeyboardInterrupt):
        quantise(base, ExportConfig(group_size=32), tmp_path / "staged", stop)
    assert threading.active_count() == before


def test_the_base_is_only_read(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", quantize=None)
    shutil.copytree(base.path, tmp_path / "copy")
    staged(base, tmp_path / "staged", group_size=32)
    for file in (tmp_path / "copy").iterdir():
        assert (base.path / file.name).read_bytes() == file.read_bytes()
    assert sorted(file.name for file in (tmp_path / "staged").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip
