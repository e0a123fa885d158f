"""`medphi fuse`: the base with its adapter folded in, and how close it is to the two apart."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import mlx_medphi as mp
from mlx_medphi.cli.options import JsonOption, ModelOption, OfflineOption, RevisionOption
from mlx_medphi.cli.show import duration, examples, print_json, size
from mlx_medphi.model.hub import resolve_model

if TYPE_CHECKING:
    from mlx_medphi.model.fuse import FuseReport

__all__ = ["fuse", "fuse_text"]

EXAMPLES = examples(
    "medphi fuse --model models/phi-3-mini --adapter runs/a/adapter --out fused",
    "medphi fuse --model models/phi-3-mini --adapter runs/a/adapter "
    "--out medical_phi3_trained.safetensors",
    "medphi fuse --model models/phi-3-mini-4bit --adapter runs/b/adapter --out fused "
    "--precision 8bit",
)


def fuse(
    model: ModelOption,
    adapter: Annotated[
        Path, typer.Option(metavar="PATH", help="An adapter: own file, mlx-lm or PEFT directory.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR|FILE",
            help="A directory any Phi-3 loader reads, or one file ending in .safetensors.",
        ),
    ],
    precision: Annotated[
        str,
        typer.Option(
            metavar="same|float16|8bit",
            help="Keep the base's numbers and size, unpack all to float16, or lift the changed "
            "layers of a quantised base to 8 bits.",
        ),
    ] = "same",
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A prepared folder: measure on its validation rows [default: the built-in "
            "synthetic sample].",
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a file, or a directory made by this verb.")
    ] = False,
    allow_other_base: Annotated[
        bool,
        typer.Option("--allow-other-base", help="Accept an adapter trained on another base."),
    ] = False,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> int:
    """Fold an adapter into its base.

    The fused model is compared with the adapted one on real tokens before it gets its name, and
    refused when it is too far away. A quantised base is never folded into the same grid; neither is
    one that was quantised on loading when the adapter was trained.
    """
    # Once, so that all parts see one revision.
    base = resolve_model(model, revision=revision, offline=offline)
    rows = None
    if data is not None:
        # Loads the tokenizer library, which no --help should wait for.
        from mlx_medphi.model.fuse_text import text_rows

        rows = text_rows(base, mp.read_splits(data).valid)
    report = mp.fuse(
        base,
        adapter,
        out,
        token_rows=rows,
        precision=precision,  # type: ignore[arg-type]  # fuse checks it and names the choices
        replace=replace,
        allow_other_base=allow_other_base,
        progress=_progress if sys.stderr.isatty() and not as_json else None,
    )
    if as_json:
        print_json(report.to_dict())
    else:
        print(fuse_text(report))
    return 0


def fuse_text(report: FuseReport) -> str:
    """What was written, its size against the base's, and the two figures of fidelity."""
    fidelity = report.fidelity
    equal = " (the same, to the byte)" if report.same_size else ""
    moved = sorted(layer.relative for layer in report.layers)
    change = f"{moved[0]:.2%} to {moved[-1]:.2%}" if moved else "nothing"
    quantized = report.quantized_on_load
    on_load = (
        [f"base: quantised to {quantized[0]} bits in groups of {quantized[1]}, as for the adapter"]
        if quantized
        else []
    )
    return "\n".join(
        [
            f"{report.out}: stored as {report.stored}, in {duration(report.seconds)}",
            *on_load,
            f"weights: base {report.base_bytes:,} bytes, fused {report.fused_bytes:,} bytes{equal}",
            f"changed: {len(moved)} layers, by {change} of their length",
            f"fused against adapted on {fidelity.positions:,} tokens: KL {fidelity.kl:.2g} nats, "
            f"same first token {fidelity.top1:.2%}",
            f"adapted against base: KL {fidelity.adapter_kl:.2g} nats; lost in fusing "
            f"{fidelity.lost:.2%} of that",
        ]
    )


def _progress(done: int, total: int) -> None:
    end = "\n" if done >= total else ""
    print(f"\rwriting {size(done)} of {size(total)}", end=end, file=sys.stderr, flush=True)
