"""What is checked before a fuse begins: the request, the places, the room on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from mlx_medphi.config import PROJECTIONS
from mlx_medphi.errors import FuseError, capped
from mlx_medphi.files import read_safetensors_header
from mlx_medphi.model.adapter_files import is_file_path
from mlx_medphi.model.adapter_formats import layer_key
from mlx_medphi.model.fuse_plan import Precision
from mlx_medphi.model.shards import Piece
from mlx_medphi.model.weights import Checkpoint
from mlx_medphi.text.tokenizer_files import FILE_NAMES

__all__ = ["REPORT_NAME", "check_places", "check_request", "check_space"]

FILE_KIND = "medphi-fused"
"""What a single fused file calls itself in its metadata."""

REPORT_NAME = "fuse_report.json"
"""The file by which a directory shows that `fuse` made it."""

# Headers, config, tokenizer and index.
SPARE_BYTES = 16 * 1024 * 1024


def check_request(
    checkpoint: Checkpoint,
    precision: Precision,
    token_rows: Sequence[Sequence[int]],
    on_load: bool,
) -> None:
    """Refuse what cannot give a faithful model, before any weight is read.

    Args:
        checkpoint: the base, seen as quantised where the adapter asks for that.
        precision: what was asked for.
        token_rows: token ids of the text for the comparison.
        on_load: whether the base is quantised on loading only.

    Raises:
        FuseError: an unknown precision, one that does not go with this base, or unusable tokens.
    """
    if precision not in get_args(Precision):
        names = ", ".join(repr(name) for name in get_args(Precision))
        raise FuseError(f"precision is {precision!r}, expected one of {names}")
    quantized = {
        form
        for name, form in checkpoint.quantized_layers.items()
        if name.startswith("model.layers.") and layer_key(name) in PROJECTIONS
    }
    if precision == "8bit" and not quantized:
        raise FuseError(
            f"{checkpoint.path}: is not quantised, so there are no layers to lift to 8 bits; "
            "use precision='same', which keeps its size"
        )
    if precision == "same" and quantized:
        bits = min(bits for bits, _ in quantized)
        raise FuseError(_why_not_the_same_grid(checkpoint.path, bits, on_load))
    ids = [token for row in token_rows for token in row]
    size = checkpoint.config.vocab_size
    if not ids or min(ids) < 0 or max(ids) >= size:
        found = f"ids from {min(ids)} to {max(ids)}" if ids else "no tokens"
        raise FuseError(
            f"the fused model is measured on real tokens: found {found}, expected ids below {size}"
        )


def _why_not_the_same_grid(path: Path, bits: int, on_load: bool) -> str:
    how = "for this adapter it is quantised on loading" if on_load else "is quantised"
    return (
        f"{path}: {how} to {bits} bits, and a fuse into the same grid would lose the "
        "training: a change of 0.5 % to 2 % of the weights is smaller than the grid's steps, and "
        "4-bit rounding keeps 4 % to 8 % of its direction (cosine). Keep the adapter beside the "
        "base (the default, nothing is lost), or choose precision='8bit' for the changed layers "
        "only, or precision='float16' for the whole model"
    )


def check_places(base: Path, adapter: Path, out: Path, replace: bool) -> None:
    """Refuse an output that would touch the base, the adapter, or files of somebody else.

    Raises:
        FuseError: says which.
    """
    resolved, sources = out.resolve(), {"base": base.resolve(), "adapter": adapter.resolve()}
    for what, source in sources.items():
        if (
            resolved == source
            or resolved in source.parents
            or (source.is_dir() and source in resolved.parents)
        ):
            raise FuseError(f"{out}: is or overlaps the {what} {source}; choose another place")
    if not out.exists():
        return
    if not replace:
        raise FuseError(f"{out}: exists already; choose another name, or replace it (--replace)")
    if is_file_path(out) != out.is_file():
        kinds = ("a directory", "a file") if is_file_path(out) else ("a file", "a directory")
        raise FuseError(f"{out}: is {kinds[0]}, this name would make {kinds[1]}")
    if out.is_file():
        if read_safetensors_header(out, FuseError).metadata.get("kind") != FILE_KIND:
            raise FuseError(f"{out}: is not a model that fuse wrote; only those are replaced")
        return
    if not (out / REPORT_NAME).exists():
        raise FuseError(
            f"{out}: holds no {REPORT_NAME}, so it is not a fused model; only those are replaced"
        )
    foreign = [place.name for place in out.iterdir() if not _is_written(place.name)]
    if foreign:
        raise FuseError(
            f"{out}: holds {capped(foreign)}, which fuse did not write; move what you want to keep"
        )


def _is_written(name: str) -> bool:
    weights = name.endswith((".safetensors", ".safetensors.index.json"))
    return weights or name in FILE_NAMES or name in ("config.json", REPORT_NAME)


def check_space(out: Path, files: Mapping[str, Sequence[Piece]]) -> None:
    """Refuse to begin what the disk has no room for; an old output stays until the new is whole.

    Raises:
        FuseError: names what is needed and what is free.
    """
    needed = sum(piece.nbytes for pieces in files.values() for piece in pieces) + SPARE_BYTES
    folder = next(place for place in out.absolute().parents if place.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FuseError(
            f"{out}: needs {needed / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free; "
            "make room or choose another disk"
        )
