"""The comparison of a package with its golden logits, and the figures that decide it.

What runs the package is a `Predictor`: the interpreter, or Core ML on a Mac. The limits are some
times what float16 activations and scales cost; what is smaller than that is not seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_medphi.coreml.golden import Case, Golden, rows_of
from mlx_medphi.coreml.runner import Predictor, Runner, Shape
from mlx_medphi.model.adapter import load_adapter
from mlx_medphi.model.lora import remove_lora
from mlx_medphi.model.phi3 import Phi3ForCausalLM

__all__ = [
    "LIMITS",
    "CaseResult",
    "GraphReport",
    "Limits",
    "Variant",
    "against",
    "compare",
    "measure",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Limits:
    """How far a package may be from MLX.

    Attributes:
        error: largest difference of a logit, as a share of the largest logit of the row.
        kl: mean KL(MLX ‖ package), nats.
        margin: MLX's lead of its first token, in logits, from which the package must agree on it;
            also a share of the row's largest logit.
    """

    error: float
    kl: float
    margin: float


LIMITS: Mapping[str, Limits] = {
    # Measured: up to 0.3 %, with bfloat16 scales up to 1.5 %, and KL 1e-5.
    "note": Limits(error=0.02, kl=2e-4, margin=0.02),
    # A full context sums the rounding of as many keys, at positions a model may hardly know;
    # measured on the demo base, trained on half of its context: 2 to 6 % and KL 1e-3.
    "edge": Limits(error=0.1, kl=5e-3, margin=0.1),
}
"""Prompt -> limits."""


@dataclass(frozen=True)
class CaseResult:
    """One case, compared row by row.

    Attributes:
        name: prompt and adapter.
        prompt: "note" or "edge".
        adapter: name of the adapter; None: the base.
        rows: rows compared.
        max_abs: largest difference of a logit.
        error: the same as a share of the row's largest logit.
        kl: mean KL(MLX ‖ package), nats.
        top1: share of rows where MLX's first token has the package's highest logit; float16 logits
            may tie.
        decided: the same among rows where MLX's lead is beyond the limit; 1 where there is none.
        greedy: whether the package continues the prompt with MLX's tokens; None where nothing is
            continued.
    """

    name: str
    prompt: str
    adapter: str | None
    rows: int
    max_abs: float
    error: float
    kl: float
    top1: float
    decided: float
    greedy: bool | None

    def findings(self) -> list[str]:
        """What is beyond its limit; a figure that is no number is beyond every limit."""
        limits = LIMITS[self.prompt]
        checks = (
            (
                self.error <= limits.error,
                f"a logit is off by {self.error:.2%} of the largest (at most {limits.error:.0%})",
            ),
            (self.kl <= limits.kl, f"KL {self.kl:.2g} nats (at most {limits.kl:g})"),
            (
                self.decided == 1,
                f"another first token in {1 - self.decided:.1%} of the decided rows",
            ),
        )
        return [f"{self.name}: {text}" for good, text in checks if not good]


@dataclass(frozen=True)
class GraphReport:
    """A package that was run.

    Attributes:
        cases: each prompt under each adapter.
        prefill_decode: largest difference between reading a prompt in blocks and token by token,
            as a share of the largest logit.
        late: largest difference between a block at the start and the same one in the last slots of
            the context, everything before it hidden, as a share of the largest logit.
        swaps: adapters put in, taken out and put in again with bit-equal logits; None without
            slots.
        hidden: largest |h| after each block; float16 ends at 65,504. Empty unless asked for.
        peak: the operation with the largest float16 result, and that number.
        findings: what is wrong, a line each.
    """

    cases: tuple[CaseResult, ...]
    prefill_decode: float
    late: float
    swaps: bool | None
    hidden: tuple[float, ...] = ()
    peak: tuple[str, float] | None = None
    findings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether everything is within its limit."""
        return not self.findings


