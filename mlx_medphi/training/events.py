"""What a training run tells its caller while it runs. No event carries text of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_medphi.config import LoRAConfig, TrainConfig

__all__ = ["Evaluated", "Event", "OnEvent", "Saved", "Started", "Stepped", "Stopped"]


@dataclass(frozen=True)
class Started:
    """The plan, known before the first update."""

    config: TrainConfig
    lora: LoRAConfig | None
    updates: int
    first_step: int
    train_rows: int
    valid_rows: int
    shortened: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    widths: tuple[int, ...]
    padding_share: float
    supervised_tokens_per_epoch: int
    trainable_parameters: int
    total_parameters: int


@dataclass(frozen=True)
class Stepped:
    """One update. Tokens and seconds are of this update; seconds include making the batch."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    skipped: bool
    tokens_supervised: int
    tokens_real: int
    tokens_padded: int
    seconds: float
    peak_memory: int


@dataclass(frozen=True)
class Evaluated:
    """Mean loss per supervised token over all validation rows, with the weights after `step`."""

    step: int
    loss: float
    best: bool
    tokens_supervised: int
    seconds: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint from which the run can go on."""

    step: int
    path: Path


@dataclass(frozen=True)
class Stopped:
    """The end of the run: `finished`, `patience` or `interrupted`."""

    step: int
    reason: str


Event = Started | Stepped | Evaluated | Saved | Stopped
OnEvent = Callable[[Event], None]
