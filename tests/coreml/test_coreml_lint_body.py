"""Level `spec`: islands, caches, masks, slots and logits that are wrong are found, one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lint_cases import Case, Edit, Edits, Program, expect, make_case

HALF, SINGLE = 10, 11
STEPS = {"attention": "decomposed"}
SLOTS = {"rank": 8}
WIDE = {"residual": "float32"}
TWO_ROPES = {"checkpoint": "longrope-long"}

WRONG = Edits()
finds = WRONG.finds


# float32 islands.


def halve(p: Program, norm: str) -> None:
    """Make a whole norm float16, as a conversion with that precision does."""
    unit = p.maker(p.op(norm), "x", "x")
    rsqrt = p.maker(unit, "y")
    square = p.maker(rsqrt, "x", "x")
    wide = p.maker(square, "x")
    for op in (wide, square, p.maker(rsqrt, "x"), rsqrt, unit):
        p.retype(op, HALF)
    p.value(wide, "dtype").strings.values[0] = "fp16"
    epsilon = p.maker(rsqrt, "epsilon")
    p.retype(epsilon, HALF)
    epsilon.attributes["val"].type.tensorType.dataType = HALF
    epsilon.attributes["val"].immediateValue.tensor.bytes.values = b"\0\1"


@finds("the norm 'layer_1_mlp_norm' computes cast .* in float16, expected float32")
def norm_in_half_precision(p: Program) -> None:
    halve(p, "layer_1_mlp_norm")


@finds("the norm 'final_norm' has an epsilon of .*, expected 9.*e-06")
def another_epsilon(p: Program) -> None:
    rsqrt = p.maker(p.maker(p.op("final_norm"), "x", "x"), "y")
    p.value(rsqrt, "epsilon").floats.values[0] = 2e-5


@finds("rsqrt .* is in no norm")
def square_of_two_values(p: Program) -> None:
    first, second = p.of("rsqrt")[:2]
    p.bind(p.maker(second, "x", "x"), "y", p.name(p.maker(first, "x", "x"), "x"))


@finds("rsqrt .* is in no norm")
def root_used_twice(p: Program) -> None:
    root = p.op("rsqrt")
    narrow = p.add(p.op("layer_0_qkv"), p.maker(p.op("layer_0_input_norm"), "x"), "second")
    p.bind(narrow, "x", root.outputs[0].name)
    narrow.outputs[0].type.CopyFrom(root.outputs[0].type)
    p.retype(narrow, HALF)


@finds("rsqrt .* is in no norm")
def unit_used_twice(p: Program) -> None:
    p.add(p.op("layer_0_qkv"), p.maker(p.op("layer_0_input_norm"), "x"), "second")


@finds("rsqrt .* is in no norm")
def norm_used_before_its_gain(p: Program) -> None:
    back = p.maker(p.op("layer_0_input_norm"), "x")
    p.bind(p.op("layer_0_qkv"), "x", back.outputs[0].name)


@finds("rsqrt .* is in no norm")
def gain_that_is_no_constant(p: Program) -> None:
    gain = p.op("layer_1_input_norm")
    p.bind(gain, "y", "layer_0")


@finds("rsqrt .* is in no norm")
def square_of_something_else(p: Program) -> None:
    root = p.of("rsqrt")[1]
    p.bind(root, "x", p.name(p.of("rsqrt")[0], "x"))


@finds("4 norms, expected 5: two in each layer and one")
def norm_left_out(p: Program) -> None:
    gain = p.op("layer_0_mlp_norm")
    back = p.maker(gain, "x")
    unit = p.maker(back, "x")
    rsqrt = p.maker(unit, "y")
    wide = p.maker(unit, "x")
    p.bind(gain, "x", p.name(wide, "x"))
    for op in (back, unit, rsqrt, p.maker(rsqrt, "x"), p.maker(rsqrt, "x", "x"), wide):
        p.drop(op)


@finds("silu .* computes in float32 outside|mul .* computes in float32 outside")
def float32_elsewhere(p: Program) -> None:
    product = p.maker(p.op("layer_0_mlp"), "x")
    wide = p.op("cast")
    for parameter in ("x", "y"):
        cast = p.add(product, wide, f"wide_{parameter}")
        p.bind(cast, "x", p.name(product, parameter))
        cast.outputs[0].type.CopyFrom(product.outputs[0].type)
        p.retype(cast, SINGLE)
        p.bind(product, parameter, f"wide_{parameter}")
    p.retype(product, SINGLE)
    linear = p.op("layer_0_mlp")
    back = p.add(linear, p.maker(p.op("layer_0_mlp_norm"), "x"), "narrow")
    p.bind(back, "x", product.outputs[0].name)
    back.outputs[0].type.CopyFrom(product.outputs[0].type)
    p.retype(back, HALF)
    p.bind(linear, "x", "narrow")


@finds("softmax .* does not compute in float32", **STEPS)
def softmax_in_half_precision(p: Program) -> None:
    softmax = p.op("softmax")
    wide = p.maker(softmax, "x")
    p.value(wide, "dtype").strings.values[0] = "fp16"
    for op in (softmax, wide):
        p.retype(op, HALF)


@finds("softmax .* is not over the keys, the last axis", **STEPS)
def softmax_over_the_queries(p: Program) -> None:
    p.value(p.op("softmax"), "axis").ints.values[0] = -2


@finds("the residual is float32 in 4 places, expected 5", **WIDE)
def residual_narrow_in_one_place(p: Program) -> None:
    """The last sum in float16: its arguments before the cast, a cast after it."""
    total, row = p.op("layer_1"), p.gathers("lastIndex")
    change = p.maker(total, "y")
    narrow = p.add(total, p.maker(p.op("layer_0_mlp_norm"), "x"), "narrow")
    p.bind(narrow, "x", p.name(total, "x"))
    p.bind(total, "x", "narrow")
    p.bind(total, "y", p.name(change, "x"))
    p.retype(total, HALF)
    wide = p.add(row, change, "widened")
    p.bind(wide, "x", "layer_1")
    p.bind(row, "x", "widened")


# Keys, values, mask and slots.


@finds("1 writes to valueCache, expected 2: one in each layer")
def values_not_kept(p: Program) -> None:
    p.drop(p.writes("valueCache")[0])


@finds("keyCache of layer 0 is written 2 times, expected once")
def layer_written_twice(p: Program) -> None:
    """Layer 1's keys go to layer 0; the values stay."""
    update = p.maker(p.writes("keyCache")[1], "data")
    other = p.maker(p.writes("keyCache")[0], "data")
    p.bind(update, "begin", p.name(other, "begin"))
    p.bind(update, "end", p.name(other, "end"))


