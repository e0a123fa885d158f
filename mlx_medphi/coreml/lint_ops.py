"""Is a function well formed: known operations, fixed types, each name made once, before it is read.

What the operations compute is for the other lints; they rely on what is checked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlx_medphi.coreml.lint_shapes import expected_shapes
from mlx_medphi.coreml.lint_view import Constant, Op, View

__all__ = ["CONSTEXPR", "OPERATIONS", "operation_findings"]

OPSET = "CoreML8"

HALF, SINGLE = "float16", "float32"
NUMBERS = (HALF, SINGLE)
CONSTEXPR = "constexpr_blockwise_shift_scale"
CODES = ("uint4", "uint8", "int8")
CAST = {HALF: "fp16", SINGLE: "fp32"}


@dataclass(frozen=True)
class Form:
    """How an operation is written.

    Attributes:
        needs: parameters it always has.
        may: parameters it can have besides; of alternatives each.
        makes: dtypes of what it makes; empty: it makes nothing.
        alike: parameters whose dtype is that of the result.
    """

    needs: tuple[str, ...]
    may: tuple[str, ...] = ()
    makes: tuple[str, ...] = (HALF,)
    alike: tuple[str, ...] = ("x",)


OPERATIONS = {
    "add": Form(("x", "y"), makes=(*NUMBERS, "int32"), alike=("x", "y")),
    "cast": Form(("x", "dtype"), makes=NUMBERS, alike=()),
    "concat": Form(("values", "axis", "interleave"), makes=(HALF, "int32"), alike=("values",)),
    "const": Form((), makes=(*NUMBERS, "int32", "bool", "string"), alike=()),
    CONSTEXPR: Form(("data", "scale"), ("offset",)),
    "gather": Form(("x", "indices", "axis", "batch_dims", "validate_indices"), makes=NUMBERS),
    "linear": Form(("x", "weight", "bias"), alike=("x", "weight", "bias")),
    "matmul": Form(("x", "y", "transpose_x", "transpose_y"), alike=("x", "y")),
    "mul": Form(("x", "y"), makes=NUMBERS, alike=("x", "y")),
    "read_state": Form(("input",), alike=("input",)),
    "reduce_mean": Form(("x", "axes", "keep_dims"), makes=NUMBERS),
    "reshape": Form(("x", "shape")),
    "rsqrt": Form(("x", "epsilon"), makes=NUMBERS, alike=("x", "epsilon")),
    "scaled_dot_product_attention": Form(
        ("query", "key", "value", "attn_mask"), alike=("query", "key", "value", "attn_mask")
    ),
    "silu": Form(("x",)),
    "slice_by_index": Form(("x", "begin", "end")),
    "slice_by_size": Form(("x", "begin", "size")),
    "slice_update": Form(("x", "update", "begin", "end"), alike=("x", "update")),
    "softmax": Form(("x", "axis"), makes=NUMBERS),
    "split": Form(("x", "axis"), ("num_splits", "split_sizes")),
    "sub": Form(("x", "y"), alike=("x", "y")),
    "tile": Form(("x", "reps")),
    "transpose": Form(("x", "perm")),
    "write_state": Form(("input", "data"), makes=(), alike=()),
}
"""Every operation a program may hold: those of `graph.py`."""


def operation_findings(view: View) -> Iterator[str]:
    """What is wrong with the form of a function, one line each."""
    if view.opset != OPSET or view.bodies != (OPSET,):
        yield f"operations of {', '.join(view.bodies)}, expected {OPSET} alone"
    known = {*view.inputs, *view.states}
    typed = True
    for op in view.ops:
        lines = list(_arguments(op, known))
        # A wrong type makes those of the operations after it wrong, which nobody has to read.
        if not lines and typed:
            lines = list(_types(view, op))
            typed = not lines
        yield from lines
        for name in op.names:
            if name in known:
                yield f"{op} makes {name!r}, a name taken before; Core ML needs each name once"
            known.add(name)


def _arguments(op: Op, known: set[str]) -> Iterator[str]:
    form = OPERATIONS.get(op.type)
    if form is None:
        yield f"{op} is not among the {len(OPERATIONS)} operations a program may hold"
        return
    if op.nested:
        yield f"{op} has blocks of its own, expected none"
    for parameter, given in op.inputs.items():
        for name in given:
            if isinstance(name, str) and name not in known:
                yield f"{op} takes {name!r} as {parameter}, which nothing before it makes"
    missing = [name for name in form.needs if not op.inputs.get(name)]
    if missing or set(op.inputs) - {*form.needs, *form.may}:
        yield (
            f"{op} has the parameters {', '.join(sorted(op.inputs))}, expected "
            f"{', '.join(form.needs)}"
        )


def _types(view: View, op: Op) -> Iterator[str]:
    """The dtypes and shapes that are declared, against those that must come out."""
    form = OPERATIONS[op.type]
    if len(op.names) < (1 if form.makes else 0) or (op.names and not form.makes):
        yield f"{op} makes {len(op.names)} values, expected {'some' if form.makes else 'none'}"
        return
    for name, made in op.outputs.items():
        if made is None:
            yield f"{op} makes {name!r} without a fixed shape; expected fixed extents throughout"
            return
        if made.dtype not in form.makes:
            yield f"{op} makes {made}, expected {' or '.join(form.makes)}"
            return
    if op.type == "const":
        yield from _constant(op, op.value)
        return
    odd = _odd_dtype(view, op, form)
    if odd is not None:
        yield odd
        return
    shapes = expected_shapes(view, op)
    declared = tuple(made.shape for made in op.outputs.values() if made is not None)
    if shapes is None:
        yield f"{op} has arguments from which no {_shapes(declared)} can come"
    elif shapes != declared:
        yield f"{op} is declared as {_shapes(declared)}, its arguments give {_shapes(shapes)}"


def _odd_dtype(view: View, op: Op, form: Form) -> str | None:
    result = next((made.dtype for made in op.outputs.values() if made is not None), HALF)
    if op.type == CONSTEXPR:
        return _odd_codes(view, op)
    if op.type == "cast":
        target = view.constant(op, "dtype")
        if target is None or target.values != CAST[result]:
            return f"{op} is declared as {result}, and does not cast to that"
    for parameter in form.alike:
        for argument in op.inputs.get(parameter, ()):
            given = argument.type if isinstance(argument, Constant) else view.type_of(argument)
            if given is not None and given.dtype != result:
                return f"{op} takes {given} as {parameter} and makes {result}; expected one dtype"
    return None


def _odd_codes(view: View, op: Op) -> str | None:
    parts = [view.constant(op, name) for name in ("data", "scale", "offset")]
    data, scale, offset = (part.type.dtype if part and part.type else None for part in parts)
    if data not in CODES or scale != HALF:
        return f"{op} has {data} codes and {scale} scales, expected {' or '.join(CODES)}"
    if op.inputs.get("offset") and offset not in (data, HALF):
        return f"{op} has {offset} offsets, expected {data} or {HALF}"
    return None


def _constant(op: Op, value: Constant | None) -> Iterator[str]:
    declared = next(iter(op.outputs.values()))
    if value is None or value.type is None:
        yield f"{op} holds no value"
    elif value.type != declared:
        yield f"{op} is declared as {declared} and holds {value.type}"
    elif value.offset is None and value.values is None:
        yield f"{op} is declared as {declared} and its numbers do not fit that"


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " and ".join(str(list(shape)) for shape in shapes)
