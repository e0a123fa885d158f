"""Adapters saved, loaded, inspected, converted; whatever does not fit is refused and named."""

from __future__ import annotations

import errno
import json
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapter_cases import MINI, SAME, adapted, base, fill, ids, logits, save_base
from mlx.utils import tree_flatten

from mlx_medphi import __version__
from mlx_medphi.config import LoRAConfig
from mlx_medphi.errors import AdapterError
from mlx_medphi.files import read_safetensors_header
from mlx_medphi.model import adapter_write
from mlx_medphi.model.adapter import adapter_info, convert_adapter, load_adapter, save_adapter
from mlx_medphi.model.adapter_formats import base_label
from mlx_medphi.model.lora import adapted_layers, apply_lora
from mlx_medphi.model.phi3 import Phi3ForCausalLM

KINDS = ("lora", "rslora", "dora")
# float16 factors: each is rounded by at most 2^-11, and logits moved by about 3 follow by less
# than a thousandth of that.
HALF = 3e-3


@contextmanager
def only(size: int) -> Iterator[None]:
    """Files can grow to `size` bytes and no further, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def patched(file: Path, change: Any) -> None:
    """Change the header of a safetensors file and leave its data."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["own.safetensors", "directory"])
@pytest.mark.parametrize("how", [{}, {"quantize": (4, 32)}], ids=["plain", "4bit"])
def test_a_saved_adapter_comes_back_bit_for_bit(
    kind: str, name: str, how: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(how=how, fine_tune_type=kind)
    save_adapter(model, tmp_path / name, dtype="float32")
    again = base(**how)
    load_adapter(again, tmp_path / name)
    assert np.array_equal(logits(again), logits(model))
    found, expected = (dict(tree_flatten(m.trainable_parameters())) for m in (again, model))
    assert found.keys() == expected.keys() and len(found) >= 16
    assert {array.dtype for array in found.values()} == {mx.float32}


def test_a_file_holds_half_precision_and_a_directory_single(tmp_path: Path) -> None:
    model = adapted()
    file = save_adapter(model, tmp_path / "a.safetensors")
    folder = save_adapter(model, tmp_path / "a")
    assert (file.dtypes, folder.dtypes) == (("float16",), ("float32",))
    again = base()
    load_adapter(again, file.path)
    difference = np.abs(logits(again) - logits(model)).max()
    assert 0 < difference < HALF
    # Training goes on from here, in single precision whatever was stored.
    assert {a.dtype for _, a in tree_flatten(again.trainable_parameters())} == {mx.float32}
    # 50.3 MB for rank 16 on Phi-3-mini: two bytes for each number, and one short header.
    assert read_safetensors_header(file.path).tensor_bytes == 2 * file.parameters
    assert file.bytes - 2 * file.parameters < 4096


def test_dora_magnitudes_stay_single(tmp_path: Path) -> None:
    info = save_adapter(adapted(fine_tune_type="dora"), tmp_path / "a.safetensors")
    stored = read_safetensors_header(info.path).tensors
    assert {t.dtype for name, t in stored.items() if name.endswith(".m")} == {"F32"}
    assert {t.dtype for name, t in stored.items() if "lora" in name} == {"F16"}


def test_the_single_file_describes_itself(tmp_path: Path) -> None:
    path = tmp_path / "medical_changes.safetensors"
    model = adapted(rank=4, scale=1.5, dropout=0.1, num_layers=1, keys=["mlp.down_proj"])
    save_adapter(model, path, training={"iters": 7, "data": "abc"})
    header = read_safetensors_header(path)
    assert sorted(header.tensors) == [
        "model.layers.1.mlp.down_proj.lora_a",
        "model.layers.1.mlp.down_proj.lora_b",
    ]
    assert header.tensors["model.layers.1.mlp.down_proj.lora_a"].shape == (96, 4)
    facts = dict(header.metadata)
    assert re.fullmatch("[0-9a-f]{64}", facts.pop("weights_sha256"))
    assert facts == {
        "format": "medphi-adapter",
        "version": "1",
        "fine_tune_type": "lora",
        "rank": "4",
        "scale": "1.5",
        "alpha": "6.0",
        "dropout": "0.1",
        "keys": '["mlp.down_proj"]',
        "layers": "[1]",
        "num_layers": "1",
        "model_layers": "2",
        "tensors": "2",
        "base_name": "mini-4k",
        "base_fingerprint": model.fingerprint,
        "base_quantization": "null",
        "package_version": __version__,
        "training": '{"data": "abc", "iters": 7}',
    }


def test_the_info_tells_what_is_stored(tmp_path: Path) -> None:
    model = adapted(how={"quantize": (4, 32)}, fine_tune_type="dora")
    save_adapter(model, tmp_path / "a", training={"iters": 7})
    info = adapter_info(tmp_path / "a")
    assert (info.form, info.fine_tune_type) == ("mlx-lm and PEFT directory", "dora")
    assert (info.rank, info.scale, info.alpha, info.num_layers) == (4, 2.0, 8.0, 2)
    assert (info.layers, len(info.keys), info.tensors) == ((0, 1), 4, 24)
    trainable = tree_flatten(model.trainable_parameters())
    assert info.parameters == sum(array.size for _, array in trainable)
    assert info.bytes == sum(len(data) for data in contents(tmp_path / "a").values())
    assert info.base_fingerprint == model.fingerprint and info.base_fingerprint.endswith("-q4g32")
    assert info.base_quantization is not None and info.base_quantization["bits"] == 4
    assert (info.package_version, info.training) == (__version__, {"iters": 7})


def test_the_same_numbers_have_the_same_hash_in_every_form(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    there = convert_adapter(tmp_path / "a", tmp_path / "b.safetensors")
    back = convert_adapter(there.path, tmp_path / "c")
    hashes = {adapter_info(path).weights_sha256 for path in (tmp_path / "a", there.path, back.path)}
    assert len(hashes) == 1
    assert contents(tmp_path / "a") == contents(tmp_path / "c")


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    directory = save_base(tmp_path / "base")
    model = base(directory)
    apply_lora(model, LoRAConfig(rank=2))
    save_adapter(fill(model), tmp_path / "a")
    save_adapter(model, tmp_path / "a.safetensors")
    for data in contents(tmp_path / "a").values():
        assert str(tmp_path).encode() not in data
    assert str(tmp_path).encode() not in (tmp_path / "a.safetensors").read_bytes()
    assert adapter_info(tmp_path / "a").base_name == "base"


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("/home/x/models/phi-3-mini", "phi-3-mini"),
        ("microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct"),
        ("/c/hub/models--microsoft--Phi-3-mini/snapshots/abc", "microsoft/Phi-3-mini"),
        ("./phi", "phi"),
        (None, None),
        ("", None),
    ],
)
def test_a_base_is_named_by_its_hub_id_or_its_folder(name: str | None, label: str | None) -> None:
    assert base_label(name) == label


