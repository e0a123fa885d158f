"""`medphi fuse` and `medphi adapter`: what is stored, how large, how faithful."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import mlx_medphi as mp


def test_fuse_says_sizes_and_fidelity(run: Any, model: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "fused"
    done = run("fuse", "--model", model, "--adapter", trained / "adapter", "--out", out)
    assert done.code == 0, done.err
    assert "base 443,648 bytes, fused 443,648 bytes (the same, to the byte)" in done.out
    assert re.search(r"fused against adapted on [\d,]+ tokens: KL \S+ nats", done.out)
    mp.load(out)


def test_fuse_into_one_file_as_json(
    run: Any, model: Path, trained: Path, prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fused.safetensors"
    line = ["fuse", "--model", model, "--adapter", trained / "adapter", "--out", out, "--json"]
    told = json.loads(run(*line, "--data", prepared).out)
    assert told["base_bytes"] == told["fused_bytes"]
    assert told["fidelity"]["top1"] > 0.99
    assert out.is_file()


def test_a_quantised_base_is_not_folded_into_its_own_grid(
    run: Any, trained: Path, model: Path, tmp_path: Path
) -> None:
    base, _ = mp.load(model, quantize=(4, 32))
    tokenizer = mp.Tokenizer.load(model)
    mp.save_model(base, tokenizer, tmp_path / "base")
    line = ["fuse", "--model", tmp_path / "base", "--adapter", trained / "adapter"]
    done = run(*line, "--out", tmp_path / "fused", "--allow-other-base")
    assert done.code == 1 and "Keep the adapter" in done.err
    assert not (tmp_path / "fused").exists()
    done = run(*line, "--out", tmp_path / "f16", "--allow-other-base", "--precision", "float16")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--precision", "4bit", "expected one of 'same', 'float16', '8bit'"),
        ("--adapter", "none", "none"),
        ("--data", "none", "no such folder"),
    ],
)
def test_a_wrong_fuse_is_one_line_and_writes_nothing(
    run: Any, model: Path, trained: Path, tmp_path: Path, option: str, value: str, expected: str
) -> None:
    out = tmp_path / "fused"
    options = {"--model": model, "--adapter": trained / "adapter", "--out": out, option: value}
    done = run("fuse", *(word for pair in options.items() for word in pair))
    assert done.code in (1, 2) and done.err.count("\n") == 1
    assert expected in done.err
    assert not out.exists()


def test_an_existing_output_needs_to_be_told_to_replace(
    run: Any, model: Path, trained: Path, tmp_path: Path
) -> None:
    line = ["fuse", "--model", model, "--adapter", trained / "adapter", "--out", tmp_path / "fused"]
    assert run(*line).code == 0
    assert "exists already" in run(*line).err
    assert run(*line, "--replace").code == 0


@pytest.mark.parametrize("precision", ["float16", "8bit"])
@pytest.mark.slow
def test_an_adapter_trained_with_quantize_is_fused_into_the_same_numbers(
    run: Any, model: Path, prepared: Path, tmp_path: Path, precision: str
) -> None:
    line = ["train", "--model", model, "--data", prepared, "--out", tmp_path / "run"]
    small = ["--rank", 4, "--learning-rate", 0.05, "--batch-size", 1, "--max-length", 1024]
    assert run(*line, *small, "--iters", 2, "--quantize", 4, "--group-size", 32).code == 0
    line = ["fuse", "--model", model, "--adapter", tmp_path / "run" / "adapter"]
    done = run(*line, "--out", tmp_path / "fused", "--precision", precision)
    assert done.code == 0, done.err
    assert "base: quantised to 4 bits in groups of 32, as for the adapter" in done.out
    mp.load(tmp_path / "fused")
    done = run(*line, "--out", tmp_path / "same")
    assert done.code == 1 and "it is quantised on loading to 4 bits" in done.err


def test_a_hub_id_is_resolved_once_at_its_revision(
    run: Any, model: Path, prepared: Path, trained: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[Any] = []

    def fetch(*given: Any) -> Path:
        asked.append(given)
        return model

    monkeypatch.setattr("mlx_medphi.model.hub._fetch", fetch)
    hub = ["--model", "clinic/phi", "--revision", "v1", "--offline"]
    line = ["fuse", *hub, "--adapter", trained / "adapter", "--out", tmp_path / "fused"]
    done = run(*line, "--data", prepared)
    assert done.code == 0, done.err
    line = ["adapter", "convert", trained / "adapter", tmp_path / "b.safetensors"]
    assert run(*line, *hub).code == 0
    assert asked == [("clinic/phi", "v1", True)] * 2
    done = run("adapter", "convert", trained / "adapter", tmp_path / "c", "--offline")
    assert done.code == 2 and "belong to the hub id of --model" in done.err


def test_a_conversion_replaces_only_when_told(run: Any, trained: Path, tmp_path: Path) -> None:
    line = ["adapter", "convert", trained / "adapter", tmp_path / "b.safetensors"]
    assert run(*line).code == 0
    done = run(*line)
    assert done.code == 1 and "holds an adapter already" in done.err
    assert run(*line, "--replace").code == 0


def test_inspect_says_what_is_stored(run: Any, trained: Path) -> None:
    done = run("adapter", "inspect", trained / "medical_changes.safetensors")
    assert "lora, rank 4, scale 2" in done.out
    assert "self_attn.qkv_proj, self_attn.o_proj, mlp.gate_up_proj, mlp.down_proj" in done.out
    told = json.loads(run("adapter", "inspect", trained / "adapter", "--json").out)
    assert told["rank"] == 4 and told["layers"] == [0, 1]
    assert told["bytes"] > 10_000


def test_convert_keeps_the_numbers(run: Any, trained: Path, tmp_path: Path) -> None:
    source, target = trained / "medical_changes.safetensors", tmp_path / "adapter"
    assert run("adapter", "convert", source, target).code == 0
    assert (target / "adapters.safetensors").is_file()
    assert (target / "adapter_model.safetensors").is_file()
    back = tmp_path / "back.safetensors"
    told = json.loads(run("adapter", "convert", target, back, "--json").out)
    assert told["weights_sha256"] == mp.adapter_info(source).weights_sha256


def test_diff_of_an_adapter_with_itself_is_no_difference(run: Any, trained: Path) -> None:
    same = run("adapter", "diff", trained / "adapter", trained / "adapter")
    assert same.out.splitlines()[1].split()[-1] == "1.0000"
    told = json.loads(
        run("adapter", "diff", trained / "adapter", trained / "adapter", "--json").out
    )
    assert told["cosine"] == pytest.approx(1.0) and len(told["layers"]) == 8


@pytest.mark.parametrize("content", [b"", b"\0" * 100], ids=["empty", "zeros"])
def test_a_damaged_adapter_is_one_line(run: Any, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(content)
    done = run("adapter", "inspect", path)
    assert done.code == 1 and done.err.count("\n") == 1
    assert "adapter.safetensors" in done.err
