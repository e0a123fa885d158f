"""Every error a user can cause or meet.

    MedPhiError
    ├── UsageError          a verb was called with arguments that do not go together
    ├── ConfigError         a setting has an unknown name or an impossible value
    ├── DataError           a conversation, note or data file is not what its format promises
    ├── TokenizerError      a tokenizer file is missing, damaged or lacks a token Phi-3 needs
    ├── CheckpointError     a base model's files are missing, damaged or of another shape
    ├── HubError            a model could not be fetched, or fetching was switched off
    ├── AdapterError        an adapter file is damaged or belongs to another model
    ├── TrainingError       training cannot start or go on
    ├── FuseError           folding an adapter into its base is refused or lost the training
    └── GenerationError     a note cannot be written for this conversation

A message says what was found, what was expected, where, and what to do. It never quotes patient
text.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FuseError",
    "GenerationError",
    "HubError",
    "MedPhiError",
    "TokenizerError",
    "TrainingError",
    "UsageError",
    "capped",
]


class MedPhiError(Exception):
    """The base of every error raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(MedPhiError):
    """A verb was called with arguments that do not go together."""

    exit_code = 2


class ConfigError(MedPhiError):
    """A setting has an unknown name or an impossible value."""

    exit_code = 2


class DataError(MedPhiError):
    """A conversation, note or data file is not what its format promises."""


class TokenizerError(MedPhiError):
    """A tokenizer file is missing, damaged or lacks a token Phi-3 needs."""


class CheckpointError(MedPhiError):
    """A base model's files are missing, damaged or of another shape."""


class HubError(MedPhiError):
    """A model could not be fetched from the hub, or fetching was switched off."""


class AdapterError(MedPhiError):
    """An adapter file is damaged or belongs to another model."""


class TrainingError(MedPhiError):
    """Training cannot start or go on."""


class FuseError(MedPhiError):
    """Folding an adapter into its base is refused or lost the training."""


class GenerationError(MedPhiError):
    """A note cannot be written for this conversation."""


def capped(items: Iterable[object], limit: int = 10) -> str:
    """Join sorted items with commas; after `limit` of them say how many more there are."""
    names = sorted(str(item) for item in items)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} … and {len(names) - limit} more"
