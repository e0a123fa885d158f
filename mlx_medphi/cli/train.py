"""`medphi train`: prepared rows and a base in, a run directory with the kept adapter out."""

from __future__ import annotations

import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mlx_medphi as mp
from mlx_medphi.cli.options import (
    DtypeOption,
    GroupSizeOption,
    JsonOption,
    ModelOption,
    OfflineOption,
    QuantizeOption,
    RevisionOption,
    quantization,
    with_settings,
)
from mlx_medphi.cli.progress import Progress
from mlx_medphi.cli.show import duration, examples, print_json, size
from mlx_medphi.config import LoRAConfig, TrainConfig, load_config, updated

if TYPE_CHECKING:
    from mlx_medphi.training.result import TrainResult

__all__ = ["settings", "train"]

FULL = "full"
TYPED = "command line"
EXAMPLES = examples(
    "medphi train --model models/phi-3-mini --data data/mts --out runs/a",
    "medphi train --model models/phi-3-mini --quantize 4 --data data/mts --out runs/b --iters 200",
    "medphi train --model models/tiny --data data/mts --out runs/c --fine-tune-type full",
    "medphi train --model models/phi-3-mini --data data/mts --out runs/a --resume",
)
INTERRUPTED = 130


@with_settings(TrainConfig, LoRAConfig, more={"fine_tune_type": FULL})
def train(
    model: ModelOption,
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="A folder made by medphi data prepare.")
    ],
    out: Annotated[Path, typer.Option(metavar="RUN", help="The run directory to make.")],
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML with the sections train and lora."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in RUN.")
    ] = False,
    quantize: QuantizeOption = None,
    group_size: GroupSizeOption = 64,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    **typed: Any,
) -> int:
    """Train an adapter on prepared rows.

    Only the notes are learned. With --fine-tune-type full every parameter is trained. A setting is
    its default, unless the YAML file of --config has it, unless its option is given. Ctrl-C
    finishes the update, saves, and says how to go on.
    """
    train_config, lora = settings(config, typed)
    splits = mp.read_splits(data)
    loaded, tokenizer = mp.load(
        model,
        revision=revision,
        dtype=dtype,
        quantize=quantization(quantize, group_size),
        offline=offline,
    )
    with Progress(quiet=as_json) as progress:
        result = mp.train(
            loaded,
            tokenizer,
            splits.train,
            splits.valid,
            out=out,
            config=train_config,
            lora=lora,
            resume=resume,
            on_event=progress,
        )
    if as_json:
        print_json(result)
    else:
        print(result_text(result))
    if result.stopped == "interrupted":
        print(f"stopped and saved; go on with: {_again(sys.argv[1:])}", file=sys.stderr)
        return INTERRUPTED
    return 0


def settings(file: Path | None, typed: dict[str, Any]) -> tuple[TrainConfig, LoRAConfig | None]:
    """What a run uses: defaults, then the file, then what was typed; no LoRA for "full".

    Raises:
        ConfigError: an unknown key or an impossible value in the file or among what was typed.
        UsageError: options of an adapter together with full-parameter training.
    """
    lora, config = load_config(file) if file is not None else (LoRAConfig(), TrainConfig())
    names = {field.name for field in fields(LoRAConfig)}
    for_lora = {name: value for name, value in typed.items() if name in names}
    for_training = {name: value for name, value in typed.items() if name not in names}
    if for_lora.get("fine_tune_type") != FULL:
        return _updated_both(config, for_training, lora, for_lora)
    del for_lora["fine_tune_type"]
    if for_lora:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(for_lora))
        raise mp.UsageError(f"{flags}: no adapter is made with --fine-tune-type full; leave it out")
    return updated(config, for_training, TYPED), None


def _updated_both(
    config: TrainConfig, for_training: dict[str, Any], lora: LoRAConfig, for_lora: dict[str, Any]
) -> tuple[TrainConfig, LoRAConfig]:
    """Both with what was typed; what is wrong in either is told together."""
    try:
        config = updated(config, for_training, TYPED)
    except mp.ConfigError as exc:
        try:
            updated(lora, for_lora, TYPED)
        except mp.ConfigError as other:
            raise mp.ConfigError(f"{exc}; {other}") from exc
        raise
    return config, updated(lora, for_lora, TYPED)


def result_text(result: TrainResult) -> str:
    """What was kept and how good it is, in a few lines."""
    kept = f"kept: {result.adapter}"
    if result.best_loss is not None:
        before = "" if result.first_loss is None else f"{result.first_loss:.4f} before training, "
        best = f"{result.best_loss:.4f} after update {result.best_step}"
        kept = f"validation loss {before}{best}\n{kept}"
        if result.improved is False:
            kept += "\nworse than before training: lower --learning-rate, or train on more rows"
    lost = [f"{result.skipped} updates skipped (not finite)"] if result.skipped else []
    lost += [f"{len(result.shortened):,} conversations shortened"] if result.shortened else []
    spent = [f"{result.steps:,} updates ({result.stopped}) in {duration(result.seconds)}"]
    spent.append(f"peak memory {size(result.peak_memory)}")
    refused = [reason for _, reason in result.refused[:10]]
    if len(result.refused) > 10:
        refused.append(f"… and {len(result.refused) - 10:,} more")
    head = [f"{len(result.refused):,} rows could not be trained on:"] if refused else []
    return "\n".join([", ".join(spent + lost), *head, *(f"  {line}" for line in refused), kept])


def _again(arguments: list[str]) -> str:
    resume = [] if "--resume" in arguments else ["--resume"]
    return shlex.join(["medphi", *arguments, *resume])