@dataclass(frozen=True)
class Variant:
    """How one adapter, or the base, is run.

    Attributes:
        shape: extents and function names.
        slots: the arrays that fill the slots; None leaves them empty or out.
    """

    shape: Shape
    slots: Mapping[str, Array] | None = None


@dataclass
class _Progress:
    total: int
    report: Callable[[int, int], None] | None
    done: int = field(default=0)

    def step(self) -> None:
        self.done += 1
        if self.report is not None:
            self.report(self.done, self.total)


def measure(
    predictor: Predictor,
    variants: Mapping[str | None, Variant],
    golden: Golden,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> GraphReport:
    """Run every case and compare.

    Args:
        predictor: runs the package.
        variants: adapter name, or None for the base -> how it is run.
        golden: what MLX said.
        progress: called with (runs done, runs in all).
    """
    steps = _Progress(len(golden.cases) + 3, progress)
    found: list[tuple[Case, Array]] = []
    for case in golden.cases:
        variant = variants[case.adapter]
        runner = Runner(predictor, variant.shape, variant.slots)
        found.append((case, _rows(runner, case)))
        steps.step()
    results = [compare(case, rows) for case, rows in found]
    first = golden.cases[0]
    apart = _prefill_against_decode(predictor, variants[first.adapter], first)
    steps.step()
    late = _late(predictor, variants[first.adapter], first)
    steps.step()
    swaps = _swap(predictor, variants, first)
    steps.step()
    findings = [line for result in results for line in result.findings()]
    findings += _without_effect(found)
    for figure, what in ((apart, "prefill and decode"), (late, "the first and the last slots")):
        if not figure <= LIMITS[first.prompt.name].error:
            findings.append(f"{what} differ by {figure:.2%} of the largest logit")
    if swaps is False:
        findings.append("an adapter taken out and put in again gives other logits")
    return GraphReport(tuple(results), apart, late, swaps, findings=tuple(findings))


def _without_effect(found: list[tuple[Case, Array]]) -> list[str]:
    """Adapters whose change of the logits is not the one MLX sees.

    A weak adapter is within the limits of the base; the length of the package's change along MLX's
    tells the two apart, because rounding has no direction.
    """
    base = {case.prompt: (case, rows) for case, rows in found if case.adapter is None}
    lines = []
    for case, rows in found:
        if case.adapter is None or case.prompt not in base:
            continue
        plain, plain_rows = base[case.prompt]
        count = sum(row < len(case.prompt.ids) for row in case.rows)
        wanted = (case.logits[:count] - plain.logits[:count]).astype(np.float64)
        change = rows[:count].astype(np.float64) - plain_rows[:count].astype(np.float64)
        length = float((wanted * wanted).sum())
        share = float((wanted * change).sum()) / length if length > 0 else 0.0
        if not 0.5 <= share <= 2.0:
            lines.append(
                f"{case.name}: the adapter changes the logits by {share:.0%} of what it does in MLX"
            )
    return lines


def _late(predictor: Predictor, variant: Variant, case: Case) -> float:
    """One block at the start against the same block in the last slots; rotation is relative."""
    shape = variant.shape
    ids = case.prompt.ids[: shape.prefill]
    start = shape.context - shape.prefill
    early, late = (Runner(predictor, shape, variant.slots, start=at).feed(ids) for at in (0, start))
    return _apart(early, late)


def _rows(runner: Runner, case: Case) -> Array:
    """The logits of a case, read as an app reads it: a prompt in blocks, then token by token."""
    ids, switch = case.prompt.ids, runner.shape.switch
    if case.fed == 0 or (switch is not None and len(ids) <= switch < len(case.ids)):
        # MLX read all of it with one set of rotary factors, so the prompt's rows are of that set.
        return runner.rows(case.ids, case.rows)
    prompt = runner.rows(ids, [row for row in case.rows if row < len(ids)])
    steps = [runner.feed([token]) for token in case.continuation[: case.fed]]
    return np.concatenate([prompt, np.stack(steps)])


def compare(case: Case, found: Array) -> CaseResult:
    """The figures of one case.

    Args:
        case: with MLX's logits (n, vocab).
        found: the package's, (n, vocab).
    """
    wanted, got = case.logits.astype(np.float64), found.astype(np.float64)
    apart = np.abs(wanted - got).max(axis=1)
    largest = np.maximum(np.abs(wanted).max(axis=1), 1.0)
    ours, theirs = _log_probs(wanted), _log_probs(got)
    kl = (np.exp(ours) * (ours - theirs)).sum(axis=1)
    first = wanted.argmax(axis=1)[:, None]
    same = np.take_along_axis(got, first, axis=1)[:, 0] == got.max(axis=1)
    order = np.sort(wanted, axis=1)
    sure = order[:, -1] - order[:, -2] > LIMITS[case.prompt.name].margin * largest
    continued = same[case.rows.index(len(case.prompt.ids) - 1) :] if case.continuation else None
    return CaseResult(
        name=case.name,
        prompt=case.prompt.name,
        adapter=case.adapter,
        rows=len(same),
        max_abs=float(apart.max()),
        error=float((apart / largest).max()),
        kl=float(kl.mean()),
        top1=float(same.mean()),
        decided=float(same[sure].mean()) if sure.any() else 1.0,
        # Each token is right given the ones before it, so the whole continuation is.
        greedy=None if continued is None else bool(continued.all()),
    )


def against(
    model: Phi3ForCausalLM, golden: Golden, adapters: Mapping[str, Path]
) -> tuple[CaseResult, ...]:
    """How far the exported weights are from those of another model, such as the original.

    Args:
        model: the other model; its adapter is taken off where `adapters` has names.
        golden: what MLX says with the exported weights.
        adapters: name -> file or directory.
    """
    results = [_turned(case, rows_of(model, case)) for case in golden.of(None)]
    for name, path in adapters.items():
        load_adapter(model, path, allow_other_base=True)
        results += [_turned(case, rows_of(model, case)) for case in golden.of(name)]
        remove_lora(model)
    return tuple(results)


def _turned(case: Case, original: Array) -> CaseResult:
    return compare(replace(case, logits=original), case.logits)


def _log_probs(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _prefill_against_decode(predictor: Predictor, variant: Variant, case: Case) -> float:
    """One padded block against the same tokens one by one, then a token more on both caches."""
    ids = case.prompt.ids[:8]
    blocks = Runner(predictor, variant.shape, variant.slots)
    steps = Runner(predictor, variant.shape, variant.slots)
    pairs = [(blocks.feed(ids), _one_by_one(steps, ids))]
    more = case.prompt.ids[8:9]
    if more:
        pairs.append((blocks.feed(more), steps.feed(more)))
    return max(_apart(first, second) for first, second in pairs)


def _one_by_one(runner: Runner, ids: Iterable[int]) -> Array:
    logits = np.zeros(0, np.float16)
    for token in ids:
        logits = runner.feed([token])
    return logits


def _apart(first: Array, second: Array) -> float:
    wide = first.astype(np.float64)
    return float(np.abs(wide - second.astype(np.float64)).max() / max(np.abs(wide).max(), 1.0))


def _swap(predictor: Predictor, variants: Mapping[str | None, Variant], case: Case) -> bool | None:
    """Base, each adapter, base again, each adapter again, on one set of states: bit for bit."""
    filled = {name: v.slots for name, v in variants.items() if name and v.slots is not None}
    if not filled:
        return None
    base, ids = variants[None], case.prompt.ids[:4]
    runner = Runner(predictor, base.shape, base.slots)
    empty = {name: np.zeros_like(array) for name, array in next(iter(filled.values())).items()}
    rounds: list[tuple[str | None, Mapping[str, Array]]] = [(None, empty), *filled.items()]
    seen: dict[str | None, Array] = {None: runner.feed(ids)}
    same = True
    for name, slots in (*rounds, *rounds):
        runner.use(slots)
        logits = runner.feed(ids)
        same &= bool(np.array_equal(seen.setdefault(name, logits), logits))
    return same
