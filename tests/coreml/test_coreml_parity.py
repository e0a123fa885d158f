"""The comparison finds what a wrong package computes, and nothing in a right one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from reference_cases import ADAPTERS, CONTEXT, MINI, PHI3, Export, Exported

from mlx_medphi.coreml import parity
from mlx_medphi.coreml.golden import Case, Golden, Prompt, make_golden
from mlx_medphi.coreml.parity import (
    LIMITS,
    CaseResult,
    GraphReport,
    Variant,
    against,
    compare,
    measure,
)
from mlx_medphi.coreml.runner import Predictor
from mlx_medphi.model.checkpoint import load

Array = npt.NDArray[Any]

IDS = tuple(int(x) for x in np.random.default_rng(4).integers(5, 300, 40))
NOTE = Prompt("note", IDS, tuple(range(3, 40, 4)), 4)
EDGE = Prompt("edge", (IDS * 2)[:CONTEXT], (60, 63), 0)


def golden_of(name: str, **adapters: Any) -> Golden:
    model, _ = load(PHI3 / name, dtype="float32")
    return make_golden(model, [NOTE, EDGE], adapters)


@pytest.fixture(scope="module")
def golden() -> Golden:
    """What MLX says without and with both adapters."""
    return golden_of("mini-4k", **ADAPTERS)


class Doctored:
    """A predictor with an error put in before or after each call."""

    def __init__(
        self,
        inner: Predictor,
        *,
        before: Callable[[str, dict[str, Array]], dict[str, Array]] = lambda name, given: given,
        after: Callable[[str, Array], Array] = lambda name, logits: logits,
    ) -> None:
        self.inner, self.before, self.after = inner, before, after

    def new_state(self, function: str) -> Any:
        return self.inner.new_state(function)

    def run(
        self, function: str, inputs: Mapping[str, Array], state: Any = None
    ) -> dict[str, Array]:
        given = self.before(function, dict(inputs))
        return {"logits": self.after(function, self.inner.run(function, given, state)["logits"])}


def measured(
    package: Exported, golden: Golden, predictor: Predictor | None = None, **changes: Any
) -> GraphReport:
    """The report on the base alone, with its shape changed."""
    base = package.variants[None]
    variants = {None: replace(base, shape=replace(base.shape, **changes))}
    return measure(predictor or package.predictor, variants, Golden(tuple(golden.of(None))))


# --- the figures of one case ----------------------------------------------------------------------

# Two rows of three tokens; the last row continues the prompt.
WANTED = np.array([[4.0, 1.0, 0.0], [0.0, 2.0, 1.0]], np.float32)
CASE = Case(Prompt("note", (3, 4), (0,), 1), None, (1,), WANTED)


def test_the_same_logits_have_no_findings() -> None:
    result = compare(CASE, WANTED.astype(np.float16))
    assert result == CaseResult("note-base", "note", None, 2, 0.0, 0.0, 0.0, 1.0, 1.0, True)
    assert result.findings() == []


def test_errors_are_shares_of_the_largest_logit_of_their_row() -> None:
    found = WANTED.copy()
    found[0, 2] += 0.25
    found[1, 0] -= 0.25
    result = compare(CASE, found)
    assert (result.max_abs, result.error) == (0.25, 0.125)
    # A row of small logits is not held to a share of nearly nothing.
    small = replace(CASE, logits=np.full((2, 3), 0.01, np.float32))
    assert compare(small, np.full((2, 3), 0.02)).error == pytest.approx(0.01)


def test_kl_is_that_of_the_two_distributions() -> None:
    found = WANTED + np.array([[0.3, 0.0, 0.0], [0.0, 0.0, 0.0]])
    p = np.exp(WANTED[0].astype(np.float64)) / np.exp(WANTED[0].astype(np.float64)).sum()
    q = np.exp(found[0]) / np.exp(found[0]).sum()
    assert compare(CASE, found).kl == pytest.approx((p * np.log(p / q)).sum() / 2, rel=1e-9)
    # A number added to all logits changes nothing.
    assert compare(CASE, WANTED + 3.0).kl == pytest.approx(0, abs=1e-12)


def test_a_tie_with_the_first_token_counts_as_the_same() -> None:
    tied = WANTED.copy()
    tied[1] = [0.0, 2.0, 2.0]
    assert compare(CASE, tied).top1 == 1 and compare(CASE, tied).greedy
    tied[1] = [2.0, 2.0, 2.5]
    assert compare(CASE, tied).top1 == 0.5 and not compare(CASE, tied).greedy


def test_only_rows_whose_lead_is_large_decide() -> None:
    close = replace(CASE, logits=np.array([[4.0, 3.99, 0.0], [0.0, 2.0, 1.0]], np.float32))
    found = np.array([[3.99, 4.0, 0.0], [0.0, 2.0, 1.0]])
    result = compare(close, found)
    assert (result.top1, result.decided) == (0.5, 1.0) and result.findings() == []
    swapped = np.array([[4.0, 3.99, 0.0], [0.0, 1.99, 2.0]])
    assert compare(close, swapped).decided == 0
    assert any("another first token" in line for line in compare(close, swapped).findings())


def test_greedy_looks_at_the_rows_of_the_continuation() -> None:
    found = WANTED[:, ::-1].copy()
    found[1] = WANTED[1]
    # The first row differs and is none of the continuation's.
    result = compare(CASE, found)
    assert result.top1 == 0.5 and result.greedy
    edge = replace(CASE, prompt=Prompt("edge", (3, 4), (0, 1), 0), continuation=())
    # Nothing is continued there, so nothing is said of it.
    assert compare(edge, found).greedy is None


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_beyond_every_limit(number: float) -> None:
    for prompt in ("note", "edge"):
        case = replace(CASE, prompt=replace(CASE.prompt, name=prompt))
        found = WANTED.astype(np.float16)
        found[0, 2] = number
        with np.errstate(invalid="ignore"):
            findings = compare(case, found).findings()
        assert findings and findings[0].startswith(f"{prompt}-base: a logit is off by")


def test_a_finding_names_its_case_the_figure_and_the_limit() -> None:
    findings = compare(CASE, -WANTED).findings()
    assert findings[0] == "note-base: a logit is off by 200.00% of the largest (at most 2%)"
    assert findings[1].startswith("note-base: KL 2.5 nats") and findings[1].endswith(
        "(at most 0.0002)"
    )
    assert findings[2:] == ["note-base: another first token in 100.0% of the decided rows"]


def test_the_limits_of_each_prompt_are_used() -> None:
    assert LIMITS.keys() == {NOTE.name, EDGE.name}
    off = WANTED + np.float32(2 * (LIMITS["note"].error + LIMITS["edge"].error) / 2)
    assert compare(CASE, off).findings()
    edge = replace(CASE, prompt=replace(CASE.prompt, name="edge"))
    assert not compare(edge, off).findings()


# --- packages -------------------------------------------------------------------------------------


def test_a_right_package_has_no_findings(golden: Golden, adapted: Export) -> None:
    package, steps = adapted("slots"), []
    report = measure(
        package.predictor,
        package.variants,
        golden,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert report.findings == () and report.passed
    assert [case.name for case in report.cases] == [case.name for case in golden.cases]
    assert all(case.error < 5e-3 and case.greedy is not False for case in report.cases)
    assert report.late < 5e-3
    assert report.prefill_decode < 5e-3
    assert report.swaps is True
    total = len(golden.cases) + 3
    assert steps == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("name", ["longrope-long", "sliding-window"])
def test_windows_and_both_rotary_sets_have_no_findings(name: str, exported: Export) -> None:
    report = measured(exported(name), golden_of(name))
    assert report.passed and report.swaps is None
    assert all(case.error < 5e-3 for case in report.cases)


@pytest.mark.parametrize("length", [29, 30, 32, 33])
def test_a_text_that_grows_over_longropes_switch_has_no_findings(
    length: int, exported: Export
) -> None:
    # With its continuation, all but the last read, the first ends before the switch at 32.
    model, _ = load(PHI3 / "longrope-long", dtype="float32")
    prompt = Prompt("note", IDS[:length], (3, 20), 4)
    report = measured(exported("longrope-long"), make_golden(model, [prompt], {}))
    assert report.passed and report.cases[0].error < 5e-3


def unmasked(function: str, given: dict[str, Array]) -> dict[str, Array]:
    return {**given, "causalMask": np.zeros_like(given["causalMask"])}


def mask_off_by_one(function: str, given: dict[str, Array]) -> dict[str, Array]:
    return {**given, "causalMask": np.roll(given["causalMask"], 1, axis=-1)}


def one_row_before(function: str, given: dict[str, Array]) -> dict[str, Array]:
    return {**given, "lastIndex": np.maximum(given["lastIndex"] - 1, 0)}


def one_slot_on(function: str, given: dict[str, Array]) -> dict[str, Array]:
    moved = min(int(given["position"][0]) + 1, CONTEXT - given["inputIds"].shape[1])
    return {**given, "position": np.array([moved], np.int32)}


@pytest.mark.parametrize("error", [unmasked, mask_off_by_one, one_row_before, one_slot_on])
def test_wrong_masks_rows_and_positions_are_found(
    error: Callable[..., dict[str, Array]], golden: Golden, exported: Export
) -> None:
    package = exported("mini-4k")
    report = measured(package, golden, Doctored(package.predictor, before=error))
    wrong = {line.split(":")[0] for line in report.findings}
    assert not report.passed and "note-base" in wrong


def test_a_wrong_window_is_found(exported: Export) -> None:
    package, golden = exported("sliding-window"), golden_of("sliding-window")
    for window in (None, package.shape.window + 1, package.shape.window - 1):
        assert not measured(package, golden, window=window).passed


def test_the_wrong_rotary_set_is_found(exported: Export) -> None:
    package, golden = exported("longrope-long"), golden_of("longrope-long")
    assert not measured(package, golden, switch=100).passed


def test_an_adapter_at_another_strength_is_found(golden: Golden, adapted: Export) -> None:
    package = adapted("slots")
    for name in ADAPTERS:
        variant = package.variants[name]
        for strength in (0.0, 0.5, 2.0):
            slots = {
                k: np.float16(strength) * v if "B" in k else v for k, v in variant.slots.items()
            }
            variants = {**package.variants, name: Variant(variant.shape, slots)}
            cases = Golden(tuple(golden.of(name)))
            report = measure(package.predictor, variants, cases)
            assert not report.passed, strength


def test_another_adapter_is_found(golden: Golden, adapted: Export) -> None:
    package = adapted("slots")
    variants = {**package.variants, "lora": package.variants["rslora"]}
    assert not measure(package.predictor, variants, Golden(tuple(golden.of("lora")))).passed


def test_a_decode_that_differs_from_prefill_is_found(golden: Golden, exported: Export) -> None:
    package = exported("mini-4k")
    doctored = Doctored(
        package.predictor,
        after=lambda name, logits: logits * np.float16(1.1) if name == "decode" else logits,
    )
    (line,) = [x for x in measured(package, golden, doctored).findings if "decode differ" in x]
    assert line.startswith("prefill and decode differ by 9") and line.endswith("largest logit")
    nothing = Doctored(
        package.predictor,
        after=lambda name, logits: logits * np.float16("nan") if name == "decode" else logits,
    )
    assert any("decode differ" in x for x in measured(package, golden, nothing).findings)


def test_last_slots_that_differ_from_the_first_are_found(golden: Golden, exported: Export) -> None:
    package, at = exported("mini-4k"), 0

    def note_place(function: str, given: dict[str, Array]) -> dict[str, Array]:
        nonlocal at
        at = int(given["position"][0])
        return given

    def late(function: str, logits: Array) -> Array:
        # Beyond everything the prompt reaches with its continuation.
        return logits * np.float16(1.1) if at >= 44 else logits

    short = Golden((next(golden.of(None)),))
    report = measured(package, short, Doctored(package.predictor, before=note_place, after=late))
    assert [case.error < 5e-3 for case in report.cases] == [True]
    (line,) = report.findings
    assert line.startswith("the first and the last slots differ by 9.9")


def test_a_swap_that_changes_one_bit_is_found(golden: Golden, adapted: Export) -> None:
    package = adapted("slots")
    one = Golden((fewer_rows(golden.cases[0], 2),))
    calls = 0

    def count(function: str, logits: Array) -> Array:
        nonlocal calls
        calls += 1
        return logits

    assert measure(Doctored(package.predictor, after=count), package.variants, one).swaps is True
    last, calls = calls, 0

    def changed_in_the_end(function: str, logits: Array) -> Array:
        logits = count(function, logits).copy()
        if calls == last:
            logits[..., 0] = np.nextafter(logits[..., 0], np.float16(9))
        return logits

    doctored = Doctored(package.predictor, after=changed_in_the_end)
    report = measure(doctored, package.variants, one)
    assert report.swaps is False and calls == last
    assert report.findings == ("an adapter taken out and put in again gives other logits",)


def fewer_rows(case: Case, count: int) -> Case:
    """A case of fewer compared rows."""
    prompt = replace(case.prompt, rows=case.prompt.rows[:count])
    smaller = replace(case, prompt=prompt)
    kept = [case.rows.index(row) for row in smaller.rows]
    return replace(smaller, logits=case.logits[kept])


@pytest.mark.parametrize("function", ["prefill_lora", "decode_lora", "prefill", "decode"])
def test_each_function_is_run_and_an_error_in_it_is_found(
    function: str, golden: Golden, adapted: Export
) -> None:
    package = adapted("functions")
    doctored = Doctored(
        package.predictor,
        after=lambda name, logits: -logits if name == function else logits,
    )
    report = measure(doctored, package.variants, golden)
    case = "note-lora" if function.endswith("lora") else "note-base"
    assert any(line.startswith(f"{case}:") for line in report.findings)


def test_slots_that_are_inputs_are_swapped_too(golden: Golden, adapted: Export) -> None:
    package = adapted("slots", slot_kind="input")
    report = measure(package.predictor, package.variants, Golden(golden.cases[:1]))
    assert report.swaps is True and report.passed


def test_functions_need_no_slots_and_have_no_findings(golden: Golden, adapted: Export) -> None:
    package = adapted("functions")
    report = measure(package.predictor, package.variants, golden)
    assert report.passed and report.swaps is None


# --- another model --------------------------------------------------------------------------------


def test_figures_against_the_original_are_those_of_the_weights(golden: Golden) -> None:
    exact, _ = load(MINI, dtype="float32")
    for result in against(exact, golden, ADAPTERS):
        assert result.error < 1e-5 and result.top1 == 1
    coarse, _ = load(MINI, dtype="float32", quantize=(4, 32))
    results = against(coarse, golden, ADAPTERS)
    assert [result.name for result in results] == [case.name for case in golden.cases]
    assert all(result.error > 0.1 for result in results)
    # The original is what is right, and errors are shares of its logits.
    twice = Golden(tuple(replace(case, logits=2 * case.logits) for case in golden.cases[:1]))
    (result,) = against(exact, twice, {})
    assert result.error == pytest.approx(1.0, abs=1e-3)


def test_an_adapter_that_changes_nothing_is_told_from_one_that_is_weak() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(2, 400)).astype(np.float32)
    weak = base + 0.002 * rng.normal(size=base.shape).astype(np.float32)
    noise = 0.002 * rng.normal(size=base.shape)
    prompt = Prompt("note", (3, 4), (0, 1), 0)
    cases = [Case(prompt, None, (), base), Case(prompt, "soap", (), weak)]
    # The rounding is as large as the change: the limits alone cannot tell the two apart.
    there = [(cases[0], base + noise), (cases[1], weak + noise)]
    absent = [(cases[0], base + noise), (cases[1], base + noise)]
    assert parity._without_effect(there) == []
    (line,) = parity._without_effect(absent)
    assert line == "note-soap: the adapter changes the logits by 0% of what it does in MLX"
    strong = base + 3 * (weak - base)
    (line,) = parity._without_effect([(cases[0], base), (cases[1], strong)])
    assert "by 300% of" in line


def test_a_weak_adapter_that_is_not_there_is_found(golden: Golden, adapted: Export) -> None:
    # MLX hears a change within the limits; this package computes the base instead.
    package, base = adapted("slots"), next(golden.of(None))
    change = 0.003 * np.random.default_rng(1).standard_normal(base.logits.shape)
    weak = replace(base, adapter="lora", logits=base.logits + change.astype(np.float32))
    empty = replace(
        package.variants["lora"],
        slots={k: np.zeros_like(v) for k, v in (package.variants["lora"].slots or {}).items()},
    )
    variants = {None: package.variants[None], "lora": empty}
    report = measure(package.predictor, variants, Golden((base, weak)))
    (line,) = report.findings
    assert line.startswith("note-lora: the adapter changes the logits by")
