"""Does a fused model say what the adapted one says? Measured on real tokens, with limits.

Two figures: KL(adapted ‖ fused) in nats per position, and the share of positions where both put the
same token first. KL(adapted ‖ base) stands beside them: what the adapter changes at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_medphi.model.lora import remove_lora
from mlx_medphi.model.phi3 import Phi3ForCausalLM

__all__ = ["LIMITS", "Fidelity", "Limits", "Reference", "compare", "reference"]

Logits = npt.NDArray[np.float32]

# Logits of 1,024 positions of Phi-3 are 131 MB; more would not move the figures much.
MAX_POSITIONS = 1024
# Positions compared at a time, 16 MB of them in double precision.
CHUNK = 64


@dataclass(frozen=True)
class Limits:
    """What a fused model must keep to.

    Attributes:
        kl: largest mean KL(adapted ‖ fused), nats.
        top1: smallest share of positions with the same first token.
        lost: largest share KL(adapted ‖ fused) / KL(adapted ‖ base) of the training.
    """

    kl: float
    top1: float
    lost: float


LIMITS: Mapping[str, Limits] = {
    "float32": Limits(1e-5, 0.999, 0.01),
    "float16": Limits(1e-3, 0.99, 0.05),
    "bfloat16": Limits(1e-2, 0.97, 0.1),
    "8bit": Limits(1e-2, 0.97, 0.1),
}


@dataclass(frozen=True)
class Fidelity:
    """How close a fused model is to the adapted one.

    Attributes:
        kl: mean KL(adapted ‖ fused), nats per position.
        top1: share of positions with the same most likely token.
        adapter_kl: mean KL(adapted ‖ base), nats per position.
        positions: number of positions compared.
    """

    kl: float
    top1: float
    adapter_kl: float
    positions: int

    @property
    def lost(self) -> float:
        """KL(adapted ‖ fused) as a share of what the adapter changes; 0 when both are nothing."""
        return self.kl / self.adapter_kl if self.adapter_kl > 0 else float(self.kl > 0)


@dataclass(frozen=True)
class Reference:
    """What the adapted model says: token rows, their logits (T, V), and how far from the base."""

    rows: tuple[tuple[int, ...], ...]
    logits: tuple[Logits, ...]
    adapter_kl: float


def reference(model: Phi3ForCausalLM, token_rows: Sequence[Sequence[int]]) -> Reference:
    """Keep what the adapted model says; the adapter is taken off the model on the way.

    Args:
        model: a model with its adapter; comes back without.
        token_rows: token ids of real text; at most `MAX_POSITIONS` of them are read, in order.
    """
    rows, left = [], MAX_POSITIONS
    for row in token_rows:
        if left and row:
            rows.append(tuple(row[:left]))
            left -= len(rows[-1])
    adapted = tuple(_logits(model, row) for row in rows)
    remove_lora(model)
    base = [_compared(own, _logits(model, row)) for own, row in zip(adapted, rows, strict=True)]
    positions = sum(map(len, rows))
    return Reference(tuple(rows), adapted, sum(kl for kl, _ in base) / max(positions, 1))


def compare(kept: Reference, fused: Phi3ForCausalLM) -> Fidelity:
    """Measure a fused model against what the adapted one said."""
    pairs = zip(kept.rows, kept.logits, strict=True)
    found = [_compared(adapted, _logits(fused, row)) for row, adapted in pairs]
    positions = sum(map(len, kept.rows))
    kl, same = (sum(values) / positions for values in zip(*found, strict=True))
    return Fidelity(kl, same, kept.adapter_kl, positions)


def _logits(model: Phi3ForCausalLM, row: Sequence[int]) -> Logits:
    """(T, V) logits of one row."""
    return np.array(model(mx.array([list(row)]))[0].astype(mx.float32))


def _compared(adapted: Logits, other: Logits) -> tuple[float, int]:
    """Summed KL(adapted ‖ other) and the number of positions with the same first token."""
    total, same = 0.0, 0
    for begin in range(0, len(adapted), CHUNK):
        p, q = (_log_probs(logits[begin : begin + CHUNK]) for logits in (adapted, other))
        total += float((np.exp(p) * (p - q)).sum())
        same += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
    return total, same


def _log_probs(logits: Logits) -> npt.NDArray[np.float64]:
    # Double precision: a KL of 1e-9 drowns in float32 sums.
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