def moved_keys(p: Program) -> tuple[Any, Any]:
    """A place of its own for layer 1's keys, the same as before: its begin and its end."""
    update = p.maker(p.writes("keyCache")[1], "data")
    first, last = p.maker(update, "begin"), p.maker(update, "end")
    begin = p.add(last, first, "begin_of_keys")
    end = p.add(update, last, "end_of_keys")
    p.bind(end, "x", "begin_of_keys")
    p.bind(update, "begin", "begin_of_keys")
    p.bind(update, "end", "end_of_keys")
    return begin, end


def another_constant(p: Program, name: str, place: int, value: int) -> str:
    """A copy of a constant with another number at one place."""
    copy = p.add(p.operations[0], p.op(name), f"{name}_changed")
    copy.attributes["val"].immediateValue.tensor.ints.values[place] = value
    return f"{name}_changed"


ELSEWHERE = "write_state .* does not write one layer of keyCache from position on"


@finds(ELSEWHERE)
def keys_written_from_another_position(p: Program) -> None:
    begin, _ = moved_keys(p)
    begin.inputs["values"].arguments[1].name = "lastIndex"


@finds(ELSEWHERE)
def keys_written_from_another_head(p: Program) -> None:
    begin, _ = moved_keys(p)
    first = begin.inputs["values"].arguments[0]
    first.name = another_constant(p, first.name, 1, 1)


