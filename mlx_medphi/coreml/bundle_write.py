"""Write everything of a bundle but the package and the adapter packs, in the order it depends on.

The manifest lists the card, and SHA256SUMS the manifest. Each step may be repeated: the same facts
give the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlx_medphi.coreml.bundle import Bundle
from mlx_medphi.coreml.bundle_card import card
from mlx_medphi.coreml.bundle_facts import BundleFacts, terms
from mlx_medphi.coreml.bundle_text import licence_text, notice_text
from mlx_medphi.coreml.bundle_tokenizer import write_generation_config, write_tokenizer
from mlx_medphi.coreml.manifest import (
    CARD,
    METADATA,
    PARITY,
    VECTORS,
    FileEntry,
    Manifest,
    Verification,
    json_text,
)
from mlx_medphi.coreml.manifest_build import build_manifest
from mlx_medphi.coreml.manifest_read import parse_manifest
from mlx_medphi.coreml.sums import Progress, bundle_files, hash_files, write_sums
from mlx_medphi.coreml.vectors import write_vectors
from mlx_medphi.errors import BundleError
from mlx_medphi.files import atomic_directory, write_text

__all__ = [
    "draft_bundle",
    "finish_bundle",
    "record_verification",
    "seal_bundle",
    "write_companions",
]


def draft_bundle(directory: Path, facts: BundleFacts) -> Bundle:
    """The bundle as it will be, while its folder is being filled; nothing is written.

    Raises:
        BundleError: the facts contradict each other.
    """
    return Bundle(Path(directory), build_manifest(facts))


def write_companions(directory: Path, facts: BundleFacts) -> None:
    """Write tokenizer, vectors, generation_config.json, LICENSE and NOTICE."""
    directory = Path(directory)
    write_generation_config(facts.tokenizer, directory)
    write_tokenizer(facts.tokenizer, directory)
    write_vectors(facts.tokenizer, directory / VECTORS)
    write_text(directory / "LICENSE", licence_text(facts.base, terms(facts)))
    write_text(directory / "NOTICE", notice_text(build_manifest(facts)))


def seal_bundle(directory: Path, facts: BundleFacts, progress: Progress | None = None) -> Bundle:
    """Write README.md, metadata.json and SHA256SUMS over everything that lies in `directory`.

    Args:
        directory: the folder with package, packs, companions and parity.json.
        facts: with the verification that was reached.
        progress: called with (bytes read so far, bytes in all) while files are hashed.

    Raises:
        BundleError: a link or device in the folder, or facts that contradict it or each other.
    """
    directory = Path(directory)
    files = bundle_files(directory)
    others = {path: place for path, place in files.items() if path not in (METADATA, CARD)}
    entries = hash_files(others, progress)
    return _describe(directory, build_manifest(facts), entries)


def finish_bundle(directory: Path, facts: BundleFacts, progress: Progress | None = None) -> Bundle:
    """`write_companions` and `seal_bundle` in one, for a folder with package, packs and parity."""
    write_companions(directory, facts)
    return seal_bundle(directory, facts, progress)


def record_verification(
    bundle: Bundle, verification: Verification, parity: object | None = None
) -> Bundle:
    """Replace a bundle by itself with another verification; it is whole at any moment.

    Args:
        bundle: an opened bundle whose files were checked.
        verification: the level it reaches now, with its figures.
        parity: the new certificate, as JSON values; None keeps the old one.

    Raises:
        BundleError: the folder cannot be written, or the level lacks its figures.
    """
    ours = replace(bundle.manifest.medphi, verification=verification)
    manifest = replace(bundle.manifest, medphi=ours)
    made = [CARD] if parity is None else [CARD, PARITY]
    kept = [entry for entry in ours.files if entry.path not in made]
    try:
        with atomic_directory(bundle.path, replace=True) as temporary:
            for entry in kept:
                _link(bundle.path / entry.path, temporary / entry.path)
            if parity is not None:
                write_text(temporary / PARITY, json_text(parity))
                kept += hash_files({PARITY: temporary / PARITY})
            sealed = _describe(temporary, manifest, kept)
    except OSError as exc:
        raise BundleError(
            f"{bundle.path}: cannot be written ({exc.strerror or exc}) and is unchanged"
        ) from exc
    return Bundle(bundle.path, sealed.manifest)


def _describe(directory: Path, manifest: Manifest, entries: Sequence[FileEntry]) -> Bundle:
    """Card, manifest and sums for the files in `entries`, which are all the others."""
    write_text(directory / CARD, card(_listing(manifest, entries)))
    manifest = _listing(manifest, [*entries, *hash_files({CARD: directory / CARD})])
    text = json_text(manifest)
    # What would be refused when it is opened is not written.
    manifest = parse_manifest(json.loads(text), str(directory / METADATA))
    write_text(directory / METADATA, text)
    own = hash_files({METADATA: directory / METADATA})
    write_sums(directory, [*manifest.medphi.files, *own])
    return Bundle(directory, manifest)


def _listing(manifest: Manifest, entries: Sequence[FileEntry]) -> Manifest:
    files = tuple(sorted(entries, key=lambda entry: entry.path))
    return replace(manifest, medphi=replace(manifest.medphi, files=files))


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copyfile(source, target)
