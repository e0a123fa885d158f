"""The program is the planned one: typed, shared, and what coremltools itself would write."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from reference_cases import (
    ADAPTERS,
    CONTEXT,
    FOLDERS,
    MINI,
    PREFILL,
    AnyFeature,
    Export,
    Exported,
    checkpoint_of,
    make_plan,
    settings,
)

from mlx_medphi.coreml.library import coremltools
from mlx_medphi.coreml.package import WEIGHT_FILE, PackageText, describe
from mlx_medphi.coreml.package_file import Package, open_package
from mlx_medphi.coreml.program import Plan, build_program, rope_tables
from mlx_medphi.coreml.slots import layer_factors, slot_shapes
from mlx_medphi.model.adapter_files import read_adapter
from mlx_medphi.model.weights import open_checkpoint

# A cosine in float16 is off by half a step of 1: 2^-11 and what float32 wavelengths add.
TABLE_ROUNDING = 5.5e-4


def opened(exported: Exported) -> Package:
    return open_package(exported.package)


def operations(package: Package, function: str) -> list[Any]:
    made = package.program.functions[function]
    return list(made.block_specializations[made.opset].operations)


def stored(op: Any) -> Iterator[tuple[str, Any]]:
    """What an operation takes from the weight file: names and places."""
    values = {"val": op.attributes["val"]} if op.type == "const" else {}
    for name, binding in op.inputs.items():
        values |= {f"{name}.{i}": item.value for i, item in enumerate(binding.arguments)}
    for name, value in sorted(values.items()):
        if value.WhichOneof("value") == "blobFileValue":
            yield f"{op.outputs[0].name}.{name}", value.blobFileValue


def constants(package: Package, function: str) -> Iterator[tuple[str, int]]:
    """Name and offset of each constant of the weight file."""
    for op in operations(package, function):
        yield from ((name, place.offset) for name, place in stored(op))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(checkpoint_of("gqa"), settings())


def factors_of(name: str) -> dict[str, Any]:
    adapter = read_adapter(ADAPTERS[name])
    return {layer: layer_factors(adapter, layer) for layer in adapter.layers}


# --- what the program has -------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_inputs_states_and_outputs_are_the_planned_ones(name: str, exported: Export) -> None:
    package, config = opened(exported(name)), checkpoint_of(name).config
    both = name == "longrope-long"
    assert set(package.functions) == {"prefill", "decode"}
    for function, width in (("prefill", PREFILL), ("decode", 1)):
        signature = package.functions[function]
        kinds = {key: (kind.dtype, kind.shape) for key, kind in signature.inputs.items()}
        row = {"ropeRow": ("int32", (1,))} if both else {}
        assert kinds == {
            "inputIds": ("int32", (1, width)),
            "position": ("int32", (1,)),
            "causalMask": ("float16", (1, 1, width, CONTEXT)),
            "lastIndex": ("int32", (1,)),
            **row,
        }
        cache = (config.num_hidden_layers, config.num_key_value_heads, CONTEXT, config.head_dim)
        states = {key: (kind.dtype, kind.shape) for key, kind in signature.states.items()}
        assert states == {"keyCache": ("float16", cache), "valueCache": ("float16", cache)}
        (logits,) = signature.outputs.values()
        assert (logits.dtype, logits.shape) == ("float16", (1, 1, config.vocab_size))


@pytest.mark.parametrize("kind", ["state", "input"])
def test_slots_are_states_or_inputs_of_every_function(kind: str, adapted: Export) -> None:
    package = opened(adapted("slots", slot_kind=kind))
    shapes = slot_shapes(open_checkpoint(MINI).config, 8)
    assert len(shapes) == 8
    for signature in package.functions.values():
        here, there = signature.states, signature.inputs
        if kind == "input":
            here, there = there, here
        found = {name: here[name].shape for name in shapes}
        assert found == shapes and not shapes.keys() & there.keys()
        assert {here[name].dtype for name in shapes} == {"float16"}


def test_each_adapter_has_a_pair_of_functions(adapted: Export) -> None:
    package = opened(adapted("functions"))
    pairs = {f"{kind}_{name}" for kind in ("prefill", "decode") for name in ADAPTERS}
    assert set(package.functions) == {"prefill", "decode", *pairs}
    assert len({str(signature.states) for signature in package.functions.values()}) == 1


def test_decode_is_the_default_and_the_form_is_that_of_ios_18(exported: Export) -> None:
    package = opened(exported("mini-4k"))
    assert package.default_function == "decode" and package.spec_version == 9
    assert {function.opset for function in package.program.functions.values()} == {"CoreML8"}


# --- shared constants -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["none", "slots", "functions", "quantised"])
def test_all_functions_take_each_weight_from_the_same_place(
    form: str, exported: Export, adapted: Export
) -> None:
    if form == "none":
        package = opened(exported("mini-4k"))
    elif form == "quantised":
        package = opened(adapted("functions", bits=4, group_size=32))
    else:
        package = opened(adapted(form))
    places = {name: dict(constants(package, name)) for name in package.functions}
    base = places["decode"]
    for name, found in places.items():
        assert {key: found[key] for key in base} == base
        # What is not the base's is an adapter's and in its own functions only.
        own = found.keys() - base.keys()
        assert (own == set()) == (name in ("prefill", "decode"))
        prefix = f"adapter_{name.partition('_')[2]}_model_layers_"
        assert all(key.startswith((prefix, "zeros_")) for key in own)
    # Two names for one place would be two loads of it.
    every = {(key, at) for found in places.values() for key, at in found.items()}
    assert len({at for _, at in every}) == len(every) == opened_count(package)


def opened_count(package: Package) -> int:
    assert package.blobs is not None
    return package.blobs.count


def test_a_constant_is_made_once_in_a_function(exported: Export, adapted: Export) -> None:
    for package in (opened(exported("partial-rotary-tied")), opened(adapted("functions"))):
        for name in package.functions:
            offsets = Counter(at for _, at in constants(package, name))
            assert offsets and set(offsets.values()) == {1}


def test_the_weight_file_holds_every_weight_once(exported: Export) -> None:
    for name in ("gqa", "partial-rotary-tied"):
        package, checkpoint = exported(name), checkpoint_of(name)
        plan = make_plan(checkpoint, settings())
        # float16 weights, two rotary tables and a bias of zeros for each width, and no more than
        # 128 bytes around each.
        numbers = sum(math.prod(weight.shape) for weight in plan.weights.layers.values())
        tables = 2 * CONTEXT * (plan.config.rotary_dim // 2)
        widths = {w.shape[0] for w in plan.weights.layers.values() if len(w.shape) == 2}
        least = 2 * (numbers + tables + sum(widths))
        size = (package.package / WEIGHT_FILE).stat().st_size
        assert size == plan.blobs.nbytes
        assert least < size < least + 128 * (len(plan.parts) + 1)
        assert len(plan.parts) == len({part.id for part in plan.parts})


def test_a_tied_head_is_the_embedding(exported: Export) -> None:
    package = opened(exported("partial-rotary-tied"))
    names = [name for name, _ in constants(package, "decode")]
    assert "model_embed_tokens_weight.val" in names and "lm_head_weight.val" not in names


def test_quantised_weights_are_dequantised_once_for_head_and_embedding() -> None:
    plan = make_plan(checkpoint_of("partial-rotary-tied"), settings(bits=4, scheme="channel"))
    model = describe(build_program(plan), plan.blobs, PackageText("x"), AnyFeature())
    for function in model.mlProgram.functions.values():
        made = function.block_specializations[function.opset].operations
        kinds = Counter(op.type for op in made)
        assert kinds["constexpr_blockwise_shift_scale"] == 4 * 2 + 1
        outputs = [op.outputs[0].name for op in made if op.type.startswith("constexpr")]
        readers = Counter(
            argument.name
            for op in made
            for binding in op.inputs.values()
            for argument in binding.arguments
            if argument.WhichOneof("binding") == "name" and argument.name in outputs
        )
        assert readers["model_embed_tokens"] == 2
        assert set(readers.values()) == {1, 2}


# --- rotary tables --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("long", [False, True])
def test_rotary_tables_follow_the_formula(name: str, long: bool) -> None:
    checkpoint = checkpoint_of(name)
    raw, config = checkpoint.raw_config, checkpoint.config
    section = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = section.get("rope_theta") or raw.get("rope_theta") or 10000.0
    half = config.rotary_dim // 2
    speeds = theta ** -(np.arange(half, dtype=np.float64) / half)
    scale = 1.0
    if (section.get("rope_type") or section.get("type")) == "longrope":
        speeds /= np.array(section["long_factor" if long else "short_factor"])
        original = raw.get("original_max_position_embeddings") or section.get(
            "original_max_position_embeddings"
        )
        stretch = section.get("factor") or raw["max_position_embeddings"] / original
        scale = math.sqrt(1 + math.log(stretch) / math.log(original))
    angles = np.arange(200)[:, None] * speeds
    cos, sin = rope_tables(config, 200, [long])
    assert cos.dtype == sin.dtype == np.float16 and cos.shape == sin.shape == (200, half)
    np.testing.assert_allclose(cos, np.cos(angles) * scale, rtol=0, atol=TABLE_ROUNDING * scale)
    np.testing.assert_allclose(sin, np.sin(angles) * scale, rtol=0, atol=TABLE_ROUNDING * scale)


def test_two_sets_of_rotary_factors_lie_one_below_the_other() -> None:
    config = checkpoint_of("longrope-long").config
    both = rope_tables(config, 64, (False, True))
    for at, long in ((0, False), (64, True)):
        single = rope_tables(config, 64, [long])
        for found, wanted in zip(both, single, strict=True):
            np.testing.assert_array_equal(found[at : at + 64], wanted)
    assert not np.array_equal(both[0][:64], both[0][64:])


@pytest.mark.parametrize(
    ("name", "context", "sets"),
    [
        ("longrope-long", 64, (False, True)), ("longrope-short", 4096, (False,)),
        ("longrope-short", 4160, (False, True)), ("mini-4k", 4096, (False,)),
    ],
)  # fmt: skip
def test_both_sets_are_stored_only_where_the_context_reaches_beyond_the_switch(
    name: str, context: int, sets: tuple[bool, ...]
) -> None:
    made = make_plan(checkpoint_of(name), settings(context=context))
    assert made.rope_sets == sets
    assert {part.shape[0] for part in made.rope_parts} == {len(sets) * context}
    assert ("ropeRow" in made.inputs(8)) == (len(sets) == 2)


# --- the graph ------------------------------------------------------------------------------------


def types(package: Package, function: str) -> Iterator[tuple[str, str, str]]:
    """Operation, name and type of each output."""
    number = coremltools("proto.MIL_pb2").DataType.Name
    for op in operations(package, function):
        for output in op.outputs:
            yield op.type, output.name, number(output.type.tensorType.dataType).lower()


@pytest.mark.parametrize("function", ["prefill", "decode"])
def test_norms_are_float32_inside_and_everything_else_is_float16(
    function: str, exported: Export
) -> None:
    package = opened(exported("mini-4k"))
    kinds = Counter((op, kind) for op, _, kind in types(package, function))
    norms = 2 * 2 + 1
    assert kinds["rsqrt", "float32"] == kinds["reduce_mean", "float32"] == norms
    assert kinds["mul", "float32"] == 2 * norms
    assert kinds["cast", "float32"] == kinds["cast", "float16"] == norms
    wide = {op for op, kind in kinds if kind == "float32"}
    assert wide == {"cast", "mul", "reduce_mean", "rsqrt", "const"}
    assert kinds["scaled_dot_product_attention", "float16"] == 2


def test_a_float32_residual_is_float32_from_end_to_end(exported: Export) -> None:
    package = opened(exported("longrope-long", residual="float32"))
    found = {name: kind for op, name, kind in types(package, "prefill") if op == "add"}
    assert {found[f"layer_{i}"] for i in range(2)} == {"float32"}
    kinds = Counter((op, kind) for op, _, kind in types(package, "prefill"))
    assert kinds["add", "float32"] == 2 * 2
    narrow = opened(exported("longrope-long"))
    assert ("add", "layer_1", "float16") in list(types(narrow, "prefill"))


def test_a_decomposed_softmax_is_float32(exported: Export) -> None:
    package = opened(exported("gqa", attention="decomposed"))
    found = [(op, kind) for op, _, kind in types(package, "decode")]
    assert found.count(("softmax", "float32")) == 2
    assert not any(op == "scaled_dot_product_attention" for op, _ in found)


def test_one_row_is_chosen_before_the_head(exported: Export) -> None:
    package = opened(exported("mini-4k"))
    found = operations(package, "prefill")
    shapes = {
        output.name: tuple(d.constant.size for d in output.type.tensorType.dimensions)
        for op in found
        for output in op.outputs
    }
    assert shapes["final_norm"] == (1, 1, 64) and shapes["logits"] == (1, 1, 320)
    assert shapes["layer_1"] == (1, PREFILL, 64)


@pytest.mark.parametrize(
    ("name", "changes", "rank"),
    [
        ("gqa", {}, None),
        ("longrope-long", {"attention": "decomposed", "residual": "float32"}, None),
        ("mini-4k", {"adapters": "slots", "bits": 4, "scheme": "channel"}, 8),
    ],
)
def test_the_program_is_the_one_coremltools_writes_without_passes(
    name: str, changes: dict[str, Any], rank: int | None
) -> None:
    plan = make_plan(checkpoint_of(name), settings(**changes), rank)
    ours = describe(build_program(plan), plan.blobs, PackageText("x"), AnyFeature()).mlProgram
    theirs = _converted(build_program(plan)).mlProgram
    places: dict[int, int] = {}
    assert set(ours.functions) == set(theirs.functions) == {"prefill", "decode"}
    for function, made in ours.functions.items():
        other = theirs.functions[function]
        assert made.opset == other.opset
        for one, two in zip(_blocks(made), _blocks(other), strict=True):
            assert len(one.operations) == len(two.operations)
            for op, twin in zip(one.operations, two.operations, strict=True):
                _same(op, twin, places)
            assert list(one.outputs) == list(two.outputs)
        assert list(made.inputs) == list(other.inputs)


def _converted(program: Any) -> Any:
    """The protobuf that coremltools' own conversion gives."""
    ct = coremltools()
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("TQDM_DISABLE", "1")
        program.skip_all_passes = False
        model = ct.convert(
            program,
            compute_precision=ct.precision.FLOAT32,
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
            pass_pipeline=ct.PassPipeline.EMPTY,
        )
    return model.get_spec()