@finds(ELSEWHERE)
def keys_written_from_another_number(p: Program) -> None:
    begin, _ = moved_keys(p)
    last = begin.inputs["values"].arguments[2]
    last.name = another_constant(p, last.name, 0, 1)


@finds(ELSEWHERE)
def keys_written_to_another_end(p: Program) -> None:
    _, end = moved_keys(p)
    p.bind(end, "y", another_constant(p, p.name(end, "y"), 2, 2))


@finds(ELSEWHERE)
def keys_written_to_the_end_of_others(p: Program) -> None:
    _, end = moved_keys(p)
    p.bind(end, "x", p.name(p.maker(p.writes("valueCache")[1], "data"), "begin"))


@finds(ELSEWHERE)
def keys_written_to_a_sum(p: Program) -> None:
    _, end = moved_keys(p)
    p.bind(p.maker(p.writes("keyCache")[1], "data"), "begin", end.outputs[0].name)


@finds("write_state .* writes something else to valueCache than a changed copy")
def values_as_they_were(p: Program) -> None:
    write = p.writes("valueCache")[1]
    p.bind(write, "data", p.name(p.maker(write, "data"), "x"))


@finds("write_state .* writes something else to keyCache than a changed copy")
def keys_from_another_state(p: Program) -> None:
    update = p.maker(p.writes("keyCache")[1], "data")
    p.bind(p.maker(update, "x"), "input", "valueCache")


@finds("write_state .* undoes an earlier write")
def earlier_write_undone(p: Program) -> None:
    first, second = (p.maker(write, "data") for write in p.writes("valueCache"))
    p.bind(second, "x", p.name(first, "x"))


@finds("of layer 1 reads keyCache as it was before the layer wrote it")
def keys_read_before_they_are_written(p: Program) -> None:
    update = p.maker(p.writes("keyCache")[1], "data")
    p.bind(p.op("layer_1_keys"), "x", p.name(update, "x"))


@finds("of layer 1 does not read valueCache")
def keys_for_values(p: Program) -> None:
    p.bind(p.op("layer_1_values"), "x", p.name(p.op("layer_1_keys"), "x"))


@finds("of layer 1 does not read all slots of its own layer of keyCache", **STEPS)
def keys_of_another_layer(p: Program) -> None:
    keys = p.op("layer_1_keys")
    p.value(keys, "begin").ints.values[0] = 0
    p.value(keys, "end").ints.values[0] = 1


def remasked(p: Program, op: Any, parameter: str) -> None:
    """A mask that is computed from the one handed in."""
    mask = p.add(op, p.maker(p.op("layer_0_mlp"), "x"), "other_mask")
    mask.outputs[0].type.CopyFrom(next(i.type for i in p.function.inputs if i.name == "causalMask"))
    for side in "xy":
        p.bind(mask, side, "causalMask")
    p.bind(op, parameter, "other_mask")


@finds("scaled_dot_product_attention .* of layer 0 has a mask that is not causalMask")
def another_mask(p: Program) -> None:
    remasked(p, p.op("scaled_dot_product_attention"), "attn_mask")


@finds("softmax .* of layer 0 has a mask that is not causalMask", **STEPS)
def another_mask_in_steps(p: Program) -> None:
    remasked(p, p.maker(p.op("softmax"), "x", "x"), "y")


@finds("write_state .* writes 'loraB_down'; only keyCache and valueCache", **SLOTS)
def slot_written(p: Program) -> None:
    write = p.add(None, p.op("write_state"), "")
    p.bind(write, "input", "loraB_down")
    read = next(op for op in p.of("read_state") if p.name(op, "input") == "loraB_down")
    p.bind(write, "data", read.outputs[0].name)


@finds("the slot 'loraA_o' is not read once for each of 2 layers", **SLOTS)
def slot_of_another_layer(p: Program) -> None:
    read = next(op for op in p.of("read_state") if p.name(op, "input") == "loraA_o")
    parts = [op for op in p.of("slice_by_index") if p.name(op, "x") == read.outputs[0].name]
    p.value(parts[1], "begin").ints.values[0] = 0
    p.value(parts[1], "end").ints.values[0] = 1


