"""`medphi export`: a model as a Core ML bundle that a Swift app loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mlx_medphi as mp
from mlx_medphi.cli.options import (
    JsonOption,
    ModelOption,
    OfflineOption,
    RevisionOption,
    with_settings,
)
from mlx_medphi.cli.show import examples, number_of, print_json, size, table
from mlx_medphi.cli.stages import Stages
from mlx_medphi.config import ExportConfig, to_dict, updated
from mlx_medphi.errors import UsageError

if TYPE_CHECKING:
    from mlx_medphi.coreml.bundle import Bundle
    from mlx_medphi.coreml.cost import CostSheet
    from mlx_medphi.coreml.export import ExportPlan

__all__ = ["adapter_paths", "bundle_text", "export", "plan_text"]

# Beyond this, in nats per token, quantising has changed what a model says.
LARGE_KL = 0.05

EXAMPLES = examples(
    "medphi export --model models/phi-3-mini-4bit --adapter soap=runs/a/adapter --out notes.medphi",
    "medphi export --model models/phi-3-mini --bits 4 --context 4096 --out base.medphi --dry-run",
    "medphi export --model fused --adapters none --out fused.medphi",
)


@with_settings(ExportConfig)
def export(
    model: ModelOption,
    out: Annotated[Path, typer.Option(metavar="NAME.medphi", help="The bundle to make; a folder.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="An adapter: own file, mlx-lm or PEFT directory. Repeat the option for several.",
        ),
    ] = None,
    verify: Annotated[
        str,
        typer.Option(
            metavar="spec|graph|predict",
            help="How far the bundle is verified before it gets its name: its parts, the saved "
            "program run against MLX, Core ML on a Mac.",
        ),
    ] = "graph",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, tell the cost, write nothing.")
    ] = False,
    show_plan: Annotated[
        bool,
        typer.Option(
            "--compute-plan", help="On a Mac: count the operations that each processor would run."
        ),
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace an older bundle of this name.")
    ] = False,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    **typed: Any,
) -> int:
    """Write a model, and adapters beside it, as a Core ML bundle.

    The saved package is read back and run against MLX; a bundle that is not the same model within
    the limits of float16 never gets its name. No Mac is needed; none of this has run on one.
    """
    # Loads NumPy, which no --help should wait for.
    from mlx_medphi.coreml.predict import compute_plan, need_mac

    config = updated(ExportConfig(), typed, "command line")
    if show_plan:
        need_mac("--compute-plan")
    adapters = adapter_paths(adapter or [])
    plan = mp.plan_export(
        model,
        out,
        adapters=adapters,
        config=config,
        replace=replace,
        revision=revision,
        offline=offline,
    )
    if dry_run:
        if as_json:
            print_json({**vars(plan), "config": to_dict(plan.config), "cost": plan.cost.to_dict()})
        else:
            print(plan_text(plan))
        return 0
    with Stages(quiet=as_json) as stages:
        bundle = mp.export(
            model,
            out,
            adapters=adapters,
            config=config,
            level=verify,  # type: ignore[arg-type]  # export checks it and names the choices
            replace=replace,
            revision=revision,
            offline=offline,
            progress=stages,
        )
    devices = compute_plan(bundle.package, config.compute_units) if show_plan else None
    if as_json:
        facts = {"path": bundle.path, "bytes": bundle.nbytes, "manifest": bundle.manifest}
        print_json(facts if devices is None else {**facts, "compute_plan": devices})
    else:
        print(bundle_text(bundle, plan.notes))
        for function, counts in (devices or {}).items():
            print(f"{function}: " + ", ".join(f"{n:,} on {name}" for name, n in counts.items()))
    return 0


def adapter_paths(texts: list[str]) -> dict[str, str] | list[str]:
    """NAME=PATH, each, or paths alone that are named after themselves.

    Raises:
        UsageError: a name comes twice, or some have names and some not.
    """
    # A path that exists may have an equals sign in it.
    named = [text for text in texts if "=" in text and not Path(text).exists()]
    if not named:
        return texts
    if len(named) < len(texts):
        raise UsageError("give every --adapter a name, as in soap=runs/a/adapter, or none of them")
    pairs = [(name, path) for name, _, path in (text.partition("=") for text in named)]
    if bare := [name for name, path in pairs if not path]:
        raise UsageError(f"--adapter {bare[0]}= names no path; write it as in soap=runs/a/adapter")
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two adapters are called {twice[0]!r}; each needs its own name")
    return dict(pairs)


def plan_text(plan: ExportPlan) -> str:
    """What would be written, and what it costs."""
    config = plan.config
    adapters = ", ".join(plan.adapters) or "none given"
    slots = f", slots of rank {plan.slot_rank}" if plan.slot_rank is not None else ""
    return "\n".join(
        [
            f"{plan.base}: {config.bits} bits, context {config.context} tokens, prefill "
            f"{config.prefill}",
            f"adapters: {adapters} ({config.adapters}{slots})",
            f"room on disk while it is made: up to {size(plan.needed_bytes)}",
            *(f"note: {note}" for note in plan.notes),
            "",
            cost_text(plan.cost),
            "",
            "Nothing was written.",
        ]
    )


def cost_text(cost: CostSheet) -> str:
    """The cost sheet: sizes, work, and speeds that no device can exceed."""
    # Imports MLX, which no --help should wait for.
    from mlx_medphi.coreml.cost import ASSUMPTIONS

    group, lines = "", []
    for row in cost.rows():
        if row.group == "ceiling":
            continue
        if row.group != group:
            group = row.group
            lines.append([f"{group}", ""])
        value = size(row.value) if row.unit == "bytes" else f"{row.value:,.0f} {row.unit}"
        lines.append([f"  {row.name}", value])
    chips = [
        [c.chip, f"{c.bandwidth:g} GB/s", f"{c.tokens_per_second:,.0f}"] for c in cost.ceilings
    ]
    head = ["ceilings, not speeds", "bandwidth", "tokens/s"]
    return "\n".join(
        [table(lines), "", table([head, *chips]), *(f"({line})" for line in ASSUMPTIONS)]
    )


def bundle_text(bundle: Bundle, notes: tuple[str, ...] = ()) -> str:
    """What was written, how far it was verified, and what to do next."""
    facts = bundle.manifest.medphi
    graph = facts.verification.graph
    lines = [f"{bundle.path}: {bundle.size}", f"base: {bundle.manifest.source.model_id}"]
    lines.append(f"weights: {bundle.manifest.compression}")
    lines.append(
        f"context {facts.coreml.context_length} tokens, {number_of(len(facts.files) + 2, 'file')}"
    )
    entries = facts.adapters.list
    if entries:
        shown = ", ".join(f"{entry.name} (rank {entry.rank})" for entry in entries)
        how = {"slots": "in slots", "functions": "as functions", "fused": "folded in"}
        lines.append(f"adapters {how[facts.adapters.mode]}: {shown}")
    elif facts.adapters.rank_slot is not None:
        lines.append(f"adapters: slots of rank {facts.adapters.rank_slot}, empty")
    if graph is not None:
        worst = max(graph["cases"], key=lambda case: case["error"])
        kl = max(case["kl"] for case in graph["cases"])
        lines.append(
            f"verified: {facts.verification.level}, the saved program against MLX: off by "
            f"{worst['error']:.2%} of the largest logit ({worst['name']}), KL {kl:.1e} nats at most"
        )
        for case in graph["fidelity"]:
            lines.append(
                f"against the weights before export, {case['name']}: KL {case['kl']:.2g} nats, "
                f"same first token {case['top1']:.0%}"
                + (" (a large change: take more bits)" if case["kl"] > LARGE_KL else "")
            )
    else:
        lines.append(f"verified: {facts.verification.level}; the program was not run")
    lines += [f"note: {note}" for note in notes]
    lines.append(f"look closer with: medphi verify {bundle.path}")
    return "\n".join(lines)
