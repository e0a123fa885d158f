"""Each operation gives what MIL says it gives, rounded once; constants are dequantised exactly."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mil_programs import builder, four_bit, function, package

from mlx_medphi.coreml import mil_ops_weights
from mlx_medphi.coreml.interpreter import Interpreter
from mlx_medphi.coreml.library import coremltools
from mlx_medphi.coreml.mil_ops import OPERATIONS, check_arguments
from mlx_medphi.coreml.mil_ops_half import narrow, round_in_place, widen
from mlx_medphi.coreml.mil_ops_weights import Constant, FloatCache, Quantised, Stored
from mlx_medphi.errors import BundleError

Array = npt.NDArray[Any]

# What float32 arithmetic may be off by before it is rounded, relative to the largest term: sums of
# up to 48 terms, and the last bit of numpy's exp, tanh and the like.
SINGLE = 2e-6


@dataclass(frozen=True)
class Case:
    """One operation on the inputs that it names.

    Attributes:
        build: MIL values by name -> the result.
        reference: the same on float64 and integers; None: what MIL itself computes for constants.
        kinds: types of the float inputs.
    """

    build: Callable[..., Any]
    reference: Callable[..., Any] | None = None
    kinds: tuple[str, ...] = ("float16", "float32")


def softmax64(x: Array, axis: int = -1) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(e / e.sum(axis, keepdims=True))


def attention64(q: Array, k: Array, v: Array, mask: Array | float = 0.0) -> Array:
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1]) + mask
    return np.asarray(np.einsum("bhqk,bhkd->bhqd", softmax64(scores), v))


def norm64(x: Array, gamma: Array, beta: Array) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return np.asarray((x - mean) / np.sqrt(variance + 0.0625) * gamma + beta)


def mb() -> Any:
    return builder()


def i32(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)


def where_mask(mask: Array) -> Array:
    return np.where(mask, 0.0, -np.inf)


# Inputs: a, b (2, 3, 4) floats; c (4,); w (5, 4); p (2, 3, 4) positive; q, k, v (1, 2, 3|6, 8);
# m (1, 1, 3, 6) a mask; i, j (2, 3) integers; n (3,) indices.
ARITHMETIC: dict[str, Case] = {
    "add": Case(lambda a, b: mb().add(x=a, y=b), lambda a, b: a + b),
    "add with broadcast": Case(lambda a, c: mb().add(x=a, y=c), lambda a, c: a + c),
    "sub": Case(lambda a, b: mb().sub(x=a, y=b), lambda a, b: a - b),
    "mul": Case(lambda a, b: mb().mul(x=a, y=b), lambda a, b: a * b),
    "real_div": Case(lambda a, p: mb().real_div(x=a, y=p), lambda a, p: a / p),
    "maximum": Case(lambda a, b: mb().maximum(x=a, y=b), np.maximum),
    "minimum": Case(lambda a, b: mb().minimum(x=a, y=b), np.minimum),
    "pow": Case(lambda p, b: mb().pow(x=p, y=b), lambda p, b: p**b),
    "exp": Case(lambda a: mb().exp(x=a), np.exp),
    "abs": Case(lambda a: mb().abs(x=a), np.abs),
    "cos": Case(lambda a: mb().cos(x=a), np.cos),
    "sin": Case(lambda a: mb().sin(x=a), np.sin),
    "tanh": Case(lambda a: mb().tanh(x=a), np.tanh),
    "square": Case(lambda a: mb().square(x=a), np.square),
    "sqrt": Case(lambda p: mb().sqrt(x=p), np.sqrt),
    "rsqrt": Case(lambda p: mb().rsqrt(x=p, epsilon=0.25), lambda p: 1 / np.sqrt(p + 0.25)),
    "rsqrt of small numbers": Case(
        lambda p: mb().rsqrt(x=mb().mul(x=p, y=p), epsilon=1e-5),
        lambda p: 1 / np.sqrt(p * p + np.float64(np.float32(1e-5))),
        ("float32",),
    ),
    "sigmoid": Case(lambda a: mb().sigmoid(x=a), lambda a: 1 / (1 + np.exp(-a))),
    "silu": Case(lambda a: mb().silu(x=a), lambda a: a / (1 + np.exp(-a))),
    "softmax": Case(lambda a: mb().softmax(x=a), softmax64),
    "softmax of large numbers": Case(
        lambda a: mb().softmax(x=mb().mul(x=a, y=float_type(a)(64))), lambda a: softmax64(a * 64)
    ),
    "softmax along 1": Case(lambda a: mb().softmax(x=a, axis=1), lambda a: softmax64(a, 1)),
    "reduce_mean": Case(
        lambda a: mb().reduce_mean(x=a, axes=[-1], keep_dims=True), lambda a: a.mean(-1, keepdims=1)
    ),
    "reduce_mean of all": Case(lambda a: mb().reduce_mean(x=a), np.mean),
    "reduce_sum": Case(lambda a: mb().reduce_sum(x=a, axes=[0, 2]), lambda a: a.sum((0, 2))),
    "reduce_max": Case(lambda a: mb().reduce_max(x=a, axes=[1]), lambda a: a.max(1)),
    "reduce_min": Case(lambda a: mb().reduce_min(x=a, axes=[1]), lambda a: a.min(1)),
    "layer_norm": Case(
        lambda a: mb().layer_norm(
            x=a,
            axes=[-1],
            gamma=np.array([1, 2, 3, 0.5], float_type(a)),
            beta=np.array([0, 1, -1, 2], float_type(a)),
            epsilon=float_type(a)(0.0625),
        ),
        lambda a: norm64(a, np.array([1, 2, 3, 0.5]), np.array([0, 1, -1, 2])),
    ),
    "linear": Case(lambda a, w: mb().linear(x=a, weight=constant(w, W)), lambda a, w: a @ W.T),
    "linear with bias": Case(
        lambda a, w: mb().linear(
            x=a, weight=constant(w, W), bias=np.array([1, 2, 3, 4, 5], float_type(a))
        ),
        lambda a, w: a @ W.T + [1, 2, 3, 4, 5],
    ),
    "matmul": Case(
        lambda a, b: mb().matmul(x=a, y=b, transpose_y=True), lambda a, b: a @ b.swapaxes(1, 2)
    ),
    "matmul with broadcast": Case(
        lambda q, w: mb().matmul(
            x=w, y=mb().slice_by_size(x=q, begin=[0] * 4, size=[1, 2, 3, 4]), transpose_y=True
        ),
        lambda q, w: np.einsum("oi,bhqi->bhoq", w, q[..., :4]),
    ),
    "matmul of transposed": Case(
        lambda a, b: mb().matmul(x=a, y=b, transpose_x=True), lambda a, b: a.swapaxes(1, 2) @ b
    ),
    "matmul with a constant": Case(
        lambda a, w: mb().matmul(x=a, y=constant(w, W), transpose_y=True), lambda a, w: a @ W.T
    ),
    "matmul with a constant as it is": Case(
        lambda a, w: mb().matmul(x=mb().transpose(x=constant(w, W), perm=[1, 0]), y=constant(w, W)),
        lambda a, w: W.T @ W,
    ),
    "attention": Case(
        lambda q, k, v: mb().scaled_dot_product_attention(query=q, key=k, value=v), attention64
    ),
    "attention with added mask": Case(
        lambda q, k, v, m: mb().scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
        attention64,
    ),
    "attention with boolean mask": Case(
        lambda q, k, v, m: mb().scaled_dot_product_attention(
            query=q, key=k, value=v, attn_mask=mb().greater(x=m, y=float_type(m)(-0.5))
        ),
        lambda q, k, v, m: attention64(q, k, v, where_mask(m > -0.5)),
    ),
}

W = (np.arange(20).reshape(5, 4) % 7 - 3) / 8  # exact in float16


def float_type(value: Any) -> Any:
    """The numpy type of a MIL value."""
    types = coremltools("converters.mil.mil").types
    return types.nptype_from_builtin(value.dtype)


def constant(like: Any, value: Array) -> Any:
    return mb().const(val=value.astype(float_type(like)))


INTEGERS: dict[str, Case] = {
    "integer add": Case(lambda i, j: mb().add(x=i, y=j), lambda i, j: i + j),
    "integer sub": Case(lambda i, j: mb().sub(x=i, y=j), lambda i, j: i - j),
    "integer mul": Case(lambda i, j: mb().mul(x=i, y=j), lambda i, j: i * j),
    "integer maximum": Case(lambda i, j: mb().maximum(x=i, y=j), np.maximum),
    "integer minimum": Case(lambda i, j: mb().minimum(x=i, y=j), np.minimum),
    "integer sum": Case(lambda i: mb().reduce_sum(x=i, axes=[1]), lambda i: i.sum(1)),
    "integer max": Case(lambda i: mb().reduce_max(x=i, axes=[1]), lambda i: i.max(1)),
    "floor_div": Case(lambda i, j: mb().floor_div(x=i, y=j)),
    "mod": Case(lambda i, j: mb().mod(x=i, y=j)),
    "greater": Case(lambda i, j: flag(mb().greater(x=i, y=j)), lambda i, j: i > j),
    "greater_equal": Case(lambda i, j: flag(mb().greater_equal(x=i, y=j)), lambda i, j: i >= j),
    "less": Case(lambda i, j: flag(mb().less(x=i, y=j)), lambda i, j: i < j),
    "less_equal": Case(lambda i, j: flag(mb().less_equal(x=i, y=j)), lambda i, j: i <= j),
    "equal": Case(lambda i, j: flag(mb().equal(x=i, y=j)), lambda i, j: i == j),
    "not_equal": Case(lambda i, j: flag(mb().not_equal(x=i, y=j)), lambda i, j: i != j),
    "logical_and": Case(
        lambda i, j: flag(mb().logical_and(x=odd(i), y=odd(j))), lambda i, j: i & j & 1
    ),
    "logical_or": Case(
        lambda i, j: flag(mb().logical_or(x=odd(i), y=odd(j))), lambda i, j: (i | j) & 1
    ),
    "logical_not": Case(lambda i: flag(mb().logical_not(x=odd(i))), lambda i: 1 - (i & 1)),
    "select": Case(lambda i, j: mb().select(cond=mb().greater(x=i, y=j), a=i, b=j), np.maximum),
    "cast of integers": Case(
        lambda i: mb().cast(
            x=mb().mul(x=mb().cast(x=i, dtype="fp32"), y=np.float32(0.6)), dtype="int32"
        ),
        lambda i: np.trunc(np.float32(0.6) * i),
    ),
    "range_1d": Case(
        lambda n: mb().range_1d(start=2, end=11, step=4), lambda n: np.array([2, 6, 10])
    ),
    "shape": Case(lambda i: mb().shape(x=i), lambda i: np.array([2, 3])),
    "fill": Case(lambda n: mb().fill(shape=i32(2, 2), value=7), lambda n: np.full((2, 2), 7)),
    "fill_like": Case(
        lambda i: mb().fill_like(ref_tensor=i, value=7), lambda i: np.full((2, 3), 7)
    ),
}


def flag(value: Any) -> Any:
    """Booleans as integers, since a program cannot give booleans."""
    return mb().cast(x=value, dtype="int32")


def odd(value: Any) -> Any:
    return mb().equal(x=mb().mod(x=value, y=2), y=1)


LAYOUT: dict[str, Case] = {
    "identity": Case(lambda a: mb().identity(x=a)),
    "cast": Case(
        lambda a: mb().cast(x=mb().cast(x=a, dtype="fp32"), dtype="fp16"), None, ("float16",)
    ),
    "reshape": Case(lambda a: mb().reshape(x=a, shape=[4, 6])),
    "reshape that keeps and infers": Case(lambda a: mb().reshape(x=a, shape=[0, -1, 2])),
    "transpose": Case(lambda a: mb().transpose(x=a, perm=[2, 0, 1])),
    "expand_dims": Case(lambda a: mb().expand_dims(x=a, axes=[0, -1])),
    "squeeze": Case(lambda q: mb().squeeze(x=q, axes=[0])),
    "squeeze of all": Case(lambda q: mb().squeeze(x=q)),
    "split into equal parts": Case(lambda a: mb().split(x=a, num_splits=2, axis=-1)[1]),
    "split into sizes": Case(lambda a: mb().split(x=a, split_sizes=[1, 3], axis=2)[1]),
    "concat": Case(lambda a, b: mb().concat(values=[a, b, a], axis=1)),
    "stack": Case(lambda a, b: mb().stack(values=[a, b], axis=1)),
    "tile": Case(lambda a: mb().tile(x=a, reps=[1, 2, 3])),
    "gather": Case(lambda a: mb().gather(x=a, indices=i32(2, 0), axis=1)),
    "gather of a matrix of indices": Case(
        lambda w: mb().gather(x=w, indices=np.array([[4, 0], [1, 1]], np.int32), axis=0)
    ),
    "slice_by_size": Case(lambda a: mb().slice_by_size(x=a, begin=[1, 0, 2], size=[1, -1, 2])),
    "slice_by_size from the end": Case(
        lambda a: mb().slice_by_size(x=a, begin=[0, -2, 0], size=[2, 2, 4])
    ),
    "slice_by_index": Case(lambda a: mb().slice_by_index(x=a, begin=[0, 1, 0], end=[2, 3, 3])),
    "slice with strides": Case(
        lambda a: mb().slice_by_index(x=a, begin=[0, 2, 3], end=[2, 0, 0], stride=[1, -1, -2])
    ),
    "slice with negative places": Case(
        lambda a: mb().slice_by_index(x=a, begin=[-1, -2, 0], end=[2, -1, -1])
    ),
    "slice beyond the end": Case(
        lambda a: mb().slice_by_index(x=a, begin=[0, 1, 0], end=[9, 9, 9])
    ),
    "slice with masks": Case(
        lambda a: mb().slice_by_index(
            x=a,
            begin=[1, 1, 1],
            end=[1, 2, 3],
            begin_mask=[True, False, False],
            end_mask=[False, True, False],
        )
    ),
    "slice with squeeze": Case(
        lambda a: mb().slice_by_index(
            x=a,
            begin=[0, -1, 1],
            end=[0, 0, 3],
            end_mask=[True, False, False],
            squeeze_mask=[False, True, False],
        )
    ),
    "slice_update": Case(
        lambda a, b: mb().slice_update(
            x=a,
            update=mb().slice_by_size(x=b, begin=[0, 0, 0], size=[1, 3, 2]),
            begin=[1, 0, 1],
            end=[2, 3, 3],
        )
    ),
    "slice_update with strides and masks": Case(
        lambda a, b: mb().slice_update(
            x=a,
            update=mb().slice_by_size(x=b, begin=[0, 0, 0], size=[2, 3, 2]),
            begin=[0, 0, 3],
            end=[0, 0, 0],
            stride=[1, 1, -2],
            begin_mask=[True, True, False],
            end_mask=[True, True, False],
        )
    ),
    "slice_update of one index": Case(
        lambda a, b: mb().slice_update(
            x=a,
            update=mb().reshape(
                x=mb().slice_by_size(x=b, begin=[0, 0, 0], size=[1, 1, 4]), shape=[4]
            ),
            begin=[1, 2, 0],
            end=[0, 0, 4],
            squeeze_mask=[True, True, False],
        )
    ),
}
CASES = {**ARITHMETIC, **INTEGERS, **LAYOUT}


def pool(kind: str) -> dict[str, Array]:
    rng = np.random.default_rng(3)
    floats = {
        "a": rng.standard_normal((2, 3, 4)) * 3,
        "b": rng.standard_normal((2, 3, 4)),
        "c": rng.standard_normal(4),
        "w": rng.standard_normal((5, 4)),
        "p": rng.random((2, 3, 4)) * 5 + 0.01,
        "q": rng.standard_normal((1, 2, 3, 8)),
        "k": rng.standard_normal((1, 2, 6, 8)),
        "v": rng.standard_normal((1, 2, 6, 8)),
        "m": np.where(np.arange(6) <= 3 + np.arange(3)[:, None], 0.0, -1e4)[None, None],
    }
    integers = {
        "i": np.array([[1, -2, 3], [40, 5, -6]]),
        "j": np.array([[1, 3, -2], [7, 5, 4]]),
        "n": np.array([2, 0, 2]),
    }
    return {
        **{name: value.astype(kind) for name, value in floats.items()},
        **{name: value.astype(np.int32) for name, value in integers.items()},
    }


def names_of(build: Callable[..., Any]) -> tuple[str, ...]:
    return build.__code__.co_varnames[: build.__code__.co_argcount]


@dataclass(frozen=True)
class Ran:
    """All cases of one float type, as one saved program that ran once; results by case."""

    kind: str
    inputs: dict[str, Array]
    results: dict[str, Array]
    operations: set[str]


@pytest.fixture(scope="module", params=["float16", "float32"])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    kind = request.param
    inputs = pool(kind)
    chosen = {name: case for name, case in CASES.items() if kind in case.kinds}

    def body(**values: Any) -> dict[str, Any]:
        return {
            f"out{at}": case.build(*(values[name] for name in names_of(case.build)))
            for at, case in enumerate(chosen.values())
        }

    made = function(body, {name: (str(x.dtype), x.shape) for name, x in inputs.items()})
    path = tmp_path_factory.mktemp("ops") / f"{kind}.mlpackage"
    seen: set[str] = set()
    results = Interpreter(package(path, main=made)).run(
        "main", inputs, watch=lambda op_type, *_: seen.add(op_type)
    )
    return Ran(kind, inputs, {name: results[f"out{at}"] for at, name in enumerate(chosen)}, seen)


def mil_own(case: Case, inputs: Mapping[str, Array]) -> Array:
    """What coremltools computes when it folds constants."""
    found: list[Array] = []

    def body(unused: Any) -> dict[str, Any]:
        values = [mb().const(val=inputs[name]) for name in names_of(case.build)]
        found.append(np.asarray(case.build(*values).val))
        return {"out": mb().identity(x=unused)}

    function(body, {"unused": ("float32", (1,))})
    return found[0]


@pytest.mark.parametrize("name", CASES)
def test_an_operation_gives_what_it_should(name: str, ran: Ran) -> None:
    kind, inputs, case = ran.kind, ran.inputs, CASES[name]
    if kind not in case.kinds:
        pytest.skip("not of this type")
    got = ran.results[name]
    if case.reference is None:
        np.testing.assert_array_equal(got, mil_own(case, inputs))
        return
    given = [inputs[n] for n in names_of(case.build)]
    wide = [x.astype(np.float64) if x.dtype.kind == "f" else x for x in given]
    expected = np.asarray(case.reference(*wide))
    assert got.shape == expected.shape
    if got.dtype == np.int32:
        np.testing.assert_array_equal(got, expected)
        return
    assert got.dtype == kind
    # Rounded once: half of the last bit, beside what the computation in float32 may be off by.
    bound = SINGLE * max(1.0, np.abs(expected).max())
    if kind == "float16":
        bound = bound + 0.5 * np.spacing(np.abs(expected).astype(np.float16)).astype(np.float64)
    assert (np.abs(got - expected) <= bound).all()


def test_every_operation_is_in_a_case(ran: Ran) -> None:
    assert ran.operations == OPERATIONS.keys()


# --- float16 -------------------------------------------------------------------------------------

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def test_every_float16_widens_to_itself() -> None:
    np.testing.assert_array_equal(
        widen(HALVES).view(np.uint32), HALVES.astype(np.float32).view(np.uint32)
    )
    # A piece without infinities takes another way.
    finite = np.sort(HALVES[np.isfinite(HALVES)])
    np.testing.assert_array_equal(widen(finite), finite.astype(np.float32))


def test_rounding_to_float16_is_numpys_without_its_warnings() -> None:
    finite = np.sort(HALVES[np.isfinite(HALVES)].astype(np.float32))
    middle = ((finite[:-1].astype(np.float64) + finite[1:]) / 2).astype(np.float32)
    edges = np.array([65519.996, 65520, 1e30, np.inf, 2.0**-25, 2.0**-26, 1e-45], np.float32)
    anything = np.random.default_rng(0).integers(0, 1 << 32, 200_000, np.uint32).view(np.float32)
    x = np.concatenate(
        [finite, middle, np.nextafter(middle, np.float32(np.inf)),
         np.nextafter(middle, np.float32(-np.inf)), edges, -edges, anything]
    )  # fmt: skip
    with np.errstate(all="ignore"):
        expected = x.astype(np.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = narrow(x, np.float16)
        small = np.concatenate([narrow(x[at : at + 1000], np.float16) for at in (0, 65_000)])
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(x))
    np.testing.assert_array_equal(small, np.concatenate([expected[:1000], expected[65_000:66_000]]))


def test_products_of_codes_and_scales_round_as_float16() -> None:
    # All scales of one binade, and the ends of the range, subnormal ones included.
    scales = np.concatenate([HALVES[0x2000:0x2400], HALVES[1:64], HALVES[0x3C00:0x3C40]])
    codes = np.arange(-255, 256, dtype=np.float32)
    x = np.ascontiguousarray(codes[:, None] * scales.astype(np.float32))
    expected = x.astype(np.float16).astype(np.float32)
    round_in_place(x, np.empty(x.size, np.uint32))
    np.testing.assert_array_equal(x, expected)


# --- constants -----------------------------------------------------------------------------------


def stored(values: Array, dtype: str | None = None, key: object = None) -> Stored:
    """Numbers as a package stores them, those of four bits two in a byte."""
    if dtype in ("uint4", "int4"):
        flat = np.append(values.reshape(-1), 0)[: (values.size + 1) // 2 * 2].astype(np.uint8) & 15
        data = (flat[0::2] | flat[1::2] << 4).tobytes()
    else:
        data = values.tobytes()
    return Stored(dtype or str(values.dtype), values.shape, memoryview(data), key)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["uint4", "int4", "uint8", "int8"])
@pytest.mark.parametrize("blocks", [(6, 2), (3, 1), (1, 4), (6, 8), (1, 1)])
@pytest.mark.parametrize("with_offset", [True, False])
def test_dequantised_numbers_are_exact_and_rounded_once(
    dtype: str, blocks: tuple[int, int], with_offset: bool
) -> None:
    rng = np.random.default_rng(5)
    low, high = {"uint4": (0, 16), "int4": (-8, 8), "uint8": (0, 256), "int8": (-128, 128)}[dtype]
    codes = rng.integers(low, high, (6, 8))
    offsets = rng.integers(low, high, blocks)
    scales = (rng.random(blocks) * 0.01).astype(np.float16)
    parts = [x.astype("int8" if low else "uint8") for x in (codes, offsets)]
    source = Quantised(
        stored(parts[0], dtype), stored(scales), stored(parts[1], dtype) if with_offset else None
    )
    spread = [np.kron(x, np.ones((6 // blocks[0], 8 // blocks[1]))) for x in (offsets, scales)]
    exact = (codes - spread[0] * with_offset) * spread[1]  # float64: no rounding
    expected = exact.astype(np.float16)
    weight = Constant(source, FloatCache(0))
    assert weight.dtype == np.float16
    np.testing.assert_array_equal(weight.array(), expected)
    indices = np.array([[5, 0], [3, 3]])
    np.testing.assert_array_equal(weight.take(indices), expected[indices])
    np.testing.assert_array_equal(narrow(source.array32(), np.float16), expected)


def test_dequantised_integers_equal_coremltools_bit_for_bit() -> None:
    rng = np.random.default_rng(6)
    codes, offsets = rng.integers(0, 256, (64, 128)), rng.integers(0, 256, (64, 4))
    scales = rng.integers(1, 0x3C00, (64, 4)).astype(np.uint16).view(np.float16)  # all below 1
    own = coremltools("converters.mil.mil.ops.defs.iOS18.compression")
    expected = own.constexpr_blockwise_shift_scale.decompress(
        codes.astype(np.uint8), scales, offsets.astype(np.uint8)
    )
    parts = (stored(x.astype(np.uint8)) for x in (codes, offsets))
    data, offset = parts
    weight = Constant(Quantised(data, stored(scales), offset), FloatCache(0))
    np.testing.assert_array_equal(weight.array(), expected)


def test_dequantised_numbers_beyond_float16_are_infinite() -> None:
    codes = np.array([[0, 1, 2, 255]], np.uint8)
    weight = Constant(
        Quantised(stored(codes), stored(np.array([[40000]], np.float16)), None), FloatCache(0)
    )
    np.testing.assert_array_equal(weight.array(), [[0, 40000, np.inf, np.inf]])
    # In a product too they are what the program's type can hold.
    with np.errstate(invalid="ignore"):
        assert np.isnan(weight.product(np.array([[0, 1, 1, 0]], np.float32)))


@pytest.mark.parametrize("scale", [0.01, 1e-6, 3000.0])
def test_a_float_offset_is_subtracted_before_rounding(scale: float) -> None:
    rng = np.random.default_rng(7)
    codes = rng.integers(0, 16, (16, 64)).astype(np.uint8)
    offsets = (rng.random((16, 2)) * 40 - 20).astype(np.float16)
    scales = (rng.random((16, 2)) * scale).astype(np.float16)
    weight = Constant(
        Quantised(stored(codes, "uint4"), stored(scales), stored(offsets)), FloatCache(0)
    )
    wide = [np.repeat(x.astype(np.float64), 32, 1) for x in (offsets, scales)]
    with np.errstate(over="ignore"):
        expected = ((codes - wide[0]) * wide[1]).astype(np.float16)
    assert np.isinf(expected).any() == (scale == 3000.0)
    np.testing.assert_array_equal(weight.array(), expected)


def test_scales_of_float32_give_float32() -> None:
    codes = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    scales = np.array([[0.1], [0.3], [0.7], [1.1]], np.float32)
    weight = Constant(Quantised(stored(codes), stored(scales), None), FloatCache(0))
    np.testing.assert_array_equal(weight.array(), codes * scales)
    assert weight.array().dtype == np.float32


def test_blocks_of_any_rank() -> None:
    codes = np.arange(48, dtype=np.uint8).reshape(2, 4, 6)
    scales = np.arange(1, 5, dtype=np.float16).reshape(1, 2, 2) / 16
    weight = Constant(Quantised(stored(codes), stored(scales), None), FloatCache(0))
    expected = codes * np.kron(scales, np.ones((2, 2, 3)))
    np.testing.assert_array_equal(weight.array(), expected.astype(np.float16))


def large(shape: tuple[int, int], form: str, key: object) -> Constant:
    rng = np.random.default_rng(8)
    if form == "quantised":
        blocks = (shape[0] // 2, 2)  # of two rows each, which pieces of rows cut through
        parts = [
            stored(rng.integers(0, 16, shape), "uint4", (key, "data")),
            stored((rng.random(blocks) * 0.1).astype(np.float16), key=(key, "scale")),
            stored(rng.integers(0, 16, blocks), "uint4", (key, "offset")),
        ]
        return Constant(Quantised(*parts), FloatCache(0))
    return Constant(stored(rng.standard_normal(shape).astype(form), key=key), FloatCache(0))


@pytest.mark.parametrize("form", ["quantised", "float16", "float32"])
def test_a_product_in_blocks_is_the_product(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mil_ops_weights, "BLOCK", 96 * 7)
    monkeypatch.setattr(mil_ops_weights, "PIECE", 96 * 2)
    weight = large((50, 96), form, "w")
    x = np.random.default_rng(9).standard_normal((2, 3, 96)).astype(np.float32)
    expected = x.astype(np.float64) @ weight.array().astype(np.float64).T
    got = weight.product(x)
    # Sums of 96 products in float32, of a size of about 10.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    cached = Constant(weight.source, FloatCache(10**6))
    np.testing.assert_allclose(cached.product(x), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(cached.array(), weight.array())


def test_the_cache_keeps_what_fits_and_no_more() -> None:
    cache = FloatCache(3 * 4 * 40)
    first, second, third = (
        Constant(large((4, 10), "quantised", key).source, cache) for key in "abc"
    )
    held = cache.whole(first)
    assert held is not None and cache.whole(first) is held
    # The same place in the file is the same matrix, whichever function asks.
    assert cache.whole(Constant(large((4, 10), "quantised", "a").source, cache)) is held
    assert cache.whole(second) is not None and cache.whole(third) is not None
    assert cache.whole(Constant(large((4, 10), "float16", "d").source, cache)) is None
    assert cache.nbytes == cache.limit
    assert cache.whole(Constant(large((4, 10), "float16", None).source, FloatCache(10**9))) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": stored(np.zeros((4, 5), np.uint8))}, "scales [4, 2] do not divide [4, 5]"),
        ({"offset": stored(np.zeros((4, 1), np.uint8))}, "offsets [4, 1] beside scales [4, 2]"),
        ({"scale": stored(np.zeros((4, 2), np.int32))}, "scales of type int32"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(
    change: dict[str, Stored], message: str
) -> None:
    parts: dict[str, Any] = {
        "data": stored(np.zeros((4, 8), np.uint8)),
        "scale": stored(np.ones((4, 2), np.float16)),
        "offset": None,
    }
    with pytest.raises(BundleError) as caught:
        Quantised(**{**parts, **change})
    assert message in str(caught.value)


def test_a_constant_of_another_size_is_refused() -> None:
    with pytest.raises(BundleError, match=r"3 bytes for uint4 \[7\], expected 4"):
        Stored("uint4", (7,), memoryview(b"abc"))
    with pytest.raises(BundleError, match="numbers of type 'bfloat16' are not implemented"):
        Stored("bfloat16", (7,), memoryview(b"abc"))


# --- what is refused -----------------------------------------------------------------------------


def test_arguments_are_all_known_and_all_there() -> None:
    check_arguments("linear", {"x", "weight"})
    with pytest.raises(BundleError, match="lacks its argument weight"):
        check_arguments("linear", {"x"})
    with pytest.raises(BundleError, match="not implemented: dropout"):
        check_arguments("linear", {"x", "weight", "dropout"})
    with pytest.raises(BundleError, match="lacks its argument update"):
        check_arguments("slice_update", {"x", "begin", "end"})


F16, F32 = np.ones((2, 4), np.float16), np.ones((2, 4), np.float32)
INTS = np.ones((2, 4), np.int32)


@pytest.mark.parametrize(
    ("op_type", "arguments", "message"),
    [
        ("add", {"x": F16, "y": F32}, "arguments of different types: float16, float32"),
        ("real_div", {"x": INTS, "y": INTS}, "of type int32, expected float16 or float32"),
        ("linear", {"x": F32, "weight": np.ones((3, 5), np.float32)}, "do not multiply"),
        ("linear", {"x": F32, "weight": F32, "bias": np.ones(4, np.float32)}, "bias [4]"),
        ("gather", {"x": F32, "indices": i32(-1)}, "indices from -1 to -1, expected 0 to 1"),
        ("gather", {"x": F32, "indices": i32(2)}, "indices from 2 to 2, expected 0 to 1"),
        ("gather", {"x": F32, "indices": i32(0), "batch_dims": np.int32(1)}, "batch_dims 1"),
        ("concat", {"values": [F16, F32], "axis": 0}, "different types"),
        ("concat", {"values": [F32], "axis": 0, "interleave": np.True_}, "interleave"),
        ("reshape", {"x": F32, "shape": i32(0, 2, 2)}, "at another rank"),
        ("split", {"x": F32, "axis": 1, "num_splits": np.int32(3)}, "into 3 equal parts"),
        ("split", {"x": F32, "axis": 1, "split_sizes": i32(1, 2)}, "do not add up to 4"),
        ("cast", {"x": F32, "dtype": "fp64"}, "cast to 'fp64' is not implemented"),
        ("slice_by_size", {"x": F32, "begin": i32(0, 3), "size": i32(2, 2)}, "slice 3:5 outside"),
        (
            "slice_update",
            {"x": F32, "update": F32[:, :1], "begin": i32(0, 4), "end": i32(2, 5)},
            "update float32 [2, 1] into a slice float32 [2, 0]",
        ),
        (
            "slice_update",
            {"x": F32, "update": F32[:1], "begin": i32(0, 0), "end": i32(2, 4)},
            "update float32 [1, 4] into a slice float32 [2, 4]",
        ),
        (
            "scaled_dot_product_attention",
            {"query": F32[None, None], "key": F32[None], "value": F32[None]},
            "differ before the last two axes",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    op_type: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError, IndexError)) as caught:
        OPERATIONS[op_type](**arguments)
    assert message in str(caught.value)


def test_results_beyond_float16_are_infinite(tmp_path: Path) -> None:
    def body(x: Any) -> dict[str, Any]:
        doubled = mb().add(x=x, y=x)
        return {"doubled": doubled, "lost": mb().sub(x=doubled, y=doubled)}

    made = package(tmp_path / "inf.mlpackage", main=function(body, {"x": ("float16", (3,))}))
    got = Interpreter(made).run("main", {"x": np.array([40000, -40000, 1], np.float16)})
    np.testing.assert_array_equal(got["doubled"], [np.inf, -np.inf, 2])
    np.testing.assert_array_equal(got["lost"], [np.nan, np.nan, 0])


def test_saved_constants_of_every_form_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    forms: dict[str, tuple[Array, Array, Array | None]] = {}
    for name, shape, bits in (("large", (32, 64), 4), ("small", (2, 4), 4), ("eight", (32, 64), 8)):
        groups = (shape[0], 2)
        codes, offsets = (rng.integers(0, 1 << bits, n) for n in (shape, groups))
        scales = (rng.random(groups) * 0.1 + 0.01).astype(np.float16)
        forms[name] = (codes, scales, offsets)
    signed = rng.integers(-8, 8, (2, 4))
    plain = rng.standard_normal((3, 64)).astype(np.float16)

    def body(ids: Any) -> dict[str, Any]:
        made = {}
        for name, (codes, scales, offsets) in forms.items():
            pack = four_bit if name != "eight" else (lambda values: values.astype(np.uint8))
            weight = mb().constexpr_blockwise_shift_scale(
                data=pack(codes), scale=scales, offset=pack(offsets)
            )
            made[name] = mb().gather(x=weight, indices=ids, axis=0, validate_indices=False)
        weight = mb().constexpr_blockwise_shift_scale(
            data=four_bit(signed, "int4"), scale=np.full((2, 1), 0.5, np.float16)
        )
        made["signed"] = mb().gather(x=weight, indices=ids, axis=0)
        made["plain"] = mb().gather(x=plain, indices=ids, axis=0)
        made["few"] = mb().gather(x=np.array([[1.5], [2.5]], np.float16), indices=ids, axis=0)
        return made

    path = tmp_path / "forms.mlpackage"
    opened = package(path, main=function(body, {"ids": ("int32", (2,))}))
    ids = np.array([1, 0], np.int32)
    got = Interpreter(opened).run("main", {"ids": ids})
    for name, (codes, scales, offsets) in forms.items():
        assert offsets is not None
        width = codes.shape[1] // 2
        wide = [np.repeat(x.astype(np.float64), width, 1) for x in (offsets, scales)]
        expected = ((codes - wide[0]) * wide[1]).astype(np.float16)
        np.testing.assert_array_equal(got[name], expected[ids], err_msg=name)
    np.testing.assert_array_equal(got["signed"], signed[ids] * 0.5)
    np.testing.assert_array_equal(got["plain"], plain[ids])
    np.testing.assert_array_equal(got["few"], [[2.5], [1.5]])
