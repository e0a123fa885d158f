"""Teach Phi-3 to write medical notes from conversations, and keep or fuse what it learned.

    import mlx_medphi as mp

    model, tokenizer = mp.load("models/phi-3-mini")
    splits = mp.prepare(mp.load_examples("mts-dialog/"), accept_identifiers=True)
    mp.train(model, tokenizer, splits.train, splits.valid, out="runs/a", on_event=print)
    mp.save_adapter(model, "medical_changes.safetensors")
    row = splits.test[0]
    print(mp.generate_note(model, tokenizer, row.conversation, section=row.note.section))

Every name is imported when it is first used: importing the package loads neither MLX nor
coremltools.
Not a medical device: a note written by a model must be read and corrected by a clinician.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "AdapterInfo",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "Conversation",
    "DataError",
    "Example",
    "ExportConfig",
    "ExportError",
    "ExportPlan",
    "FuseError",
    "GenerateConfig",
    "GenerationError",
    "HubError",
    "LoRAConfig",
    "MedPhiError",
    "Note",
    "ParityError",
    "ParityReport",
    "SplitPlan",
    "Splits",
    "Tokenizer",
    "TokenizerError",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "Turn",
    "UsageError",
    "adapter_diff",
    "adapter_info",
    "convert_adapter",
    "export",
    "fuse",
    "generate_note",
    "load",
    "load_adapter",
    "load_examples",
    "measure_lengths",
    "open_bundle",
    "plan_export",
    "prepare",
    "read_splits",
    "rehearse",
    "remove_lora",
    "save_adapter",
    "save_model",
    "stream_note",
    "summarise",
    "train",
    "verify",
    "write_splits",
]

# The names of each module, in the order of the layers.
_MODULES = {
    "errors": (
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
    ),
    "config": ("ExportConfig", "GenerateConfig", "LoRAConfig", "TrainConfig"),
    "data.assign": ("SplitPlan",),
    "data.examples": ("Conversation", "Example", "Note", "Turn"),
    "data.load": ("load_examples",),
    "data.prepared": ("read_splits", "write_splits"),
    "data.splits": ("Splits", "prepare"),
    "data.summary": ("summarise",),
    "text.lengths": ("measure_lengths",),
    "text.tokenizer": ("Tokenizer",),
    "model.checkpoint": ("load", "save_model"),
    "model.adapter": (
        "AdapterInfo",
        "adapter_info",
        "convert_adapter",
        "load_adapter",
        "save_adapter",
    ),
    "model.delta": ("adapter_diff",),
    "model.fuse": ("fuse",),
    "model.lora": ("remove_lora",),
    "model.generate": ("generate_note", "stream_note"),
    "training.loop": ("train",),
    "training.result": ("TrainResult",),
    "coreml.bundle": ("Bundle", "open_bundle"),
    "coreml.export": ("ExportPlan", "export", "plan_export"),
    "coreml.rehearse": ("rehearse",),
    "coreml.verify": ("ParityReport", "verify"),
}

if TYPE_CHECKING:
    from mlx_medphi.config import ExportConfig, GenerateConfig, LoRAConfig, TrainConfig
    from mlx_medphi.coreml.bundle import Bundle, open_bundle
    from mlx_medphi.coreml.export import ExportPlan, export, plan_export
    from mlx_medphi.coreml.rehearse import rehearse
    from mlx_medphi.coreml.verify import ParityReport, verify
    from mlx_medphi.data.assign import SplitPlan
    from mlx_medphi.data.examples import Conversation, Example, Note, Turn
    from mlx_medphi.data.load import load_examples
    from mlx_medphi.data.prepared import read_splits, write_splits
    from mlx_medphi.data.splits import Splits, prepare
    from mlx_medphi.data.summary import summarise
    from mlx_medphi.errors import (
        AdapterError,
        BundleError,
        CheckpointError,
        ConfigError,
        DataError,
        ExportError,
        FuseError,
        GenerationError,
        HubError,
        MedPhiError,
        ParityError,
        TokenizerError,
        TrainingError,
        UsageError,
    )
    from mlx_medphi.model.adapter import (
        AdapterInfo,
        adapter_info,
        convert_adapter,
        load_adapter,
        save_adapter,
    )
    from mlx_medphi.model.checkpoint import load, save_model
    from mlx_medphi.model.delta import adapter_diff
    from mlx_medphi.model.fuse import fuse
    from mlx_medphi.model.generate import generate_note, stream_note
    from mlx_medphi.model.lora import remove_lora
    from mlx_medphi.text.lengths import measure_lengths
    from mlx_medphi.text.tokenizer import Tokenizer
    from mlx_medphi.training.loop import train
    from mlx_medphi.training.result import TrainResult


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(import_module(f"mlx_medphi.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'mlx_medphi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
