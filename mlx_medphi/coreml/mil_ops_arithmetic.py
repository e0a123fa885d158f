"""Operations that compute: element by element, along axes, and matrix products.

A float16 operation is computed in float32 and rounded once, where it ends, as a GPU with float32
accumulators does; the attention of Core ML is one operation, so nothing inside it is rounded.
float32 stays float32. Arguments carry the names the program gives them; weights and the like may
be of another float type than what they work on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlx_medphi.coreml.mil_ops_half import Array, narrow, widen
from mlx_medphi.coreml.mil_ops_weights import Constant

__all__ = ["ARITHMETIC"]


def same_dtype(*values: Array | Constant | None) -> np.dtype[Any]:
    """The one type of all values that are there.

    Raises:
        TypeError: they have several.
    """
    dtypes = [value.dtype for value in values if value is not None]
    if any(dtype != dtypes[0] for dtype in dtypes):
        names = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"arguments of different types: {names}")
    return dtypes[0]


def _floats(*values: Array | Constant | None) -> np.dtype[Any]:
    dtype = same_dtype(*values)
    if dtype.kind != "f":
        raise TypeError(f"arguments of type {dtype}, expected float16 or float32")
    return dtype


def _binary(function: Callable[..., Any], *, floats: bool = False) -> Callable[..., Array]:
    def kernel(*, x: Array, y: Array) -> Array:
        dtype = _floats(x, y) if floats else same_dtype(x, y)
        return narrow(np.asarray(function(widen(x), widen(y))), dtype)

    return kernel


def _compare(function: Callable[..., Any]) -> Callable[..., Array]:
    def kernel(*, x: Array, y: Array) -> Array:
        same_dtype(x, y)
        return np.asarray(function(x, y))

    return kernel


def _unary(function: Callable[[Array], Any], *, floats: bool = True) -> Callable[..., Array]:
    def kernel(*, x: Array) -> Array:
        dtype = _floats(x) if floats else x.dtype
        return narrow(np.asarray(function(widen(x))), dtype)

    return kernel


def _reduce(function: Callable[..., Any], *, floats: bool = False) -> Callable[..., Array]:
    def kernel(*, x: Array, axes: Array | None = None, keep_dims: Array | None = None) -> Array:
        dtype = _floats(x) if floats else x.dtype
        over = None if axes is None else tuple(int(axis) for axis in axes)
        kept = keep_dims is not None and bool(keep_dims)
        return narrow(np.asarray(function(widen(x), axis=over, keepdims=kept)), dtype)

    return kernel


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def _softmax(x: Array, axis: int) -> Array:
    """Over float32; the argument is overwritten."""
    np.subtract(x, x.max(axis=axis, keepdims=True), out=x)
    np.exp(x, out=x)
    np.divide(x, x.sum(axis=axis, keepdims=True), out=x)
    return x


def softmax(*, x: Array, axis: Array | None = None) -> Array:
    dtype = _floats(x)
    along = -1 if axis is None else int(axis)
    return narrow(_softmax(np.array(widen(x)), along), dtype)


def rsqrt(*, x: Array, epsilon: Array | None = None) -> Array:
    dtype = _floats(x)
    added = np.float32(1e-12) if epsilon is None else widen(epsilon)
    return narrow(np.asarray(1 / np.sqrt(widen(x) + added)), dtype)


def layer_norm(
    *,
    x: Array,
    axes: Array | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Array | None = None,
) -> Array:
    dtype = _floats(x)
    over = range(x.ndim) if axes is None else sorted(int(axis) % x.ndim for axis in axes)
    shape = [x.shape[axis] if axis in over else 1 for axis in range(x.ndim)]
    y = widen(x)
    y = y - y.mean(axis=tuple(over), keepdims=True)
    variance = np.square(y).mean(axis=tuple(over), keepdims=True)
    y = y / np.sqrt(variance + (np.float32(1e-5) if epsilon is None else widen(epsilon)))
    y = y if gamma is None else y * widen(gamma).reshape(shape)
    y = y if beta is None else y + widen(beta).reshape(shape)
    return narrow(y, dtype)


def linear(*, x: Array, weight: Array | Constant, bias: Array | None = None) -> Array:
    """x (…, in), weight (out, in), bias (out,) -> (…, out)."""
    dtype = _floats(x)
    _floats(weight, bias)
    if len(weight.shape) != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} do not multiply")
    wide = widen(x)
    y = weight.product(wide) if isinstance(weight, Constant) else wide @ widen(weight).T
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias {list(bias.shape)} beside weight {list(weight.shape)}")
        y += widen(bias)
    return narrow(y, dtype)


def matmul(
    *,
    x: Array,
    y: Array | Constant,
    transpose_x: Array | None = None,
    transpose_y: Array | None = None,
) -> Array:
    """x (…, m, k), y (…, k, n) -> (…, m, n); a flag swaps the last two axes of its argument."""
    dtype = same_dtype(x, y)
    left = widen(x)
    if transpose_x is not None and bool(transpose_x):
        left = left.swapaxes(-1, -2)
    swapped = transpose_y is not None and bool(transpose_y)
    if isinstance(y, Constant):
        fits = len(y.shape) == 2 and swapped and left.shape[-1:] == y.shape[1:]
        if fits and dtype.kind == "f":
            return narrow(y.product(left), dtype)
        y = y.array()
    right = widen(y)
    return narrow(np.asarray(left @ (right.swapaxes(-1, -2) if swapped else right)), dtype)


def scaled_dot_product_attention(
    *, query: Array, key: Array, value: Array, attn_mask: Array | None = None
) -> Array:
    """softmax(query·keyᵀ/√E + mask)·value: query (…, L, E), key (…, S, E), value (…, S, V).

    The mask is added, or, where it is boolean, says which keys take part.
    """
    dtype = _floats(query, key, value)
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        raise ValueError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} "
            "differ before the last two axes"
        )
    scores = widen(query) @ widen(key).swapaxes(-1, -2)
    scores /= np.sqrt(np.float32(query.shape[-1]))
    if attn_mask is not None and attn_mask.dtype == np.bool_:
        scores = np.where(attn_mask, scores, np.float32(-np.inf))
    elif attn_mask is not None:
        _floats(query, attn_mask)
        scores += widen(attn_mask)
    return narrow(_softmax(scores, -1) @ widen(value), dtype)


ARITHMETIC: dict[str, Callable[..., Array]] = {
    "abs": _unary(np.abs, floats=False),
    "add": _binary(np.add),
    "cos": _unary(np.cos),
    "equal": _compare(np.equal),
    "exp": _unary(np.exp),
    "floor_div": _binary(np.floor_divide),
    "greater": _compare(np.greater),
    "greater_equal": _compare(np.greater_equal),
    "layer_norm": layer_norm,
    "less": _compare(np.less),
    "less_equal": _compare(np.less_equal),
    "linear": linear,
    "logical_and": _compare(np.logical_and),
    "logical_not": _unary(np.logical_not, floats=False),
    "logical_or": _compare(np.logical_or),
    "matmul": matmul,
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "mod": _binary(np.mod),
    "mul": _binary(np.multiply),
    "not_equal": _compare(np.not_equal),
    "pow": _binary(np.power, floats=True),
    "real_div": _binary(np.true_divide, floats=True),
    "reduce_max": _reduce(np.max),
    "reduce_mean": _reduce(np.mean, floats=True),
    "reduce_min": _reduce(np.min),
    "reduce_sum": _reduce(np.sum),
    "rsqrt": rsqrt,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "sigmoid": _unary(_sigmoid),
    "silu": _unary(lambda x: x * _sigmoid(x)),
    "sin": _unary(np.sin),
    "softmax": softmax,
    "sqrt": _unary(np.sqrt),
    "square": _unary(np.square, floats=False),
    "sub": _binary(np.subtract),
    "tanh": _unary(np.tanh),
}
"""Operation -> function of its arguments by name."""
