"""Fold an adapter into its base: a directory any Phi-3 loader reads, or one self-describing file.

The base is only ever read. What was written is loaded again and compared with the adapted model on
real tokens before it gets its name; when it is too far away nothing is left behind.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_medphi import __version__
from mlx_medphi.errors import FuseError
from mlx_medphi.files import atomic_directory, atomic_path
from mlx_medphi.model.adapter import AdapterInfo, adapter_of, load_adapter
from mlx_medphi.model.adapter_files import is_file_path
from mlx_medphi.model.adapter_formats import base_label
from mlx_medphi.model.checkpoint import build_model
from mlx_medphi.model.delta import LayerChange, Tally
from mlx_medphi.model.fidelity import LIMITS, Fidelity, Limits, Reference, compare, reference
from mlx_medphi.model.fuse_checks import check_places, check_request, check_space
from mlx_medphi.model.fuse_plan import Precision, Source, plan_files, stored_form
from mlx_medphi.model.fuse_text import text_rows
from mlx_medphi.model.fuse_write import Progress, describe, write_checkpoint
from mlx_medphi.model.hub import resolve_model
from mlx_medphi.model.quantize import dtype_of
from mlx_medphi.model.shards import Piece, ShardSet
from mlx_medphi.model.weights import Checkpoint, open_checkpoint

__all__ = ["FuseReport", "fuse"]


@dataclass(frozen=True)
class FuseReport:
    """What was fused, where it lies, how large it is, and how close it came.

    Attributes:
        base: hub id or folder name of the base.
        base_fingerprint: which base it is.
        adapter: what the adapter says about itself.
        out: the directory or file.
        precision: what was asked for.
        stored: what the changed weights are stored as: "float32", "float16", "bfloat16", "8bit".
        base_bytes: all tensors of the base, headers not counted.
        fused_bytes: all tensors of the fused model, headers not counted.
        layers: how far each weight moved, and how much of that the stored numbers kept.
        fidelity: the fused model against the adapted one, on real tokens.
        limits: what it had to keep to.
        seconds: how long it took.
    """

    base: str
    base_fingerprint: str
    adapter: AdapterInfo
    out: Path
    precision: Precision
    stored: str
    base_bytes: int
    fused_bytes: int
    layers: tuple[LayerChange, ...]
    fidelity: Fidelity
    limits: Limits
    seconds: float

    @property
    def same_size(self) -> bool:
        """Whether the fused tensors take exactly the bytes of the base's."""
        return self.base_bytes == self.fused_bytes

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, without the folders of this machine."""
        return {
            **asdict(self),
            "out": self.out.name,
            "adapter": {**asdict(self.adapter), "path": self.adapter.path.name},
            "fidelity": {**asdict(self.fidelity), "lost": self.fidelity.lost},
            "package_version": __version__,
        }


def fuse(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    token_rows: Sequence[Sequence[int]] | None = None,
    precision: Precision = "same",
    replace: bool = False,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> FuseReport:
    """Write the base with the adapter folded in.

    Args:
        base: a checkpoint directory, a single-file model, or a hub id.
        adapter: the adapter, in any form that can be read.
        out: a name ending in .safetensors makes one file, whose tokenizer is the base's; any other
            name makes a directory.
        token_rows: token ids of text on which the fused model is compared with the adapted; None
            takes the project's synthetic conversations and notes.
        precision: "same" keeps the base's dtype and size; "float16" stores all weights so, unpacked
            where they are quantised; "8bit" stores the changed layers of a quantised base so.
        replace: whether an existing file, or a directory that `fuse` made, is replaced.
        allow_other_base: accept an adapter that says it belongs to another base of the same shape.
        progress: called with the bytes written so far and in all.

    Raises:
        FuseError: the base is quantised and precision is "same", the fused model is not the adapted
            one within `LIMITS`, `out` exists or lies in the base, or the disk is full.
        AdapterError: the adapter is damaged or does not fit the base.
        CheckpointError: the base is damaged.
    """
    begun = time.monotonic()
    adapter, out = Path(adapter), Path(out)
    checkpoint = open_checkpoint(resolve_model(base))
    if token_rows is None:
        token_rows = text_rows(checkpoint.path)
    check_request(checkpoint, precision, token_rows)
    check_places(checkpoint.path, adapter, out, replace)
    work = _prepared(checkpoint, adapter, out, precision, token_rows, allow_other_base)
    with _named_when_done(out) as temporary:
        write_checkpoint(work.source, work.files, precision, temporary, progress)
        fidelity = compare(work.kept, build_model(open_checkpoint(temporary)))
        _accept(fidelity, work.limits, work.stored, out)
        report = FuseReport(
            base=base_label(str(checkpoint.path.absolute())) or str(base),
            base_fingerprint=work.fingerprint,
            adapter=work.info,
            out=out,
            precision=precision,
            stored=work.stored,
            base_bytes=work.source.shards.tensor_bytes,
            fused_bytes=sum(piece.nbytes for pieces in work.files.values() for piece in pieces),
            layers=tuple(tally.result() for tally in work.source.tallies.values()),
            fidelity=fidelity,
            limits=work.limits,
            seconds=time.monotonic() - begun,
        )
        describe(work.source, work.files, temporary, report.to_dict())
    return report


@dataclass(frozen=True)
class _Work:
    """All that is kept of the adapted model: the plan, and what it said."""

    source: Source
    files: dict[str, list[Piece]]
    stored: str
    limits: Limits
    info: AdapterInfo
    fingerprint: str
    kept: Reference


def _prepared(
    checkpoint: Checkpoint,
    adapter: Path,
    out: Path,
    precision: Precision,
    token_rows: Sequence[Sequence[int]],
    allow_other_base: bool,
) -> _Work:
    """Load the adapted model, plan, and hear it; it is gone on return, before another is loaded."""
    model = build_model(checkpoint)
    info = load_adapter(model, adapter, allow_other_base=allow_other_base)
    carried = adapter_of(model)
    assert carried is not None
    tallies = {name: Tally(name) for name in carried.layers}
    shards = ShardSet(checkpoint.files)
    source = Source(checkpoint, shards, carried.layers, carried.scaling.scale, tallies)
    files = plan_files(source, precision)
    check_space(out, files)
    kept, stored = reference(model, token_rows), stored_form(source, precision)
    # The adapted model itself is no more exact than the dtype it computes in.
    computed = str(dtype_of(model)).removeprefix("mlx.core.")
    limits = max(LIMITS[stored], LIMITS[computed], key=lambda known: known.kl)
    return _Work(source, files, stored, limits, info, model.fingerprint, kept)


@contextmanager
def _named_when_done(out: Path) -> Iterator[Path]:
    """A temporary place beside `out` that takes its name at the end, or disappears."""
    try:
        place = atomic_path(out) if is_file_path(out) else atomic_directory(out, replace=True)
        with place as temporary:
            yield temporary
    except OSError as exc:
        raise FuseError(
            f"{out}: cannot be written ({exc.strerror or exc}); what was there is unchanged"
        ) from exc


def _accept(fidelity: Fidelity, limits: Limits, stored: str, out: Path) -> None:
    """Refuse a fused model that is not the adapted one.

    Raises:
        FuseError: a figure is beyond its limit, or no number at all.
    """
    missed = fidelity.misses(limits)
    if missed:
        raise FuseError(
            f"{out}: stored as {stored}, the fused model is not the adapted one on "
            f"{fidelity.positions} tokens: {', '.join(missed)}; nothing was written. Keep the "
            + (
                "adapter beside the base"
                if stored in ("float16", "float32")
                else "adapter beside the base, or fuse with precision='float16'"
            )
        )
