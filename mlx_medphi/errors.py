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
    ├── GenerationError     a note cannot be written for this conversation
    ├── ExportError         a model cannot become a Core ML package with these settings
    └── BundleError         an exported bundle is missing, damaged, or not the model it says it is
        └── ParityError     an exported model is further from the original than its limits allow

A message says what was found, what was expected, where, and what to do. It never quotes patient
text.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "AdapterError",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "FuseError",
    "GenerationError",
    "HubError",
    "MedPhiError",
    "ParityError",
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


class ExportError(MedPhiError):
    """A model cannot become a Core ML package with these settings."""


class BundleError(MedPhiError):
    """An exported bundle is missing, damaged, or not the model it says it is."""


class ParityError(BundleError):
    """An exported model is further from the original than its limits allow.

    Attributes:
        report: all figures, the same object that a verification without findings returns.
    """

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class GenerationError(MedPhiError):
    """A note cannot be written for this conversation."""


def capped(items: Iterable[object], limit: int = 10) -> str:
    """Join sorted items with commas; after `limit` of them say how many more there are."""
    names = sorted(str(item) for item in items)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} … and {len(names) - limit} more"
