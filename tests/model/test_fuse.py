"""A fused model says what the adapted one says, has the base's size, or is not written at all."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapter_cases import (
    MINI,
    PARITY,
    PHI3,
    SAME,
    adapted,
    base,
    ids,
    logits,
    reference_logits,
    rows,
    save_base,
)
from mlx.utils import tree_flatten

from mlx_medphi.errors import AdapterError, FuseError
from mlx_medphi.files import read_safetensors_header
from mlx_medphi.model import fuse_checks, fuse_plan, fuse_write, shards
from mlx_medphi.model.adapter import load_adapter, save_adapter
from mlx_medphi.model.adapter_formats import LowRank
from mlx_medphi.model.checkpoint import load
from mlx_medphi.model.delta import Tally
from mlx_medphi.model.fidelity import LIMITS, Fidelity, compare, reference
from mlx_medphi.model.fuse import fuse
from mlx_medphi.model.fuse_plan import Source, plan_files
from mlx_medphi.model.fuse_text import text_rows
from mlx_medphi.model.fuse_write import write_checkpoint
from mlx_medphi.model.lora import adapted_layers, adapted_weight
from mlx_medphi.model.phi3 import Phi3ForCausalLM
from mlx_medphi.model.shards import Piece, ShardSet, header_bytes
from mlx_medphi.model.weights import open_checkpoint

KINDS = ("lora", "rslora", "dora")
SCRIPT = Path(__file__).resolve().parents[1] / "fixtures" / "make_peft_roundtrip.py"
MLX_LM_IS_RIGHT = ("mini-4k", "gqa", "longrope-long")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def saved(tmp_path: Path, folder: Path = MINI, **config: Any) -> Path:
    """An adapter for a checkpoint, stored exactly."""
    how = config.pop("how", {})
    save_adapter(adapted(folder, how, **config), tmp_path / "adapter", dtype="float32")
    return tmp_path / "adapter"


def with_adapter(folder: Path, adapter: Path) -> Phi3ForCausalLM:
    model = base(folder)
    load_adapter(model, adapter)
    return model


def sharded(directory: Path, files: int = 3) -> Path:
    """mini-4k with its tensors dealt out to several files, as large checkpoints are."""
    shutil.copytree(MINI, directory, ignore=shutil.ignore_patterns("peft*", "reference*"))
    tensors: Any = mx.load(str(directory / "model.safetensors"))
    mx.eval(list(tensors.values()))
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i in range(files):
        name = f"model-{i + 1:05}-of-{files:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::files]}
        mx.save_safetensors(str(directory / name), part, {"format": "pt"})
        weight_map |= {key: name for key in part}
    index = {"metadata": {"total_size": 443648}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return directory


# --- faithful


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["fused", "fused.safetensors"])
def test_fused_logits_equal_adapted_logits(kind: str, name: str, tmp_path: Path) -> None:
    adapter = saved(tmp_path, fine_tune_type=kind)
    report = fuse(MINI, adapter, tmp_path / name, token_rows=rows())
    expected = logits(with_adapter(MINI, adapter))
    assert np.abs(expected - logits(base())).max() > 0.1
    np.testing.assert_allclose(logits(base(tmp_path / name)), expected, rtol=0, atol=SAME)
    assert report.fidelity.kl < 1e-11 and report.fidelity.top1 == report.fidelity.decided == 1
    assert report.fidelity.adapter_kl > 1e-3 and report.fidelity.positions == 96
    assert len(report.layers) == 8
    assert all(layer.relative > 0.01 and layer.cosine > 0.999999 for layer in report.layers)


@pytest.mark.parametrize("case", [0, 1, 2], ids=["lora", "rslora", "dora"])
def test_a_fused_peft_adapter_gives_pefts_logits(case: int, tmp_path: Path) -> None:
    folder = MINI / f"peft_{case}"
    fuse(MINI, folder, tmp_path / "fused", token_rows=rows())
    expected = reference_logits(folder / "reference.safetensors")
    np.testing.assert_allclose(logits(base(tmp_path / "fused")), expected, rtol=0, atol=PARITY)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("folder", MLX_LM_IS_RIGHT)
def test_mlx_lm_loads_the_fused_directory_with_our_logits(
    folder: str, kind: str, tmp_path: Path
) -> None:
    from mlx_lm.utils import load_model

    adapter = saved(tmp_path, PHI3 / folder, fine_tune_type=kind)
    tokens = ids(PHI3 / folder)
    fuse(PHI3 / folder, adapter, tmp_path / "fused", token_rows=tokens.tolist())
    theirs = load_model(tmp_path / "fused")[0]
    theirs.set_dtype(mx.float32)  # bfloat16 sums differ by their order
    expected = logits(base(tmp_path / "fused", dtype="float32"), tokens)
    np.testing.assert_allclose(np.array(theirs(tokens)), expected, rtol=0, atol=PARITY)


def test_transformers_loads_the_fused_directory_with_our_logits(tmp_path: Path) -> None:
    lacking = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if lacking:
        pytest.skip(f"{' and '.join(lacking)} not installed; mlx-lm's loader is tested instead")
    fuse(MINI, saved(tmp_path), tmp_path / "fused", token_rows=rows())
    out = tmp_path / "logits.safetensors"
    line = [sys.executable, str(SCRIPT), str(tmp_path / "fused"), "-", str(out)]
    subprocess.run(line, check=True, capture_output=True, cwd=SCRIPT.parents[2])
    expected = logits(base(tmp_path / "fused"))
    np.testing.assert_allclose(reference_logits(out), expected, rtol=0, atol=PARITY)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_sums_are_made_in_float32_and_rounded_once(kind: str, dtype: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", dtype=dtype)
    adapter = saved(tmp_path, folder, size=0.01, fine_tune_type=kind)
    fuse(folder, adapter, tmp_path / "fused", token_rows=rows())
    fused: Any = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    for name, layer in adapted_layers(with_adapter(folder, adapter)):
        stored = fused[f"{name}.weight"]
        assert np.array_equal(
            np.array(stored.astype(mx.float32)),
            np.array(layer.fused_weight().astype(stored.dtype).astype(mx.float32)),
        )
    if kind == "lora":
        # The old rule: a change rounded by itself, then a sum rounded again.
        change = (layer.scale * (layer.lora_a @ layer.lora_b).T).astype(stored.dtype)
        assert not mx.array_equal(stored, layer.linear.weight + change).item()


def test_an_adapter_of_nothing_leaves_every_byte(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", dtype="bfloat16")
    adapter = saved(tmp_path, folder, size=0.0)
    report = fuse(folder, adapter, tmp_path / "fused", token_rows=rows())
    name = "model.safetensors"
    assert (tmp_path / "fused" / name).read_bytes() == (folder / name).read_bytes()
    assert (report.fidelity.kl, report.fidelity.lost) == (0, 0)
    assert {(layer.relative, layer.cosine) for layer in report.layers} == {(0, 1)}


# --- what lies where


def test_every_file_has_the_size_of_the_bases(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "base")
    (folder / "LICENSE").write_text("MIT")
    (folder / "notes.txt").write_text("not part of the model")
    adapter = saved(tmp_path, folder, keys=["mlp.down_proj"])
    report = fuse(folder, adapter, tmp_path / "fused", token_rows=rows())
    before, after = contents(folder), contents(tmp_path / "fused")
    assert set(after) == set(before) - {"notes.txt"} | {"fuse_report.json"}
    for name, data in after.items():
        if name.endswith(".safetensors"):
            assert len(data) == len(before[name])
            end = 8 + int.from_bytes(data[:8], "little")
            assert data[:end] == before[name][:end]
        elif name != "fuse_report.json":
            assert data == before[name]
    assert report.same_size and report.base_bytes == report.fused_bytes == 443648
    old, new = (tensors_of(where) for where in (folder, tmp_path / "fused"))
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    np.testing.assert_allclose(
        logits(base(tmp_path / "fused")), logits(with_adapter(folder, adapter)), rtol=0, atol=SAME
    )


def tensors_of(folder: Path) -> dict[str, bytes]:
    """The stored bytes of every tensor of a checkpoint."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        header, data = read_safetensors_header(path), path.read_bytes()
        for name, info in header.tensors.items():
            found[name] = data[header.data_start + info.begin : header.data_start + info.end]
    return found


