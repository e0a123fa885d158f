"""Checkpoints: every form is read, everything wrong is named, and what is saved others can read."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_medphi.config import LoRAConfig
from mlx_medphi.errors import CheckpointError, TokenizerError
from mlx_medphi.model.checkpoint import build_model, load, save_model
from mlx_medphi.model.lora import apply_lora
from mlx_medphi.model.phi3 import Phi3ForCausalLM, named_parameters
from mlx_medphi.model.weights import CONFIG_KEY, open_checkpoint

# One float32 sum in another order; the measured difference to mlx-lm is 2e-6.
LOGITS_ATOL = 1e-5
QKV = "model.layers.1.self_attn.qkv_proj.weight"


def reference_ids(folder: Path) -> mx.array:
    return mx.load(str(folder / "reference.safetensors"))["ids"]


def logits(model: Any, ids: mx.array) -> np.ndarray:
    return np.array(model(ids).astype(mx.float32))


def weights_of(folder: Path) -> dict[str, mx.array]:
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)  # the file is about to be written over
    return weights


def rewrite(folder: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    weights = weights_of(folder)
    change(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    """Split model.safetensors into shards with an index, as transformers does."""
    weights = weights_of(folder)
    names = sorted(weights)
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {name: weights[name] for name in names[i::count]}
        mx.save_safetensors(str(folder / file), part, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def set_item(name: str, value: Any) -> Callable[[dict[str, mx.array]], object]:
    return lambda weights: weights.__setitem__(name, value)


def test_shards_hold_the_same_model_as_one_file(mini: Path, phi3: Path) -> None:
    ids = reference_ids(phi3 / "mini-4k")
    whole = logits(load(mini)[0], ids)
    shard(mini)
    model, _ = load(mini)
    np.testing.assert_array_equal(logits(model, ids), whole)
    assert model.source is not None
    assert len(model.source.files) == 3


def test_an_index_for_one_file_is_read(mini: Path) -> None:
    write_index(mini, dict.fromkeys(weights_of(mini), "model.safetensors"))  # as mlx-lm writes it
    assert open_checkpoint(mini).files == (mini / "model.safetensors",)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_cast_to_the_dtype_asked_for(phi3: Path, dtype: str) -> None:
    model, _ = load(phi3 / "gqa", dtype=dtype)
    assert {a.dtype for a in named_parameters(model).values()} == {getattr(mx, dtype)}


def test_without_a_dtype_weights_stay_as_stored(phi3: Path) -> None:
    model, _ = load(phi3 / "gqa")
    assert {a.dtype for a in named_parameters(model).values()} == {mx.bfloat16}


def test_a_loaded_model_does_not_read_its_files_again(mini: Path, phi3: Path) -> None:
    model, _ = load(mini)
    ids = reference_ids(phi3 / "mini-4k")
    truncate(mini / "model.safetensors", 0)
    np.testing.assert_array_equal(logits(model, ids), logits(load(phi3 / "mini-4k")[0], ids))


def test_tied_embeddings_ignore_a_stored_head(phi3: Path, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("partial-rotary-tied")
    rewrite(folder, set_item("lm_head.weight", mx.ones((320, 64))))
    ids = reference_ids(phi3 / "partial-rotary-tied")
    model, _ = load(folder)
    np.testing.assert_array_equal(
        logits(model, ids), logits(load(phi3 / "partial-rotary-tied")[0], ids)
    )
    assert "lm_head.weight" not in named_parameters(model)


def test_stored_rotary_frequencies_are_ignored(mini: Path) -> None:
    rewrite(mini, set_item("model.layers.0.self_attn.rotary_emb.inv_freq", mx.ones((8,))))
    assert "inv_freq" not in " ".join(open_checkpoint(mini).tensors)


def test_a_single_file_describes_itself(mini: Path, phi3: Path, tmp_path: Path) -> None:
    single = tmp_path / "out" / "medical.safetensors"
    single.parent.mkdir()
    config = (mini / "config.json").read_text()
    mx.save_safetensors(str(single), weights_of(mini), {CONFIG_KEY: config})
    with pytest.raises(TokenizerError, match="of its base beside it"):
        load(single)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(mini / name, single.parent / name)
    ids = reference_ids(phi3 / "mini-4k")
    np.testing.assert_array_equal(logits(load(single)[0], ids), logits(load(mini)[0], ids))


def test_an_adapter_is_put_on_the_model(phi3: Path) -> None:
    folder = phi3 / "mini-4k"
    model, _ = load(folder, adapter=folder / "peft_0")
    expected = mx.load(str(folder / "peft_0" / "reference.safetensors"))["logits"]
    found = logits(model, reference_ids(folder))
    np.testing.assert_allclose(found, np.array(expected), rtol=0, atol=1e-4)


def test_files_that_change_after_the_check_are_an_error(mini: Path) -> None:
    checkpoint = open_checkpoint(mini)
    assert checkpoint.nbytes == sum(a.nbytes for a in weights_of(mini).values())
    truncate(mini / "model.safetensors", 100_000)
    with pytest.raises(CheckpointError, match="mini-4k: cannot be read"):
        build_model(checkpoint)


def test_a_loaded_model_can_be_compiled_with_its_state(mini: Path, phi3: Path) -> None:
    model, _ = load(mini)
    assert model.fingerprint
    ids = reference_ids(phi3 / "mini-4k")
    compiled = mx.compile(lambda x: model(x), inputs=model.state)
    np.testing.assert_allclose(
        np.array(compiled(ids)), logits(model, ids), rtol=0, atol=LOGITS_ATOL
    )


WRONG: list[tuple[str, Callable[[Path], object], str]] = [
    ("no config", lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    ("bad config", lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    ("an adapter", lambda f: (f / "config.json").rename(f / "adapter_config.json"), "an adapter"),
    (
        "no weights",
        lambda f: (f / "model.safetensors").unlink(),
        "neither model.safetensors nor model.safetensors.index.json is here; fetch",
    ),
    (
        "only a pickle",
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "only pytorch_model.bin; only safetensors can be loaded",
    ),
    (
        "no index",
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        "though model-00001-of-00002.safetensors is",
    ),
    (
        "truncated",
        lambda f: truncate(f / "model.safetensors", 400_000),
        "model.safetensors: not a whole safetensors file: it is 400000 bytes",
    ),
    ("empty", lambda f: truncate(f / "model.safetensors", 0), "not a whole safetensors file"),
    (
        "not safetensors",
        lambda f: (f / "model.safetensors").write_bytes(b"PK\3\4" * 99),
        "not a whole safetensors file",
    ),
    (
        "missing tensor",
        lambda f: rewrite(f, lambda w: w.pop(QKV)),
        rf"\(1 tensor\): {QKV}: missing, expected \(192, 64\) F32 or F16 or BF16",
    ),
    (
        "left over",
        lambda f: rewrite(f, set_item("model.layers.2.mlp.down_proj.weight", mx.ones((64, 96)))),
        r"layers.2.mlp.down_proj.weight in model.safetensors: found \(64, 96\) F32, expected no",
    ),
    (
        "transposed",
        lambda f: rewrite(f, lambda w: w.update({QKV: w[QKV].T})),
        rf"{QKV} in model.safetensors: found \(64, 192\) F32, expected \(192, 64\)",
    ),
    (
        "integers",
        lambda f: rewrite(f, set_item("model.norm.weight", mx.ones((64,), dtype=mx.int32))),
        r"model.norm.weight in model.safetensors: found \(64,\) I32, expected \(64,\) F32",
    ),
    (
        "packed without quantisation",
        lambda f: rewrite(f, set_item(QKV, mx.ones((192, 8), dtype=mx.uint32))),
        r"found \(192, 8\) U32, expected \(192, 64\) F32",
    ),
    (
        "another vocabulary",
        lambda f: edit_json(f / "config.json", vocab_size=400),
        r"\(2 tensors\): lm_head.weight in .* expected \(400, 64\)",
    ),
    (
        "another model",
        lambda f: edit_json(f / "config.json", model_type="llama"),
        "expected 'phi3'",
    ),
]


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as handle:
        handle.truncate(size)


@pytest.mark.parametrize(("spoil", "words"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_is_wrong_is_named(mini: Path, spoil: Callable[[Path], object], words: str) -> None:
    spoil(mini)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(mini)
    assert str(caught.value).startswith(str(mini))
    assert "\n" not in str(caught.value)


def test_more_blocks_than_tensors_are_one_short_error(mini: Path) -> None:
    edit_json(mini / "config.json", num_hidden_layers=9999)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 9999, the weights are 15 ten"):
        open_checkpoint(mini)


def test_a_long_list_of_problems_is_sorted_and_cut_at_ten(mini: Path) -> None:
    edit_json(mini / "config.json", num_hidden_layers=5)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(mini)
    text = str(caught.value)
    assert "(18 tensors)" in text
    assert text.count("missing") == 10
    assert text.endswith("… and 8 more")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update({QKV: "model-00009-of-00009.safetensors"}), "1 of the 4 files"),
        (lambda m: m.update({QKV: "../secret.safetensors"}), "found ../secret.safetensors"),
        (lambda m: m.update({QKV: "/etc/x.safetensors"}), "found /etc/x.safetensors"),
        (lambda m: m.update({QKV: "model.bin"}), "found model.bin"),
        (lambda m: m.update({QKV: 3}), "found 3"),
        (lambda m: m.update({QKV: next(f for f in m.values() if f != m[QKV])}), "which lacks it"),
        (
            lambda m: m.update({"ghost.weight": m[QKV]}),
            "ghost.weight is listed in .*, which lacks it",
        ),
        (lambda m: m.pop(QKV), f"{QKV} is in .*, not listed there"),
        (lambda m: m.clear(), "holds no 'weight_map'"),
    ],
)
def test_a_wrong_index_is_named(
    mini: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    weight_map: dict[str, Any] = dict(shard(mini))
    change(weight_map)
    write_index(mini, weight_map)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(mini)
    assert "\n" not in str(caught.value)


def test_an_index_without_a_map_is_named(mini: Path) -> None:
    shard(mini)
    for text in ("[]", "{", '{"weight_map": 3}'):
        (mini / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="index.json"):
            open_checkpoint(mini)


def test_only_a_self_describing_file_is_a_model(mini: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not describe a model by itself"):
        open_checkpoint(mini / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a .safetensors file"):
        open_checkpoint(mini / "config.json")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")
    mx.save_safetensors(str(tmp_path / "bad.safetensors"), {"a": mx.ones(1)}, {CONFIG_KEY: "{"})
    with pytest.raises(CheckpointError, match="metadata 'config' is not valid JSON"):
        open_checkpoint(tmp_path / "bad.safetensors")


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(mini: Path) -> None:
    edit_json(mini / "config.json", vocab_size=300)
    rewrite(
        mini,
        lambda w: w.update(
            {n: w[n][:300] for n in ("lm_head.weight", "model.embed_tokens.weight")}
        ),
    )
    with pytest.raises(CheckpointError, match="the tokenizer has 316 ids, the model 300"):
        load(mini)


def test_an_unknown_dtype_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype is 'int8', expected one of bfloat16"):
        load(tmp_path / "nothing", dtype="int8")


def test_a_saved_model_is_the_same_model(each_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(each_folder)
    save_model(model, tokenizer, tmp_path / "out")
    again, _ = load(tmp_path / "out")
    ids = reference_ids(each_folder)
    np.testing.assert_array_equal(logits(again, ids), logits(model, ids))
    assert again.config == model.config
    assert again.fingerprint == model.fingerprint
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (each_folder / name).read_bytes()


def test_a_model_made_from_nothing_can_be_saved(phi3: Path, tmp_path: Path) -> None:
    loaded, tokenizer = load(phi3 / "mini-4k")
    model = Phi3ForCausalLM(loaded.config)
    save_model(model, tokenizer, tmp_path / "out", dtype="float16")
    again, _ = load(tmp_path / "out")
    assert {a.dtype for a in named_parameters(again).values()} == {mx.float16}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, 305)
    assert written["torch_dtype"] == "float16"


def test_the_saved_config_has_one_form_and_says_what_the_original_said(
    copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_of("longrope-new-config")
    edit_json(folder / "config.json", auto_map={"AutoConfig": "code.py"}, initializer_range=0.5)
    edit_json(folder / "config.json", rope_theta=1.0, partial_rotary_factor=0.5)  # not heeded
    save_model(*load(folder), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (saved["rope_theta"], saved["partial_rotary_factor"]) == (10000.0, 1.0)
    assert saved["rope_scaling"]["type"] == "longrope"
    assert saved["initializer_range"] == 0.5
    assert saved.keys().isdisjoint({"rope_parameters", "auto_map", "dtype"})


# Where mlx-lm is right; it reads partial rotary only in the old form, which is the one saved.
@pytest.mark.parametrize("folder", ["mini-4k", "gqa", "longrope-long", "partial-rotary-tied"])
def test_mlx_lm_loads_what_is_saved(phi3: Path, tmp_path: Path, folder: str) -> None:
    from mlx_lm.utils import load_model

    model, tokenizer = load(phi3 / folder, dtype="float32")
    save_model(model, tokenizer, tmp_path / "out")
    theirs, _ = load_model(tmp_path / "out")
    ids = reference_ids(phi3 / folder)
    np.testing.assert_allclose(logits(theirs, ids), logits(model, ids), rtol=0, atol=LOGITS_ATOL)


def test_the_safetensors_library_reads_what_is_saved(phi3: Path, tmp_path: Path) -> None:
    import safetensors

    model, tokenizer = load(phi3 / "mini-4k")
    save_model(model, tokenizer, tmp_path / "out")
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(file.get_tensor(QKV), np.array(named_parameters(model)[QKV]))


def test_a_model_with_an_adapter_is_not_saved_as_a_base(phi3: Path, tmp_path: Path) -> None:
    model, tokenizer = load(phi3 / "mini-4k")
    apply_lora(model, LoRAConfig())
    with pytest.raises(CheckpointError, match="the model carries an adapter"):
        save_model(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_replaced_only_when_asked(mini: Path, phi3: Path) -> None:
    model, tokenizer = load(phi3 / "mini-4k")
    (mini / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="exists already"):
        save_model(model, tokenizer, mini)
    assert (mini / "mine.txt").read_text() == "keep"
    save_model(model, tokenizer, mini, replace=True)
    assert not (mini / "mine.txt").exists()


def test_a_full_disk_leaves_what_was_there(phi3: Path, mini: Path) -> None:
    model, tokenizer = load(phi3 / "mini-4k")
    before = {file.name: file.read_bytes() for file in mini.iterdir()}
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # The system refuses to write more than this into one file, as a full disk would.
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old_limit[1]))
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_model(model, tokenizer, mini, replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert {file.name: file.read_bytes() for file in mini.iterdir()} == before
    assert [p.name for p in mini.parent.iterdir()] == [mini.name]
