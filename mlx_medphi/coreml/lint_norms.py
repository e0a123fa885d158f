"""Do the float32 islands stand: the squares of every norm, the softmax of a decomposed attention.

A norm is cast → x·x → reduce_mean → rsqrt → x· → cast → ·γ. In float16 its squares overflow from
256 on, and small numbers vanish (pytorch/executorch issue 8641). With a float32 residual the first
cast is missing, and the sums of the residual are islands too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlx_medphi.coreml.lint_view import Op, View

__all__ = ["Norm", "find_norms", "find_softmaxes", "island_findings"]

SINGLE = "float32"


@dataclass(frozen=True)
class Norm:
    """One norm.

    Attributes:
        rsqrt: its middle.
        source: the value it is taken of, before that is cast.
        result: the value that comes out, times γ.
        inner: what computes in float32.
        back: the cast to float16, and the product with γ.
    """

    rsqrt: Op
    source: str
    result: str
    inner: tuple[Op, ...]
    back: tuple[Op, ...]


def find_norms(view: View) -> list[Norm | Op]:
    """Every norm in order; an rsqrt that is in none stands for itself."""
    return [_norm(view, op) or op for op in view.by_type.get("rsqrt", ())]


def _norm(view: View, rsqrt: Op) -> Norm | None:
    mean = view.source(rsqrt, "x", "reduce_mean")
    square = view.source(mean, "x", "mul")
    unit = _only_reader(view, rsqrt, "mul")
    back = _only_reader(view, unit, "cast")
    scaled = _only_reader(view, back, "mul")
    if mean is None or square is None or unit is None or back is None or scaled is None:
        return None
    # The shapes have shown that the mean is over the last axis.
    wide = square.argument("x")
    if wide is None:
        return None
    if (square.argument("y"), unit.argument("x"), unit.argument("y")) != (wide, wide, rsqrt.name):
        return None
    if scaled.argument("x") != back.name or view.source(scaled, "y", "const") is None:
        return None
    cast = view.source(square, "x", "cast")
    source = cast.argument("x") if cast is not None else None
    inner = (*((cast,) if cast is not None else ()), square, mean, rsqrt, unit)
    return Norm(rsqrt, source or wide, scaled.name, inner, (back, scaled))


def _only_reader(view: View, op: Op | None, kind: str) -> Op | None:
    readers = view.readers.get(op.name, ()) if op is not None else ()
    return readers[0] if len(readers) == 1 and readers[0].type == kind else None


def find_softmaxes(view: View) -> list[tuple[Op, ...] | Op]:
    """Every softmax with the casts around it; one without them stands for itself."""
    found: list[tuple[Op, ...] | Op] = []
    for op in view.by_type.get("softmax", ()):
        before, after = view.source(op, "x", "cast"), _only_reader(view, op, "cast")
        found.append((before, op, after) if before is not None and after is not None else op)
    return found


def island_findings(
    view: View, layers: int, eps: float, *, decomposed: bool, wide: bool
) -> Iterator[str]:
    """What is wrong with the parts that must be float32, one line each.

    Args:
        view: the function.
        layers: of the model.
        eps: of the norms.
        decomposed: whether attention is written out, with a softmax of its own.
        wide: whether the residual is float32.
    """
    norms, softmaxes = find_norms(view), find_softmaxes(view)
    for norm in norms:
        if isinstance(norm, Op):
            yield f"{norm} is in no norm (cast, square, mean, rsqrt, product, cast, gain)"
        else:
            yield from _norm_findings(view, norm, eps)
    if len(norms) != 2 * layers + 1:
        yield f"{len(norms)} norms, expected {2 * layers + 1}: two in each layer and one"
    for softmax in softmaxes:
        if isinstance(softmax, Op):
            yield f"{softmax} is not between casts to float32 and back"
        elif not _is_single(softmax[:2]):
            yield f"{softmax[1]} does not compute in float32; float16 loses the small shares"
        elif not _is_over_keys(view, softmax[1]):
            yield f"{softmax[1]} is not over the keys, the last axis"
    if len(softmaxes) != (layers if decomposed else 0):
        yield f"{len(softmaxes)} softmaxes, expected {layers if decomposed else 0}"
    if not any(isinstance(found, Op) for found in (*norms, *softmaxes)):
        yield from _elsewhere(view, layers, wide)


def _elsewhere(view: View, layers: int, wide: bool) -> Iterator[str]:
    """float32 outside of norms and softmaxes: the residual's, or none."""
    island = {op.index for norm in find_norms(view) for op in _members(norm)}
    island |= {op.index for softmax in find_softmaxes(view) for op in _members(softmax)}
    single = [op for op in view.ops if op.type not in ("const", "cast") and _is_single((op,))]
    sums = [op for op in single if op.type in ("add", "gather")] if wide else []
    if wide and len(sums) != 2 * layers + 1:
        yield (
            f"the residual is float32 in {len(sums)} places, expected {2 * layers + 1}: two sums "
            "in each layer and the last row"
        )
    known = island | {op.index for op in sums}
    for op in single:
        if op.index not in known:
            yield f"{op} computes in float32 outside of the norms and softmaxes; expected float16"


def _members(found: Norm | tuple[Op, ...] | Op) -> tuple[Op, ...]:
    if isinstance(found, Norm):
        return (*found.inner, *found.back)
    return found if isinstance(found, tuple) else (found,)


def _norm_findings(view: View, norm: Norm, eps: float) -> Iterator[str]:
    if not _is_single(norm.inner):
        odd = next(op for op in norm.inner if not _is_single((op,)))
        yield f"the norm {norm.result!r} computes {odd} in float16, expected float32"
    epsilon = view.constant(norm.rsqrt, "epsilon")
    values = epsilon.values if epsilon is not None else None
    stored = np.float32(values.reshape(-1)[0]) if isinstance(values, np.ndarray) else None
    if stored != np.float32(eps) and _is_single((norm.rsqrt,)):
        yield f"the norm {norm.result!r} has an epsilon of {stored}, expected {np.float32(eps)}"


def _is_over_keys(view: View, softmax: Op) -> bool:
    axis, kind = view.constant(softmax, "axis"), view.type_of(softmax.name)
    last = len(kind.shape) - 1 if kind is not None else -1
    return axis is not None and axis.ints in ((-1,), (last,))


def _is_single(ops: tuple[Op, ...]) -> bool:
    types = [made for op in ops for made in op.outputs.values()]
    return bool(types) and all(made is not None and made.dtype == SINGLE for made in types)
