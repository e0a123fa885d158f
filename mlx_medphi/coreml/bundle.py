"""A bundle on this machine: found, its files checked against their hashes, its manifest read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mlx_medphi.coreml.bundle_text import readable, stored_as, verified_as
from mlx_medphi.coreml.manifest import METADATA, PARITY, SUMS, Manifest, added_adapters
from mlx_medphi.coreml.manifest_read import read_manifest
from mlx_medphi.coreml.sums import Progress, differing, read_sums
from mlx_medphi.errors import BundleError, capped

__all__ = ["SUFFIX", "Bundle", "open_bundle"]

SUFFIX = ".medphi"


@dataclass(frozen=True, repr=False)
class Bundle:
    """An exported model: Core ML package, tokenizer, adapters and the proof, in one folder.

    Attributes:
        path: the folder.
        manifest: its metadata.json.

    >>> bundle = open_bundle("notes.medphi")  # doctest: +SKIP
    >>> bundle  # doctest: +SKIP
    Bundle(notes.medphi, 2.15 GB, context 2048, 2 adapters in slots, verified: graph)
    """

    path: Path
    manifest: Manifest

    @property
    def package(self) -> Path:
        """The `.mlpackage`."""
        return self.path / self.manifest.assets.main

    @property
    def tokenizer_directory(self) -> Path:
        """What `Tokenizer.load` reads."""
        return (self.path / self.manifest.medphi.tokenizer.path).parent

    @property
    def vectors(self) -> Path:
        """The tokenizer's test vectors."""
        return self.path / self.manifest.medphi.tokenizer.vectors

    @property
    def adapters(self) -> dict[str, Path]:
        """Name -> pack of each adapter that lies beside the package."""
        entries = self.manifest.medphi.adapters.list
        return {entry.name: self.path / entry.path for entry in entries if entry.path is not None}

    @property
    def parity(self) -> Path:
        """The certificate: what was compared, and how far it differed."""
        return self.path / PARITY

    @property
    def level(self) -> str:
        """How far it was exported as verified: "none", "spec", "graph" or "predict".

        Adapters that an app added later, `not_compared`, never were.
        """
        return self.manifest.medphi.verification.level

    @property
    def not_compared(self) -> tuple[str, ...]:
        """Adapters that came after the export, so that nothing is known of their logits."""
        return added_adapters(self.manifest)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        described = sum(entry.bytes for entry in self.manifest.medphi.files)
        own = (self.path / name for name in (METADATA, SUMS))
        return described + sum(file.stat().st_size for file in own if file.is_file())

    @property
    def size(self) -> str:
        """`nbytes` for people, e.g. "2.15 GB"."""
        return readable(self.nbytes)

    def __repr__(self) -> str:
        context, adapters = self.manifest.medphi.coreml.context_length, self._adapters()
        return (
            f"Bundle({self.path.name}, {self.size}, context {context}, {adapters}, "
            f"verified: {self.level}{', without ' if self.not_compared else ''}"
            f"{', '.join(self.not_compared)})"
        )

    def __rich_repr__(self) -> Iterator[tuple[str, str]]:
        yield from self._facts()

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in self._facts()
        )
        return f"<table>{cells}</table>"

    def _facts(self) -> Iterator[tuple[str, str]]:
        ours = self.manifest.medphi
        yield "bundle", str(self.path)
        yield "base", self.manifest.source.model_id
        yield "size", self.size
        yield "weights", stored_as(ours.quantization)
        yield "context", f"{ours.coreml.context_length} tokens"
        yield "adapters", self._adapters()
        yield "verified", " ".join([verified_as(ours.verification), *self._but()])
        yield "licence", self.manifest.source.licence

    def _but(self) -> list[str]:
        names = self.not_compared
        return [f"Not compared: {', '.join(names)} (added after the export)."] if names else []

    def _adapters(self) -> str:
        adapters = self.manifest.medphi.adapters
        count = f"{len(adapters.list)} adapter{'' if len(adapters.list) == 1 else 's'}"
        if adapters.mode == "slots":
            return f"{count} in slots of rank {adapters.rank_slot}"
        return f"{count}, {adapters.mode}" if adapters.list else "no adapter"


def open_bundle(
    path: str | Path, *, check: bool = True, progress: Progress | None = None
) -> Bundle:
    """Open a bundle and check that every file of it is as it was written.

    Args:
        path: the `.medphi` folder.
        check: read all files and compare their hashes; without, the manifest alone is read.
        progress: called with (bytes read so far, bytes in all).

    Raises:
        BundleError: no bundle; files altered, missing or not listed, each by its name; links or
            devices inside; a damaged manifest, or one made by a newer version.
    """
    path = Path(path).expanduser()
    _check_folder(path)
    if not check:
        return Bundle(path, _checked(path, None))
    sums = read_sums(path)
    # The manifest is small: what made the bundle is known before gigabytes are read.
    manifest = None
    if not any(line.startswith(f"{METADATA} ") for line in differing(path, sums, only=[METADATA])):
        manifest = _checked(path, sums)
    lines = differing(path, sums, progress)
    if lines:
        count = f"{len(lines)} file{'s' if len(lines) > 1 else ''}"
        raise BundleError(
            f"{path}: {count} not as {SUMS} says: {capped(lines)}; fetch or export the bundle again"
        )
    return Bundle(path, manifest or _checked(path, sums))


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise BundleError(f"{path}: {found}; expected a folder NAME{SUFFIX} that export wrote")
    if not (path / METADATA).is_file():
        inside = next((p for p in path.absolute().parents if (p / METADATA).is_file()), None)
        hint = f"; the bundle is {inside}" if inside else f"; expected a folder NAME{SUFFIX}"
        raise BundleError(f"{path}: has no {METADATA}, so it is not a bundle{hint}")


def _checked(path: Path, sums: dict[str, str] | None) -> Manifest:
    """The manifest, in agreement with SHA256SUMS."""
    manifest = read_manifest(path)
    if sums is not None:
        listed = {entry.path: entry.sha256 for entry in manifest.medphi.files}
        others = {name: sha256 for name, sha256 in sums.items() if name != METADATA}
        differ = {name for name, _ in listed.items() ^ others.items()}
        if differ:
            raise BundleError(
                f"{path}: {METADATA} and {SUMS} disagree about {capped(differ)}; fetch or export "
                "the bundle again"
            )
    return manifest