def test_base_and_adapter_are_only_read(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "base")
    adapter = saved(tmp_path, folder)
    for place in (folder, adapter):
        for file in place.iterdir():
            file.chmod(0o444)
    before = {name: hashlib.sha256(data).digest() for name, data in contents(tmp_path).items()}
    for name in ("a", "a.safetensors"):
        fuse(folder, adapter, tmp_path / "out" / name, token_rows=rows())
    after = {
        name: hashlib.sha256(data).digest()
        for name, data in contents(tmp_path).items()
        if not name.startswith("out/")
    }
    assert before == after


def test_the_report_lies_beside_the_weights_without_paths(tmp_path: Path) -> None:
    report = fuse(MINI, saved(tmp_path, scale=1.5), tmp_path / "fused", token_rows=rows())
    text = (tmp_path / "fused" / "fuse_report.json").read_text(encoding="utf-8")
    told = json.loads(text)
    assert str(tmp_path) not in text and str(MINI) not in text
    assert told == json.loads(json.dumps(report.to_dict()))
    assert (told["base"], told["stored"], told["out"]) == ("mini-4k", "float32", "fused")
    assert told["base_fingerprint"] == base().fingerprint
    assert told["adapter"]["scale"] == 1.5 and len(told["layers"]) == 8
    assert told["limits"]["kl"] == LIMITS["float32"].kl
    assert told["fidelity"]["kl"] == report.fidelity.kl