# --- refusals


def test_an_adapter_of_another_base_is_refused_and_taken_on_request(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a.safetensors", dtype="float32")
    other = base(save_base(tmp_path / "other", dtype="bfloat16"), dtype="float32")
    before = logits(other)
    with pytest.raises(AdapterError, match="base fingerprint") as caught:
        load_adapter(other, tmp_path / "a.safetensors")
    assert "trained on mini-4k" in str(caught.value)
    assert "allow_other_base=True" in str(caught.value)
    assert np.array_equal(logits(other), before)
    assert next(adapted_layers(other), None) is None
    load_adapter(other, tmp_path / "a.safetensors", allow_other_base=True)
    assert np.abs(logits(other) - before).max() > 0.1


def test_an_adapter_belongs_to_one_quantisation(tmp_path: Path) -> None:
    save_adapter(adapted(how={"quantize": (4, 32)}), tmp_path / "a")
    with pytest.raises(AdapterError, match="4 bits in groups of 32, this model is not quantised"):
        load_adapter(base(), tmp_path / "a")
    with pytest.raises(AdapterError, match="this model is 8 bits in groups of 64"):
        load_adapter(base(quantize=(8, 64)), tmp_path / "a")


def test_a_base_that_does_not_say_who_it_is_takes_what_fits(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    model = base()
    model.fingerprint = ""
    load_adapter(model, tmp_path / "a")


def test_an_adapter_of_another_shape_lists_every_tensor_up_to_ten(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    config = replace(base().config, hidden_size=128, head_dim=32, intermediate_size=160)
    other = Phi3ForCausalLM(config)
    before = logits(other)
    with pytest.raises(AdapterError) as caught:
        load_adapter(other, tmp_path / "a", allow_other_base=True)
    lines = str(caught.value).splitlines()
    assert re.search(r"a does not fit this model \(\d+ differences\):", lines[0])
    shown = [line for line in lines if "model expects" in line]
    assert len(shown) == 10 and shown == sorted(shown)
    assert re.search(r"down_proj.lora_a: shape \(96, 4\), model expects \(160, 4\)", shown[0])
    assert lines[-1].startswith("  … and ") and "trained on mini-4k: load that base" in lines[-1]
    assert np.array_equal(logits(other), before)


def test_more_blocks_than_the_model_has_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(adapted(), path)
    tensors: Any = mx.load(str(path))
    moved = {name.replace("layers.1.", "layers.7."): array for name, array in tensors.items()}
    settings = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    folder = tmp_path / "moved"
    folder.mkdir()
    kept = {name: array for name, array in moved.items() if "layers.7." in name}
    mx.save_safetensors(str(folder / "adapters.safetensors"), kept)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="layers.7.mlp.down_proj: this model has blocks 0 to 1"):
        load_adapter(base(), folder)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rank": 8}, "rank: 4, the model's adapter has 8"),
        ({"scale": 3.0}, "scale: 2.0, the model's adapter has 3.0"),
        ({"fine_tune_type": "dora"}, "fine_tune_type: lora, the model's adapter has dora"),
        ({"keys": ["mlp.down_proj"]}, "layers.0.mlp.gate_up_proj: not adapted in this model"),
    ],
)
def test_an_adapter_of_another_form_than_the_models_is_refused(
    config: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    save_adapter(adapted(), tmp_path / "a")
    model = adapted(**config)
    before = logits(model)
    with pytest.raises(AdapterError, match=re.escape(expected)):
        load_adapter(model, tmp_path / "a")
    assert np.array_equal(logits(model), before)


def test_a_model_with_an_adapter_of_the_same_form_gets_the_new_values(tmp_path: Path) -> None:
    first = adapted()
    save_adapter(first, tmp_path / "a")
    model = fill(adapted(), seed=8)
    compiled = mx.compile(lambda tokens: model(tokens), inputs=model.state)
    assert np.abs(np.array(compiled(ids())) - logits(first)).max() > 0.1
    load_adapter(model, tmp_path / "a")
    np.testing.assert_allclose(np.array(compiled(ids())), logits(first), rtol=0, atol=SAME)


def test_a_loaded_adapter_can_be_trained_on(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    model = base()
    load_adapter(model, tmp_path / "a")
    names = {name.rsplit(".", 1)[-1] for name, _ in tree_flatten(model.trainable_parameters())}
    assert names == {"lora_a", "lora_b"}


@pytest.mark.parametrize("keep", [4, 300, -1])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(adapted(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        load_adapter(base(), path)


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_model.safetensors"])
def test_a_truncated_file_of_a_directory_is_refused(name: str, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    file = tmp_path / "a" / name
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(AdapterError, match=f"{name}: not a whole safetensors file"):
        load_adapter(base(), tmp_path / "a")


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(adapted(), path)
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterError, match="not those it was written with: the file is damaged"):
        load_adapter(base(), path)


@pytest.mark.parametrize("part", ["lora_a", "lora_b", "m"])
def test_a_tensor_taken_out_is_named(part: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(adapted(fine_tune_type="dora"), path)
    tensors: Any = mx.load(str(path))
    lost = f"model.layers.0.mlp.down_proj.{part}"
    del tensors[lost]
    facts = dict(read_safetensors_header(path).metadata)
    mx.save_safetensors(str(path), tensors, facts)
    with pytest.raises(AdapterError, match=f"{lost}: missing"):
        adapter_info(path)


def test_a_layer_taken_out_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(adapted(), path)
    tensors: Any = mx.load(str(path))
    kept = {name: array for name, array in tensors.items() if "layers.0.mlp.down" not in name}
    mx.save_safetensors(str(path), kept, dict(read_safetensors_header(path).metadata))
    with pytest.raises(AdapterError, match="14 tensors, its metadata says 16"):
        adapter_info(path)


def test_values_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(adapted(), path)
    tensors: Any = mx.load(str(path))
    bad = "model.layers.1.self_attn.o_proj.lora_b"
    tensors[bad] = tensors[bad] * float("nan")
    mx.save_safetensors(str(path), tensors, dict(read_safetensors_header(path).metadata))
    with pytest.raises(AdapterError, match=f"{bad}: holds values that are not finite"):
        load_adapter(base(), path)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("format", "pt", "its metadata does not say rank and scale"),
        ("version", "2", "written in version 2 of its format"),
        ("rank", "eight", "metadata is incomplete or malformed"),
        ("rank", '"8"', "rank is '8'"),
        ("rank", "5", r"shape \(64, 4\), expected \(in, 5\)"),
        ("scale", "-1", "scale is -1"),
        ("scale", "5", r"scale is 5, alpha / rank is"),
        ("layers", "3", "metadata is incomplete or malformed"),
        ("training", "null", "metadata is incomplete or malformed"),
        ("base_quantization", "[]", "metadata is incomplete or malformed"),
        ("fine_tune_type", "zzz", "metadata is incomplete or malformed"),
        ("weights_sha256", "00", "the file is damaged"),
    ],
)
def test_wrong_facts_are_refused(key: str, value: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(adapted(), path)
    patched(path, lambda header: header["__metadata__"].update({key: value}))
    with pytest.raises(AdapterError, match=expected):
        load_adapter(base(), path)


def test_a_dtype_that_is_no_adapters_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(adapted(), path)
    patched(path, lambda h: h["model.layers.0.mlp.down_proj.lora_a"].update(dtype="I16"))
    with pytest.raises(AdapterError, match="down_proj.lora_a: dtype I16, expected one of F32"):
        adapter_info(path)


def test_what_is_no_adapter_says_so(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such file or directory"):
        adapter_info(tmp_path / "none")
    with pytest.raises(AdapterError, match="holds no adapter_config.json"):
        adapter_info(tmp_path)
    save_adapter(adapted(), tmp_path / "run" / "adapter")
    with pytest.raises(AdapterError, match=r"did you mean .*run/adapter\?"):
        adapter_info(tmp_path / "run")
    with pytest.raises(AdapterError, match="give the directory"):
        adapter_info(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    (tmp_path / "run" / "adapter" / "adapters.safetensors").unlink()
    adapter_info(tmp_path / "run" / "adapter")  # PEFT's copy is left
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="adapter_model.safetensors: cannot be read"):
        adapter_info(tmp_path / "run" / "adapter")


@pytest.mark.parametrize("name", ["a.safetensors", "a"])
def test_a_file_without_tensors_is_no_adapter(name: str, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / name)
    file = tmp_path / name if name != "a" else tmp_path / "a" / "adapters.safetensors"
    facts = dict(read_safetensors_header(file).metadata) if name != "a" else {"format": "mlx"}
    mx.save_safetensors(str(file), {}, facts)
    with pytest.raises(AdapterError, match="holds no tensors"):
        adapter_info(tmp_path / name)


# --- saving


def test_a_model_without_adapter_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nothing to save"):
        save_adapter(base(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (1e6, "float16")])
@pytest.mark.parametrize("name", ["a.safetensors", "a"])
def test_values_that_cannot_be_stored_are_refused(
    value: float, dtype: str, name: str, tmp_path: Path
) -> None:
    model = adapted()
    save_adapter(model, tmp_path / name)
    before = contents(tmp_path)
    layer = dict(adapted_layers(model))["model.layers.1.mlp.down_proj"]
    layer.lora_b[0, 0] = value
    with pytest.raises(
        AdapterError, match=f"down_proj holds values that are not finite in {dtype}"
    ):
        save_adapter(model, tmp_path / name, dtype=dtype)
    assert contents(tmp_path) == before


def test_an_unknown_dtype_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="'float16', 'bfloat16' or 'float32'"):
        save_adapter(adapted(), tmp_path / "a", dtype="int8")


def test_bfloat16_is_stored_and_read(tmp_path: Path) -> None:
    model, again = adapted(), base()
    save_adapter(model, tmp_path / "a.safetensors", dtype="bfloat16")
    assert load_adapter(again, tmp_path / "a.safetensors").dtypes == ("bfloat16",)
    assert 0 < np.abs(logits(again) - logits(model)).max() < 8 * HALF


@pytest.mark.parametrize("name", ["a.safetensors", "a"])
def test_a_full_disk_leaves_the_old_adapter(name: str, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / name)
    before = contents(tmp_path)
    with only(8192), pytest.raises(AdapterError, match="cannot be written .*is unchanged"):
        save_adapter(fill(adapted(), seed=5), tmp_path / name)
    assert contents(tmp_path) == before


def test_a_writer_that_fails_at_the_last_file_leaves_the_old_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(adapted(), tmp_path / "a")
    before = contents(tmp_path)

    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapter_write, "write_json", full)
    with pytest.raises(AdapterError, match="No space left on device"):
        save_adapter(fill(adapted(), seed=5), tmp_path / "a")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["a.safetensors", "a"])
def test_an_older_adapter_is_replaced(name: str, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / name)
    model = fill(adapted(), seed=5)
    save_adapter(model, tmp_path / name, dtype="float32")
    again = base()
    load_adapter(again, tmp_path / name)
    assert np.array_equal(logits(again), logits(model))


def test_a_directory_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.docx").write_bytes(b"x")
    with pytest.raises(AdapterError, match="thesis.docx"):
        save_adapter(adapted(), tmp_path / "a")
    assert contents(tmp_path) == {"a/thesis.docx": b"x"}
    with pytest.raises(AdapterError, match="is a file"):
        save_adapter(adapted(), tmp_path / "a" / "thesis.docx")


def test_a_model_card_beside_an_adapter_stays(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("what the clinic says about it")
    before = contents(tmp_path)
    for replaced in (
        lambda: save_adapter(adapted(), tmp_path / "a"),
        lambda: convert_adapter(MINI / "peft_0", tmp_path / "a", replace=True),
    ):
        with pytest.raises(AdapterError, match=r"other files than an adapter's .*\n  README.md"):
            replaced()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "cut.safetensors", "folder.safetensors"])
def test_a_file_that_is_no_adapter_is_never_replaced(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.startswith("model"):
        path.write_bytes((MINI / "model.safetensors").read_bytes())
    elif name.startswith("cut"):
        path.write_bytes(b"\x10\0\0\0")
    else:
        path.mkdir()
        (path / "thesis.docx").write_bytes(b"x")
    before = contents(tmp_path)
    with pytest.raises(AdapterError, match="is no adapter file|is a directory"):
        save_adapter(adapted(), path)
    with pytest.raises(AdapterError, match="is no adapter file|is a directory"):
        convert_adapter(MINI / "peft_0", path, replace=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["b.safetensors", "b"])
def test_a_conversion_replaces_an_older_adapter_on_request_only(name: str, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    convert_adapter(MINI / "peft_0", tmp_path / name)
    before = contents(tmp_path)
    with pytest.raises(AdapterError, match="holds an adapter already"):
        convert_adapter(tmp_path / "a", tmp_path / name)
    assert contents(tmp_path) == before
    info = convert_adapter(tmp_path / "a", tmp_path / name, replace=True)
    assert info.weights_sha256 == adapter_info(tmp_path / "a").weights_sha256


def test_an_empty_directory_is_a_place_for_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".DS_Store").write_bytes(b"x")
    assert convert_adapter(MINI / "peft_0", tmp_path / "b").rank == 8


def test_what_appears_while_an_adapter_is_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = adapter_write._write

    def meanwhile(path: Path, *given: Any) -> None:
        real(path, *given)
        target = tmp_path / "a.safetensors"
        target.write_bytes((MINI / "model.safetensors").read_bytes())
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / "thesis.docx").write_bytes(b"x")

    monkeypatch.setattr(adapter_write, "_write", meanwhile)
    for name in ("a.safetensors", "b"):
        with pytest.raises(AdapterError, match="is no adapter file|thesis.docx"):
            save_adapter(adapted(), tmp_path / name)
    found = contents(tmp_path)
    assert found.keys() == {"a.safetensors", "b/thesis.docx"}
    assert found["a.safetensors"] == (MINI / "model.safetensors").read_bytes()


def test_an_adapter_is_not_converted_into_its_own_directory(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    before = contents(tmp_path)
    with pytest.raises(AdapterError, match="is the adapter to convert, or a part of it"):
        convert_adapter(tmp_path / "a", tmp_path / "a" / "adapters.safetensors", replace=True)
    assert contents(tmp_path) == before


def test_an_adapter_is_not_converted_onto_itself(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    with pytest.raises(AdapterError, match="is the adapter to convert"):
        convert_adapter(tmp_path / "a", tmp_path / "." / "a")


def test_a_conversion_keeps_facts_and_changes_the_dtype_on_request(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a", training={"iters": 3})
    info = convert_adapter(tmp_path / "a", tmp_path / "b.safetensors", dtype="float16")
    assert (info.dtypes, info.training) == (("float16",), {"iters": 3})
    assert info.base_fingerprint == base().fingerprint


def test_a_peft_adapter_saved_again_knows_its_base(tmp_path: Path) -> None:
    model = base()
    assert load_adapter(model, MINI / "peft_1").base_fingerprint is None
    info = save_adapter(model, tmp_path / "a")
    assert (info.base_fingerprint, info.base_name) == (model.fingerprint, "mini-4k")
