"""A package computes what transformers computed: every architecture, each way of running, each
form of an adapter, and every way weights are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from reference_cases import (
    ADAPTERS,
    CONTEXT,
    DORA,
    FEW,
    FOLDERS,
    LOGIT_ERROR,
    LORA,
    MINI,
    PHI3,
    Export,
    agreement,
    assert_agrees,
    checkpoint_of,
    long_row,
    make_plan,
    mlx_rows,
    reference,
    reference_rows,
    settings,
    write_base,
    write_bundle,
)
from weight_cases import make_checkpoint, stored_values

import mlx_medphi
from mlx_medphi.coreml.golden import make_prompts
from mlx_medphi.coreml.package import WEIGHT_FILE
from mlx_medphi.coreml.runner import Runner
from mlx_medphi.coreml.slots import slot_arrays, zero_slots
from mlx_medphi.coreml.staging import quantise
from mlx_medphi.errors import AdapterError, BundleError
from mlx_medphi.model.adapter_files import read_adapter
from mlx_medphi.model.checkpoint import build_model, load, save_model
from mlx_medphi.model.weights import open_checkpoint

# The reference's greedy continuation begins after its first 16 tokens.
PROMPT = 16

TINY = Path(mlx_medphi.__file__).parent / "assets" / "tiny"

# Two ways through the same program differ by where float16 values are rounded: measured 1.6e-3 of
# the row's largest logit.
REORDERED = 4e-3


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_equal_transformers(name: str, exported: Export) -> None:
    found = exported(name).rows(reference(PHI3 / name)["ids"])
    assert_agrees(found, reference_rows(PHI3 / name))


@pytest.mark.parametrize("name", FEW)
def test_greedy_continuation_equals_transformers(name: str, exported: Export) -> None:
    greedy = reference(PHI3 / name)["greedy"][0].tolist()
    for by_decode in (False, True):
        runner = exported(name).runner(by_decode=by_decode)
        assert runner.greedy(greedy[:PROMPT], 24) == greedy[PROMPT:]


@pytest.mark.parametrize("name", FEW)
def test_tokens_one_by_one_equal_transformers(name: str, exported: Export) -> None:
    found = exported(name).rows(reference(PHI3 / name)["ids"], by_decode=True)
    assert_agrees(found, reference_rows(PHI3 / name))


@pytest.mark.parametrize("name", FEW)
def test_pieces_of_any_length_equal_transformers(name: str, exported: Export) -> None:
    # The first piece is beyond LongRoPE's switch, where the reference is from its first row on.
    ids, at, rows = reference(PHI3 / name)["ids"][1].tolist(), 0, []
    runner = exported(name).runner()
    for count in (33, 1, 9, 5):
        rows.append(runner.rows(ids[at : at + count]))
        at += count
    assert runner.length == len(ids)
    assert_agrees(np.concatenate(rows).astype(np.float32), reference(PHI3 / name)["logits"][1])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gqa", {"prefill": 8}),
        pytest.param("sliding-window", {"prefill": 24}, marks=pytest.mark.slow),
        ("longrope-long", {"prefill": 64}),
        pytest.param("partial-rotary-tied", {"prefill": 5}, marks=pytest.mark.slow),
        pytest.param("mini-4k", {"context": 128}, marks=pytest.mark.slow),
        pytest.param("longrope-short", {"context": 192}, marks=pytest.mark.slow),
        pytest.param("gqa", {"attention": "decomposed"}, marks=pytest.mark.slow),
        ("sliding-window", {"attention": "decomposed"}),
        ("longrope-long", {"residual": "float32"}),
        pytest.param(
            "gqa", {"attention": "decomposed", "residual": "float32"}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_every_setting_equals_transformers(
    name: str, changes: dict[str, Any], exported: Export
) -> None:
    ids = reference(PHI3 / name)["ids"]
    assert_agrees(exported(name, **changes).rows(ids), reference_rows(PHI3 / name))


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 0.05},
        {"num_attention_heads": 8, "num_key_value_heads": 2},
        {"num_attention_heads": 4, "num_key_value_heads": 1},
        {"head_dim": 20},
        {"sliding_window": 1},
        {"partial_rotary_factor": 0.25, "rope_theta": 500.0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_models_of_other_forms_equal_mlx(changes: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "base", quantize=None, **changes)
    package = write_base(checkpoint, tmp_path / "n.mlpackage", settings(prefill=8))
    ids = np.random.default_rng(2).integers(0, 40, (1, 30))
    wanted = mlx_rows(build_model(checkpoint, dtype="float32"), ids)
    assert_agrees(package.rows(ids), wanted)
    assert_agrees(package.rows(ids, by_decode=True), wanted)


def test_a_sum_beyond_float16_needs_a_float32_residual(tmp_path: Path) -> None:
    # The embedding is near float16's end at 65504, and attention adds some 1e4 to it.
    rng = np.random.default_rng(8)
    floats = {
        "model.layers.0.self_attn.o_proj": 1e4 * rng.standard_normal((64, 64)),
        "model.embed_tokens": 6e4 * np.sign(rng.standard_normal((40, 64))),
    }
    checkpoint = make_checkpoint(tmp_path / "base", quantize=None, dtype="F32", floats=floats)
    ids = rng.integers(0, 40, (1, 24))
    found = {}
    for residual in ("float16", "float32"):
        config = settings(residual=residual)
        found[residual] = write_base(checkpoint, tmp_path / residual, config).rows(ids)
    assert not np.isfinite(found["float16"]).all()
    assert_agrees(found["float32"], mlx_rows(build_model(checkpoint, dtype="float32"), ids))


@pytest.mark.parametrize("name", ["gqa", "longrope-long", "sliding-window"])
@pytest.mark.parametrize("prefill", [16, 24])
def test_a_context_filled_to_its_last_slot_equals_mlx(
    name: str, prefill: int, exported: Export
) -> None:
    # 24 does not divide the context: the last tokens are read by decode.
    model, _ = load(PHI3 / name, dtype="float32")
    ids = long_row(PHI3 / name, CONTEXT)
    runner = exported(name, prefill=prefill).runner()
    found = runner.rows(ids).astype(np.float32)
    assert_agrees(found, mlx_rows(model, np.array([ids])))
    assert runner.length == CONTEXT
    with pytest.raises(BundleError, match="1 tokens after 64 do not fit the context of 64"):
        runner.feed([5])


@pytest.mark.parametrize("name", FEW)
def test_one_wide_block_equals_narrow_ones_and_single_tokens(name: str, exported: Export) -> None:
    ids, rows = reference(PHI3 / name)["ids"][:1], range(3, 48, 4)
    wide = exported(name, prefill=48).runner().rows(ids[0].tolist(), rows)
    narrow = exported(name)
    for other in (narrow.rows(ids), narrow.rows(ids, by_decode=True)):
        assert agreement(other[rows], wide).error <= REORDERED


@pytest.mark.parametrize("name", ["gqa", "mini-4k"])
def test_one_conversation_leaves_nothing_for_the_next(name: str, exported: Export) -> None:
    model, ids = exported(name), reference(PHI3 / name)["ids"]
    runner = model.runner()
    first = runner.feed(ids[0].tolist())
    runner.reset()
    runner.feed(ids[1].tolist())
    runner.reset()
    np.testing.assert_array_equal(runner.feed(ids[0].tolist()), first)


def test_longrope_switches_while_the_text_grows(exported: Export) -> None:
    folder = PHI3 / "longrope-long"
    model, _ = load(folder, dtype="float32")
    switch = model.config.switch_length
    assert switch == 32
    ids = reference(folder)["ids"][:1]
    runner = exported("longrope-long").runner()
    # Up to the switch the short factors, over the whole sequence; beyond it the long ones.
    before = runner.rows(ids[0, :switch].tolist())
    assert_agrees(before.astype(np.float32), mlx_rows(model, ids[:, :switch]))
    after = runner.rows(ids[0, switch:].tolist())
    assert_agrees(after.astype(np.float32), mlx_rows(model, ids)[switch:])
    assert agreement(before, mlx_rows(model, ids)[:switch]).error > 10 * REORDERED


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(
    ("form", "changes"),
    [("slots", {}), ("slots", {"slot_kind": "input"}), ("functions", {})],
    ids=["state", "input", "functions"],
)
def test_an_adapter_beside_the_base_equals_peft(
    form: str, changes: dict[str, Any], name: str, adapted: Export
) -> None:
    package = adapted(form, **changes)
    ids, wanted = reference(MINI)["ids"], reference_rows(ADAPTERS[name])
    assert_agrees(package.rows(ids, name), wanted)
    assert_agrees(package.rows(ids[:1], name, by_decode=True), wanted[: ids.shape[1]])
    # Without the change they are far apart.
    assert agreement(reference_rows(MINI), wanted).error > 10 * REORDERED


@pytest.mark.parametrize("form", ["slots", "functions"])
def test_adapters_beside_the_base_leave_the_base_alone(form: str, adapted: Export) -> None:
    assert_agrees(adapted(form).rows(reference(MINI)["ids"]), reference_rows(MINI))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fused_adapter_equals_peft(name: str, adapted: Export) -> None:
    package = adapted("fused", only=name)
    assert list(package.variants) == [None]
    assert_agrees(package.rows(reference(MINI)["ids"]), reference_rows(ADAPTERS[name]))


def test_dora_is_fused_and_equals_peft(tmp_path: Path) -> None:
    package = write_bundle(MINI, tmp_path / "n.medphi", settings(adapters="fused"), {"dora": DORA})
    assert_agrees(package.rows(reference(MINI)["ids"]), reference_rows(DORA))


@pytest.mark.parametrize("form", ["slots", "functions"])
def test_dora_beside_the_base_is_refused_with_the_way_out(form: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="DoRA(.|\n)*adapters='fused'"):
        write_bundle(MINI, tmp_path / "n.medphi", settings(adapters=form), {"dora": DORA})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["state", "input"])
def test_empty_slots_are_the_base_bit_for_bit(kind: str, adapted: Export, exported: Export) -> None:
    ids = reference(MINI)["ids"]
    base = exported("mini-4k").rows(ids)
    package = adapted("slots", slot_kind=kind)
    np.testing.assert_array_equal(package.rows(ids), base)
    np.testing.assert_array_equal(
        package.rows(ids[:1], by_decode=True), exported("mini-4k").rows(ids[:1], by_decode=True)
    )


def test_slots_are_the_same_as_states_and_as_inputs(adapted: Export) -> None:
    ids = reference(MINI)["ids"]
    for name in ADAPTERS:
        np.testing.assert_array_equal(
            adapted("slots").rows(ids, name), adapted("slots", slot_kind="input").rows(ids, name)
        )


@pytest.mark.parametrize("kind", ["state", "input"])
def test_adapters_swapped_in_and_out_give_the_same_bits(kind: str, adapted: Export) -> None:
    package = adapted("slots", slot_kind=kind)
    ids = reference(MINI)["ids"][0].tolist()
    config = open_checkpoint(MINI).config
    filled = {name: package.variants[name].slots for name in ADAPTERS}
    filled["off"] = zero_slots(config, 8)
    runner, seen = package.runner(), {}
    seen["off"] = runner.feed(ids)
    for name in ("lora", "rslora", "off", "lora", "off", "rslora", "lora"):
        runner.use(filled[name] or {})
        logits = runner.feed(ids)
        np.testing.assert_array_equal(seen.setdefault(name, logits), logits)
    rows = np.stack(list(seen.values())).astype(np.float32)
    for i in range(len(rows)):
        assert agreement(np.delete(rows, i, 0), rows[[i, i]]).error > 10 * REORDERED


@pytest.mark.slow
def test_a_rank_below_the_slots_computes_the_same(tmp_path: Path, adapted: Export) -> None:
    # Zeros that fill a slot up add exact zeros; a sum may only be taken in another order.
    ids, config = reference(MINI)["ids"][:1], open_checkpoint(MINI).config
    small = adapted("slots")
    given = settings(adapters="slots", slot_rank=24)
    wide = write_bundle(MINI, tmp_path / "n.medphi", given, ADAPTERS)
    for name, rank in (("lora", 8), ("rslora", 4)):
        pack = slot_arrays(read_adapter(ADAPTERS[name]), config, 24)
        assert not np.any(pack["loraA_qkv"][:, rank:]) and np.any(pack["loraA_qkv"][:, rank - 1])
        runner = Runner(wide.predictor, wide.shape, pack)
        found = runner.rows(ids[0].tolist()).astype(np.float32)
        assert agreement(found, small.rows(ids, name)).error <= REORDERED
        assert_agrees(found, reference(ADAPTERS[name])["logits"][0])


def test_functions_grow_the_package_by_their_adapters_alone(
    adapted: Export, exported: Export
) -> None:
    def nbytes(folder: Path) -> int:
        return (folder / WEIGHT_FILE).stat().st_size

    def record(array: Any) -> int:
        # 64 bytes tell of each constant, and each begins on a multiple of 64.
        return 64 + -(-np.asarray(array).astype(np.float16).nbytes // 64) * 64

    factors = [
        record(factor)
        for path in ADAPTERS.values()
        for change in read_adapter(path).layers.values()
        for factor in (change.a, change.b)
    ]
    assert len(factors) == 2 * 2 * (4 + 2)
    # Besides, a bias of zeros for each of the two ranks.
    biases = record(np.zeros(8)) + record(np.zeros(4))
    grown = nbytes(adapted("functions").package) - nbytes(exported("mini-4k").package)
    # The last constant of a file is not filled up.
    assert abs(grown - (sum(factors) + biases)) < 64


# --- weights of fewer bits ------------------------------------------------------------------------


def mlx_base(base: Path, folder: Path, dtype: str, quantize: tuple[int, int]) -> Path:
    """A checkpoint that MLX quantised on loading."""
    model, tokenizer = load(base, dtype=dtype, quantize=quantize)
    save_model(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_mlx_quantised_equals_mlx(bits: int, dtype: str, tmp_path: Path) -> None:
    base = mlx_base(MINI, tmp_path / "base", dtype, (bits, 32))
    model, _ = load(base, dtype="float32")
    package = write_base(open_checkpoint(base), tmp_path / "n.mlpackage", settings(bits=None))
    ids = reference(MINI)["ids"]
    found = package.rows(ids)
    assert_agrees(found, mlx_rows(model, ids))
    # Codes are seen: they change this random model by 0.6 at 4 bits and by 0.03 at 8.
    assert agreement(found, reference_rows(MINI)).error > 4 * LOGIT_ERROR


# Fusing compares both models on MLX's processor kernels for 4 bits, which takes some 12 seconds.
SLOW_FUSED = pytest.param("fused", marks=pytest.mark.slow)


@pytest.mark.parametrize("form", ["slots", "functions", SLOW_FUSED])
def test_an_adapter_on_a_base_of_4_bits_equals_mlx(form: str, tmp_path: Path) -> None:
    base = mlx_base(MINI, tmp_path / "base", "float16", (4, 32))
    model, _ = load(base, dtype="float32", adapter=LORA)
    config = settings(bits=None, adapters=form)
    package = write_bundle(base, tmp_path / "n.medphi", config, {"lora": LORA})
    ids = reference(MINI)["ids"]
    wanted = mlx_rows(model, ids)
    if form == "fused":
        # The sum is stored in 8 bits, whose rounding changes this random model by up to 0.03.
        assert agreement(package.rows(ids), wanted).error < 0.06
    else:
        assert_agrees(package.rows(ids, "lora"), wanted)
    assert agreement(mlx_rows(load(base, dtype="float32")[0], ids), wanted).error > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_with_offsets_in_bfloat16_is_closer_than_mlx_in_bfloat16(
    bits: int, tmp_path: Path
) -> None:
    # MLX rounded each offset to 8 digits; the package has the whole number of codes it stood for.
    base = mlx_base(MINI, tmp_path / "base", "bfloat16", (bits, 32))
    exact, rounded = load(base, dtype="float32")[0], load(base)[0]
    package = write_base(open_checkpoint(base), tmp_path / "n.mlpackage", settings(bits=None))
    ids = reference(MINI)["ids"]
    wanted = mlx_rows(exact, ids)
    # Measured 0.016 at 4 bits and 0.026 at 8, against 0.06 of MLX.
    assert (
        agreement(package.rows(ids), wanted).error < agreement(mlx_rows(rounded, ids), wanted).error
    )
    assert agreement(package.rows(ids), wanted).error < 0.04
    # In float16 they are what MLX has.
    half = write_base(open_checkpoint(base), tmp_path / "h.mlpackage", settings(bits=16))
    assert_agrees(half.rows(ids), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 64)])
def test_a_trained_base_that_mlx_quantised_equals_mlx(
    bits: int, group: int, tmp_path: Path
) -> None:
    base = mlx_base(TINY, tmp_path / "base", "float16", (bits, group))
    model, tokenizer = load(base, dtype="float32")
    package = write_base(open_checkpoint(base), tmp_path / "n.mlpackage", settings(bits=None))
    (prompt,) = make_prompts(tokenizer, CONTEXT, 2, 0)[:1]
    ids = np.array([prompt.ids])
    assert_agrees(package.rows(ids), mlx_rows(model, ids))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_plain_base_is_quantised_as_mlx_does_it(bits: int, tmp_path: Path) -> None:
    config = settings(bits=bits, group_size=32)
    folder = tmp_path / "staged"
    folder.mkdir()
    model = build_model(quantise(open_checkpoint(MINI), config, folder), dtype="float32")
    ids = reference(MINI)["ids"]
    found = write_bundle(MINI, tmp_path / "n.medphi", config).rows(ids)
    assert_agrees(found, mlx_rows(model, ids))


@pytest.mark.parametrize("bits", [4, 8])
def test_one_scale_for_each_row_equals_the_dequantised_model(bits: int, tmp_path: Path) -> None:
    checkpoint = checkpoint_of("gqa")
    config = settings(bits=bits, scheme="channel")
    package = write_base(checkpoint, tmp_path / "n.mlpackage", config)
    model = build_model(checkpoint, dtype="float32")
    for layer, weight in make_plan(checkpoint, config).weights.layers.items():
        values = mx.array(stored_values(weight).astype(np.float32))
        model.load_weights([(f"{layer}.weight", values)], strict=False)
    ids = reference(PHI3 / "gqa")["ids"]
    found = package.rows(ids)
    assert_agrees(found, mlx_rows(model, ids))
    assert agreement(found, reference_rows(PHI3 / "gqa")).error > 2 * LOGIT_ERROR
