"""An adapter trained on a base that was quantised on loading is fused into just those numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapter_cases import MINI, SAME, adapted, base, logits, rows, save_base

from mlx_medphi.errors import AdapterError, CheckpointError, FuseError
from mlx_medphi.files import read_safetensors_header
from mlx_medphi.model import shards
from mlx_medphi.model.adapter import load_adapter, save_adapter
from mlx_medphi.model.checkpoint import save_model
from mlx_medphi.model.fingerprint import quantized_as, short_fingerprint
from mlx_medphi.model.fuse import fuse
from mlx_medphi.model.on_load import quantized_on_load
from mlx_medphi.model.phi3 import Phi3ForCausalLM, named_parameters
from mlx_medphi.model.weights import open_checkpoint
from mlx_medphi.text.tokenizer import Tokenizer

HOW = {"quantize": (4, 32)}


def trained(tmp_path: Path, folder: Path = MINI, how: Any = HOW, **config: Any) -> Path:
    """An adapter of a base quantised on loading, stored exactly."""
    save_adapter(adapted(folder, how, **config), tmp_path / "adapter", dtype="float32")
    return tmp_path / "adapter"


def expected(adapter: Path, folder: Path = MINI, how: Any = HOW) -> Phi3ForCausalLM:
    model = base(folder, **how)
    load_adapter(model, adapter)
    return model


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("precision", ["float16", "8bit"])
@pytest.mark.parametrize("name", ["fused", "fused.safetensors"])
def test_the_fused_model_says_what_the_adapter_says_on_the_quantised_base(
    name: str, precision: Any, kind: str, tmp_path: Path
) -> None:
    adapter, out = trained(tmp_path, fine_tune_type=kind), tmp_path / name
    report = fuse(MINI, adapter, out, token_rows=rows(), precision=precision)
    wanted = logits(expected(adapter))
    # The plain base is much further away than what either precision rounds.
    plain = base()
    load_adapter(plain, adapter, allow_other_base=True)
    assert np.abs(logits(plain) - wanted).max() > 0.2
    assert np.abs(logits(base(out)) - wanted).max() < 0.05
    assert report.quantized_on_load == (4, 32)
    assert report.base_fingerprint == base(**HOW).fingerprint
    stored = read_safetensors_header(MINI / "model.safetensors").tensor_bytes
    assert (report.base_bytes, report.same_size) == (stored, False)
    assert report.fidelity.kl < 1e-3 < report.fidelity.adapter_kl


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_it_is_what_the_base_stored_quantised_gives(dtype: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", dtype=dtype)
    adapter = trained(tmp_path, folder, keys=["mlp.down_proj"])
    save_model(base(folder, **HOW), Tokenizer.load(folder), tmp_path / "stored")
    for precision in ("float16", "8bit"):
        here, there = tmp_path / f"a {precision}", tmp_path / f"b {precision}"
        how: Any = {"token_rows": rows(), "precision": precision}
        fuse(folder, adapter, here, **how)
        fuse(tmp_path / "stored", adapter, there, allow_other_base=True, **how)
        one, other = (weights(out) for out in (here, there))
        assert one.keys() == other.keys()
        assert all(mx.array_equal(one[name], other[name]).item() for name in one)
    raw = json.loads((here / "config.json").read_text())
    section = raw["quantization"]
    assert (section["bits"], section["group_size"]) == (4, 32)
    assert section["model.layers.1.mlp.down_proj"] == {"group_size": 32, "bits": 8}
    assert "model.layers.1.mlp.gate_up_proj" not in section


def test_layers_that_the_group_does_not_divide_stay_as_they_are() -> None:
    checkpoint, files = quantized_on_load(open_checkpoint(MINI), (4, 64))
    model = base(quantize=(4, 64))
    assert checkpoint.config.quantization is not None
    assert len(checkpoint.config.quantization.layers) == 2  # both down_proj, 96 wide
    assert checkpoint.config == model.config
    named = {name: array.shape for name, array in flat(model).items()}
    assert {name: tensor.info.shape for name, tensor in checkpoint.tensors.items()} == named
    assert all(np.array_equal(np.array(files.rows(n)), np.array(a)) for n, a in flat(model).items())


def weights(folder: Path) -> dict[str, mx.array]:
    found: Any = mx.load(str(folder / "model.safetensors"))
    return dict(found)


def flat(model: Phi3ForCausalLM) -> dict[str, mx.array]:
    return dict(named_parameters(model))


def test_blocks_of_rows_are_the_codes_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK_ELEMENTS", 7 * 64)
    _, files = quantized_on_load(open_checkpoint(MINI), (4, 32))
    for name, array in flat(base(**HOW)).items():
        assert b"".join(files.raw(name)) == shards.array_bytes(array)


def test_it_is_not_folded_into_its_own_grid(tmp_path: Path) -> None:
    adapter = trained(tmp_path)
    with pytest.raises(FuseError, match="for this adapter it is quantised on loading to 4 bits"):
        fuse(MINI, adapter, tmp_path / "fused", token_rows=rows())
    assert not (tmp_path / "fused").exists()


def test_an_adapter_of_the_plain_base_is_fused_into_the_plain_base(tmp_path: Path) -> None:
    adapter = trained(tmp_path, how={})
    report = fuse(MINI, adapter, tmp_path / "fused", token_rows=rows())
    assert report.quantized_on_load is None and report.same_size
    wanted = logits(expected(adapter, how={}))
    np.testing.assert_allclose(logits(base(tmp_path / "fused")), wanted, rtol=0, atol=SAME)


def test_an_adapter_of_another_quantised_base_is_refused(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", dtype="float16")
    with pytest.raises(AdapterError, match=r"base fingerprint: [0-9a-f]{16}…-q4g32, this model"):
        fuse(folder, trained(tmp_path), tmp_path / "f", token_rows=rows(), precision="float16")


def test_a_quantised_checkpoint_is_not_quantised_again() -> None:
    checkpoint, _ = quantized_on_load(open_checkpoint(MINI), (4, 32))
    with pytest.raises(CheckpointError, match="already quantised"):
        quantized_on_load(checkpoint, (4, 32))


def test_a_fingerprint_says_how_the_base_was_quantised() -> None:
    digits = "0123456789abcdef" * 4
    assert quantized_as(f"{digits}-q4g64", digits) == (4, 64)
    assert quantized_as(digits, digits) is None
    assert quantized_as(f"{digits[::-1]}-q4g64", digits) is None
    assert quantized_as(f"{digits}-x", digits) is None
    assert short_fingerprint(f"{digits}-q4g64") == "0123456789abcdef…-q4g64"
    assert short_fingerprint(digits) == "0123456789abcdef…"
