"""From a plan to a package on disk: the program first, then every weight straight to its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock

from mlx_medphi.coreml.blobs import BlobWriter
from mlx_medphi.coreml.package import WEIGHT_FILE, PackageText, describe, write_program
from mlx_medphi.coreml.program import Plan, build_program
from mlx_medphi.coreml.slots import slot_shapes

__all__ = ["write_package"]

Progress = Callable[[str, int, int], None]

_BUILDING = Lock()


def write_package(
    plan: Plan, text: PackageText, package: Path, progress: Progress | None = None
) -> None:
    """Write a `.mlpackage`.

    Args:
        plan: what it is built from.
        text: what it says about itself.
        package: a directory that does not exist.
        progress: called with ("graph", blocks built, blocks in all) and then with ("weights",
            bytes written, bytes in all).

    Raises:
        OSError: the disk is full or the package cannot be written.
        ExportError: a weight cannot be stored.
    """

    def tell(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: None if progress is None else progress(stage, done, total)

    # coremltools keeps the function that is being built for the whole process.
    with _BUILDING:
        program = build_program(plan, tell("graph"))
        model = describe(program, plan.blobs, text, _features(plan))
    write_program(model, package)
    _write_weights(plan, package / WEIGHT_FILE, tell("weights"))


def _write_weights(plan: Plan, path: Path, tell: Callable[[int, int], None]) -> None:
    with BlobWriter(path, plan.parts) as writer:
        done = 0
        for part_id, data in _pieces(plan):
            writer.append(part_id, data)
            done += len(data)
            tell(done, writer.plan.nbytes)
        tell(writer.plan.nbytes, writer.plan.nbytes)


def _pieces(plan: Plan) -> Iterator[tuple[str, bytes]]:
    for weight in plan.weights.layers.values():
        ids = [part.id for part in weight.parts.values()]
        for pieces in weight.blocks():
            yield from zip(ids, pieces, strict=True)
    for part, array in plan.made_arrays():
        yield part.id, array.tobytes()


def _features(plan: Plan) -> dict[str, str]:
    """What each input, state and output is, as Xcode shows it."""
    context, window = plan.context, plan.config.sliding_window
    seen = f" and at most the {window} last keys" if window is not None else ""
    slots = slot_shapes(plan.config, plan.slot_rank) if plan.slot_rank is not None else {}
    return {
        "inputIds": "Token ids, each at least 0 and below the size of the vocabulary.",
        "position": "Slot of the first token of this call; position plus tokens must not exceed "
        f"{context}.",
        "ropeRow": "Row of the rotary tables for the first token: its position, plus "
        f"{context} once the sequence is longer than {plan.config.switch_length} tokens; it is "
        "then read again from its start.",
        "causalMask": "Added to the attention scores: 0 where a query sees a key, -10000 where "
        f"not. A query sees itself, what comes before{seen}.",
        "lastIndex": "Row of this call whose logits are returned: that of the last real token.",
        "keyCache": "Keys of all tokens read so far, after rotation.",
        "valueCache": "Values of all tokens read so far.",
        "logits": "Scores of the next token; ids the tokenizer does not have are to be masked.",
        **{
            name: "Adapter slot: first factors of all layers; zeros switch the adapter off."
            if name.startswith("loraA")
            else "Adapter slot: second factors of all layers, times the adapter's scale."
            for name in slots
        },
    }
