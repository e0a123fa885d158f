"""Exports of the reference checkpoints, and how close logits must come to their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.build import write_package
from mlx_medphi.coreml.export import export
from mlx_medphi.coreml.interpreter import Interpreter
from mlx_medphi.coreml.package import PackageText
from mlx_medphi.coreml.package_file import open_package
from mlx_medphi.coreml.parity import Variant
from mlx_medphi.coreml.program import Plan
from mlx_medphi.coreml.runner import Runner, Shape
from mlx_medphi.coreml.verify import variants
from mlx_medphi.coreml.weights import plan_weights
from mlx_medphi.model.phi3 import Phi3ForCausalLM
from mlx_medphi.model.weights import Checkpoint, open_checkpoint

Array = npt.NDArray[Any]
Logits = npt.NDArray[np.float32]

PHI3 = Path(__file__).resolve().parents[1] / "fixtures" / "phi3"
FOLDERS = sorted(folder.name for folder in PHI3.iterdir())
# The fast tests look at one of each kind where the logits of all are compared anyway.
FEW = [
    name if name in {"mini-4k", "longrope-long"} else pytest.param(name, marks=pytest.mark.slow)
    for name in FOLDERS
]
MINI = PHI3 / "mini-4k"
LORA, RSLORA, DORA = (MINI / f"peft_{i}" for i in range(3))
ADAPTERS = {"lora": LORA, "rslora": RSLORA}
CONTEXT, PREFILL = 64, 16

# Two layers of float16 activations over float16 weights, against float32: the largest difference
# measured is 3.3e-3 of the row's largest logit; a step of float16 is up to 1e-3 of it, and weights
# in float16 alone give up to 2.1e-3. A wrong mask, window, table or scale gives 2e-2 to 1.
LOGIT_ERROR = 5e-3
# Nats; measured 1e-6 where logits end at 3, 1e-5 where they end at 10.
LOGIT_KL = 3e-5


@dataclass(frozen=True)
class Agreement:
    """How close logits came to the ones they should be, over all rows.

    Attributes:
        error: largest difference, as a share of the largest logit of its row.
        kl: mean KL(wanted ‖ found), nats.
        first: share of rows where the wanted first token has the highest logit found. Float16
            logits between 1 and 2 lie 1e-3 apart, and the closest leads of the references are 3e-4:
            a step of float16 is a tie.
    """

    error: float
    kl: float
    first: float


def agreement(found: Array, wanted: Array) -> Agreement:
    """The figures of found (n, vocab) against wanted (n, vocab)."""
    ours, theirs = found.astype(np.float64), wanted.astype(np.float64)
    assert ours.shape == theirs.shape
    shares = np.abs(ours - theirs).max(axis=1) / np.abs(theirs).max(axis=1)
    token = theirs.argmax(axis=1)[:, None]
    top = found.max(axis=1)
    lag = (top - np.take_along_axis(found, token, axis=1)[:, 0]).astype(np.float64)
    first = lag <= np.spacing(top.astype(np.float16)).astype(np.float64)
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (theirs, ours))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    return Agreement(float(shares.max()), float(kl.mean()), float(first.mean()))


def assert_agrees(found: Array, wanted: Array) -> None:
    """The same model to float16 accuracy, and the same first token in every row."""
    figures = agreement(found, wanted)
    assert figures.error <= LOGIT_ERROR, figures
    assert figures.kl <= LOGIT_KL, figures
    assert figures.first == 1, figures


@dataclass(frozen=True)
class Exported:
    """A saved package that was opened again, and how each adapter is run."""

    package: Path
    predictor: Interpreter
    variants: Mapping[str | None, Variant]
    seen: dict[tuple[Any, ...], Logits] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        """Extents of the base."""
        return self.variants[None].shape

    def runner(self, adapter: str | None = None, *, by_decode: bool = False) -> Runner:
        """A new conversation, by blocks or by `decode` alone."""
        variant = self.variants[adapter]
        shape = variant.shape
        if by_decode:
            # No block of this width fits anywhere.
            shape = replace(shape, prefill=shape.context + 1)
        return Runner(self.predictor, shape, variant.slots)

    def rows(self, ids: Array, adapter: str | None = None, *, by_decode: bool = False) -> Logits:
        """The logits after every token of ids (B, T), (B · T, vocab), each row run once."""
        rows = []
        for row in ids.tolist():
            key = (*row, adapter, by_decode)
            if key not in self.seen:
                self.seen[key] = self.runner(adapter, by_decode=by_decode).rows(row)
            rows.append(self.seen[key])
        return np.concatenate(rows).astype(np.float32)


Export = Callable[..., Exported]


def make_plan(checkpoint: Checkpoint, config: ExportConfig, slot_rank: int | None = None) -> Plan:
    """What the program of a base is built from."""
    assert config.context is not None
    weights = plan_weights(checkpoint, config)
    return Plan(checkpoint.config, config, config.context, weights, slot_rank=slot_rank)


def settings(**changes: Any) -> ExportConfig:
    """Small extents, 16 bits and no adapter, unless told otherwise."""
    given = {"bits": 16, "context": CONTEXT, "prefill": PREFILL, "adapters": "none", **changes}
    return ExportConfig(**given)


def shape_of(plan: Plan) -> Shape:
    """What a loop must know of a plan's program."""
    both = len(plan.rope_sets) > 1
    return Shape(
        context=plan.context,
        prefill=plan.export.prefill,
        window=plan.config.sliding_window,
        functions=("prefill", "decode"),
        switch=plan.config.switch_length if both else None,
    )


def write_base(checkpoint: Checkpoint, package: Path, config: ExportConfig) -> Exported:
    """The package of a base alone, without a bundle around it."""
    plan = make_plan(checkpoint, config)
    write_package(plan, PackageText("A model of the tests."), package)
    return Exported(
        package, Interpreter(open_package(package)), {None: Variant(shape_of(plan), None)}
    )


def write_bundle(
    base: Path, out: Path, config: ExportConfig, adapters: Mapping[str, Path] | None = None
) -> Exported:
    """The package of a whole bundle; how it is run is what its manifest says."""
    bundle = export(base, out, adapters=adapters or {}, config=config, level="spec")
    predictor = Interpreter(open_package(bundle.package))
    return Exported(bundle.package, predictor, variants(bundle))


def reference(folder: Path) -> dict[str, Array]:
    """What transformers computed in float32 for ids (B, T): logits (B, T, vocab), and greedily."""
    found: dict[str, Array] = load_file(folder / "reference.safetensors")
    return found


def reference_rows(folder: Path) -> Logits:
    """The logits of all rows, (B · T, vocab)."""
    logits: Logits = reference(folder)["logits"]
    return logits.reshape(-1, logits.shape[-1])


def mlx_rows(model: Phi3ForCausalLM, ids: Array) -> Logits:
    """What MLX says after every token of ids (B, T), (B · T, vocab)."""
    logits = np.array(model(mx.array(ids)).astype(mx.float32))
    return logits.reshape(-1, logits.shape[-1])


def checkpoint_of(name: str) -> Checkpoint:
    return open_checkpoint(PHI3 / name)


def long_row(folder: Path, count: int) -> Sequence[int]:
    """`count` tokens of a reference's two rows, one after the other."""
    ids: list[int] = reference(folder)["ids"].reshape(-1)[:count].tolist()
    return ids


class AnyFeature(dict[str, str]):
    """A description for every name."""

    def __missing__(self, name: str) -> str:
        return f"About {name}."
