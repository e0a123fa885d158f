"""Which base a bundle was made from, and on whose terms: what the files beside it say.

Nothing is asked of the network and no licence is guessed from a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["UNKNOWN_TERMS", "Base", "Licence", "describe_base", "find_licence"]

UNKNOWN_TERMS = "unknown: look at the base's page"

# Longer files are no licences.
MAX_BYTES = 1 << 20
_LICENCE_NAME = re.compile(r"(licen[cs]e|copying)([.-].*)?", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---(\n|\Z)", re.DOTALL)
_ENTRY = re.compile(r"""^(license|license_name):[ \t]*["']?([\w.+-]{1,60})["']?[ \t]*$""", re.M)
_COMMIT = re.compile(r"/snapshots/([0-9a-f]{40})(?:/|$)")
# What the texts of common licences say near their beginning.
_TITLES = {"mit": "MIT License", "apache-2.0": "Apache License"}


@dataclass(frozen=True)
class Licence:
    """Terms of the base: an id such as "mit" and the text, each None where nobody says."""

    id: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Base:
    """The model that was exported.

    Attributes:
        name: hub id or folder name, never a path.
        fingerprint: which base it is, see `model/fingerprint.py`.
        revision: the commit of a hub model.
        licence: its terms.
    """

    name: str
    fingerprint: str
    revision: str | None = None
    licence: Licence = Licence()


def describe_base(
    path: Path, fingerprint: str, *, asked: str | None = None, revision: str | None = None
) -> Base:
    """What is known of a base from where it lies.

    Args:
        path: its directory or single file on this machine.
        fingerprint: of its weights.
        asked: the name it was asked for by, where that is a hub id.
        revision: the one asked for; a fetched model's own commit is better and wins.
    """
    # Imports MLX, which reading a bundle does without.
    from mlx_medphi.model.adapter_formats import base_label

    place = str(path.absolute())
    commit = _COMMIT.search(place)
    return Base(
        name=base_label(place) or base_label(asked) or "base",
        fingerprint=fingerprint,
        revision=commit[1] if commit else revision,
        licence=find_licence(path if path.is_dir() else path.parent),
    )


def find_licence(directory: Path) -> Licence:
    """The terms that lie beside a checkpoint: licence files, and the model card's front matter."""
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    texts = [_text(directory / name) for name in names if _LICENCE_NAME.fullmatch(name)]
    text = "\n\n".join(part.strip("\n") for part in texts if part.strip()) or None
    return Licence(_card_id(directory / "README.md") or _title_id(text), text)


def _card_id(card: Path) -> str | None:
    front = _FRONT_MATTER.match(_text(card)) if card.is_file() else None
    entries = {name: value.lower() for name, value in _ENTRY.findall(front[1])} if front else {}
    named = entries.get("license")
    # The hub's word for terms of one's own, whose name stands beside it.
    return entries.get("license_name", named) if named == "other" else named


def _title_id(text: str | None) -> str | None:
    head = (text or "")[:400]
    return next((name for name, title in _TITLES.items() if title in head), None)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            data = handle.read(MAX_BYTES + 1)
    except OSError:
        return ""  # what cannot be read says nothing
    if len(data) > MAX_BYTES:
        return ""
    return data.decode("utf-8", errors="replace").replace("\r\n", "\n")
