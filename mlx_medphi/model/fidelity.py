"""Does a fused model say what the adapted one says? Measured on real tokens, with limits.

Two figures: KL(adapted ‖ fused) in nats per position, and the share of positions where both put the
same token first. KL(adapted ‖ base) stands beside them: what the adapter changes at all.

The limits lie between what was measured for faithful and for lost fuses, on a 2 M parameter Phi-3
trained on synthetic notes with LoRA and DoRA adapters of ‖ΔW‖/‖W‖ = 3 % to 34 %, 781 positions:

    stored as                      KL                    first token, decided positions
    float32                        4e-12 at most         100 %
    float16                        1.2e-5 at most        100 %
    bfloat16                       7.7e-4 at most        100 %
    8 bits on a 4-bit base         1.6e-4 at most        100 %
    4 bits, the base's own grid    2.6e-2 to 8.5e-1      72 % to 98 %
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
# So well bfloat16 stores a change of 0.4 % of the weights, 8 bits one of 1.2 %, 4 bits one of 20 %.
MIN_COSINE = 0.9
# Half a nat is 1.6 times as likely. Below that the first token changes with the last bit of a
# bfloat16 logit, which says nothing about the weights.
DECIDED = 0.5


@dataclass(frozen=True)
class Limits:
    """What a fused model must keep to.

    Attributes:
        kl: largest mean KL(adapted ‖ fused), nats.
        noise: a KL up to this may be the rounding of the dtype that is computed in. Then the tokens
            cannot tell what was lost, and the weights must have kept the change's direction.
        lost: largest KL(adapted ‖ fused) as a share of KL(adapted ‖ base).
        decided: smallest share of decided positions with the same first token.
    """

    kl: float
    noise: float
    lost: float
    decided: float


LIMITS: Mapping[str, Limits] = {
    "float32": Limits(kl=1e-5, noise=1e-6, lost=0.01, decided=0.999),
    "float16": Limits(kl=1e-3, noise=1e-4, lost=0.1, decided=0.99),
    "bfloat16": Limits(kl=1e-2, noise=1e-3, lost=0.1, decided=0.99),
    "8bit": Limits(kl=1e-2, noise=1e-3, lost=0.1, decided=0.99),
}


@dataclass(frozen=True)
class Fidelity:
    """How close a fused model is to the adapted one.

    Attributes:
        kl: mean KL(adapted ‖ fused), nats per position.
        top1: share of positions with the same most likely token.
        decided: the same among positions where the adapted model prefers its first token by
            `DECIDED` nats or more; 1 where there is none.
        adapter_kl: mean KL(adapted ‖ base), nats per position.
        positions: number of positions compared.
    """

    kl: float
    top1: float
    decided: float
    adapter_kl: float
    positions: int

    @property
    def lost(self) -> float:
        """KL(adapted ‖ fused) as a share of what the adapter changes; 0 when both are nothing."""
        return self.kl / self.adapter_kl if self.adapter_kl > 0 else float(self.kl > 0)

    def misses(self, limits: Limits, cosine: float) -> list[str]:
        """What is beyond its limit, in words; a figure that is no number is beyond every limit.

        Args:
            limits: what to keep to.
            cosine: between the wanted change of all weights and the stored one.
        """
        unheard = self.kl <= limits.noise and cosine >= MIN_COSINE
        checks = (
            (self.kl <= limits.kl, f"KL {self.kl:.2g} (at most {limits.kl:g})"),
            (
                unheard or self.lost <= limits.lost,
                f"{self.lost:.1%} of the training lost (at most {limits.lost:.0%}), the change "
                f"stored with cosine {cosine:.2f} (at least {MIN_COSINE})",
            ),
            (
                self.decided >= limits.decided,
                f"same first token at {self.decided:.1%} of the decided positions "
                f"(at least {limits.decided:.1%})",
            ),
        )
        return [text for good, text in checks if not good]


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
    return Reference(tuple(rows), adapted, sum(sums.kl for sums in base) / max(positions, 1))


def compare(kept: Reference, fused: Phi3ForCausalLM) -> Fidelity:
    """Measure a fused model against what the adapted one said."""
    pairs = zip(kept.rows, kept.logits, strict=True)
    found = [_compared(adapted, _logits(fused, row)) for row, adapted in pairs]
    positions = sum(map(len, kept.rows))
    decided = sum(sums.decided for sums in found)
    return Fidelity(
        kl=sum(sums.kl for sums in found) / positions,
        top1=sum(sums.same for sums in found) / positions,
        decided=sum(sums.same_decided for sums in found) / decided if decided else 1.0,
        adapter_kl=kept.adapter_kl,
        positions=positions,
    )


def _logits(model: Phi3ForCausalLM, row: Sequence[int]) -> Logits:
    """(T, V) logits of one row."""
    return np.array(model(mx.array([list(row)]))[0].astype(mx.float32))


@dataclass
class _Sums:
    """KL, positions with the same first token, decided positions, and those with the same token."""

    kl: float = 0.0
    same: int = 0
    decided: int = 0
    same_decided: int = 0


def _compared(adapted: Logits, other: Logits) -> _Sums:
    """Sums over the positions of one row."""
    sums = _Sums()
    for begin in range(0, len(adapted), CHUNK):
        p, q = (_log_probs(logits[begin : begin + CHUNK]) for logits in (adapted, other))
        same = p.argmax(axis=-1) == q.argmax(axis=-1)
        best = np.partition(p, -2, axis=-1)[:, -2:]
        decided = best[:, 1] - best[:, 0] >= DECIDED
        sums.kl += float((np.exp(p) * (p - q)).sum())
        sums.same += int(same.sum())
        sums.decided += int(decided.sum())
        sums.same_decided += int((same & decided).sum())
    return sums


def _log_probs(logits: Logits) -> npt.NDArray[np.float64]:
    # Double precision: a KL of 1e-9 drowns in float32 sums.
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
