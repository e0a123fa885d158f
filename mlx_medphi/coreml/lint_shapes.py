"""The shapes that come out of an operation, from those of its arguments.

Written beside coremltools' own rules, so that a package is not checked by what has made it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from mlx_medphi.coreml.lint_view import Constant, Op, View

__all__ = ["expected_shapes"]

Extents = tuple[int, ...]
_Item = TypeVar("_Item")


class _Impossible(ValueError):
    """The arguments fit no result."""


def expected_shapes(view: View, op: Op) -> tuple[Extents, ...] | None:
    """The shapes of all outputs; None where the arguments fit no result."""
    try:
        return _RULES[op.type](_Arguments(view, op))
    except (ArithmeticError, LookupError, ValueError):
        # Besides what the rules refuse: extents and axes that make no sense, of a damaged program.
        return None


class _Arguments:
    """The arguments of one operation, by parameter."""

    def __init__(self, view: View, op: Op) -> None:
        self.view, self.op = view, op

    def shape(self, parameter: str) -> Extents:
        return _only(self.shapes(parameter))

    def shapes(self, parameter: str) -> list[Extents]:
        found = []
        for argument in self.op.inputs.get(parameter, ()):
            known = argument.type if isinstance(argument, Constant) else self.view.type_of(argument)
            if known is None:
                raise _Impossible
            found.append(known.shape)
        return found

    def ints(self, parameter: str) -> Extents:
        """The whole numbers of a constant."""
        constant = self.view.constant(self.op, parameter)
        if constant is None or constant.ints is None:
            raise _Impossible
        return constant.ints

    def flag(self, parameter: str) -> bool:
        constant = self.view.constant(self.op, parameter)
        if constant is None or not isinstance(constant.values, np.ndarray):
            raise _Impossible
        return bool(constant.values.any())

    def axis(self, parameter: str, rank: int) -> int:
        axis = _only(self.ints(parameter))
        _require(-rank <= axis < rank)
        return axis % rank


def _only(found: Sequence[_Item]) -> _Item:
    _require(len(found) == 1)
    return found[0]


def _require(condition: bool) -> None:
    if not condition:
        raise _Impossible


def _same(given: _Arguments) -> tuple[Extents, ...]:
    return (given.shape("x"),)


def _broadcast(given: _Arguments) -> tuple[Extents, ...]:
    return (np.broadcast_shapes(given.shape("x"), given.shape("y")),)


def _linear(given: _Arguments) -> tuple[Extents, ...]:
    x, weight, bias = (given.shape(name) for name in ("x", "weight", "bias"))
    _require(len(weight) == 2 and x[-1:] == weight[1:] and bias == weight[:1])
    return ((*x[:-1], weight[0]),)


def _matmul(given: _Arguments) -> tuple[Extents, ...]:
    x, y = given.shape("x"), given.shape("y")
    _require(len(x) == len(y) >= 2)
    if given.flag("transpose_x"):
        x = (*x[:-2], x[-1], x[-2])
    if given.flag("transpose_y"):
        y = (*y[:-2], y[-1], y[-2])
    _require(x[:-2] == y[:-2] and x[-1] == y[-2])
    return ((*x[:-1], y[-1]),)


def _attention(given: _Arguments) -> tuple[Extents, ...]:
    query, key, value = (given.shape(name) for name in ("query", "key", "value"))
    _require(len(query) == len(key) == len(value) == 4 and key[:3] == value[:3])
    _require(query[:2] == key[:2] and query[3] == key[3])
    scores = (*query[:3], key[2])
    mask = given.shape("attn_mask")
    _require(len(mask) == 4 and all(m in (1, s) for m, s in zip(mask, scores, strict=True)))
    return ((*query[:3], value[3]),)


def _constexpr(given: _Arguments) -> tuple[Extents, ...]:
    data, scale = given.shape("data"), given.shape("scale")
    _require(len(data) == len(scale))
    _require(all(n % m == 0 for n, m in zip(data, scale, strict=True)))
    _require(all(offset == scale for offset in given.shapes("offset")))
    return (data,)


def _gather(given: _Arguments) -> tuple[Extents, ...]:
    x = given.shape("x")
    axis = given.axis("axis", len(x))
    _require(given.ints("batch_dims") == (0,))
    return ((*x[:axis], *given.shape("indices"), *x[axis + 1 :]),)


def _reduce(given: _Arguments) -> tuple[Extents, ...]:
    x = given.shape("x")
    axes = {axis % len(x) for axis in given.ints("axes")}
    _require(given.flag("keep_dims"))
    return (tuple(1 if axis in axes else n for axis, n in enumerate(x)),)


def _reshape(given: _Arguments) -> tuple[Extents, ...]:
    shape = given.ints("shape")
    _require(math.prod(shape) == math.prod(given.shape("x")) and min(shape) > 0)
    return (shape,)


def _transpose(given: _Arguments) -> tuple[Extents, ...]:
    x, perm = given.shape("x"), given.ints("perm")
    _require(sorted(axis % len(x) for axis in perm) == list(range(len(x))))
    return (tuple(x[axis] for axis in perm),)


def _split(given: _Arguments) -> tuple[Extents, ...]:
    x = given.shape("x")
    axis = given.axis("axis", len(x))
    if "split_sizes" in given.op.inputs:
        sizes = given.ints("split_sizes")
    else:
        count = _only(given.ints("num_splits"))
        _require(count > 0 and x[axis] % count == 0)
        sizes = (x[axis] // count,) * count
    _require(sum(sizes) == x[axis])
    return tuple((*x[:axis], size, *x[axis + 1 :]) for size in sizes)


def _concat(given: _Arguments) -> tuple[Extents, ...]:
    values = given.shapes("values")
    axis = given.axis("axis", len(values[0]))
    rests = {(*value[:axis], *value[axis + 1 :]) for value in values}
    _require(len(rests) == 1 and not given.flag("interleave"))
    first = values[0]
    return ((*first[:axis], sum(value[axis] for value in values), *first[axis + 1 :]),)


def _tile(given: _Arguments) -> tuple[Extents, ...]:
    x, reps = given.shape("x"), given.ints("reps")
    _require(len(x) == len(reps))
    return (tuple(n * times for n, times in zip(x, reps, strict=True)),)


def _slice(given: _Arguments) -> tuple[Extents, ...]:
    x, begin, end = given.shape("x"), given.ints("begin"), given.ints("end")
    _require(len(x) == len(begin) == len(end))
    _require(all(0 <= b < e <= n for b, e, n in zip(begin, end, x, strict=True)))
    return (tuple(e - b for b, e in zip(begin, end, strict=True)),)


def _slice_by_size(given: _Arguments) -> tuple[Extents, ...]:
    x, size = given.shape("x"), given.ints("size")
    _require(len(x) == len(size) and given.shape("begin") == (len(x),))
    _require(all(0 < s <= n for s, n in zip(size, x, strict=True)))
    return (size,)


def _slice_update(given: _Arguments) -> tuple[Extents, ...]:
    x, update = given.shape("x"), given.shape("update")
    _require(given.shape("begin") == given.shape("end") == (len(x),) and len(update) == len(x))
    _require(all(u <= n for u, n in zip(update, x, strict=True)))
    return (x,)


def _read(given: _Arguments) -> tuple[Extents, ...]:
    return (given.shape("input"),)


def _write(given: _Arguments) -> tuple[Extents, ...]:
    _require(given.shape("input") == given.shape("data"))
    return ()


_RULES: Mapping[str, Callable[[_Arguments], tuple[Extents, ...]]] = {
    "add": _broadcast, "cast": _same, "concat": _concat,
    "constexpr_blockwise_shift_scale": _constexpr, "gather": _gather, "linear": _linear,
    "matmul": _matmul, "mul": _broadcast, "read_state": _read, "reduce_mean": _reduce,
    "reshape": _reshape, "rsqrt": _same, "scaled_dot_product_attention": _attention,
    "silu": _same, "slice_by_index": _slice, "slice_by_size": _slice_by_size,
    "slice_update": _slice_update, "softmax": _same, "split": _split, "sub": _broadcast,
    "tile": _tile, "transpose": _transpose, "write_state": _write,
}  # fmt: skip
