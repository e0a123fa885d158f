"""The shapes of every operation, right and impossible, from the rules MIL documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_medphi.coreml.lint_ops import OPERATIONS
from mlx_medphi.coreml.lint_shapes import expected_shapes
from mlx_medphi.coreml.lint_view import Constant, Op, View
from mlx_medphi.coreml.package_file import TensorType

Shape = tuple[int, ...]


def whole(*values: int) -> Constant:
    """A constant of whole numbers; of one, it has no axes."""
    array = np.array(values if len(values) != 1 else values[0], np.int32)
    return Constant(TensorType("int32", array.shape), values=array)


def vector(*values: int) -> Constant:
    return Constant(TensorType("int32", (len(values),)), values=np.array(values, np.int32))


YES, NO = (Constant(TensorType("bool", ()), values=np.array(flag)) for flag in (True, False))


def shapes_of(kind: str, arguments: dict[str, Any]) -> tuple[Shape, ...] | None:
    """What comes out of an operation; an argument is a constant, a shape, or a list of shapes."""
    inputs: dict[str, TensorType | None] = {}
    given: dict[str, tuple[str | Constant, ...]] = {}
    for parameter, argument in arguments.items():
        names: list[str | Constant] = []
        for index, item in enumerate(argument if isinstance(argument, list) else [argument]):
            if isinstance(item, tuple):
                inputs[f"{parameter}{index}"] = TensorType("float16", item)
                item = f"{parameter}{index}"
            names.append(item)
        given[parameter] = tuple(names)
    op = Op(0, kind, "out", given, {}, (), None, False)
    return expected_shapes(View("f", inputs, {}, (op,), (), "CoreML8", ("CoreML8",)), op)


FLAT = {"transpose_x": NO, "transpose_y": NO}
ATTENTION = {"query": (1, 2, 3, 8), "key": (1, 2, 5, 8), "value": (1, 2, 5, 8)}
GATHER = {"batch_dims": whole(0), "validate_indices": NO}

POSSIBLE = [
    ("add", {"x": (1, 4, 3), "y": (4, 1)}, [(1, 4, 3)]),
    ("sub", {"x": (2, 3), "y": (2, 3)}, [(2, 3)]),
    ("mul", {"x": (2, 3), "y": (1,)}, [(2, 3)]),
    ("cast", {"x": (2, 3)}, [(2, 3)]),
    ("silu", {"x": (2, 3)}, [(2, 3)]),
    ("rsqrt", {"x": (2, 1)}, [(2, 1)]),
    ("softmax", {"x": (2, 3), "axis": whole(-1)}, [(2, 3)]),
    ("linear", {"x": (1, 4, 3), "weight": (5, 3), "bias": (5,)}, [(1, 4, 5)]),
    ("matmul", {"x": (1, 4, 3), "y": (1, 3, 5), **FLAT}, [(1, 4, 5)]),
    ("matmul", {"x": (1, 4, 3), "y": (1, 5, 3), **FLAT, "transpose_y": YES}, [(1, 4, 5)]),
    ("matmul", {"x": (3, 4), "y": (3, 5), **FLAT, "transpose_x": YES}, [(4, 5)]),
    ("scaled_dot_product_attention", {**ATTENTION, "attn_mask": (1, 1, 3, 5)}, [(1, 2, 3, 8)]),
    ("constexpr_blockwise_shift_scale", {"data": (4, 64), "scale": (4, 2)}, [(4, 64)]),
    ("constexpr_blockwise_shift_scale", {"data": (4, 8), "scale": (4, 1), "offset": (4, 1)},
     [(4, 8)]),
    ("gather", {"x": (9, 3), "indices": (1, 4), "axis": whole(0), **GATHER}, [(1, 4, 3)]),
    ("gather", {"x": (1, 4, 3), "indices": (1,), "axis": whole(1), **GATHER}, [(1, 1, 3)]),
    ("reduce_mean", {"x": (1, 4, 3), "axes": vector(-1), "keep_dims": YES}, [(1, 4, 1)]),
    ("reshape", {"x": (1, 4, 6), "shape": vector(1, 4, 2, 3)}, [(1, 4, 2, 3)]),
    ("transpose", {"x": (1, 4, 2, 3), "perm": vector(0, 2, 1, 3)}, [(1, 2, 4, 3)]),
    ("split", {"x": (1, 6), "num_splits": whole(2), "axis": whole(-1)}, [(1, 3), (1, 3)]),
    ("split", {"x": (1, 6), "split_sizes": vector(4, 2), "axis": whole(1)}, [(1, 4), (1, 2)]),
    ("concat", {"values": [(2, 3), (2, 1)], "axis": whole(1), "interleave": NO}, [(2, 4)]),
    ("tile", {"x": (1, 1, 4, 5), "reps": vector(1, 1, 2, 1)}, [(1, 1, 8, 5)]),
    ("slice_by_index", {"x": (4, 5), "begin": vector(1, 0), "end": vector(2, 5)}, [(1, 5)]),
    ("slice_by_size", {"x": (4, 5), "begin": (2,), "size": vector(2, 5)}, [(2, 5)]),
    ("slice_update", {"x": (4, 5), "update": (1, 2), "begin": (2,), "end": (2,)}, [(4, 5)]),
    ("read_state", {"input": (4, 5)}, [(4, 5)]),
    ("write_state", {"input": (4, 5), "data": (4, 5)}, []),
]  # fmt: skip

IMPOSSIBLE = [
    ("add", {"x": (2, 3), "y": (2, 4)}),
    ("silu", {"x": [(2, 3), (2, 3)]}),
    ("linear", {"x": (1, 4, 3), "weight": (3, 5), "bias": (3,)}),
    ("linear", {"x": (1, 4, 3), "weight": (5, 3), "bias": (3,)}),
    ("linear", {"x": (1, 4, 3), "weight": (1, 5, 3), "bias": (1,)}),
    ("matmul", {"x": (1, 4, 3), "y": (1, 5, 3), **FLAT}),
    ("matmul", {"x": (2, 4, 3), "y": (1, 3, 5), **FLAT}),
    ("matmul", {"x": (4, 3), "y": (1, 3, 5), **FLAT}),
    ("matmul", {"x": (3,), "y": (3,), **FLAT}),
    ("matmul", {"x": (1, 4, 3), "y": (1, 3, 5), **FLAT, "transpose_y": whole(1, 1)}),
    ("matmul", {"x": (4, 3), "y": (3, 5), **FLAT, "transpose_y": (1,)}),
    ("scaled_dot_product_attention", {**ATTENTION, "attn_mask": (1, 1, 3, 4)}),
    ("scaled_dot_product_attention", {**ATTENTION, "attn_mask": (3, 5)}),
    ("scaled_dot_product_attention", {**ATTENTION, "key": (1, 1, 5, 8), "attn_mask": (1, 1, 3, 5)}),
    ("scaled_dot_product_attention", {**ATTENTION, "query": (1, 2, 3, 4), "attn_mask": (1,) * 4}),
    ("scaled_dot_product_attention",
     {"query": (1, 4, 3, 8), "key": (1, 2, 5, 8), "value": (1, 2, 5, 8), "attn_mask": (1,) * 4}),
    ("scaled_dot_product_attention",
     {"query": (2, 3, 8), "key": (2, 5, 8), "value": (2, 5, 8), "attn_mask": (1, 1, 3, 5)}),
    ("constexpr_blockwise_shift_scale", {"data": (4, 64), "scale": (4, 3)}),
    ("constexpr_blockwise_shift_scale", {"data": (4, 64), "scale": (2,)}),
    ("constexpr_blockwise_shift_scale", {"data": (4, 64), "scale": (4, 2), "offset": (4, 1)}),
    ("gather", {"x": (9, 3), "indices": (1,), "axis": whole(2), **GATHER}),
    ("gather", {"x": (9, 3), "indices": (1,), "axis": whole(-3), **GATHER}),
    ("gather", {"x": (9, 3), "indices": (1,), "axis": vector(0, 1), **GATHER}),
    ("gather", {"x": (9, 3), "indices": (1,), "axis": whole(0), "batch_dims": whole(1)}),
    ("reduce_mean", {"x": (1, 4, 3), "axes": vector(-1), "keep_dims": NO}),
    ("reduce_mean", {"x": (1, 4, 3), "axes": (1,), "keep_dims": YES}),
    ("reduce_mean", {"x": (), "axes": vector(-1), "keep_dims": YES}),
    ("reshape", {"x": (), "shape": vector()}),
    ("reshape", {"x": (1, 4, 6), "shape": vector(1, 4, 5)}),
    ("reshape", {"x": (1, 4, 6), "shape": vector(-4, -6)}),
    ("transpose", {"x": (1, 4, 2), "perm": vector(0, 1, 1)}),
    ("transpose", {"x": (1, 4, 2), "perm": vector(0, 1)}),
    ("split", {"x": (1, 6), "num_splits": whole(4), "axis": whole(1)}),
    ("split", {"x": (1, 6), "num_splits": whole(0), "axis": whole(1)}),
    ("split", {"x": (1, 6), "split_sizes": vector(4, 3), "axis": whole(1)}),
    ("split", {"x": (1, 6), "axis": whole(1)}),
    ("concat", {"values": [(2, 3), (1, 1)], "axis": whole(1), "interleave": NO}),
    ("concat", {"values": [(2, 3), (2, 3)], "axis": whole(1), "interleave": YES}),
    ("tile", {"x": (1, 4), "reps": vector(1, 1, 2)}),
    ("slice_by_index", {"x": (4, 5), "begin": vector(1, 0), "end": vector(2, 6)}),
    ("slice_by_index", {"x": (4, 5), "begin": vector(2, 0), "end": vector(2, 5)}),
    ("slice_by_index", {"x": (4, 5), "begin": vector(-1, 0), "end": vector(2, 5)}),
    ("slice_by_index", {"x": (4, 5), "begin": vector(1), "end": vector(2)}),
    ("slice_by_size", {"x": (4, 5), "begin": (2,), "size": vector(5, 5)}),
    ("slice_by_size", {"x": (4, 5), "begin": (2,), "size": vector(0, 5)}),
    ("slice_by_size", {"x": (4, 5), "begin": (1,), "size": vector(2, 5)}),
    ("slice_by_size", {"x": (4, 5), "begin": (2,), "size": vector(2,)}),
    ("slice_update", {"x": (4, 5), "update": (5, 2), "begin": (2,), "end": (2,)}),
    ("slice_update", {"x": (4, 5), "update": (2,), "begin": (2,), "end": (2,)}),
    ("slice_update", {"x": (4, 5), "update": (1, 2), "begin": (1,), "end": (2,)}),
    ("write_state", {"input": (4, 5), "data": (4, 4)}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "arguments", "expected"), POSSIBLE)
def test_the_shapes_of_an_operation_follow_from_its_arguments(
    kind: str, arguments: dict[str, Any], expected: list[Shape]
) -> None:
    assert shapes_of(kind, arguments) == tuple(expected)


@pytest.mark.parametrize(("kind", "arguments"), IMPOSSIBLE)
def test_arguments_that_fit_no_result_are_refused(kind: str, arguments: dict[str, Any]) -> None:
    assert shapes_of(kind, arguments) is None


def test_every_operation_that_may_be_in_a_program_has_its_shapes_checked() -> None:
    assert {kind for kind, _, _ in POSSIBLE} == OPERATIONS.keys() - {"const"}
