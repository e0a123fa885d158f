"""Are keys, values and mask used as they must be: written once, read after that, causal.

A layer writes its block of both caches, then reads all slots of it; what it reads must be what it
wrote, and what hides the future must be the mask that the app hands in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlx_medphi.coreml.lint_view import Op, View

__all__ = ["Attention", "cache_findings", "find_attentions", "slot_findings"]

KEYS, VALUES = "keyCache", "valueCache"
MASK, POSITION = "causalMask", "position"


@dataclass(frozen=True)
class Attention:
    """One attention: where it reads keys, values and mask. A name is None where it has none."""

    op: Op
    keys: tuple[Op, str]
    values: tuple[Op, str]
    mask: str | None


def find_attentions(view: View) -> list[Attention | Op]:
    """All of them in order; a softmax that belongs to none stands for itself."""
    found: list[Attention | Op] = []
    for op in view.of("scaled_dot_product_attention", "softmax"):
        if op.type == "softmax":
            found.append(_decomposed(view, op) or op)
        else:
            found.append(Attention(op, (op, "key"), (op, "value"), op.argument("attn_mask")))
    return found


def _decomposed(view: View, softmax: Op) -> Attention | None:
    """matmul → + mask → cast → softmax → cast → matmul."""
    scores = view.source(view.source(softmax, "x", "cast"), "x", "add")
    product = view.source(scores, "x", "matmul")
    narrow = view.readers.get(softmax.name, ())
    mixed = view.readers.get(narrow[0].name, ()) if len(narrow) == 1 else ()
    if scores is None or product is None or len(mixed) != 1 or mixed[0].type != "matmul":
        return None
    return Attention(softmax, (product, "y"), (mixed[0], "y"), scores.argument("y"))


def cache_findings(view: View, layers: int) -> Iterator[str]:
    """What is wrong with how a function keeps and reads keys and values, one line each."""
    for op in view.of("write_state"):
        if op.argument("input") not in (KEYS, VALUES):
            yield f"{op} writes {op.argument('input')!r}; only {KEYS} and {VALUES} are written"
    written: dict[tuple[str, int], int] = {}
    for cache in (KEYS, VALUES):
        yield from _writes(view, cache, layers, written)
    attentions = find_attentions(view)
    if len(attentions) != layers:
        yield f"{len(attentions)} attentions, expected {layers}: one in each layer"
    for layer, attention in enumerate(attentions):
        if isinstance(attention, Op):
            yield f"{attention} is in no attention (scores, mask, softmax, values)"
            continue
        for cache, place in ((KEYS, attention.keys), (VALUES, attention.values)):
            problem = _read(view, cache, layer, place, written.get((cache, layer)))
            if problem is not None:
                yield f"{attention.op} of layer {layer} {problem}"
        if not _is_mask(view, attention.mask):
            yield f"{attention.op} of layer {layer} has a mask that is not {MASK}"


def _writes(
    view: View, cache: str, layers: int, written: dict[tuple[str, int], int]
) -> Iterator[str]:
    """Check the writes to one cache; notes in `written` which operation writes which layer."""
    writes = [op for op in view.of("write_state") if op.argument("input") == cache]
    last, count = -1, dict.fromkeys(range(layers), 0)
    for op in writes:
        update = view.source(op, "data", "slice_update")
        before = view.source(update, "x", "read_state")
        layer = _layer_written(view, update)
        if update is None or before is None or before.argument("input") != cache:
            yield f"{op} writes something else to {cache} than a changed copy of it"
        elif before.index < last:
            yield f"{op} undoes an earlier write: it changes what {cache} was before that"
        elif layer is None:
            yield f"{op} does not write one layer of {cache} from {POSITION} on"
        else:
            count[layer] = count.get(layer, 0) + 1
            written.setdefault((cache, layer), op.index)
        last = op.index
    if len(writes) != layers:
        yield f"{len(writes)} writes to {cache}, expected {layers}: one in each layer"
    elif sum(count.values()) == layers and any(times != 1 for times in count.values()):
        odd = sorted(layer for layer, times in count.items() if times != 1)
        yield f"{cache} of layer {odd[0]} is written {count[odd[0]]} times, expected once"


def _layer_written(view: View, update: Op | None) -> int | None:
    """The layer that a slice_update changes from `position` on; None where it is another range."""
    begin = view.source(update, "begin", "concat")
    end = view.source(update, "end", "add")
    given = view.type_of(update.argument("update") or "") if update is not None else None
    extent = view.constant(end, "y")
    if begin is None or end is None or extent is None or given is None:
        return None
    first, middle, last = (*begin.inputs.get("values", ()), None, None, None)[:3]
    start, rest = view.ints(first), view.ints(last)
    if start is None or len(start) != 2 or start[1] != 0 or rest != (0,) or middle != POSITION:
        return None
    if end.argument("x") != begin.name or extent.ints != given.shape:
        return None
    return start[0]


def _read(
    view: View, cache: str, layer: int, place: tuple[Op, str], written: int | None
) -> str | None:
    """What is wrong with how an attention reads one cache; None where nothing is."""
    part = view.source(*place, "slice_by_index")
    read = view.source(part, "x", "read_state")
    state = view.states.get(cache)
    if part is None or read is None or read.argument("input") != cache or state is None:
        return f"does not read {cache}"
    if written is not None and read.index < written:
        return f"reads {cache} as it was before the layer wrote it"
    begin, end = view.constant(part, "begin"), view.constant(part, "end")
    _, heads, slots, dim = (*state.shape, 0, 0, 0, 0)[:4]
    whole = (layer, 0, 0, 0), (layer + 1, heads, slots, dim)
    if begin is None or end is None or (begin.ints, end.ints) != whole:
        return f"does not read all slots of its own layer of {cache}"
    return None


def _is_mask(view: View, name: str | None) -> bool:
    tiled = view.made.get(name) if name is not None else None
    return (tiled.argument("x") if tiled is not None and tiled.type == "tile" else name) == MASK


def slot_findings(view: View, slots: tuple[str, ...], layers: int, states: bool) -> Iterator[str]:
    """What is wrong with how adapter slots are read, one line each."""
    for slot in slots:
        names = [op.name for op in view.of("read_state") if op.argument("input") == slot]
        if not states:
            names = [slot]
        # Writing to a slot is complained of elsewhere.
        parts = [
            op
            for name in names
            for op in view.readers.get(name, ())
            if op.type not in ("read_state", "write_state")
        ]
        found = [_first(view, op) if op.type == "slice_by_index" else None for op in parts]
        if found != list(range(layers)):
            yield f"the slot {slot!r} is not read once for each of {layers} layers, in order"


def _first(view: View, part: Op) -> int | None:
    begin = view.constant(part, "begin")
    return begin.ints[0] if begin is not None and begin.ints else None
