"""What a manifest says twice must agree, and its paths must stay inside the bundle."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from mlx_medphi.coreml.manifest import FileEntry, Manifest

__all__ = ["contradictions", "file_problems", "path_problem"]

_SHA256 = re.compile(r"[0-9a-f]{64}")


def contradictions(manifest: Manifest) -> Iterator[str]:
    """What cannot be true, and paths that lead out of the bundle; one line each."""
    yield from _shape_problems(manifest)
    yield from _path_problems(manifest)


def file_problems(manifest: Manifest) -> Iterator[str]:
    """Files that other keys name, and their hashes, against the list of all files."""
    ours = manifest.medphi
    listed: dict[str, FileEntry] = {entry.path: entry for entry in ours.files}
    for entry in ours.files:
        if not _SHA256.fullmatch(entry.sha256):
            yield f"medphi.files: {entry.path:.60} has no SHA-256"
    if not any(path.startswith(f"{manifest.assets.main}/") for path in listed):
        yield "medphi.files: lists nothing of assets.main"
    tokenizer = ours.tokenizer
    hashes: dict[str, str | None] = {entry.path: entry.sha256 for entry in ours.files}
    named: list[tuple[str, str | None]] = [
        (tokenizer.path, tokenizer.sha256),
        (tokenizer.chat_template, tokenizer.chat_template_sha256),
        (tokenizer.vectors, hashes.get(tokenizer.vectors)),
        *((entry.path, entry.sha256) for entry in ours.adapters.list if entry.path is not None),
    ]
    for path, sha256 in named:
        if path not in listed:
            yield f"medphi.files: lacks {path:.60}, which is named elsewhere"
        elif hashes[path] != sha256:
            yield f"medphi.files: another SHA-256 of {path:.60} is named elsewhere"


def path_problem(text: str) -> str | None:
    """Why a path must not be followed, or None: it has to lie in the bundle, on every system."""
    parts = text.split("/")
    if not text or PurePosixPath(text).is_absolute() or any(p in ("", ".", "..") for p in parts):
        return "leaves the bundle or is no plain path"
    if any(character in text for character in "\\:") or not text.isprintable():
        return "holds characters that are not for paths"
    return None


def _shape_problems(manifest: Manifest) -> Iterator[str]:
    """What is impossible about the package and what is said of it."""
    ours, coreml = manifest.medphi, manifest.medphi.coreml
    for name, signature in coreml.functions.items():
        for tensor in (*signature.inputs, *signature.outputs, *signature.states):
            if not tensor.name or not tensor.shape or min(tensor.shape) < 1:
                yield f"medphi.coreml.functions.{name:.40}.{tensor.name:.40} has an empty shape"
    if not 0 < coreml.prefill_width <= coreml.context_length:
        yield "medphi.coreml.prefill_width is not between 1 and context_length"
    named = [name for names in manifest.language.function_map.values() for name in names]
    named += [name for entry in ours.adapters.list for name in entry.functions.values()]
    for name in {coreml.default_function, *named} - coreml.functions.keys():
        yield f"medphi.coreml.functions lacks {name:.40}, which is named elsewhere"
    if not ours.generation.stop_token_ids:
        yield "medphi.generation.stop_token_ids is empty, so no text would ever end"
    reached = ("spec", "graph", "predict")
    for level in reached[: ("none", *reached).index(ours.verification.level)]:
        if getattr(ours.verification, level) is None:
            yield f"medphi.verification.{level} has no figures, though the level is said reached"
    slots = ours.adapters.mode == "slots"
    if slots != (ours.adapters.slot_kind is not None and ours.adapters.rank_slot is not None):
        yield "medphi.adapters.slot_kind and rank_slot do not go with its mode"


def _path_problems(manifest: Manifest) -> Iterator[str]:
    ours = manifest.medphi
    named = {
        "assets.main": manifest.assets.main,
        "language.tokenizer": manifest.language.tokenizer,
        "medphi.tokenizer.path": ours.tokenizer.path,
        "medphi.tokenizer.chat_template": ours.tokenizer.chat_template,
        "medphi.tokenizer.vectors": ours.tokenizer.vectors,
        **{
            f"medphi.adapters.list.{entry.name:.40}": entry.path
            for entry in ours.adapters.list
            if entry.path is not None
        },
        **{f"medphi.files[{i}]": entry.path for i, entry in enumerate(ours.files)},
    }
    for name, path in named.items():
        problem = path_problem(path)
        if problem:
            yield f"{name}: {path!r:.60} {problem}"
    # Many disks do not tell upper case from lower.
    yield from _twice("medphi.files", (entry.path.casefold() for entry in ours.files))
    yield from _twice("medphi.adapters.list", (e.name.casefold() for e in ours.adapters.list))
    for entry in ours.adapters.list:
        if "/" in entry.name or path_problem(entry.name):
            yield f"medphi.adapters.list: {entry.name!r:.60} is no name for an adapter"


def _twice(name: str, items: Iterable[str]) -> Iterator[str]:
    for item, count in Counter(items).items():
        if count > 1:
            yield f"{name} holds {item!r:.60} twice"
