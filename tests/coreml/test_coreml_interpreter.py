"""A saved package runs as its program says: values, states, types; what it cannot run it names."""

from __future__ import annotations

import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mil_programs import builder, change, four_bit, function, operations, package, save

from mlx_medphi.coreml.interpreter import Interpreter
from mlx_medphi.coreml.library import coremltools
from mlx_medphi.coreml.package_file import Package, open_package
from mlx_medphi.errors import BundleError

Array = npt.NDArray[Any]

# A small model of one layer: each id has a row; the rows of a sequence attend to what the cache
# holds up to their place; a quantised head.
ROWS, WIDTH, CONTEXT, VOCABULARY, GROUP = 24, 32, 12, 40, 16
# Values of size 10 go through float16 four times, each rounding by 2^-11 of the value.
HALF_STEPS = 0.02


def model_parts() -> dict[str, tuple[Array, Array, Array]]:
    rng = np.random.default_rng(21)
    return {
        name: (
            rng.integers(0, 16, (rows, WIDTH)),
            (rng.random((rows, WIDTH // GROUP)) * 0.2 + 0.05).astype(np.float16),
            rng.integers(6, 10, (rows, WIDTH // GROUP)),
        )
        for name, rows in (("embedding", ROWS), ("head", VOCABULARY))
    }


PARTS = model_parts()


def weight(name: str) -> Any:
    mb = builder()
    made = {}
    for part, values in zip(("data", "scale", "offset"), PARTS[name], strict=True):
        value = mb.const(val=values if part == "scale" else four_bit(values), name=f"{name}_{part}")
        value.op.weight_id = f"{name}.{part}"
        made[part] = value
    return mb.constexpr_blockwise_shift_scale(**made)


def attend(width: int) -> Any:
    """A function that reads `width` ids from `position` on."""
    mb = builder()

    def body(ids: Any, position: Any, mask: Any, cache: Any) -> dict[str, Any]:
        x = mb.gather(x=weight("embedding"), indices=ids, axis=0, validate_indices=False)
        zero, last = np.zeros(1, np.int32), mb.add(x=position, y=np.array([width], np.int32))
        begin = mb.concat(values=[zero, position, zero], axis=0)
        end = mb.concat(values=[np.ones(1, np.int32), last, np.array([WIDTH], np.int32)], axis=0)
        new = mb.slice_update(x=mb.read_state(input=cache), update=x, begin=begin, end=end)
        kept = mb.coreml_update_state(state=cache, value=new)
        seen = mb.scaled_dot_product_attention(query=x, key=kept, value=kept, attn_mask=mask)
        return {"logits": mb.linear(x=mb.add(x=x, y=seen), weight=weight("head"))}

    inputs = {
        "ids": ("int32", (1, width)),
        "position": ("int32", (1,)),
        "mask": ("float16", (1, width, CONTEXT)),
    }
    return function(body, inputs, {"cache": ("float16", (1, CONTEXT, WIDTH))})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.mlpackage"
    return save(path, decode=attend(1), prefill=attend(4))


@pytest.fixture(scope="module")
def small(saved: Path) -> Package:
    return open_package(saved)


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "small.mlpackage"))


def arguments(ids: list[int], position: int) -> dict[str, Array]:
    places = position + np.arange(len(ids))[:, None]
    mask = np.where(np.arange(CONTEXT) <= places, 0.0, -1e4).astype(np.float16)
    return {
        "ids": np.array([ids], np.int32),
        "position": np.array([position], np.int32),
        "mask": mask[None],
    }


def reference(ids: list[int]) -> Array:
    """The model in float64, without cache."""
    table, head = (
        (codes - np.repeat(offsets, GROUP, 1)) * np.repeat(scales.astype(np.float64), GROUP, 1)
        for codes, scales, offsets in PARTS.values()
    )
    x = table[ids]
    scores = x @ x.T / np.sqrt(WIDTH)
    scores[np.triu_indices(len(ids), 1)] = -np.inf
    odds = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray((x + odds / odds.sum(1, keepdims=True) @ x) @ head.T)


IDS = [3, 17, 5, 3, 23, 0, 9]


def test_two_functions_share_one_state(small: Package) -> None:
    interpreter = Interpreter(small)
    wide, narrow = interpreter.new_state("prefill"), interpreter.new_state("decode")
    logits = [interpreter.run("prefill", arguments(IDS[:4], 0), wide)["logits"][0]]
    logits += [
        interpreter.run("decode", arguments([i], at), wide)["logits"][0]
        for at, i in enumerate(IDS[4:], 4)
    ]
    alone = [
        interpreter.run("decode", arguments([i], at), narrow)["logits"][0]
        for at, i in enumerate(IDS)
    ]
    expected = reference(IDS)
    assert np.abs(expected).max() > 5
    np.testing.assert_allclose(np.concatenate(logits), expected, rtol=0, atol=HALF_STEPS)
    np.testing.assert_allclose(np.concatenate(alone), expected, rtol=0, atol=HALF_STEPS)
    np.testing.assert_array_equal(wide["cache"], narrow["cache"])
    assert not wide["cache"][0, len(IDS) :].any()


def test_a_model_too_large_for_the_cache_gives_the_same(small: Package) -> None:
    whole, streamed = Interpreter(small), Interpreter(small, cache_bytes=0)
    states = [whole.new_state("prefill"), streamed.new_state("prefill")]
    got = [
        i.run("prefill", arguments(IDS[:4], 0), s)["logits"]
        for i, s in zip((whole, streamed), states, strict=True)
    ]
    np.testing.assert_allclose(got[0], got[1], rtol=0, atol=HALF_STEPS)
    assert streamed.cache.nbytes == 0
    # The head only: of the embedding nothing but the rows that are asked for is dequantised.
    assert whole.cache.nbytes == VOCABULARY * WIDTH * 4


def test_functions_share_the_cached_weights(small: Package) -> None:
    interpreter = Interpreter(small)
    state = interpreter.new_state("decode")
    interpreter.run("prefill", arguments(IDS[:4], 0), state)
    held = interpreter.cache.nbytes
    interpreter.run("decode", arguments(IDS[4:5], 4), state)
    assert interpreter.cache.nbytes == held


def test_coremltools_own_reader_agrees_with_the_saved_weights(saved: Path, small: Package) -> None:
    """The second method: their loader gives the same dequantised numbers for the same file."""
    loader = coremltools("converters.mil.frontend.milproto.load").load
    model = coremltools("proto.Model_pb2").Model()
    folder = saved / "Data" / "com.apple.CoreML"
    model.ParseFromString((folder / "model.mlmodel").read_bytes())
    theirs = loader(model, specification_version=9, file_weights_dir=str(folder / "weights"))
    values = [
        op.materialized_val_inference()
        for op in theirs.functions["decode"].operations
        if op.op_type == "constexpr_blockwise_shift_scale"
    ]
    interpreter = Interpreter(small)
    ours: dict[str, Array] = {}
    for step in interpreter.package.program.functions["decode"].block_specializations.values():
        for op in step.operations:
            if op.type == "constexpr_blockwise_shift_scale":
                constants = interpreter.routines["decode"].constants
                ours[op.outputs[0].name] = constants[op.outputs[0].name].array()
    assert len(values) == len(ours) == 2
    for mine, their in zip(ours.values(), values, strict=True):
        np.testing.assert_array_equal(mine, their)


# --- states --------------------------------------------------------------------------------------

MEMORY = {"memory": ("float16", (4, 3))}
ONE_ROW = {"row": ("float16", (1, 3)), "at": ("int32", (1,))}


def put(value: Any, row: Any, at: Any) -> Any:
    """`value` with its row number `at` replaced."""
    mb = builder()
    zero, width = np.zeros(1, np.int32), np.array([3], np.int32)
    after = mb.add(x=at, y=np.ones(1, np.int32))
    return mb.slice_update(
        x=value,
        update=row,
        begin=mb.concat(values=[at, zero], axis=0),
        end=mb.concat(values=[after, width], axis=0),
    )


def update(state: Any, row: Any, at: Any) -> Any:
    mb = builder()
    return mb.coreml_update_state(state=state, value=put(mb.read_state(input=state), row, at))


def used_after(row: Any, at: Any, memory: Any) -> dict[str, Any]:
    """An old value beside the newest one."""
    mb = builder()
    old = mb.read_state(input=memory)
    new = mb.coreml_update_state(state=memory, value=put(old, row, at))
    return {"old": mb.add(x=old, y=old), "new": new}


def view_used_after(row: Any, at: Any, memory: Any) -> dict[str, Any]:
    mb = builder()
    old = mb.read_state(input=memory)
    part = mb.transpose(x=mb.slice_by_size(x=old, begin=[1, 0], size=[2, 3]), perm=[1, 0])
    new = update(memory, row, at)
    return {"part": mb.add(x=part, y=part), "new": new}


def read_before_write(row: Any, at: Any, memory: Any) -> dict[str, Any]:
    """The state is still the old one while a changed copy exists already."""
    mb = builder()
    changed = put(mb.read_state(input=memory), row, at)
    old = mb.read_state(input=memory)
    both = mb.sub(x=changed, y=old)
    new = mb.coreml_update_state(state=memory, value=changed)
    return {"difference": both, "new": new}


def never_written(row: Any, at: Any, memory: Any) -> dict[str, Any]:
    changed = put(builder().read_state(input=memory), row, at)
    return {"changed": changed, "new": builder().read_state(input=memory)}


def used_before_next_update(row: Any, at: Any, memory: Any) -> dict[str, Any]:
    """The value of one update is needed after the next one."""
    mb = builder()
    first = update(memory, row, at)
    second = update(memory, mb.add(x=row, y=row), np.array([3], np.int32))
    return {"first": mb.add(x=first, y=first), "new": second}


def update_with_itself(row: Any, at: Any, memory: Any) -> dict[str, Any]:
    """Rows move down by one, so that source and target overlap."""
    mb = builder()
    old = mb.read_state(input=memory)
    rows = mb.slice_by_size(x=old, begin=[0, 0], size=[3, 3])
    moved = mb.slice_update(x=old, update=rows, begin=[1, 0], end=[4, 3])
    return {"new": mb.coreml_update_state(state=memory, value=moved)}


def returned(row: Any, at: Any, memory: Any) -> dict[str, Any]:
    """The old value is an output itself."""
    old = builder().identity(x=builder().read_state(input=memory), name="old")
    return {"old": old, "new": update(memory, row, at)}


BEFORE = np.arange(12, dtype=np.float16).reshape(4, 3)
ROW, AT = np.array([[100, 200, 300]], np.float16), 2
AFTER = np.concatenate([BEFORE[:AT], ROW, BEFORE[AT + 1 :]])
PROGRAMS: dict[Callable[..., dict[str, Any]], dict[str, Array]] = {
    used_after: {"old": BEFORE * 2, "new": AFTER},
    view_used_after: {"part": BEFORE[1:3].T * 2, "new": AFTER},
    read_before_write: {"difference": AFTER - BEFORE, "new": AFTER},
    never_written: {"changed": AFTER, "new": BEFORE},
    used_before_next_update: {"first": AFTER * 2, "new": np.concatenate([AFTER[:3], ROW * 2])},
    update_with_itself: {"new": BEFORE[[0, 0, 1, 2]]},
    returned: {"old": BEFORE, "new": AFTER},
}


@pytest.fixture(scope="module")
def remembering(tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    functions = {made.__name__: function(made, ONE_ROW, MEMORY) for made in PROGRAMS}
    path = tmp_path_factory.mktemp("states") / "states.mlpackage"
    return Interpreter(package(path, **functions))


@pytest.mark.parametrize("made", PROGRAMS, ids=lambda made: made.__name__)
def test_states_are_values(made: Callable[..., dict[str, Any]], remembering: Interpreter) -> None:
    state = remembering.new_state(made.__name__)
    state["memory"] = BEFORE
    inputs = {"row": ROW, "at": np.array([AT], np.int32)}
    got = remembering.run(made.__name__, inputs, state)
    for name, expected in PROGRAMS[made].items():
        np.testing.assert_array_equal(got[name], expected, err_msg=name)
    np.testing.assert_array_equal(state["memory"], PROGRAMS[made]["new"])
    # Neither what was given nor what was returned changes with a later run.
    kept = {name: value.copy() for name, value in got.items()}
    remembering.run(made.__name__, {**inputs, "row": ROW * 2}, state)
    for name, value in kept.items():
        np.testing.assert_array_equal(got[name], value)
    assert BEFORE[AT, 0] == 6 and ROW[0, 0] == 100


def test_a_cache_is_updated_where_it_lies(small: Package) -> None:
    interpreter = Interpreter(small)
    state = interpreter.new_state("decode")
    array = state["cache"]
    interpreter.run("decode", arguments([3], 0), state)
    assert state["cache"] is array and array[0, 0].any()


def test_a_state_given_as_an_input_stays_as_it_was(tmp_path: Path) -> None:
    mb = builder()

    def body(x: Any, memory: Any) -> dict[str, Any]:
        new = update(memory, np.ones((1, 3), np.float16), np.array([0], np.int32))
        return {"sum": mb.add(x=new, y=x)}

    made = function(body, {"x": ("float16", (4, 3))}, MEMORY)
    interpreter = Interpreter(package(tmp_path / "alias.mlpackage", main=made))
    state = interpreter.new_state("main")
    state["memory"] = BEFORE
    got = interpreter.run("main", {"x": state["memory"]}, state)["sum"]
    np.testing.assert_array_equal(got, np.concatenate([BEFORE[:1] + 1, BEFORE[1:] * 2]))


@pytest.mark.parametrize("change_first", [False, True])
def test_an_input_written_to_a_state_stays_as_it_was(tmp_path: Path, change_first: bool) -> None:
    mb = builder()
    ones, top = np.ones((1, 3), np.float16), np.array([0], np.int32)

    def body(x: Any, memory: Any) -> dict[str, Any]:
        if change_first:
            return {"new": mb.coreml_update_state(state=memory, value=put(x, ones, top))}
        mb.coreml_update_state(state=memory, value=x)
        return {"new": update(memory, ones, top)}

    made = function(body, {"x": ("float16", (4, 3))}, MEMORY)
    interpreter = Interpreter(package(tmp_path / "input.mlpackage", main=made))
    state, x = interpreter.new_state("main"), BEFORE.copy()
    got = interpreter.run("main", {"x": x}, state)["new"]
    np.testing.assert_array_equal(x, BEFORE)
    np.testing.assert_array_equal(got, np.concatenate([ones, BEFORE[1:]]))


@pytest.mark.parametrize("shared", [False, True])
def test_two_states_stay_apart(tmp_path: Path, shared: bool) -> None:
    mb = builder()

    def body(x: Any, one: Any, two: Any) -> dict[str, Any]:
        mb.coreml_update_state(state=two, value=mb.read_state(input=one))
        new = update(one, x, np.array([0], np.int32))
        return {"first": new, "second": mb.read_state(input=two)}

    made = function(
        body, {"x": ("float16", (1, 3))}, {"one": MEMORY["memory"], "two": MEMORY["memory"]}
    )
    interpreter = Interpreter(package(tmp_path / "two.mlpackage", main=made))
    state: Any = interpreter.new_state("main")
    state["one"] = BEFORE
    if shared:
        # A mapping of arrays does as well; here both names stand for the same one.
        array = BEFORE.copy()
        state = {"one": array, "two": array}
    for _ in range(2):
        before = state["one"].copy()
        got = interpreter.run("main", {"x": ROW}, state)
        np.testing.assert_array_equal(got["second"], before)
        np.testing.assert_array_equal(got["first"], np.concatenate([ROW, BEFORE[1:]]))
        np.testing.assert_array_equal(state["two"], before)


def test_a_state_holds_only_its_own_kind(small: Package) -> None:
    state = Interpreter(small).new_state("decode")
    values = np.ones((1, CONTEXT, WIDTH), np.float16)
    state["cache"] = values
    values[:] = 2
    assert list(state) == ["cache"] and len(state) == 1 and (state["cache"] == 1).all()
    other = state.copy()
    other["cache"][:] = 3
    assert (state["cache"] == 1).all()
    with pytest.raises(BundleError, match="no state 'keys', only cache"):
        state["keys"] = values
    with pytest.raises(BundleError, match=r"'cache' is float32 \[1, 12, 32\], expected float16"):
        state["cache"] = values.astype(np.float32)
    with pytest.raises(BundleError, match="belongs to the model"):
        del state["cache"]


# --- what is said --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ids": None}, "inputs mask, position given, expected ids, mask, position"),
        ({"more": np.zeros(1)}, "inputs ids, mask, more, position given, expected"),
        ({"ids": np.zeros((1, 2), np.int32)}, "input 'ids' is int32 [1, 2], expected int32 [1, 1]"),
        ({"ids": np.zeros((1, 1))}, "input 'ids' is float64 [1, 1], expected int32 [1, 1]"),
        ({"ids": [[1]]}, "input 'ids' is a list, expected an array"),
        ({"ids": np.array([[ROWS]], np.int32)}, "gather"),
        ({"position": np.array([CONTEXT], np.int32)}, "slice_update"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    small: Package, changed: dict[str, Any], message: str
) -> None:
    interpreter = Interpreter(small)
    inputs = {k: v for k, v in {**arguments([3], 0), **changed}.items() if v is not None}
    with pytest.raises(BundleError) as caught:
        interpreter.run("decode", inputs, interpreter.new_state("decode"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_function_or_a_missing_state_is_refused(small: Package) -> None:
    interpreter = Interpreter(small)
    with pytest.raises(BundleError, match="no function 'predict', only decode, prefill"):
        interpreter.run("predict", {})
    with pytest.raises(BundleError, match="no function 'predict'"):
        interpreter.new_state("predict")
    with pytest.raises(BundleError, match="'decode' needs a state; make one with new_state"):
        interpreter.run("decode", arguments([3], 0))
    with pytest.raises(BundleError, match="states none given, expected cache"):
        interpreter.run("decode", arguments([3], 0), {})
    wrong = {"cache": np.zeros((1, 1), np.float16)}
    with pytest.raises(BundleError, match=r"state 'cache' is float16 \[1, 1\], expected"):
        interpreter.run("decode", arguments([3], 0), wrong)


def test_all_operations_that_are_not_implemented_are_named_at_once(copied: Path) -> None:
    def edit(model: Any) -> None:
        for op in operations(model, "prefill"):
            op.type = {"linear": "conv", "gather": "lstm"}.get(op.type, op.type)

    with pytest.raises(BundleError, match="operations that are not implemented: conv, lstm$"):
        Interpreter(open_package(change(copied, edit)))


def first(model: Any, op_type: str) -> Any:
    return next(op for op in operations(model, "decode") if op.type == op_type)


def other_shape(model: Any) -> None:
    first(model, "gather").outputs[0].type.tensorType.dimensions[1].constant.size = 2


def other_type(model: Any) -> None:
    tensor = first(model, "scaled_dot_product_attention").outputs[0].type.tensorType
    tensor.dataType = coremltools("proto.MIL_pb2").DataType.Value("FLOAT32")


def too_many_outputs(model: Any) -> None:
    op = first(model, "gather")
    op.outputs.add().CopyFrom(op.outputs[0])
    op.outputs[1].name = "second"


def state_of_another_shape(model: Any) -> None:
    op = first(model, "write_state")
    op.inputs["data"].arguments[0].name = first(model, "gather").outputs[0].name


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (other_shape, r"gather 'gather_\d+': output 'gather_\d+' is float16 \[1, 1, 32\], the "
                      r"program declares float16 \[1, 2, 32\]"),
        (other_type, r"scaled_dot_product_attention '\w+': output '\w+' is float16 \[1, 1, 32\], "
                     r"the program declares float32 \[1, 1, 32\]"),
        (too_many_outputs, "gather 'gather_\\d+': 1 outputs, the program declares 2"),
        (state_of_another_shape, r"write_state 'cache': float16 \[1, 1, 32\] into a state float16"),
    ],
)  # fmt: skip
def test_what_differs_from_the_declared_type_is_named(
    copied: Path, edit: Callable[[Any], None], message: str
) -> None:
    interpreter = Interpreter(open_package(change(copied, edit)))
    with pytest.raises(BundleError, match=f"function 'decode': {message}"):
        interpreter.run("decode", arguments([3], 0), interpreter.new_state("decode"))


def lost_argument(model: Any) -> None:
    del first(model, "gather").inputs["indices"]


def strange_argument(model: Any) -> None:
    op = first(model, "gather")
    op.inputs["dropout"].CopyFrom(op.inputs["axis"])


def unmade_argument(model: Any) -> None:
    first(model, "gather").inputs["indices"].arguments[0].name = "later"


def two_arguments(model: Any) -> None:
    first(model, "gather").inputs["indices"].arguments.add().name = "ids"


def made_twice(model: Any) -> None:
    first(model, "gather").outputs[0].name = "ids"


def nested(model: Any) -> None:
    first(model, "gather").blocks.add()


def other_constant_shape(model: Any) -> None:
    op = first(model, "constexpr_blockwise_shift_scale")
    op.outputs[0].type.tensorType.dimensions[0].constant.size = 3


def other_blob_offset(model: Any) -> None:
    op = first(model, "constexpr_blockwise_shift_scale")
    op.inputs["data"].arguments[0].value.blobFileValue.offset += 64


def other_blob_type(model: Any) -> None:
    op = first(model, "constexpr_blockwise_shift_scale")
    tensor = op.inputs["data"].arguments[0].value.type.tensorType
    tensor.dataType = coremltools("proto.MIL_pb2").DataType.Value("UINT8")


def other_blob_shape(model: Any) -> None:
    op = first(model, "constexpr_blockwise_shift_scale")
    tensor = op.inputs["data"].arguments[0].value.type.tensorType
    tensor.dimensions[0].constant.size = 1 << 40


def numbers_short(model: Any) -> None:
    op = next(op for op in operations(model, "decode") if op.type == "const" and rank(op) == 1)
    op.attributes["val"].immediateValue.tensor.ints.values.append(1)


def rank(op: Any) -> int:
    return len(op.outputs[0].type.tensorType.dimensions)


def words(model: Any) -> None:
    op = first(model, "const")
    op.attributes["val"].immediateValue.tensor.strings.values.append("x")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lost_argument, "gather '\\w+': lacks its argument indices"),
        (strange_argument, "gather '\\w+': has arguments that are not implemented: dropout"),
        (unmade_argument, "gather '\\w+': argument 'indices' is 'later', which is not made"),
        (two_arguments, "gather '\\w+': argument 'indices' has 2 values, expected one"),
        (made_twice, "gather 'ids': makes 'ids', which is there already"),
        (nested, "gather '\\w+': nested operations are not implemented"),
        (other_constant_shape, r"is float16 \[24, 32\], declared float16 \[3, 32\]"),
        (other_blob_offset, "weight.bin: no whole constant at byte"),
        (other_blob_type, "weight.bin: uint4 at byte \\d+, the program says uint8"),
        (other_blob_shape, "bytes for uint4 \\[1099511627776, 32\\], expected"),
        (numbers_short, "const '\\w+': 2 numbers for int32 \\[1\\]"),
        (words, "const '\\w+': numbers of kind strings are not implemented"),
    ],
)
def test_a_program_that_is_not_sound_is_refused_before_it_runs(
    copied: Path, edit: Callable[[Any], None], message: str
) -> None:
    opened = open_package(change(copied, edit))
    with pytest.raises(BundleError, match=message) as caught:
        Interpreter(opened)
    assert "small.mlpackage: function 'decode': " in str(caught.value)
    assert "\n" not in str(caught.value)


# --- what is watched -----------------------------------------------------------------------------


def test_a_watcher_sees_every_value_and_cannot_change_it(small: Package) -> None:
    interpreter = Interpreter(small)
    seen: list[tuple[str, str, Array]] = []

    def watch(op_type: str, name: str, value: Array) -> None:
        assert not value.flags.writeable
        seen.append((op_type, name, value.copy()))

    state = interpreter.new_state("decode")
    got = interpreter.run("decode", arguments([3], 0), state, watch)
    kinds = [op_type for op_type, _, _ in seen]
    assert (
        kinds[0] == "gather" and kinds[-2:] == ["linear", "identity"] and "write_state" not in kinds
    )
    assert kinds.count("read_state") == 2
    assert seen[-1][1] == "logits"
    np.testing.assert_array_equal(seen[-1][2], got["logits"])
    np.testing.assert_array_equal(seen[kinds.index("gather")][2][0, 0], state["cache"][0, 0])


def test_a_watchers_error_is_its_own(small: Package) -> None:
    interpreter = Interpreter(small)

    def watch(op_type: str, name: str, value: Array) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$"):
        interpreter.run("decode", arguments([3], 0), interpreter.new_state("decode"), watch)


def test_values_are_freed_after_their_last_use(tmp_path: Path) -> None:
    mb = builder()

    def body(x: Any) -> dict[str, Any]:
        for _ in range(6):
            x = mb.add(x=x, y=np.float32(1))
        return {"y": x}

    opened = package(tmp_path / "chain.mlpackage", main=function(body, {"x": ("float32", (9,))}))
    alive: list[weakref.ref[Array]] = []
    most = 0

    def watch(op_type: str, name: str, value: Array) -> None:
        nonlocal most
        assert value.base is not None
        alive.append(weakref.ref(value.base))
        most = max(most, sum(ref() is not None for ref in alive))

    got = Interpreter(opened).run("main", {"x": np.zeros(9, np.float32)}, watch=watch)
    assert len(alive) == 7
    assert most == 2 and (got["y"] == 6).all()


def test_importing_the_interpreter_imports_neither_coremltools_nor_mlx() -> None:
    code = (
        "import sys, mlx_medphi.coreml.interpreter\n"
        "sys.exit(bool({'coremltools', 'mlx', 'google.protobuf'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
