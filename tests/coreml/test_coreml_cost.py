"""The cost sheet: the design's arithmetic for Phi-3-mini, and what is counted on small models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.blobs import Part, plan_blobs
from mlx_medphi.coreml.build import write_package
from mlx_medphi.coreml.cost import BANDWIDTHS, CostSheet, cost_sheet
from mlx_medphi.coreml.package import PackageText
from mlx_medphi.coreml.program import Plan
from mlx_medphi.coreml.slots import layer_factors, zero_slots
from mlx_medphi.coreml.weights import Weight, Weights, plan_weights
from mlx_medphi.model.adapter_files import read_adapter
from mlx_medphi.model.checkpoint import build_model
from mlx_medphi.model.config import Phi3Config
from mlx_medphi.model.layout import linear_shapes
from mlx_medphi.model.weights import open_checkpoint

PHI3 = Path(__file__).resolve().parents[1] / "fixtures" / "phi3"
# microsoft/Phi-3-mini-4k-instruct.
FULL = Phi3Config(
    vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, head_dim=96, rms_norm_eps=1e-5,
    max_position_embeddings=4096, rope_theta=10000.0, rotary_dim=96, longrope=None,
    sliding_window=2047, tie_word_embeddings=False,
)  # fmt: skip
EXPORT = ExportConfig()
# The tables that this is compared with give hundredths of a GB, and leave out norms and text.
ROUNDED = 0.01
GB = 1e9


def quantised(layer: str, shape: tuple[int, int], bits: int, group: int, offset: str) -> Weight:
    small = (shape[0], shape[1] // group)
    parts = {
        "data": Part(f"{layer}.data", f"uint{bits}" if offset else "int8", shape),
        "scale": Part(f"{layer}.scale", "float16", small),
    }
    if offset:
        parts["offset"] = Part(f"{layer}.offset", offset, small)
    form = {"": "no offset", "float16": "float16 offset"}.get(offset, "integer offset")
    return Weight(layer, shape, bits, group, form, parts, None, 0, lambda: iter(()))  # type: ignore[arg-type]


def half(layer: str, shape: tuple[int, ...]) -> Weight:
    parts = {"weight": Part(f"{layer}.weight", "float16", shape)}
    return Weight(layer, shape, 16, None, "float16", parts, None, 0, lambda: iter(()))


def full_weights(group: int = 64, offset: str = "uint4", ends: int = 8) -> Weights:
    """Phi-3-mini at 4 bits, embedding and head at `ends` bits; 8 bits with one scale per row."""
    layers = {}
    for name, shape in linear_shapes(FULL).items():
        if name.startswith("model.layers."):
            layers[name] = quantised(name, shape, 4, group, offset)
        else:
            layers[name] = half(name, shape) if ends == 16 else quantised(name, shape, 8, 3072, "")
    norms = [
        f"model.layers.{i}.{n}_layernorm" for i in range(32) for n in ("input", "post_attention")
    ]
    layers |= {name: half(name, (3072,)) for name in [*norms, "model.norm"]}
    return Weights(layers)


def full_sheet(
    weights: Weights | None = None, context: int = 2048, rank: int | None = None
) -> CostSheet:
    return cost_sheet(FULL, weights or full_weights(), EXPORT, context=context, slot_rank=rank)


# --- Phi-3-mini against the design's tables


@pytest.mark.parametrize(
    ("group", "offset", "ends", "projections", "whole"),
    [
        (64, "uint4", 8, 1.95, 2.15),
        (64, "uint4", 16, 1.95, 2.35),
        (32, "uint4", 8, 2.10, 2.29),
        (32, "uint4", 16, 2.10, 2.49),
        (64, "float16", 8, 2.04, 2.24),
        (64, "float16", 16, 2.04, 2.43),
        (32, "float16", 8, 2.26, 2.46),
        (32, "float16", 16, 2.26, 2.66),
    ],
)
def test_package_sizes_of_phi_3_mini(
    group: int, offset: str, ends: int, projections: float, whole: float
) -> None:
    sheet = full_sheet(full_weights(group, offset, ends))
    found = sum(sheet.package[module] for module in ("qkv", "o", "gate_up", "down"))
    assert found / GB == pytest.approx(projections, abs=ROUNDED)
    assert sheet.package_bytes / GB == pytest.approx(whole, abs=ROUNDED)


@pytest.mark.parametrize(
    ("context", "kv", "resident"),
    [(512, 0.20, 2.35), (1024, 0.40, 2.55), (2048, 0.81, 2.96), (4096, 1.61, 3.76)],
)
def test_key_value_bytes_of_phi_3_mini(context: int, kv: float, resident: float) -> None:
    sheet = full_sheet(context=context)
    assert sheet.kv_per_token == 384 * 1024
    assert sheet.kv == sheet.kv_per_token * context
    assert sheet.kv / GB == pytest.approx(kv, abs=ROUNDED)
    assert sheet.resident / GB == pytest.approx(resident, abs=ROUNDED)


@pytest.mark.parametrize(("rank", "megabytes"), [(8, 25.2), (16, 50.3), (32, 100.7), (64, 201.3)])
def test_slot_bytes_of_phi_3_mini(rank: int, megabytes: float) -> None:
    sheet, bare = full_sheet(rank=rank), full_sheet()
    assert sheet.adapter / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert sheet.resident - bare.resident == sheet.adapter
    assert sheet.decode_read_bytes - bare.decode_read_bytes == sheet.adapter
    # Two bytes of a slot are one number, which meets one activation.
    assert sheet.decode_multiply_adds["adapter"] == sheet.adapter // 2
    assert sheet.prefill_multiply_adds["adapter"] == 64 * sheet.adapter // 2
    assert bare.decode_multiply_adds["adapter"] == bare.adapter == 0


def test_slots_of_rank_16_add_the_published_share_of_weight_traffic() -> None:
    sheet = full_sheet(rank=16)
    assert sheet.adapter / sheet.package_bytes == pytest.approx(0.023, abs=0.001)


def test_multiply_adds_of_phi_3_mini() -> None:
    sheet = full_sheet()
    work = sheet.decode_multiply_adds
    assert work["projections"] / 1e9 == pytest.approx(3.624, abs=0.001)
    assert work["head"] == 32064 * 3072
    assert work["attention"] == 32 * 2 * 3072 * 2048
    assert sheet.prefill_multiply_adds == {
        "projections": 64 * work["projections"],
        "attention": 64 * work["attention"],
        "head": work["head"],  # one row, however many tokens are read
        "adapter": 0,
    }


def test_a_ceiling_is_bandwidth_over_the_bytes_of_a_token() -> None:
    sheet = full_sheet(rank=16)
    read = sheet.decode_read
    assert read == {
        # All but the other rows of the embedding and of the tables.
        "weights": pytest.approx(
            sum(sheet.package[p] for p in ("qkv", "o", "gate_up", "down", "norms", "head")), abs=1e4
        ),
        "keys_values": 2048 * 384 * 1024,
        "adapter": sheet.adapter,
    }
    ceilings = {ceiling.chip: ceiling for ceiling in sheet.ceilings}
    assert list(ceilings) == list(BANDWIDTHS)
    # 120 GB/s over 1.95 + 0.10 + 0.81 + 0.05 GB.
    assert ceilings["M4"].tokens_per_second == pytest.approx(41.2, abs=0.2)
    ratio = ceilings["M4 Max (16-core)"].tokens_per_second / ceilings["M4"].tokens_per_second
    assert ratio == pytest.approx(546 / 120)


# --- small models against what is counted


def plan_of(name: str, **how: object) -> tuple[Phi3Config, Plan]:
    checkpoint = open_checkpoint(PHI3 / name)
    export = replace(ExportConfig(bits=16), context=64, prefill=32)
    weights = plan_weights(checkpoint, export)
    return checkpoint.config, Plan(checkpoint.config, export, 64, weights, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mini-4k", "gqa", "partial-rotary-tied"])
def test_numbers_of_a_small_package_are_those_of_the_model(name: str) -> None:
    config, plan = plan_of(name)
    sheet = cost_sheet(config, plan.weights, plan.export, context=64)
    model = build_model(open_checkpoint(PHI3 / name))
    block = model.model.layers[0]
    assert sheet.package["qkv"] == 2 * 2 * block.self_attn.qkv_proj.weight.size
    assert sheet.package["gate_up"] == 2 * 2 * block.mlp.gate_up_proj.weight.size
    assert sheet.package["norms"] == 5 * 2 * config.hidden_size
    assert sheet.package["embedding"] == 2 * model.model.embed_tokens.weight.size
    assert sheet.package["head"] == (0 if config.tie_word_embeddings else 2 * 320 * 64)
    assert sheet.package["rope"] == sum(part.nbytes for part in plan.rope_parts)
    layers, heads, slots, dim = plan.cache_shape
    assert sheet.kv == 2 * layers * heads * slots * dim * 2
    assert sheet.prefill == 32


def test_a_tied_head_is_stored_once_and_read_for_every_token() -> None:
    config, plan = plan_of("partial-rotary-tied")
    assert config.tie_word_embeddings
    sheet = cost_sheet(config, plan.weights, plan.export, context=64)
    rest = sum(sheet.package[p] for p in ("qkv", "o", "gate_up", "down", "norms"))
    assert sheet.decode_read["weights"] > rest + sheet.package["embedding"]


def test_functions_mode_stores_every_adapter_and_reads_one() -> None:
    config, plan = plan_of("mini-4k")
    both = {"a": read_adapter(PHI3 / "mini-4k/peft_0"), "b": read_adapter(PHI3 / "mini-4k/peft_1")}
    sheet = cost_sheet(config, plan.weights, plan.export, context=64, factors=both)
    bare = cost_sheet(config, plan.weights, plan.export, context=64)
    large, small = (
        sum(sum(part.nbytes for part in layer_factors(adapter, name)) for name in adapter.layers)
        for adapter in both.values()
    )
    assert small < large
    assert sheet.package["adapters"] == large + small
    assert sheet.adapter == sheet.decode_read["adapter"] == large
    assert sheet.resident - bare.resident == large + small


def test_slot_bytes_are_those_of_the_arrays() -> None:
    config, plan = plan_of("gqa")
    sheet = cost_sheet(config, plan.weights, plan.export, context=64, slot_rank=8)
    assert sheet.adapter == sum(array.nbytes for array in zero_slots(config, 8).values())


@pytest.mark.parametrize("rank", [None, 8])
def test_the_estimate_is_near_the_package_that_is_written(rank: int | None, tmp_path: Path) -> None:
    config, plan = plan_of("mini-4k", slot_rank=rank)
    write_package(plan, PackageText("test"), tmp_path / "a.mlpackage")
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    guess, exact = (
        cost_sheet(
            config, plan.weights, plan.export, context=64, slot_rank=rank, package_bytes=known
        )
        for known in (None, written)
    )
    assert exact.package_bytes == written
    assert exact.package["program"] < written - plan.weights.nbytes
    assert plan_blobs(plan.parts).nbytes < written
    # Text grows with names and shapes: an estimate for the megabyte beside two gigabytes.
    assert guess.package["program"] == pytest.approx(exact.package["program"], rel=0.3)


def test_the_sheet_is_plain_json_with_its_sums_and_its_reservations() -> None:
    sheet = full_sheet(rank=16)
    plain = json.loads(json.dumps(sheet.to_dict()))
    assert plain == sheet.to_dict()
    assert plain["package_bytes"] == sum(plain["package"].values())
    assert plain["decode_read_bytes"] == sum(plain["decode_read"].values())
    assert plain["ceilings"][0] == sheet.ceilings[0]._asdict()
    words = " ".join(plain["assumptions"])
    assert "prediction" in words and "without scratch" in words and "ceilings" in words


def test_the_rows_show_every_part_that_is_there_and_the_totals() -> None:
    sheet = full_sheet(rank=16)
    rows = {(row.group, row.name): row for row in sheet.rows()}
    assert len(rows) == len(sheet.rows())
    assert rows["package", "total"].value == sheet.package_bytes
    assert rows["package", "gate_up"].value == sheet.package["gate_up"]
    assert ("package", "adapters") not in rows
    assert rows["read per token", "total"].value == sheet.decode_read_bytes
    assert rows["prefill, 64 tokens", "total"].unit == "multiply-adds"
    assert rows["ceiling", "M2"].value == sheet.ceilings[3].tokens_per_second
