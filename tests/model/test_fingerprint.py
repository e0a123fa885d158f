"""The fingerprint names the weights, not the files they lie in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_medphi.errors import CheckpointError
from mlx_medphi.model.checkpoint import load, save_model
from mlx_medphi.model.config import Phi3Config
from mlx_medphi.model.fingerprint import SAMPLE_BYTES, SAMPLES, WHOLE_BYTES, fingerprint
from mlx_medphi.model.weights import open_checkpoint

# Adapters carry this string: it may only change together with the `medphi-base-1` in it.
MINI_4K = "17d4c82691c5"


def test_the_fingerprint_of_a_base_never_changes(phi3: Path) -> None:
    assert fingerprint(phi3 / "mini-4k").startswith(MINI_4K)
    assert len(fingerprint(phi3 / "mini-4k")) == 64


def test_every_reference_checkpoint_has_its_own(phi3: Path) -> None:
    folders = sorted(phi3.iterdir())
    assert len({fingerprint(folder) for folder in folders}) == len(folders)


def test_it_does_not_depend_on_the_sharding_or_the_form_of_the_config(mini: Path) -> None:
    before = fingerprint(mini)
    weights = mx.load(str(mini / "model.safetensors"))
    weight_map = {}
    for i, name in enumerate(sorted(weights, reverse=True)):
        weight_map[name] = f"model-{i:02}.safetensors"
        mx.save_safetensors(str(mini / weight_map[name]), {name: weights[name]})
    (mini / "model.safetensors").unlink()
    (mini / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = Phi3Config.from_hf(json.loads((mini / "config.json").read_text()))
    (mini / "config.json").write_text(json.dumps(config.to_hf()))
    assert fingerprint(mini) == before


def test_it_does_not_depend_on_the_dtype_computed_in(phi3: Path) -> None:
    folder = phi3 / "gqa"
    assert load(folder, dtype="float32")[0].fingerprint == load(folder)[0].fingerprint


def test_quantising_on_load_is_part_of_it(phi3: Path) -> None:
    plain = fingerprint(phi3 / "mini-4k")
    assert fingerprint(phi3 / "mini-4k", (4, 32)) == f"{plain}-q4g32"
    assert load(phi3 / "mini-4k", quantize=(8, 32))[0].fingerprint == f"{plain}-q8g32"


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(offset)
        byte = handle.read(1)[0]
        handle.seek(offset)
        handle.write(bytes([byte ^ 1]))


def test_a_changed_bit_in_any_tensor_changes_it(mini: Path) -> None:
    checkpoint = open_checkpoint(mini)
    seen = {fingerprint(mini)}
    for tensor in checkpoint.tensors.values():
        flip(tensor.file, tensor.offset + tensor.info.nbytes - 1)
        seen.add(fingerprint(mini))
    assert len(seen) == len(checkpoint.tensors) + 1


@pytest.mark.parametrize("change", [{"rope_theta": 9999.0}, {"sliding_window": 100}])
def test_a_changed_architecture_changes_it(mini: Path, change: dict[str, Any]) -> None:
    before = fingerprint(mini)
    config = json.loads((mini / "config.json").read_text())
    (mini / "config.json").write_text(json.dumps({**config, **change}))
    assert fingerprint(mini) != before


def test_a_large_tensor_is_sampled_from_its_first_to_its_last_byte(
    mini: Path,
) -> None:
    config = json.loads((mini / "config.json").read_text())
    (mini / "config.json").write_text(json.dumps({**config, "intermediate_size": 320}))
    weights = mx.load(str(mini / "model.safetensors"))
    for i in range(2):
        weights[f"model.layers.{i}.mlp.gate_up_proj.weight"] = mx.ones((640, 64))
        weights[f"model.layers.{i}.mlp.down_proj.weight"] = mx.ones((64, 320))
    mx.eval(weights)
    mx.save_safetensors(str(mini / "model.safetensors"), weights)
    checkpoint = open_checkpoint(mini)
    tensor = checkpoint.tensors["model.layers.0.mlp.gate_up_proj.weight"]
    size = tensor.info.nbytes
    assert size > 2 * WHOLE_BYTES
    before = fingerprint(mini)
    starts = [k * (size - SAMPLE_BYTES) // (SAMPLES - 1) for k in range(SAMPLES)]
    for offset in (0, size - 1, starts[7], starts[7] + SAMPLE_BYTES - 1):
        flip(tensor.file, tensor.offset + offset)
        assert fingerprint(mini) != before
        flip(tensor.file, tensor.offset + offset)
    flip(tensor.file, tensor.offset + starts[7] + SAMPLE_BYTES)  # between two samples
    assert fingerprint(mini) == before


def test_a_model_saved_and_loaded_keeps_it(phi3: Path, tmp_path: Path) -> None:
    model, tokenizer = load(phi3 / "longrope-new-config")
    save_model(model, tokenizer, tmp_path / "out")
    assert fingerprint(tmp_path / "out") == model.fingerprint


def test_a_base_that_is_gone_is_an_error(mini: Path) -> None:
    checkpoint = open_checkpoint(mini)
    (mini / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="mini-4k: cannot be read"):
        fingerprint(checkpoint)


def test_a_missing_base_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        fingerprint(tmp_path / "nothing")
