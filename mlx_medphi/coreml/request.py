"""What is to be exported, checked in full before anything is written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.bundle import SUFFIX
from mlx_medphi.coreml.bundle_base import Base, describe_base
from mlx_medphi.coreml.manifest import METADATA, SUMS
from mlx_medphi.coreml.slot_file import check_names
from mlx_medphi.coreml.slots import AdapterBase, check_adapters, slot_rank
from mlx_medphi.coreml.sums import bundle_files, read_sums
from mlx_medphi.coreml.weights import export_bits
from mlx_medphi.errors import AdapterError, BundleError, ExportError, UsageError, capped
from mlx_medphi.model.adapter_files import read_adapter
from mlx_medphi.model.adapter_formats import Adapter
from mlx_medphi.model.checkpoint import open_tokenizer
from mlx_medphi.model.config import Phi3Config
from mlx_medphi.model.fingerprint import fingerprint, quantized_as, short_fingerprint
from mlx_medphi.model.hub import resolve_model
from mlx_medphi.model.weights import Checkpoint, open_checkpoint
from mlx_medphi.text.tokenizer import Tokenizer

__all__ = ["Request", "check_place", "check_space", "make_request"]

DEFAULT_CONTEXT, BLOCK = 2048, 64
# Everything of a bundle but the weights: program, tokenizer, golden logits.
SPARE_BYTES = 64_000_000


@dataclass(frozen=True)
class Request:
    """An export whose parts fit each other.

    Attributes:
        checkpoint: the base.
        tokenizer: its tokenizer.
        base: what is known of it.
        config: the settings, with `bits` and `context` resolved.
        adapters: name -> adapter.
        sources: name -> the file or directory it was read from.
        rank: of the slots; None without slots.
        notes: what the user should know, one line each.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    base: Base
    config: ExportConfig
    adapters: Mapping[str, Adapter]
    sources: Mapping[str, Path]
    rank: int | None
    notes: tuple[str, ...]

    @property
    def context(self) -> int:
        """Slots of the key/value cache."""
        assert self.config.context is not None
        return self.config.context

    @property
    def bits(self) -> int:
        """Bits of the projections."""
        assert self.config.bits is not None
        return self.config.bits

    @property
    def on_load(self) -> tuple[int, int] | None:
        """(bits, group size) that a plain base is given, 0 for one scale for each row; None where
        it keeps its own numbers."""
        return _on_load(self.checkpoint, self.config)

    @property
    def quantizes(self) -> bool:
        """Whether a plain base is quantised on the way."""
        return self.checkpoint.config.quantization is None and self.bits < 16


def make_request(
    base: str | Path,
    adapters: Mapping[str, str | Path] | Iterable[str | Path],
    config: ExportConfig,
    *,
    revision: str | None = None,
    offline: bool = False,
) -> Request:
    """Open everything, read the adapters, and refuse what cannot be exported.

    Raises:
        UsageError: adapters and mode, or their names, do not go together.
        ExportError: settings the model cannot have.
        AdapterError: an adapter is damaged or does not fit.
        CheckpointError, TokenizerError, HubError: the base cannot be used.
    """
    if not isinstance(config, ExportConfig):
        raise UsageError(f"config is {type(config).__name__}, expected an ExportConfig")
    sources = _named(adapters)
    _check_mode(config, len(sources))
    path = resolve_model(base, revision=revision, offline=offline)
    checkpoint = open_checkpoint(path)
    tokenizer = open_tokenizer(checkpoint)
    resolved = replace(
        config,
        bits=export_bits(checkpoint, config),
        context=_context(checkpoint.config, config.context),
    )
    read = {name: read_adapter(source) for name, source in sources.items()}
    _check_effect(read)
    target = AdapterBase(checkpoint.config, fingerprint(checkpoint), _on_load(checkpoint, resolved))
    rank = slot_rank(read.values(), config.slot_rank) if config.adapters == "slots" else None
    if config.adapters == "fused":
        notes = _check_fused(read, target, resolved)
    else:
        notes = check_adapters(read, target, rank)
    if config.bits is None and checkpoint.config.quantization is None:
        notes.append("a plain base gets 4 bits unless --bits (bits) says otherwise; 16 keeps it")
    if resolved.bits == 16:
        resolved = replace(resolved, embedding_bits=16, head_bits=16)
    return Request(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        base=describe_base(path, target.fingerprint, asked=str(base), revision=revision),
        config=resolved,
        adapters=read,
        sources=sources,
        rank=rank,
        notes=tuple(notes),
    )


def _named(adapters: Mapping[str, str | Path] | Iterable[str | Path]) -> dict[str, Path]:
    """Name -> path; a path alone is named by its file or folder."""
    if isinstance(adapters, (str, Path)):
        adapters = [adapters]
    if isinstance(adapters, Mapping):
        pairs = [(str(name), Path(path)) for name, path in adapters.items()]
    else:
        pairs = [(_name_of(Path(path)), Path(path)) for path in adapters]
    check_names([name for name, _ in pairs])
    # In whatever order they are given, the bundle has the same bytes.
    return dict(sorted(pairs))


