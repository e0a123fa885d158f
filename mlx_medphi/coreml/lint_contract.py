"""What every package offers, from its model's extents alone: the functions an app calls.

The same facts stand in metadata.json and in the package; this is the third, independent opinion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from mlx_medphi.coreml.lint_view import Op, View
from mlx_medphi.coreml.manifest_program import Model, Signature, Tensor

__all__ = ["contract", "projection_findings", "rope_findings", "slot_names"]

MODULES = ("qkv", "o", "gate_up", "down")


def contract(
    model: Model, width: int, context: int, rank: int | None, kind: str | None
) -> Signature:
    """The signature of a function that reads `width` tokens.

    Args:
        model: the architecture.
        width: tokens of one call.
        context: slots of the cache.
        rank: of the adapter slots; None without slots.
        kind: "state" or "input": what the slots are.
    """
    inputs = [
        Tensor("inputIds", (1, width), "int32"),
        Tensor("position", (1,), "int32"),
        Tensor("causalMask", (1, 1, width, context), "float16"),
        Tensor("lastIndex", (1,), "int32"),
    ]
    if rope_sets(model, context) > 1:
        inputs.append(Tensor("ropeRow", (1,), "int32"))
    cache = (model.layers, model.kv_heads, context, model.head_dim)
    states = [Tensor(name, cache, "float16") for name in ("keyCache", "valueCache")]
    if rank is not None:
        (states if kind == "state" else inputs).extend(_slots(model, rank))
    return Signature(
        tuple(inputs), (Tensor("logits", (1, 1, model.vocab_size), "float16"),), tuple(states)
    )


def slot_names() -> tuple[str, ...]:
    """All adapter slots."""
    return tuple(f"lora{factor}_{module}" for module in MODULES for factor in "AB")


def _slots(model: Model, rank: int) -> Iterator[Tensor]:
    for module, (outputs, inputs) in _projections(model).items():
        yield Tensor(f"loraA_{module}", (model.layers, rank, inputs), "float16")
        yield Tensor(f"loraB_{module}", (model.layers, outputs, rank), "float16")


def _projections(model: Model) -> dict[str, tuple[int, int]]:
    """(out, in) of a layer's four projections."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    return {
        "qkv": (queries + 2 * keys, hidden),
        "o": (hidden, queries),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def projection_findings(view: View, model: Model, adapter: bool, slots: bool) -> Iterator[str]:
    """What is wrong with the number and size of the matrix products, one line each."""
    found = Counter(_weight_shape(view, op) for op in view.of("linear"))
    expected: Counter[tuple[int, ...]] = Counter()
    for sizes in _projections(model).values():
        expected[sizes] += model.layers
    expected[model.vocab_size, model.hidden_size] += 1
    for shape in sorted(expected.keys() | (set() if adapter else found.keys())):
        if found[shape] < expected[shape] or (found[shape] != expected[shape] and not adapter):
            yield f"{found[shape]} linear layers of {list(shape)}, expected {expected[shape]}"
    extra = found.total() - expected.total()
    if adapter and (extra <= 0 or extra % 2):
        yield f"{extra} linear layers beside the base's, expected an adapter's two for each layer"
    products = 2 * model.layers if "softmax" in view.by_type else 0
    products += 2 * len(MODULES) * model.layers if slots else 0
    if len(view.of("matmul")) != products:
        yield f"{len(view.of('matmul'))} matmuls, expected {products}"


def _weight_shape(view: View, linear: Op) -> tuple[int, ...]:
    kind = view.type_of(linear.argument("weight") or "")
    return kind.shape if kind is not None else ()


def rope_sets(model: Model, context: int) -> int:
    """Sets of rotary tables: two where LongRoPE's factors change within the context."""
    switch = model.rope.switch_length
    return 2 if switch is not None and context > switch else 1


def rope_findings(view: View, model: Model, context: int) -> Iterator[str]:
    """What is wrong with the rows of the rotary tables that a call takes, one line each."""
    sets = rope_sets(model, context)
    row = "ropeRow" if sets > 1 else "position"
    wanted = [sets * context, model.rope.rotary_dim // 2]
    slices, tables = view.of("slice_by_size"), set()
    for op in slices:
        begin, table = view.source(op, "begin", "concat"), view.constant(op, "x")
        first, *rest = begin.inputs["values"] if begin is not None else (None,)
        if first != row or [view.ints(n) for n in rest] != [(0,)] or table is None:
            yield f"{op} does not take rows of a table from the input {row!r} on"
            return
        if table.type is None or list(table.type.shape) != wanted:
            yield f"{op} is of a table {table.type}, expected {wanted}"
            return
        tables.add(table.offset)
    if (len(slices), len(tables)) != (2, 2):
        yield f"rows of {len(tables)} rotary tables, expected cosines and sines"