# Tokens in, logits out.


@finds("0 look-ups of inputIds, expected one")
def other_tokens(p: Program) -> None:
    ids = p.add(p.gathers("inputIds"), p.maker(p.writes("keyCache")[0], "data", "end"), "ids")
    ids.outputs[0].type.CopyFrom(next(i.type for i in p.function.inputs if i.name == "inputIds"))
    for side in "xy":
        p.bind(ids, side, "inputIds")
    p.bind(p.gathers("inputIds"), "indices", "ids")


@finds("0 choices of the row lastIndex among tokens, expected one")
def another_row(p: Program) -> None:
    p.bind(p.gathers("lastIndex"), "indices", "position")


@finds("1 choices of the row lastIndex among tokens, expected one")
def row_of_the_batch(p: Program) -> None:
    p.value(p.gathers("lastIndex"), "axis").ints.values[0] = 0


@finds("does not return logits that a linear layer makes")
def logits_that_are_changed(p: Program) -> None:
    head = p.op("logits")
    head.outputs[0].name = "raw"
    changed = p.add(None, p.op("silu"), "logits")
    changed.outputs[0].type.CopyFrom(head.outputs[0].type)
    p.bind(changed, "x", "raw")


@finds("logits are not made of the norm of the row lastIndex")
def logits_without_a_norm(p: Program) -> None:
    p.bind(p.op("logits"), "x", p.gathers("lastIndex").outputs[0].name)


@finds("logits are not made of the norm of the row lastIndex")
def logits_of_every_row(p: Program) -> None:
    p.bind(p.maker(p.op("final_norm"), "x", "x", "x"), "x", "layer_1")


@finds("slice_by_size 'rope_sin_rows' does not take rows of a table from the input 'position' on")
def rotary_rows_of_another_position(p: Program) -> None:
    sines = p.op("rope_sin_rows")
    begin = p.add(sines, p.maker(sines, "begin"), "elsewhere")
    begin.inputs["values"].arguments[0].name = "lastIndex"
    p.bind(sines, "begin", "elsewhere")


@finds("slice_by_size 'rope_sin_rows' does not take rows of a table from the input 'position' on")
def rotary_columns_of_another_place(p: Program) -> None:
    sines = p.op("rope_sin_rows")
    begin = p.maker(sines, "begin")
    zero = p.op(begin.inputs["values"].arguments[1].name)
    one = p.add(begin, zero, "one")
    one.attributes["val"].immediateValue.tensor.ints.values[0] = 1
    begin.inputs["values"].arguments[1].name = "one"
    second = p.add(sines, begin, "elsewhere")
    begin.inputs["values"].arguments[1].name = zero.outputs[0].name
    p.bind(sines, "begin", second.outputs[0].name)


@finds(
    "slice_by_size 'rope_cos_rows' does not take rows of a table from the input 'ropeRow' on",
    **TWO_ROPES,
)
def rotary_rows_of_the_short_factors_alone(p: Program) -> None:
    cosines = p.op("rope_cos_rows")
    begin = p.add(cosines, p.maker(cosines, "begin"), "elsewhere")
    begin.inputs["values"].arguments[0].name = "position"
    p.bind(cosines, "begin", "elsewhere")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """Packages by their settings, each made once."""
    made: dict[str, Case] = {}

    def get(settings: dict[str, Any]) -> Case:
        key = repr(settings)
        if key not in made:
            made[key] = make_case(tmp_path_factory.mktemp("case"), **settings)
        return made[key]

    return get


@pytest.mark.parametrize(("settings", "edit", "pattern"), WRONG)
def test_what_is_wrong_with_what_a_program_computes_is_found_and_named(
    cases: Callable[..., Case], tmp_path: Path, settings: Any, edit: Edit, pattern: str
) -> None:
    expect(cases(settings), tmp_path, edit, pattern)