def _blocks(function: Any) -> list[Any]:
    return [block for _, block in sorted(function.block_specializations.items())]


def _same(op: Any, twin: Any, places: dict[int, int]) -> None:
    """Two operations but for the place of their constants, one of ours for each of theirs."""
    for (_, ours), (_, theirs) in zip(stored(op), stored(twin), strict=True):
        assert ours.fileName == theirs.fileName
        assert places.setdefault(theirs.offset, ours.offset) == ours.offset
        theirs.offset = ours.offset
    assert op == twin


def test_progress_counts_the_blocks_of_all_functions(plan: Plan) -> None:
    steps: list[tuple[int, int]] = []
    build_program(plan, lambda done, total: steps.append((done, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


# --- the plan -------------------------------------------------------------------------------------


def test_factors_of_an_adapter_are_constants_of_its_functions() -> None:
    checkpoint = open_checkpoint(MINI)
    made = make_plan(checkpoint, settings(adapters="functions"))
    with_factors = Plan(
        made.config, made.export, made.context, made.weights, factors={"a-b": factors_of("rslora")}
    )
    assert list(with_factors.functions.items()) == [
        ("decode", (1, None)), ("prefill", (PREFILL, None)),
        ("decode_a_b", (1, "a-b")), ("prefill_a_b", (PREFILL, "a-b")),
    ]  # fmt: skip
    added = [part for part in with_factors.parts if part not in made.parts]
    factors = [part for part in added if part.id.startswith("adapter.a-b.")]
    assert len(factors) == 2 * 2 * 2 and [p.id for p in added if p not in factors] == ["zeros.4"]
    assert {part.shape for part in factors if part.id.endswith("o_proj.b")} == {(64, 4)}
    arrays = dict(with_factors.made_arrays())
    assert [part for part in arrays] == with_factors.made_parts
    for part, array in arrays.items():
        assert array.shape == part.shape and array.dtype == np.float16
        assert np.any(array) == (not part.id.startswith("zeros."))


def test_the_weight_file_is_laid_out_in_the_order_of_use(plan: Plan) -> None:
    ids = [part.id for part in plan.parts]
    offsets = plan.blobs.offsets
    assert [offsets[i] for i in ids] == sorted(offsets.values())
    assert ids[0] == "model.embed_tokens.weight" and ids.index("lm_head.weight") < ids.index(
        "rope.cos"
    )