def _name_of(path: Path) -> str:
    name = path.name.removesuffix(".safetensors")
    # A run's adapter lies in RUN/adapter; the run tells adapters apart.
    name = path.absolute().parent.name if name == "adapter" else name
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)


def _check_effect(adapters: Mapping[str, Adapter]) -> None:
    """Refuse adapters as they are before training: no comparison could tell them from the base."""
    for name, adapter in adapters.items():
        changes = adapter.layers.values()
        if not adapter.scaling.dora and not any(mx.any(change.b).item() for change in changes):
            raise AdapterError(
                f"{name}: changes nothing, its lora_b is all zeros as before training; train it or "
                "leave it out"
            )


def _check_mode(config: ExportConfig, count: int) -> None:
    if config.adapters == "fused" and count != 1:
        raise UsageError(f"fused takes one adapter, {count} are given; slots hold several")
    if config.adapters == "functions" and count == 0:
        raise UsageError("functions are made for adapters and none is given; use slots, or none")
    if config.adapters == "none" and count:
        raise UsageError(f"adapters is 'none' and {count} given; use slots, functions or fused")


def _on_load(checkpoint: Checkpoint, config: ExportConfig) -> tuple[int, int] | None:
    bits = config.bits or 16
    if checkpoint.config.quantization is not None or bits == 16:
        return None
    return bits, config.group_size if config.scheme == "block" else 0


def _check_fused(
    adapters: Mapping[str, Adapter], base: AdapterBase, config: ExportConfig
) -> list[str]:
    """What is seen at once; fusing takes every kind of adapter and checks the rest for itself.

    Returns:
        What the user should know, one line each.
    """
    ((name, adapter),) = adapters.items()
    theirs = adapter.origin.base_fingerprint
    trained = quantized_as(theirs or base.fingerprint, base.fingerprint)
    if theirs not in (None, base.fingerprint) and trained is None:
        raise AdapterError(
            f"{name}: was trained on another base ({short_fingerprint(theirs or '')}, this one is "
            f"{short_fingerprint(base.fingerprint)}); export with the base it was trained on"
        )
    if trained is not None and config.scheme == "block" and config.bits not in (16, trained[0]):
        raise AdapterError(
            f"{name}: was trained on this base with {trained[0]} bits, {config.bits} are asked "
            f"for; export with bits={trained[0]} or 16"
        )
    if config.bits != 4:
        return []
    if config.scheme == "block":
        return [f"{name}: the layers it changes get 8 bits; 4 would round the change away"]
    return [f"{name}: 4 bits with one scale per row round much of its change away; take 8 or 16"]


def _context(config: Phi3Config, wanted: int | None) -> int:
    most = config.max_position_embeddings
    if wanted is None:
        context = min(DEFAULT_CONTEXT, most) // BLOCK * BLOCK
        if context == 0:
            raise ExportError(f"the model has {most} positions; a package needs {BLOCK} or more")
        return context
    if wanted > most:
        raise ExportError(
            f"a context of {wanted} tokens, but this model's rotary positions end at {most}; "
            f"choose {most // BLOCK * BLOCK} or less"
        )
    return wanted


def check_place(out: Path, sources: Iterable[Path], replace: bool) -> Path:
    """The bundle's path, which must be free or an older bundle, and away from what is read.

    Raises:
        UsageError: the name does not end in .medphi.
        ExportError: something is there, or it overlaps the base or an adapter.
    """
    if out.suffix != SUFFIX or out.name == SUFFIX:
        raise UsageError(f"{out}: a bundle's name ends in {SUFFIX}, as in notes{SUFFIX}")
    resolved = out.resolve()
    for source in sources:
        place = source.resolve()
        if resolved == place or resolved in place.parents or place in resolved.parents:
            raise ExportError(f"{out}: overlaps {source}, which is read; choose another place")
    if not out.exists() and not out.is_symlink():
        return out
    if not replace:
        raise ExportError(f"{out}: exists already; choose another name, or replace it (--replace)")
    if not (out / METADATA).is_file() or not (out / SUMS).is_file():
        raise ExportError(f"{out}: is not a bundle; only bundles are replaced")
    try:
        foreign = bundle_files(out).keys() - read_sums(out).keys()
    except BundleError as exc:
        raise ExportError(f"{exc}; only whole bundles are replaced") from exc
    if foreign:
        raise ExportError(
            f"{out}: holds {capped(foreign)}, which export did not write; move what you want to "
            "keep"
        )
    return out


def check_space(out: Path, nbytes: int) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        out: the bundle.
        nbytes: what the export writes at its largest moment.

    Raises:
        ExportError: names what is needed and what is free.
    """
    needed = nbytes + SPARE_BYTES
    folder = next(place for place in out.resolve().parents if place.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{out}: needs {needed / 1e9:.2f} GB while it is made, {folder} has "
            f"{free / 1e9:.2f} GB free; make room or choose another disk"
        )
