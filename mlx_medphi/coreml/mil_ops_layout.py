"""Operations that move numbers or make them up: shapes, slices, indices, casts.

Results may share memory with arguments, which nobody writes to. Arguments carry the names the
program gives them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlx_medphi.coreml.mil_ops_half import Array, narrow, widen
from mlx_medphi.coreml.mil_ops_weights import Constant

__all__ = ["LAYOUT", "write_slice"]

CASTS = {
    "fp16": "float16", "fp32": "float32", "bool": "bool", "int8": "int8", "int16": "int16",
    "int32": "int32", "uint8": "uint8", "uint16": "uint16",
}  # fmt: skip


def _ints(values: Array) -> list[int]:
    return [int(value) for value in values.reshape(-1)]


def cast(*, x: Array, dtype: str) -> Array:
    """Floats lose their fraction on the way to integers."""
    if dtype not in CASTS:
        raise TypeError(f"cast to {dtype!r} is not implemented")
    return narrow(widen(x), CASTS[dtype])


def select(*, cond: Array, a: Array, b: Array) -> Array:
    if a.dtype != b.dtype or cond.dtype != np.bool_:
        raise TypeError(f"arguments of types {cond.dtype}, {a.dtype}, {b.dtype}")
    return np.where(cond, a, b)


def gather(
    *,
    x: Array | Constant,
    indices: Array,
    axis: Array | None = None,
    batch_dims: Array | None = None,
    validate_indices: Array | None = None,
) -> Array:
    """Entries of `x` along `axis`; since iOS 17 an index below 0 is out of bounds.

    Without `validate_indices` what a device gives for an index out of bounds is undefined, so it
    is an error here with or without.
    """
    if batch_dims is not None and int(batch_dims):
        raise ValueError(f"batch_dims {int(batch_dims)} is not implemented")
    along = 0 if axis is None else int(axis)
    extent = x.shape[along]
    if indices.size and (indices.min() < 0 or indices.max() >= extent):
        raise IndexError(
            f"indices from {indices.min()} to {indices.max()}, expected 0 to {extent - 1}"
        )
    if isinstance(x, Constant):
        if along % len(x.shape) == 0:
            return x.take(indices)
        x = x.array()
    return np.asarray(np.take(x, indices, axis=along))


def reshape(*, x: Array, shape: Array) -> Array:
    """0 keeps the extent at this place, -1 is what remains."""
    wanted = _ints(shape)
    if 0 in wanted and len(wanted) != x.ndim:
        raise ValueError(f"shape {wanted} keeps an extent of {list(x.shape)} at another rank")
    return x.reshape([x.shape[at] if n == 0 else n for at, n in enumerate(wanted)])


def transpose(*, x: Array, perm: Array) -> Array:
    return x.transpose(_ints(perm))


def expand_dims(*, x: Array, axes: Array) -> Array:
    return np.expand_dims(x, tuple(_ints(axes)))


def squeeze(*, x: Array, axes: Array | None = None) -> Array:
    return np.asarray(np.squeeze(x, None if axes is None else tuple(_ints(axes))))


def split(
    *, x: Array, axis: Array, num_splits: Array | None = None, split_sizes: Array | None = None
) -> tuple[Array, ...]:
    extent = x.shape[int(axis)]
    if split_sizes is not None:
        sizes = _ints(split_sizes)
    elif num_splits is not None and int(num_splits) > 0 and extent % int(num_splits) == 0:
        sizes = [extent // int(num_splits)] * int(num_splits)
    else:
        raise ValueError(f"an axis of {extent} does not split into {num_splits} equal parts")
    if sum(sizes) != extent or min(sizes) < 0:
        raise ValueError(f"sizes {sizes} do not add up to {extent}")
    return tuple(np.split(x, np.cumsum(sizes)[:-1].tolist(), axis=int(axis)))


def concat(*, values: Sequence[Array], axis: Array, interleave: Array | None = None) -> Array:
    if interleave is not None and bool(interleave):
        raise ValueError("interleave is not implemented")
    if len({value.dtype for value in values}) > 1:
        raise TypeError("arguments of different types")
    return np.concatenate(values, axis=int(axis))


def stack(*, values: Sequence[Array], axis: Array) -> Array:
    if len({value.dtype for value in values}) > 1:
        raise TypeError("arguments of different types")
    return np.stack(values, axis=int(axis))


def _slices(
    shape: Sequence[int],
    begin: Array,
    end: Array,
    stride: Array | None,
    begin_mask: Array | None,
    end_mask: Array | None,
    squeeze_mask: Array | None,
) -> tuple[slice | int, ...]:
    """Python's own slices, which end where the array ends; a squeezed axis is one index."""
    rank = len(shape)
    begins, ends = _ints(begin), _ints(end)
    steps = [1] * rank if stride is None else _ints(stride)
    from_start, to_end, squeezed = (
        [False] * rank if mask is None else [bool(value) for value in mask.reshape(-1)]
        for mask in (begin_mask, end_mask, squeeze_mask)
    )
    lengths = {len(part) for part in (begins, ends, steps, from_start, to_end, squeezed)}
    if lengths != {rank}:
        raise ValueError(f"a slice of another rank than {list(shape)}")
    taken: list[slice | int] = []
    for at in range(rank):
        first = None if from_start[at] else begins[at]
        last = None if to_end[at] else ends[at]
        taken.append((first or 0) if squeezed[at] else slice(first, last, steps[at]))
    return tuple(taken)


