"""Level `spec`: operations, parameters, names and types that are wrong are found, one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lint_cases import Case, Edit, Edits, Program, expect, make_case

SINGLE, INT32 = 11, 23
CODED = {"bits": 4}

WRONG = Edits()
finds = WRONG.finds


@finds("gelu 'silu_.*' is not among the 24 operations")
def unknown_operation(p: Program) -> None:
    p.op("silu").type = "gelu"


@finds("operations of CoreML7, expected CoreML8")
def old_operations(p: Program) -> None:
    bodies = p.function.block_specializations
    bodies["CoreML7"].CopyFrom(bodies["CoreML8"])
    p.function.opset = "CoreML7"
    del bodies["CoreML8"]


@finds("operations of CoreML7, CoreML8, expected CoreML8 alone")
def operations_of_two_kinds(p: Program) -> None:
    bodies = p.function.block_specializations
    bodies["CoreML7"].CopyFrom(bodies["CoreML8"])


@finds("write_state .* makes 1 values, expected none")
def write_that_makes_a_value(p: Program) -> None:
    p.op("write_state").outputs.add().CopyFrom(p.op("silu").outputs[0])
    p.op("write_state").outputs[0].name = "written"


@finds("silu .* makes 0 values, expected some")
def operation_that_makes_nothing(p: Program) -> None:
    del p.add(None, p.op("silu"), "nothing").outputs[:]


@finds("silu .* without a fixed shape")
def open_extent(p: Program) -> None:
    p.op("silu").outputs[0].type.tensorType.dimensions[1].unknown.variadic = False


@finds(r"silu .* makes float32 \[1, 1, 96\], expected float16")
def operation_of_another_dtype(p: Program) -> None:
    p.retype(p.op("silu"), SINGLE)


@finds(r"silu .* is declared as \[1, 2, 96\], its arguments give \[1, 1, 96\]")
def operation_of_another_shape(p: Program) -> None:
    p.op("silu").outputs[0].type.tensorType.dimensions[1].constant.size = 2


@finds("linear 'layer_1_mlp' has arguments from which no .* can come")
def arguments_that_do_not_fit(p: Program) -> None:
    p.bind(p.op("layer_1_mlp"), "x", "embedding")


@finds("mul .* takes float16 .* as y and makes float32; expected one dtype")
def two_dtypes_in_a_product(p: Program) -> None:
    p.bind(p.maker(p.op("rsqrt"), "x", "x"), "y", "embedding")


@finds("cast .* is declared as float32, and does not cast to that")
def cast_to_something_else(p: Program) -> None:
    p.value(p.op("cast"), "dtype").strings.values[0] = "fp16"


@finds("cast .* is declared as float32, and does not cast to that")
def cast_without_a_target(p: Program) -> None:
    p.bind(p.op("cast"), "dtype", "rope_cos")


@finds("makes 'rope_cos', a name taken before; Core ML needs each name once")
def name_twice(p: Program) -> None:
    p.add(p.op("silu"), p.op("rope_cos"), "rope_cos")


@finds("takes 'silu_.*' as x, which nothing before it makes")
def value_read_before_it_is_made(p: Program) -> None:
    silu = p.op("silu")
    p.add(None, silu, silu.outputs[0].name)
    p.drop(silu)


@finds("silu .* has the parameters alpha, x, expected x")
def foreign_parameter(p: Program) -> None:
    p.op("silu").inputs["alpha"].arguments.add().name = "embedding"


@finds("rsqrt .* has the parameters x, expected x, epsilon")
def missing_parameter(p: Program) -> None:
    del p.op("rsqrt").inputs["epsilon"]


@finds("silu .* has blocks of its own")
def nested_operations(p: Program) -> None:
    p.op("silu").blocks.add()


@finds("const .* is declared as float32 .* and holds int32")
def constant_of_another_type(p: Program) -> None:
    constant = p.maker(p.op("rsqrt"), "epsilon")
    constant.attributes["val"].type.tensorType.dataType = INT32


@finds("const .* its numbers do not fit that")
def constant_without_numbers(p: Program) -> None:
    del p.value(p.op("rsqrt"), "epsilon").floats.values[:]


@finds("constexpr_.* has int32 codes and float16 scales", **CODED)
def codes_of_another_type(p: Program) -> None:
    codes = p.op("constexpr_blockwise_shift_scale").inputs["data"].arguments[0].value
    codes.type.tensorType.dataType = INT32


@finds("constexpr_.* has int8 codes and float32 scales", **CODED)
def scales_of_another_type(p: Program) -> None:
    scales = p.op("constexpr_blockwise_shift_scale").inputs["scale"].arguments[0].value
    scales.type.tensorType.dataType = SINGLE


@finds("constexpr_.* has int32 offsets, expected uint4 or float16", **CODED)
def offsets_of_another_type(p: Program) -> None:
    offsets = p.op("model_layers_0_mlp_down_proj").inputs["offset"].arguments[0].value
    offsets.type.tensorType.dataType = INT32


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
def test_what_is_wrong_with_the_form_of_a_program_is_found_and_named(
    cases: Callable[..., Case], tmp_path: Path, settings: Any, edit: Edit, pattern: str
) -> None:
    expect(cases(settings), tmp_path, edit, pattern)