def test_one_file_describes_itself(tmp_path: Path) -> None:
    path = tmp_path / "fused.safetensors"
    report = fuse(sharded(tmp_path / "base"), MINI / "peft_0", path, token_rows=rows())
    header = read_safetensors_header(path)
    facts = header.metadata
    assert facts["config"] == (MINI / "config.json").read_text(encoding="utf-8")
    assert facts["generation_config"] == (MINI / "generation_config.json").read_text()
    digest = hashlib.sha256((MINI / "tokenizer.json").read_bytes()).hexdigest()
    assert facts["tokenizer_sha256"] == digest
    assert (facts["kind"], facts["base"], facts["precision"]) == ("medphi-fused", "base", "same")
    assert json.loads(facts["fidelity"])["kl"] == report.fidelity.kl
    assert json.loads(facts["adapter"])["weights_sha256"] == report.adapter.weights_sha256
    assert str(tmp_path) not in str(dict(facts))
    assert header.tensor_bytes == report.base_bytes == report.fused_bytes
    shutil.copyfile(MINI / "tokenizer.json", tmp_path / "tokenizer.json")
    shutil.copyfile(MINI / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    model, _ = load(path)
    expected = reference_logits(MINI / "peft_0" / "reference.safetensors")
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=PARITY)


def test_one_file_is_a_base_again(tmp_path: Path) -> None:
    first = tmp_path / "first.safetensors"
    fuse(MINI, MINI / "peft_0", first, token_rows=rows())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(MINI / name, tmp_path / name)
    (tmp_path / "LICENSE").write_text("of something else")
    fuse(first, MINI / "peft_1", tmp_path / "second", token_rows=rows())
    assert set(contents(tmp_path / "second")) == {
        "config.json", "fuse_report.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    model = base(first)
    load_adapter(model, MINI / "peft_1")
    expected = logits(model)
    np.testing.assert_allclose(logits(base(tmp_path / "second")), expected, rtol=0, atol=SAME)
    fuse(first, MINI / "peft_1", tmp_path / "third" / "x.safetensors", token_rows=rows())
    third = logits(base(tmp_path / "third" / "x.safetensors"))
    np.testing.assert_allclose(third, expected, rtol=0, atol=SAME)


def test_a_fuse_is_repeatable(tmp_path: Path) -> None:
    adapter = saved(tmp_path)
    for name in ("a", "b"):
        fuse(MINI, adapter, tmp_path / name, token_rows=rows())
    a, b = (tensors_of(tmp_path / name) for name in ("a", "b"))
    assert a == b


def test_progress_ends_with_all_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    fuse(
        MINI, saved(tmp_path), tmp_path / "fused", token_rows=rows(),
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == sorted(seen) and len(seen) > 10
    assert seen[-1] == (443648, 443648)


# --- other precisions


def quantised(directory: Path, bits: int = 4, scales: mx.Dtype | None = None) -> Path:
    return save_base(directory, quantize=(bits, 32), scales=scales)


def test_a_quantised_base_is_not_folded_into_its_own_grid(tmp_path: Path) -> None:
    folder = quantised(tmp_path / "base")
    with pytest.raises(FuseError) as caught:
        fuse(folder, saved(tmp_path, folder), tmp_path / "fused", token_rows=rows())
    message = str(caught.value)
    assert "is quantised to 4 bits" in message and "lose the training" in message
    assert all(way in message for way in ("Keep the adapter", "'8bit'", "'float16'"))
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize(
    ("kind", "bits", "name"),
    [
        ("lora", 4, "fused"),
        ("dora", 4, "fused.safetensors"),
        ("dora", 3, "fused"),
        ("lora", 6, "fused"),
        ("lora", 8, "fused"),
    ],
)
def test_a_quantised_base_unpacks_to_float16(
    kind: str, bits: int, name: str, tmp_path: Path
) -> None:
    folder = quantised(tmp_path / "base", bits)
    adapter = saved(tmp_path, folder, fine_tune_type=kind)
    report = fuse(folder, adapter, tmp_path / name, token_rows=rows(), precision="float16")
    again = base(tmp_path / name)
    assert again.config.quantization is None
    assert {array.dtype for _, array in tree_flatten(again.parameters())} == {mx.float16}
    assert report.fidelity.kl < 1e-5 and report.stored == "float16"
    assert report.fused_bytes == 443648 // 2
    raw = json.loads((tmp_path / name / "config.json").read_text()) if name == "fused" else {}
    assert raw.get("torch_dtype", "float16") == "float16" and "quantization" not in raw


@pytest.mark.parametrize(
    ("kind", "scales"),
    [("lora", mx.float32), ("dora", mx.bfloat16), ("lora", mx.float16)],
    ids=["float32", "bfloat16", "float16"],
)
@pytest.mark.slow
def test_only_changed_layers_of_a_quantised_base_go_to_8_bits(
    kind: str, scales: mx.Dtype, tmp_path: Path
) -> None:
    folder = quantised(tmp_path / "base", scales=scales)
    adapter = saved(
        tmp_path, folder, fine_tune_type=kind, num_layers=1,
        keys=["self_attn.qkv_proj", "mlp.down_proj"],
    )  # fmt: skip
    report = fuse(folder, adapter, tmp_path / "fused", token_rows=rows(), precision="8bit")
    touched = {f"model.layers.1.{key}" for key in ("self_attn.qkv_proj", "mlp.down_proj")}
    old, new = tensors_of(folder), tensors_of(tmp_path / "fused")
    assert {name.rsplit(".", 1)[0] for name in new if old[name] != new[name]} == touched
    assert {len(new[f"{name}.weight"]) / len(old[f"{name}.weight"]) for name in touched} == {2}
    model = base(tmp_path / "fused")
    assert model.config.quantization is not None
    assert {name: model.config.quantization.of(name) for name in touched} == dict.fromkeys(
        touched, (8, 32)
    )
    assert model.config.quantization.of("model.layers.0.mlp.down_proj") == (4, 32)
    # What the grid leaves: half a step of 1/255 of a group's range on each weight.
    assert all(layer.cosine > 0.99 and 0.98 < layer.kept < 1.02 for layer in report.layers)
    assert report.fidelity.kl < 1e-3


def test_mlx_lm_reads_the_mixed_bits(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    folder = quantised(tmp_path / "base")
    adapter = saved(tmp_path, folder, num_layers=1)
    fuse(folder, adapter, tmp_path / "fused", token_rows=rows(), precision="8bit")
    theirs, config = load_model(tmp_path / "fused")
    assert config["quantization"]["model.layers.1.mlp.down_proj"]["bits"] == 8
    assert theirs.layers[1].mlp.down_proj.bits == 8 and theirs.layers[0].mlp.down_proj.bits == 4
    expected = logits(base(tmp_path / "fused"))
    np.testing.assert_allclose(np.array(theirs(ids())), expected, rtol=0, atol=PARITY)


def test_8_bit_codes_belong_to_the_scales_that_are_stored() -> None:
    weight = 0.1 * mx.random.normal((64, 256), key=mx.random.key(0))

    def error(codes: mx.array, scales: mx.array, biases: mx.array) -> float:
        parts = (part.astype(mx.float32) for part in (scales, biases))
        kept = mx.dequantize(codes, *parts, 64, 8)  # type: ignore[call-arg,arg-type]
        return mx.square(kept - weight).mean().item() ** 0.5  # type: ignore[no-any-return]

    exact = error(*mx.quantize(weight, 64, 8))
    plain = mx.quantize(weight.astype(mx.bfloat16), 64, 8)
    ours = fuse_plan._quantize(weight, 64, mx.bfloat16)
    assert plain[1].dtype == ours[1].dtype == mx.bfloat16
    assert error(*ours) < 1.15 * exact
    assert error(*plain) > 1.3 * exact  # the library's codes are for scales it then rounds


def test_8_bit_codes_of_equal_weights_are_no_nonsense() -> None:
    for value in (0.0, 1e-9, 0.5):
        weight = mx.full((2, 64), value)
        codes, scales, biases = fuse_plan._quantize(weight, 64, mx.float16)
        kept = mx.dequantize(codes, scales, biases, 64, 8)
        np.testing.assert_allclose(np.array(kept), value, rtol=0, atol=1e-6)


def test_a_plain_base_goes_to_float16_whole(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "base")
    adapter = saved(tmp_path, folder)
    report = fuse(folder, adapter, tmp_path / "fused", token_rows=rows(), precision="float16")
    assert (report.fused_bytes, report.same_size) == (443648 // 2, False)
    index = json.loads((tmp_path / "fused" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 443648 // 2
    again = base(tmp_path / "fused")
    assert {array.dtype for _, array in tree_flatten(again.parameters())} == {mx.float16}
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["torch_dtype"] == "float16"


def test_shards_of_an_unpacked_base_are_listed_anew(tmp_path: Path) -> None:
    folder = quantised(tmp_path / "base")
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    mx.eval(list(tensors.values()))
    (folder / "model.safetensors").unlink()
    # The worst case: codes, scales and biases of a layer in three files.
    parts: dict[str, dict[str, mx.array]] = {"a": {}, "b": {}, "c": {}}
    for name, array in tensors.items():
        parts[{"scales": "b", "biases": "c"}.get(name.rsplit(".", 1)[1], "a")][name] = array
    weight_map = {}
    for letter, part in parts.items():
        mx.save_safetensors(str(folder / f"{letter}.safetensors"), part, {"format": "mlx"})
        weight_map |= {name: f"{letter}.safetensors" for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    adapter = saved(tmp_path, folder)
    for precision in ("float16", "8bit"):
        out = tmp_path / precision
        fuse(folder, adapter, out, token_rows=rows(), precision=precision)  # type: ignore[arg-type]
        expected = logits(with_adapter(folder, adapter))
        assert np.abs(logits(base(out)) - expected).max() < 0.05
    assert not (tmp_path / "float16" / "b.safetensors").exists()


def test_a_weight_beyond_float16_is_named(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1e5
    mx.eval(list(tensors.values()))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    adapter = saved(tmp_path, folder)
    with pytest.raises(FuseError, match=r"model.norm.weight: holds 144079, beyond what float16"):
        fuse(folder, adapter, tmp_path / "fused", token_rows=rows(), precision="float16")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("8bit", "no layers to lift to 8 bits"),
        ("4bit", "expected one of 'same', 'float16', '8bit'"),
    ],
)
def test_a_precision_that_does_not_go_with_the_base(
    precision: Any, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(FuseError, match=expected):
        fuse(MINI, MINI / "peft_0", tmp_path / "f", token_rows=rows(), precision=precision)


# --- the measure


def test_fidelity_is_kl_and_agreement() -> None:
    model, other = adapted(), adapted(size=0.1)
    p, q = (log_probs(logits(m)) for m in (model, other))
    z = log_probs(logits(base()))
    kept = reference(model, rows())
    found = compare(kept, other)
    same = p.argmax(-1) == q.argmax(-1)
    gap = np.sort(p, axis=-1)
    decided = gap[..., -1] - gap[..., -2] >= 0.5
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-6)
    assert found.adapter_kl == pytest.approx((np.exp(p) * (p - z)).sum(-1).mean(), rel=1e-4)
    assert (found.top1, found.decided) == (same.mean(), same[decided].mean())
    assert 0.2 < found.top1 < found.decided < 1
    assert found.lost == pytest.approx(found.kl / found.adapter_kl)


def log_probs(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = values.astype(np.float64) - values.max(axis=-1, keepdims=True)
    result: np.ndarray[Any, Any] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def test_the_measured_tokens_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_medphi.model.fidelity.MAX_POSITIONS", 60)
    kept = reference(adapted(), [[], *rows()])
    assert [len(row) for row in kept.rows] == [48, 12]


@pytest.mark.parametrize(
    ("figures", "missed"),
    [
        ({}, ""),
        ({"kl": 2e-2}, "KL 0.02"),
        ({"kl": float("nan")}, "KL nan"),
        ({"kl": 5e-3, "adapter_kl": 1e-2}, "50.0% of the training lost"),
        ({"kl": 9e-4, "adapter_kl": 1e-3}, ""),  # the dtype's own noise, and the weights are right
        ({"kl": 9e-4, "adapter_kl": 1e-3, "cosine": 0.8}, "stored with cosine 0.80"),
        ({"kl": 9e-4, "cosine": 0.8}, ""),  # the tokens tell that little was lost
        ({"decided": 0.98}, "98.0% of the decided positions"),
        ({"top1": 0.5}, ""),  # near ties say nothing
    ],
)
def test_each_limit_refuses(figures: dict[str, float], missed: str) -> None:
    good = {"kl": 1e-4, "top1": 1.0, "decided": 1.0, "adapter_kl": 1.0, "cosine": 0.95}
    given = {**good, **figures}
    cosine = given.pop("cosine")
    found = Fidelity(**given, positions=10).misses(LIMITS["bfloat16"], cosine)
    assert bool(found) == bool(missed) and missed in " ".join(found)


def test_a_fuse_that_loses_the_training_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(weight: mx.array, *_: Any) -> mx.array:
        return weight

    monkeypatch.setattr(fuse_plan, "adapted_weight", lost)
    adapter = saved(tmp_path)
    before = contents(tmp_path)
    for name in ("fused", "fused.safetensors"):
        with pytest.raises(FuseError, match=r"100.0% of the training lost .*nothing was written"):
            fuse(MINI, adapter, tmp_path / name, token_rows=rows())
    assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == 1


def test_the_4_bit_grid_is_refused_by_measure_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounded(*given: Any) -> mx.array:
        return mx.dequantize(*mx.quantize(adapted_weight(*given), 32, 4), 32, 4)

    folder = quantised(tmp_path / "base")
    adapter = saved(tmp_path, folder, size=0.005)
    fuse(folder, adapter, tmp_path / "good", token_rows=rows(), precision="float16")
    monkeypatch.setattr(fuse_plan, "adapted_weight", rounded)
    with pytest.raises(FuseError, match="the fused model is not the adapted one on 96 tokens"):
        fuse(folder, adapter, tmp_path / "bad", token_rows=rows(), precision="float16")


def test_a_weak_training_is_not_stored_in_8_bits(tmp_path: Path) -> None:
    folder = quantised(tmp_path / "base")
    adapter = saved(tmp_path, folder, size=0.002)
    with pytest.raises(FuseError, match=r"stored with cosine 0\.\d+ .*'float16'"):
        fuse(folder, adapter, tmp_path / "a", token_rows=rows(), precision="8bit")
    report = fuse(folder, adapter, tmp_path / "b", token_rows=rows(), precision="float16")
    assert report.change.cosine > 0.99 and report.change.relative < 0.01


@pytest.mark.slow
def test_text_is_found_for_every_base(each_folder: Path, tmp_path: Path) -> None:
    found = text_rows(each_folder)
    limit = base(each_folder).config.max_position_embeddings
    assert len(found) == 24 and all(0 < len(row) <= limit for row in found)
    save_adapter(adapted(each_folder, size=0.05), tmp_path / "adapter")
    report = fuse(each_folder, tmp_path / "adapter", tmp_path / "fused")
    assert report.fidelity.positions == 1024 and report.fidelity.decided == 1


def test_no_text_is_no_measure() -> None:
    with pytest.raises(FuseError, match="no examples were given"):
        text_rows(MINI, [])


def test_a_half_precision_base_is_judged_by_its_own_precision(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", dtype="bfloat16")
    adapter = saved(tmp_path, folder)
    report = fuse(folder, adapter, tmp_path / "f", token_rows=rows(), precision="float16")
    assert (report.stored, report.limits) == ("float16", LIMITS["bfloat16"])


@pytest.mark.parametrize("found", [[], [[]], [[5, 320]], [[-1]]])
def test_tokens_that_are_none_are_refused(found: list[list[int]], tmp_path: Path) -> None:
    with pytest.raises(FuseError, match="measured on real tokens"):
        fuse(MINI, MINI / "peft_0", tmp_path / "fused", token_rows=found)


# --- places and disks


def test_an_adapter_for_another_base_writes_nothing(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", dtype="float16")
    with pytest.raises(AdapterError, match="base fingerprint"):
        fuse(folder, saved(tmp_path), tmp_path / "fused", token_rows=rows())
    assert not (tmp_path / "fused").exists()
    fuse(folder, tmp_path / "adapter", tmp_path / "f", token_rows=rows(), allow_other_base=True)


@pytest.mark.parametrize("name", ["fused", "fused.safetensors"])
def test_an_existing_output_is_replaced_on_request_only(name: str, tmp_path: Path) -> None:
    out = tmp_path / name
    fuse(MINI, MINI / "peft_0", out, token_rows=rows())
    before = contents(tmp_path)
    with pytest.raises(FuseError, match="exists already"):
        fuse(MINI, MINI / "peft_1", out, token_rows=rows())
    assert contents(tmp_path) == before
    fuse(MINI, MINI / "peft_1", out, token_rows=rows(), replace=True)
    expected = reference_logits(MINI / "peft_1" / "reference.safetensors")
    np.testing.assert_allclose(logits(base(out)), expected, rtol=0, atol=PARITY)


def test_only_what_fuse_made_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.docx").write_bytes(b"x")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    fuse(MINI, MINI / "peft_0", tmp_path / "mixed", token_rows=rows())
    (tmp_path / "mixed" / "mine.txt").write_text("mine")
    (tmp_path / "other.safetensors").write_bytes((MINI / "model.safetensors").read_bytes())
    cases = {
        "documents": "not a fused model",
        "mixed": "holds mine.txt, which fuse did not write",
        "other.safetensors": "is not a model that fuse wrote",
        "folder.safetensors": "is a directory",
        "file": "a file",
    }
    before = contents(tmp_path)
    for name, expected in cases.items():
        with pytest.raises(FuseError, match=expected):
            fuse(MINI, MINI / "peft_0", tmp_path / name, token_rows=rows(), replace=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "out", ["base", "base/fused", "base/model.safetensors", ".", "adapter", "link", "link/x"]
)
def test_base_and_adapter_are_never_an_output(out: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    adapter = saved(tmp_path, folder)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "fuse_report.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(FuseError, match="overlaps the"):
        fuse(folder, adapter, tmp_path / out, token_rows=rows(), replace=True)
    assert contents(tmp_path) == before


def test_a_disk_without_room_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fuse_checks.shutil, "disk_usage", lambda _: usage(10, 10, 1000))
    with pytest.raises(FuseError, match=r"needs 0.02 GB, .* has 0.00 GB free"):
        fuse(MINI, MINI / "peft_0", tmp_path / "deep" / "fused", token_rows=rows())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["fused", "fused.safetensors"])
def test_a_disk_that_fills_up_in_the_middle_leaves_the_old_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse(MINI, MINI / "peft_0", tmp_path / name, token_rows=rows())
    before = contents(tmp_path)
    original = fuse_write._Watch.over

    def full(self: Any, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for i, piece in enumerate(original(self, pieces)):  # type: ignore[arg-type]
            if i == 5:
                raise OSError(errno.ENOSPC, "No space left on device")
            yield piece

    monkeypatch.setattr(fuse_write._Watch, "over", full)
    with pytest.raises(FuseError, match="No space left on device.*what was there is unchanged"):
        fuse(MINI, MINI / "peft_1", tmp_path / name, token_rows=rows(), replace=True)
    assert contents(tmp_path) == before


# --- memory


def large_base(directory: Path, bits: int | None) -> Path:
    """A Phi-3 of random numbers, 20 MB in bfloat16."""
    directory.mkdir()
    raw = json.loads((MINI / "config.json").read_text(encoding="utf-8"))
    raw |= {"hidden_size": 512, "intermediate_size": 1344, "vocab_size": 640}
    raw |= {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 3}
    if bits:
        raw["quantization"] = {"group_size": 64, "bits": bits}
    (directory / "config.json").write_text(json.dumps(raw))
    config = {k: v for k, v in raw.items() if k != "quantization"}
    model = Phi3ForCausalLM(base().config.from_hf(config))
    if bits:
        import mlx.nn as nn

        nn.quantize(model, 64, bits)
    model.set_dtype(mx.bfloat16)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    return directory


@pytest.mark.parametrize(
    ("bits", "precision"), [(None, "same"), (None, "float16"), (4, "float16"), (4, "8bit")]
)
def test_blocks_of_rows_give_the_bytes_of_whole_weights(
    bits: int | None, precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantised(tmp_path / "base", bits) if bits else MINI
    adapter = saved(tmp_path, folder, fine_tune_type="dora")
    fuse(folder, adapter, tmp_path / "whole", token_rows=rows(), precision=precision)
    monkeypatch.setattr(shards, "BLOCK_ELEMENTS", 7 * 64)
    monkeypatch.setattr(shards, "COPY_BYTES", 1000)
    fuse(folder, adapter, tmp_path / "blocks", token_rows=rows(), precision=precision)
    whole, blocks = (tensors_of(tmp_path / name) for name in ("whole", "blocks"))
    assert whole.keys() == blocks.keys()
    # Products of other shapes may round their last bit otherwise, and a code with it.
    model, other = (base(tmp_path / name) for name in ("whole", "blocks"))
    np.testing.assert_allclose(logits(model), logits(other), rtol=0, atol=2e-3)
    differ = sum(x != y for name in whole for x, y in zip(whole[name], blocks[name], strict=True))
    assert differ < 0.001 * sum(map(len, whole.values()))


@pytest.mark.parametrize(
    ("bits", "precision"), [(None, "same"), (None, "float16"), (4, "float16"), (4, "8bit")]
)
def test_writing_needs_the_memory_of_a_block_not_of_the_model(
    bits: int | None, precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = large_base(tmp_path / "base", bits)
    monkeypatch.setattr(shards, "BLOCK_ELEMENTS", 1 << 15)
    monkeypatch.setattr(shards, "COPY_BYTES", 1 << 16)
    checkpoint = open_checkpoint(folder)
    changes = {
        name: LowRank(mx.ones((inputs, 2)), mx.ones((2, outputs)))
        for name, (outputs, inputs) in (
            ("model.layers.0.self_attn.qkv_proj", (1536, 512)),
            ("model.layers.1.mlp.gate_up_proj", (2688, 512)),
            ("model.layers.2.mlp.down_proj", (512, 1344)),
        )
    }
    mx.eval([change.arrays for change in changes.values()])
    tallies = {name: Tally(name) for name in changes}
    source = Source(checkpoint, ShardSet(checkpoint.files), changes, 0.01, tallies)
    files = plan_files(source, precision)
    (tmp_path / "out").mkdir()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    write_checkpoint(source, files, precision, tmp_path / "out", None, {})
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Blocks of 32,768 numbers: some float32 copies of one, 128 kB each, and their bytes. A layer's
    # 8-bit scales and biases wait for its codes, 86 kB. The model has 9.7 million numbers.
    assert mx.get_peak_memory() - before < 3e6
    assert python < 2e6
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) > 7e6


def test_the_adapted_model_is_gone_before_the_fused_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = large_base(tmp_path / "base", None)
    monkeypatch.setattr(shards, "BLOCK_ELEMENTS", 1 << 15)
    adapter = saved(tmp_path, folder, num_layers=1)
    size = read_safetensors_header(folder / "model.safetensors").tensor_bytes
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    fuse(folder, adapter, tmp_path / "fused", token_rows=[[1, 2, 3]])
    # One model and what a forward pass and a block need.
    assert mx.get_peak_memory() - before < 1.5 * size


# --- the header


def test_a_header_can_be_completed_in_place() -> None:
    specs = [shards.TensorSpec("a", "F32", (2, 2))]
    short = header_bytes(specs, {"x": "1"}, 200)
    full = header_bytes(specs, {"x": "1", "y": "2" * 50}, 200)
    assert len(short) == len(full) == 200
    assert len(header_bytes(specs, {})) % 8 == 0


def test_an_adapter_with_many_facts_fits_the_header_of_one_file(tmp_path: Path) -> None:
    facts = {f"fact {i}": "x" * 100 for i in range(300)}
    save_adapter(adapted(), tmp_path / "adapter", training=facts)
    report = fuse(MINI, tmp_path / "adapter", tmp_path / "f.safetensors", token_rows=rows())
    told = read_safetensors_header(tmp_path / "f.safetensors").metadata
    assert json.loads(told["adapter"])["training"] == facts
    assert json.loads(told["fidelity"])["kl"] == report.fidelity.kl
    assert json.loads(told["seconds"]) == report.seconds > 0


@pytest.mark.parametrize("name", ["fused", "fused.safetensors"])
def test_what_another_program_wrote_meanwhile_is_not_replaced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, out = saved(tmp_path), tmp_path / name

    def meanwhile(*given: Any) -> Fidelity:
        out.mkdir()
        return compare(*given)

    monkeypatch.setattr("mlx_medphi.model.fuse.compare", meanwhile)
    with pytest.raises(FuseError, match="made by another program meanwhile"):
        fuse(MINI, adapter, out, token_rows=rows())
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", name}
    assert not list(out.iterdir())
