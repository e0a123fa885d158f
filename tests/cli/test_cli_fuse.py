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
