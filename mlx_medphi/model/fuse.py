"""Fold an adapter into its base: a directory any Phi-3 loader reads, or one self-describing file.

The base is only ever read, and a fused model is never accepted unmeasured: what was written is loaded
again and compared with the adapted model on real tokens before it gets its name. Nothing is left
behind when it fails.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx

from mlx_medphi import __version__
from mlx_medphi.config import PROJECTIONS
from mlx_medphi.errors import FuseError
from mlx_medphi.files import atomic_directory, atomic_path, sha256_file, write_json
from mlx_medphi.model.adapter import AdapterInfo, adapter_of, load_adapter
from mlx_medphi.model.adapter_files import is_file_path
from mlx_medphi.model.adapter_formats import base_label, layer_key
from mlx_medphi.model.checkpoint import build_model
from mlx_medphi.model.delta import LayerChange, Tally
from mlx_medphi.model.fidelity import LIMITS, Fidelity, Reference, compare, reference
from mlx_medphi.model.fuse_plan import Precision, Source, fused_config, plan_files, shard_index
from mlx_medphi.model.hub import resolve_model
from mlx_medphi.model.shards import Piece, ShardSet, header_bytes, write_pieces
from mlx_medphi.model.weights import CONFIG_KEY, Checkpoint, open_checkpoint

__all__ = ["REPORT_NAME", "FuseReport", "fuse"]

REPORT_NAME = "fuse_report.json"
INDEX_NAME = "model.safetensors.index.json"
TOKENIZER_NAME = "tokenizer.json"
# What belongs to a checkpoint beside its weights; an adapter or a log in the folder does not.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template*", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip
# Room in a single file's header for the figures that are known only after it is written.
HEADER_SPARE = 4096
STORED_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Progress = Callable[[int, int], None]


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
        base_bytes: size of the base's weight files.
        fused_bytes: size of the fused weight files.
        base_tensor_bytes: the same without headers.
        fused_tensor_bytes: the same without headers.
        layers: how far each weight moved, and how much of that the stored numbers kept.
        fidelity: the fused model against the adapted one, on real tokens.
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
    base_tensor_bytes: int
    fused_tensor_bytes: int
    layers: tuple[LayerChange, ...]
    fidelity: Fidelity
    seconds: float

    @property
    def same_size(self) -> bool:
        """Whether the fused tensors take exactly the bytes of the base's."""
        return self.base_tensor_bytes == self.fused_tensor_bytes

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, without the paths of this machine."""
        adapter = {**asdict(self.adapter), "path": self.adapter.path.name}
        fidelity = {**asdict(self.fidelity), "lost": self.fidelity.lost}
        own = {"out": self.out.name, "adapter": adapter, "fidelity": fidelity}
        limits = asdict(LIMITS[self.stored])
        return {**asdict(self), **own, "limits": limits, "package_version": __version__}


def fuse(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    token_rows: Sequence[Sequence[int]],
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
        token_rows: token ids of real text on which the fused model is compared with the adapted.
        precision: "same" keeps the base's dtype and size; "float16" stores all weights so, unpacked
            where they are quantised; "8bit" stores the changed layers of a quantised base in 8 bits.
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
    out, adapter = Path(out), Path(adapter)
    checkpoint = open_checkpoint(resolve_model(base))
    _check_request(checkpoint, precision, token_rows)
    _check_places(checkpoint.path, adapter, out, replace)
    model = build_model(checkpoint)
    info = load_adapter(model, adapter, allow_other_base=allow_other_base)
    carried = adapter_of(model)
    assert carried is not None
    tallies = {name: Tally(name) for name in carried.layers}
    shards = ShardSet(checkpoint.files)
    source = Source(checkpoint, shards, carried.layers, carried.scaling.scale, tallies)
    files = plan_files(source, precision)
    _check_space(out, files)
    kept, fingerprint = reference(model, token_rows), model.fingerprint
    del model
    mx.clear_cache()

    def report(path: Path, fidelity: Fidelity) -> FuseReport:
        sizes = [file.stat().st_size for file in _weight_files(path)]
        return FuseReport(
            base=base_label(str(checkpoint.path.absolute())) or str(base),
            base_fingerprint=fingerprint,
            adapter=info,
            out=out,
            precision=precision,
            stored=_stored(source, precision),
            base_bytes=sum(file.stat().st_size for file in checkpoint.files),
            fused_bytes=sum(sizes),
            base_tensor_bytes=shards.tensor_bytes,
            fused_tensor_bytes=sum(p.nbytes for pieces in files.values() for p in pieces),
            layers=tuple(tally.result() for tally in tallies.values()),
            fidelity=fidelity,
            seconds=time.monotonic() - begun,
        )

    write = _write_file if is_file_path(out) else _write_directory
    counted = {name: list(_counted(files, name, progress)) for name in files}
    with _as_fuse_errors(out):
        return write(source, counted, precision, kept, report)


Finish = Callable[[Path, Fidelity], FuseReport]
