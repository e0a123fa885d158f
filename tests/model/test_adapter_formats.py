"""Adapters of PEFT and mlx-lm are read exactly, and ours are read exactly by them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
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
)

from mlx_medphi.errors import AdapterError
from mlx_medphi.files import read_safetensors_header
from mlx_medphi.model.adapter import adapter_info, convert_adapter, load_adapter, save_adapter
from mlx_medphi.model.lora import adapted_layers

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SCRIPT = FIXTURES / "make_peft_roundtrip.py"
OURS = sorted(folder.name for folder in (FIXTURES / "peft_ours").iterdir())
THEIRS = sorted(folder.name for folder in (FIXTURES / "peft_theirs").iterdir())
# mlx-lm 0.32 is right on these of the reference checkpoints only.
MLX_LM_IS_RIGHT = ("mini-4k", "gqa", "longrope-long")


def recorded(folder: Path) -> tuple[mx.array, np.ndarray[Any, Any]]:
    """Token ids and the logits that PEFT gave for them with the adapter in `folder`."""
    tensors: Any = mx.load(str(folder / "peft_logits.safetensors"))
    return tensors["ids"], np.array(tensors["logits"])


def edit(config: Path, **changes: Any) -> None:
    """Change settings of a JSON file; None of Python stays null."""
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def rewrite(file: Path, change: Callable[[dict[str, mx.array]], None], **metadata: str) -> None:
    """Change the tensors of a safetensors file; its metadata becomes what is given."""
    tensors: Any = mx.load(str(file))
    mx.eval(list(tensors.values()))
    change(tensors)
    mx.save_safetensors(str(file), tensors, metadata or {"format": "pt"})


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    """A PEFT directory that a test may change."""
    return copied(MINI / "peft_0", tmp_path / "peft")


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        if file.name.startswith("adapter"):
            (to / file.name).write_bytes(file.read_bytes())
    return to


# --- PEFT -> here


@pytest.mark.parametrize("case", [0, 1, 2], ids=["lora", "rslora", "dora"])
def test_peft_adapters_give_pefts_logits(case: int) -> None:
    model, folder = base(), MINI / f"peft_{case}"
    info = load_adapter(model, folder)
    assert info.form == "PEFT directory"
    assert info.scale == (2.0, 4.0, 2.0)[case]  # the second is 8 / sqrt(4)
    expected = reference_logits(folder / "reference.safetensors")
    assert np.abs(expected - logits(base())).max() > 0.5
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=PARITY)


@pytest.mark.parametrize("case", THEIRS)
def test_patterns_single_blocks_and_separate_projections_give_pefts_logits(case: str) -> None:
    folder = FIXTURES / "peft_theirs" / case
    tokens, expected = recorded(folder)
    model = base()
    load_adapter(model, folder)
    assert np.abs(expected - logits(base(), tokens)).max() > 1
    np.testing.assert_allclose(logits(model, tokens), expected, rtol=0, atol=PARITY)


@pytest.mark.parametrize("case", THEIRS)
def test_a_converted_peft_adapter_gives_pefts_logits(case: str, tmp_path: Path) -> None:
    folder = FIXTURES / "peft_theirs" / case
    tokens, expected = recorded(folder)
    for target in (tmp_path / "own.safetensors", tmp_path / "directory"):
        convert_adapter(folder, target, model=base() if case == "unfused_dora" else None)
        model = base()
        load_adapter(model, target)
        np.testing.assert_allclose(logits(model, tokens), expected, rtol=0, atol=PARITY)


def test_merged_parts_stack_their_ranks_and_keep_the_scale() -> None:
    info = adapter_info(FIXTURES / "peft_theirs" / "unfused")
    # q and k have rank 2, v has 4: the merged rank is their sum, and alpha follows it.
    assert (info.rank, info.scale, info.alpha) == (8, 2.5, 20)


def test_a_part_whose_row_lengths_only_the_base_knows_needs_the_base(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no change of self_attn.k_proj, so only the base tells"):
        adapter_info(FIXTURES / "peft_theirs" / "unfused_dora")


@pytest.mark.parametrize("missing", ["v_proj", "gate_proj"])
def test_parts_without_change_get_zeros(peft: Path, missing: str) -> None:
    folder = copied(FIXTURES / "peft_theirs" / "unfused", peft / "part")

    def drop(tensors: dict[str, mx.array]) -> None:
        for name in [name for name in tensors if missing in name]:
            del tensors[name]

    rewrite(folder / "adapter_model.safetensors", drop)
    model, whole = base(), base()
    convert_adapter(folder, peft / "converted.safetensors")  # widths follow without the base
    load_adapter(model, peft / "converted.safetensors")
    load_adapter(whole, FIXTURES / "peft_theirs" / "unfused")
    key = "self_attn.qkv_proj" if missing == "v_proj" else "mlp.gate_up_proj"
    name, rows = f"model.layers.0.{key}", slice(128, 192) if missing == "v_proj" else slice(0, 96)
    changed, full = (dict(adapted_layers(m))[name] for m in (model, whole))
    plain, found, expected = (np.array(w) for w in (
        changed.linear.weight, changed.fused_weight(), full.fused_weight()))  # fmt: skip
    assert np.array_equal(found[rows], plain[rows])
    expected[rows] = plain[rows]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_queries_without_change_need_the_base_for_their_width(peft: Path) -> None:
    folder = copied(FIXTURES / "peft_theirs" / "unfused", peft / "part")

    def drop(tensors: dict[str, mx.array]) -> None:
        for name in [name for name in tensors if "q_proj" in name]:
            del tensors[name]

    rewrite(folder / "adapter_model.safetensors", drop)
    with pytest.raises(AdapterError, match="no change of self_attn.q_proj"):
        adapter_info(folder)
    load_adapter(base(), folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["weight"]),
        ("layer_replication", [[0, 1]]),
        ("init_lora_weights", "pissa"),
        ("peft_type", "LOHA"),
        ("use_something_new", True),
        ("something_config", {"a": 1}),
    ],
)
def test_features_we_do_not_have_are_refused_by_name(peft: Path, key: str, value: Any) -> None:
    edit(peft / "adapter_config.json", **{key: value})
    with pytest.raises(AdapterError, match=f"{key} is .*which this library does not have"):
        load_adapter(base(), peft)


def test_all_features_we_do_not_have_are_listed_together(peft: Path) -> None:
    edit(peft / "adapter_config.json", lora_bias=True, modules_to_save=["lm_head"], r=0)
    with pytest.raises(AdapterError, match=r"\(3 differences\)") as caught:
        load_adapter(base(), peft)
    assert all(word in str(caught.value) for word in ("lora_bias", "modules_to_save", "r is 0"))


@pytest.mark.parametrize(
    "changes",
    [
        {"r": "eight"},
        {"lora_alpha": -1},
        {"lora_alpha": None},
        {"rank_pattern": [1]},
        {"alpha_pattern": {"o_proj": "x"}},
        {"lora_dropout": 2},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"alpha_pattern": {"o_proj": float("inf")}},
        {"rank_pattern": {"o_proj": 2.5}},
        {"use_rslora": "false"},
        {"use_dora": "false"},
    ],
)
def test_impossible_settings_are_refused(peft: Path, changes: dict[str, Any]) -> None:
    edit(peft / "adapter_config.json", **changes)
    name = next(iter(changes))
    with pytest.raises(AdapterError, match="dropout" if "dropout" in name else name):
        load_adapter(base(), peft)


@pytest.mark.parametrize(
    "pattern",
    ["(", "(a+)+", "(a|a)*b", "a{2}", r"\w", ".*.*.*x", "(q|k)_proj", "x" * 201, "[", "", "a**"],
)
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_could_match_forever_or_not_at_all_is_refused(
    peft: Path, name: str, pattern: str
) -> None:
    edit(peft / "adapter_config.json", **{name: {pattern: 8}})
    with pytest.raises(AdapterError, match="is no name or pattern that is read here"):
        load_adapter(base(), peft)


@pytest.mark.parametrize("number", ["3000000", "10000", "01", "9" * 5000])
@pytest.mark.parametrize("form", ["PEFT", "mlx-lm"])
def test_a_block_that_no_model_has_is_refused_at_once(
    peft: Path, tmp_path: Path, form: str, number: str
) -> None:
    folder, prefix, parts = peft, "base_model.model.", ("lora_A.weight", "lora_B.weight")
    file = folder / "adapter_model.safetensors"
    if form == "mlx-lm":
        folder, prefix, parts = tmp_path / "a", "", ("lora_a", "lora_b")
        save_adapter(adapted(), folder)
        file = folder / "adapters.safetensors"

    def add(tensors: dict[str, mx.array]) -> None:
        for part in parts:
            array = tensors[f"{prefix}model.layers.1.mlp.down_proj.{part}"]
            tensors[f"{prefix}model.layers.{number}.mlp.down_proj.{part}"] = array

    rewrite(file, add)
    with pytest.raises(AdapterError, match="not a change of one of Phi-3's projections"):
        adapter_info(folder)


@pytest.mark.parametrize("blocks", ["3000000000", "1", "1e999"])
def test_an_adapter_file_with_an_impossible_number_of_blocks_is_refused(
    tmp_path: Path, blocks: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(adapted(), path)
    tensors: Any = mx.load(str(path))
    mx.eval(list(tensors.values()))
    facts = {**read_safetensors_header(path).metadata, "model_layers": blocks}
    mx.save_safetensors(str(path), dict(tensors), facts)
    with pytest.raises(AdapterError, match="model_layers is|malformed"):
        adapter_info(path)


def test_a_pickled_peft_adapter_is_not_opened(peft: Path) -> None:
    (peft / "adapter_model.safetensors").rename(peft / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model.bin; save it with PEFT as"):
        load_adapter(base(), peft)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_missing_factor_is_named(peft: Path, part: str) -> None:
    lost = f"base_model.model.model.layers.1.mlp.down_proj.{part}.weight"
    rewrite(peft / "adapter_model.safetensors", lambda tensors: tensors.__delitem__(lost))
    ours = f"model.layers.1.mlp.down_proj.{part.lower()}: missing"
    with pytest.raises(AdapterError, match=ours):
        load_adapter(base(), peft)


def test_a_module_that_other_blocks_have_is_missed(peft: Path) -> None:
    def drop(tensors: dict[str, mx.array]) -> None:
        for name in [name for name in tensors if "layers.1.mlp.down_proj" in name]:
            del tensors[name]

    rewrite(peft / "adapter_model.safetensors", drop)
    with pytest.raises(AdapterError, match="layers.1.mlp.down_proj: missing, other layers have it"):
        load_adapter(base(), peft)


def test_tensors_of_no_projection_are_named(peft: Path) -> None:
    def add(tensors: dict[str, mx.array]) -> None:
        tensors["base_model.model.lm_head.lora_A.weight"] = mx.zeros((8, 64))

    rewrite(peft / "adapter_model.safetensors", add)
    with pytest.raises(AdapterError, match="lm_head.lora_A.weight: not a change of one of Phi-3's"):
        load_adapter(base(), peft)


def test_whole_and_separate_changes_of_one_projection_are_refused(peft: Path) -> None:
    def add(tensors: dict[str, mx.array]) -> None:
        for part, shape in (("A", (8, 64)), ("B", (64, 8))):
            name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"
            tensors[name] = mx.ones(shape)

    edit(peft / "adapter_config.json", target_modules="all-linear")
    rewrite(peft / "adapter_model.safetensors", add)
    with pytest.raises(AdapterError, match="both as a whole and in its parts"):
        load_adapter(base(), peft)


# --- here -> PEFT


@pytest.mark.parametrize("case", OURS)
def test_what_we_write_is_what_peft_was_seen_to_load(case: str, tmp_path: Path) -> None:
    folder = FIXTURES / "peft_ours" / case
    tokens, expected = recorded(folder)
    model = base()
    load_adapter(model, folder)
    np.testing.assert_allclose(logits(model, tokens), expected, rtol=0, atol=PARITY)
    save_adapter(model, tmp_path / "adapter")
    name = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (folder / name).read_bytes()
    now, then = (
        json.loads((where / "adapter_config.json").read_text(encoding="utf-8"))
        for where in (tmp_path / "adapter", folder)
    )
    assert now.pop("medphi") and then.pop("medphi")
    assert now == then


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_peft_itself_loads_our_directory_with_our_logits(kind: str, tmp_path: Path) -> None:
    lacking = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]
    if lacking:
        pytest.skip(
            f"{' and '.join(lacking)} not installed; the recorded logits are tested instead"
        )
    model = adapted(fine_tune_type=kind)
    save_adapter(model, tmp_path / "adapter")
    out = tmp_path / "logits.safetensors"
    # In a process of its own: torch and MLX need not share one.
    line = [sys.executable, str(SCRIPT), str(MINI), str(tmp_path / "adapter"), str(out)]
    subprocess.run(line, check=True, capture_output=True, cwd=SCRIPT.parents[2])
    np.testing.assert_allclose(reference_logits(out), logits(model), rtol=0, atol=PARITY)


# --- mlx-lm


def mlx_lm_model(folder: Path) -> Any:
    """mlx-lm's own model of a checkpoint, in float32: bfloat16 sums differ by their order."""
    # Heavy, and only these tests need it.
    from mlx_lm.utils import load_model

    model = load_model(folder)[0]
    model.set_dtype(mx.float32)
    return model


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("folder", MLX_LM_IS_RIGHT)
def test_mlx_lm_loads_our_directory_with_our_logits(folder: str, kind: str, tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    single: dict[str, Any] = {"dtype": "float32"}
    model = adapted(PHI3 / folder, single, fine_tune_type=kind)
    save_adapter(model, tmp_path / "adapter")
    theirs = load_adapters(mlx_lm_model(PHI3 / folder), str(tmp_path / "adapter"))
    tokens = ids(PHI3 / folder)
    expected = logits(model, tokens)
    assert np.abs(expected - logits(base(PHI3 / folder, **single), tokens)).max() > 0.1
    np.testing.assert_allclose(np.array(theirs(tokens)), expected, rtol=0, atol=PARITY)


@pytest.mark.parametrize("case", ["last_block", "uneven"])
def test_mlx_lm_loads_an_adapter_of_some_layers(case: str, tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    model, folder = base(), FIXTURES / "peft_ours" / case
    load_adapter(model, folder)
    save_adapter(model, tmp_path / "adapter")
    theirs = load_adapters(mlx_lm_model(MINI), str(tmp_path / "adapter"))
    np.testing.assert_allclose(np.array(theirs(ids())), logits(model), rtol=0, atol=PARITY)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_of_mlx_lm_gives_mlx_lms_logits(kind: str, tmp_path: Path) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    theirs = mlx_lm_model(MINI)
    settings = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.qkv_proj"]}
    theirs.freeze()
    linear_to_lora_layers(theirs, 1, settings, use_dora=kind == "dora")
    layer = theirs.layers[1].self_attn.qkv_proj
    layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(2))
    weights = dict(tree_flatten(theirs.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    # What mlx-lm writes: all its options, and num_layers may be -1.
    config = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": settings, "seed": 0}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "model": "/x/y/phi"}))
    model = base()
    info = load_adapter(model, tmp_path)
    assert (info.form, info.layers, info.base_name) == ("mlx-lm directory", (1,), "phi")
    np.testing.assert_allclose(logits(model), np.array(theirs(ids())), rtol=0, atol=SAME)


def test_the_directory_holds_a_real_count_and_both_key_sets(tmp_path: Path) -> None:
    save_adapter(adapted(num_layers=1, keys=["mlp.down_proj"], scale=3.0), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["num_layers"] == 1  # -1 makes mlx-swift-lm stop
    assert config["lora_parameters"] == {
        "rank": 4, "scale": 3.0, "dropout": 0.0, "keys": ["mlp.down_proj"],
    }  # fmt: skip
    assert config["fine_tune_type"] == "lora"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 12, False)
    assert config["target_modules"] == ["down_proj"]
    assert config["layers_to_transform"] == [1]
    assert config["medphi"]["base_fingerprint"] == base().fingerprint


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full'"),
        ({"lora_parameters": [8]}, "lora_parameters a list"),
        ({"lora_parameters": {"rank": 4, "dropout": 0.0}}, "scale is 0, expected a positive"),
        ({"lora_parameters": {"rank": "4", "scale": 1.0}}, "rank is '4', expected a positive"),
        ({"lora_parameters": {"rank": 4, "scale": 1.0, "dropout": -1}}, "dropout is -1"),
        ({"lora_parameters": {"rank": 4, "scale": 5.0}}, "scale: 5.0 in adapter_config.json, 2.0"),
        ({"fine_tune_type": "dora"}, "dora: True in adapter_config.json, False in adapters"),
    ],
)
def test_wrong_settings_of_an_mlx_lm_directory_are_named(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    save_adapter(adapted(), tmp_path / "a")
    edit(tmp_path / "a" / "adapter_config.json", **changes)
    with pytest.raises(AdapterError, match=expected):
        load_adapter(base(), tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "not valid JSON"), ("[]", "expected a JSON object, found list"), ("{}", "neither")],
)
def test_a_broken_configuration_is_named(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=expected):
        load_adapter(base(), tmp_path)


def test_a_lost_layer_of_an_mlx_lm_directory_is_named(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    lost = "model.layers.1.self_attn.o_proj"

    def drop(tensors: dict[str, mx.array]) -> None:
        for part in ("lora_a", "lora_b"):
            del tensors[f"{lost}.{part}"]

    rewrite(tmp_path / "a" / "adapters.safetensors", drop)
    with pytest.raises(AdapterError, match=f"{lost}: missing, other layers have it"):
        load_adapter(base(), tmp_path / "a")
