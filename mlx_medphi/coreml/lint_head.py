"""Do tokens come in and logits go out as they must: embedding, last row, norm, head."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_medphi.coreml.lint_norms import Norm, find_norms
from mlx_medphi.coreml.lint_view import Op, View

__all__ = ["head_findings", "weight_offsets"]

IDS, LAST, LOGITS = "inputIds", "lastIndex", "logits"


def weight_offsets(view: View, op: Op | None, parameter: str) -> tuple[int, ...] | None:
    """Where a weight lies in the file: of its constant, or of its codes, scales and offsets."""
    made = view.source(op, parameter)
    if made is None:
        return None
    if made.value is not None:
        return (made.value.offset,) if made.value.offset is not None else None
    parts = [view.constant(made, name) for name in ("data", "scale", "offset")]
    offsets = [part.offset for part in parts if part is not None and part.offset is not None]
    return tuple(offsets) or None


def head_findings(view: View, tied: bool) -> Iterator[str]:
    """What is wrong between tokens and layers, and between layers and logits, one line each."""
    embeddings = [op for op in view.of("gather") if op.argument("indices") == IDS]
    rows = [op for op in view.of("gather") if op.argument("indices") == LAST]
    head = view.made.get(LOGITS)
    if len(embeddings) != 1:
        yield f"{len(embeddings)} look-ups of {IDS}, expected one, in the embedding"
    if head is None or head.type != "linear" or view.outputs != (LOGITS,):
        yield f"does not return {LOGITS} that a linear layer makes, and nothing else"
        return
    norms = {norm.result: norm for norm in find_norms(view) if isinstance(norm, Norm)}
    final = norms.get(head.argument("x") or "")
    if len(rows) != 1 or _axis(view, rows[0]) != 1:
        yield f"{len(rows)} choices of the row {LAST} among tokens, expected one"
    elif final is None or final.source != rows[0].name:
        yield f"{LOGITS} are not made of the norm of the row {LAST}"
    if len(embeddings) == 1:
        yield from _weights(view, head, embeddings[0], tied)


def _weights(view: View, head: Op, embedding: Op, tied: bool) -> Iterator[str]:
    below, above = weight_offsets(view, embedding, "x"), weight_offsets(view, head, "weight")
    if below is None or above is None:
        yield "the embedding or the head has no weight in the weight file"
    elif tied and below != above:
        yield f"the head has weights at {above[0]}, expected the embedding's at {below[0]}"
    elif not tied and below == above:
        yield f"the head has the embedding's weights at {below[0]}, expected its own"


def _axis(view: View, op: Op) -> int | None:
    axis = view.constant(op, "axis")
    return axis.ints[0] if axis is not None and axis.ints else None