def slice_by_index(
    *,
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    return np.asarray(x[_slices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)])


def write_slice(
    *,
    x: Array,
    update: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """`slice_update` in place: only for an array that no one else needs as it was."""
    taken = _slices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    found = x[taken].shape
    if x.dtype != update.dtype or found != update.shape:
        raise ValueError(
            f"update {update.dtype} {list(update.shape)} into a slice {x.dtype} {list(found)}"
        )
    x[taken] = update
    return x


@functools.wraps(write_slice)
def slice_update(*, x: Array, **arguments: Any) -> Array:
    """A copy of `x` with one slice replaced."""
    return write_slice(x=np.array(x), **arguments)


def slice_by_size(*, x: Array, begin: Array, size: Array) -> Array:
    """-1 takes all that remains of an axis."""
    begins, sizes = _ints(begin), _ints(size)
    if not len(begins) == len(sizes) == x.ndim:
        raise ValueError(f"a slice of another rank than {list(x.shape)}")
    taken = []
    for at, (first, count) in enumerate(zip(begins, sizes, strict=True)):
        extent = x.shape[at]
        first += extent if first < 0 else 0
        last = extent if count == -1 else first + count
        if not 0 <= first <= last <= extent:
            raise ValueError(f"slice {first}:{last} outside the {extent} of axis {at}")
        taken.append(slice(first, last))
    return x[tuple(taken)]


def tile(*, x: Array, reps: Array) -> Array:
    if len(reps) != x.ndim:
        raise ValueError(f"{len(reps)} repetitions for {list(x.shape)}")
    return np.tile(x, _ints(reps))


def shape_of(*, x: Array) -> Array:
    return np.array(x.shape, np.int32)


def range_1d(*, start: Array, end: Array, step: Array) -> Array:
    return np.arange(start.item(), end.item(), step.item()).astype(start.dtype)


def fill(*, shape: Array, value: Array | None = None) -> Array:
    filler = np.zeros((), np.float32) if value is None else value
    return np.full(_ints(shape), filler, filler.dtype)


def fill_like(*, ref_tensor: Array, value: Array) -> Array:
    return np.full(ref_tensor.shape, value, value.dtype)


LAYOUT: dict[str, Callable[..., Any]] = {
    "cast": cast,
    "concat": concat,
    "expand_dims": expand_dims,
    "fill": fill,
    "fill_like": fill_like,
    "gather": gather,
    "identity": lambda *, x: x,
    "range_1d": range_1d,
    "reshape": reshape,
    "select": select,
    "shape": shape_of,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
}
"""Operation -> function of its arguments by name."""
