"""Fold an adapter into its base: a directory any Phi-3 loader reads, or one self-describing file.

The base is only ever read. What was written is loaded again and compared with the adapted model on
real tokens before it gets its name; when it is too far away nothing is left behind.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from functools import reduce
from pathlib import Path
from typing import Any

from mlx_medphi import __version__
from mlx_medphi.errors import FuseError
from mlx_medphi.files import atomic_directory, atomic_path
from mlx_medphi.model.adapter import AdapterInfo, adapter_of, load_adapter
from mlx_medphi.model.adapter_files import is_file_path, recorded_base
from mlx_medphi.model.adapter_formats import base_label
from mlx_medphi.model.checkpoint import build_model
from mlx_medphi.model.delta import LayerChange, Tally
from mlx_medphi.model.fidelity import LIMITS, Fidelity, Limits, compare, reference
from mlx_medphi.model.fingerprint import fingerprint, quantized_as
from mlx_medphi.model.fuse_checks import check_places, check_request, check_space
from mlx_medphi.model.fuse_plan import Precision, Source, plan_files, stored_form
from mlx_medphi.model.fuse_text import text_rows
from mlx_medphi.model.fuse_write import Progress, describe, write_checkpoint
from mlx_medphi.model.hub import resolve_model
from mlx_medphi.model.on_load import quantized_on_load
from mlx_medphi.model.phi3 import Phi3ForCausalLM
from mlx_medphi.model.quantize import dtype_of
from mlx_medphi.model.shards import Piece, ShardSet
from mlx_medphi.model.weights import Checkpoint, open_checkpoint

__all__ = ["FuseReport", "fuse"]

# What stands in a report until it is known.
UNCHANGED = LayerChange("all layers", 0.0, 1.0, 0.0, 1.0)
UNMEASURED = Fidelity(0.0, 0.0, 0.0, 0.0, 0)


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
        quantized_on_load: (bits, group size) of a plain base that was quantised on loading when the
            adapter was trained, and so it was for the fuse; None: fused as it is stored.
        base_bytes: all tensors of the base as it is stored, headers not counted.
        fused_bytes: all tensors of the fused model, headers not counted.
        limits: what it has to keep to.
        change: how far the weights moved together, and how much of that the stored numbers kept.
        layers: the same of each weight.
        fidelity: the fused model against the adapted one, on real tokens.
        seconds: how long it took.
    """

    base: str
    base_fingerprint: str
    adapter: AdapterInfo
    out: Path
    precision: Precision
    stored: str
    quantized_on_load: tuple[int, int] | None
    base_bytes: int
    fused_bytes: int
    limits: Limits
    change: LayerChange = UNCHANGED
    layers: tuple[LayerChange, ...] = ()
    fidelity: Fidelity = UNMEASURED
    seconds: float = 0.0

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

    An adapter trained on this base quantised on loading (`load(…, quantize=(4, 64))`) says so; then
    what is fused is the base quantised in the same way.

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
        FuseError: the base is quantised, or was on loading, and precision is "same"; the fused
            model is not the adapted one within `LIMITS`; `out` exists or lies in the base; or the
            disk is full.
        AdapterError: the adapter is damaged or does not fit the base.
        CheckpointError: the base is damaged.
    """
    begun = time.monotonic()
    adapter, out = Path(adapter), Path(out)
    checkpoint = open_checkpoint(resolve_model(base))
    if token_rows is None:
        token_rows = text_rows(checkpoint.path)
    quantize = _quantized_on_load(checkpoint, adapter)
    seen, shards = _seen(checkpoint, quantize)
    check_request(seen, precision, token_rows, quantize is not None)
    check_places(checkpoint.path, adapter, out, replace)
    model = build_model(checkpoint, quantize=quantize)
    info = load_adapter(model, adapter, allow_other_base=allow_other_base)
    source, files, limits = _planned(model, seen, shards, out, precision)
    draft = FuseReport(
        base=base_label(str(checkpoint.path.absolute())) or str(base),
        base_fingerprint=model.fingerprint,
        adapter=info,
        out=out,
        precision=precision,
        stored=stored_form(source, precision),
        quantized_on_load=quantize,
        base_bytes=ShardSet(checkpoint.files).tensor_bytes,
        fused_bytes=sum(piece.nbytes for pieces in files.values() for piece in pieces),
        limits=limits,
    )
    kept = reference(model, token_rows)
    del model  # before another is loaded
    with _named_when_done(out, replace) as temporary:
        write_checkpoint(source, files, precision, temporary, progress, draft.to_dict())
        fidelity = compare(kept, build_model(open_checkpoint(temporary)))
        tallies = source.tallies.values()
        change = reduce(Tally.plus, tallies, Tally("all layers")).result()
        _accept(fidelity, change.cosine, limits, draft.stored, out)
        layers, seconds = tuple(tally.result() for tally in tallies), time.monotonic() - begun
        report = changed(draft, change=change, layers=layers, fidelity=fidelity, seconds=seconds)
        describe(source, files, temporary, report.to_dict())
    return report


def _quantized_on_load(checkpoint: Checkpoint, adapter: Path) -> tuple[int, int] | None:
    """How the base was quantised on loading when the adapter was trained; None: not at all."""
    recorded = recorded_base(adapter)
    if recorded is None or checkpoint.config.quantization is not None:
        return None
    return quantized_as(recorded, fingerprint(checkpoint))


def _seen(checkpoint: Checkpoint, quantize: tuple[int, int] | None) -> tuple[Checkpoint, ShardSet]:
    """The base and its files as the adapter knows them."""
    if quantize is None:
        return checkpoint, ShardSet(checkpoint.files)
    return quantized_on_load(checkpoint, quantize)


def _planned(
    model: Phi3ForCausalLM, seen: Checkpoint, shards: ShardSet, out: Path, precision: Precision
) -> tuple[Source, dict[str, list[Piece]], Limits]:
    """What is written of a model with its adapter, and what it has to keep to."""
    carried = adapter_of(model)
    assert carried is not None
    tallies = {name: Tally(name) for name in carried.layers}
    source = Source(seen, shards, carried.layers, carried.scaling.scale, tallies)
    files, stored = plan_files(source, precision), stored_form(source, precision)
    check_space(out, files)
    # The adapted model itself is no more exact than the dtype it computes in.
    computed = str(dtype_of(model)).removeprefix("mlx.core.")
    limits = max(LIMITS[stored], LIMITS[computed], key=lambda known: known.kl)
    return source, files, limits


@contextmanager
def _named_when_done(out: Path, replace: bool) -> Iterator[Path]:
    """A temporary place beside `out` that takes its name at the end, or disappears."""
    make = atomic_path if is_file_path(out) else atomic_directory
    try:
        with make(out, replace=replace) as temporary:
            yield temporary
    except FileExistsError as exc:
        raise FuseError(
            f"{out}: was made by another program meanwhile and is unchanged; choose another name"
        ) from exc
    except OSError as exc:
        raise FuseError(
            f"{out}: cannot be written ({exc.strerror or exc}); what was there is unchanged"
        ) from exc


def _accept(fidelity: Fidelity, cosine: float, limits: Limits, stored: str, out: Path) -> None:
    """Refuse a fused model that is not the adapted one.

    Raises:
        FuseError: a figure is beyond its limit, or no number at all.
    """
    missed = fidelity.misses(limits, cosine)
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
