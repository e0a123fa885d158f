"""`medphi adapter`: look into an adapter, write it in another form, compare two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import mlx_medphi as mp
from mlx_medphi.cli.options import JsonOption, OfflineOption, RevisionOption
from mlx_medphi.cli.show import examples, print_json, size, table

if TYPE_CHECKING:
    from mlx_medphi.model.adapter import AdapterInfo
    from mlx_medphi.model.delta import AdapterDiff

__all__ = ["app", "diff_text", "info_text"]

app = typer.Typer(
    name="adapter",
    help="Look into an adapter, convert it, compare two.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
AdapterArgument = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="Own file, mlx-lm or PEFT directory.")
]


@app.command(epilog=examples("medphi adapter inspect medical_changes.safetensors"))
def inspect(path: AdapterArgument, as_json: JsonOption = False) -> int:
    """What an adapter is, how large, and which base it belongs to."""
    info = mp.adapter_info(path)
    if as_json:
        print_json(info)
    else:
        print(info_text(info))
    return 0


@app.command(
    epilog=examples(
        "medphi adapter convert medical_changes.safetensors adapter/",
        "medphi adapter convert peft_adapter/ medical_changes.safetensors --dtype float16",
    )
)
def convert(
    source: AdapterArgument,
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET",
            help="A file ending in .safetensors, or a directory for mlx-lm, PEFT and Swift.",
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(metavar="float32|float16|bfloat16", help="Store as [default: as it is]."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|ID",
            help="The base; needed for PEFT adapters of a part of a fused projection.",
        ),
    ] = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace an older adapter; never anything else.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Write an adapter in another form, with the same numbers."""
    if model is None and (revision is not None or offline):
        raise mp.UsageError("--revision and --offline belong to the hub id of --model; give one")
    base = None if model is None else mp.load(model, revision=revision, offline=offline)[0]
    info = mp.convert_adapter(source, target, dtype=dtype, model=base, replace=replace)
    if as_json:
        print_json(info)
    else:
        print(info_text(info))
    return 0


@app.command(epilog=examples("medphi adapter diff runs/a/adapter runs/b/adapter"))
def diff(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="An adapter.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Another for the same model.")],
    as_json: JsonOption = False,
) -> int:
    """How far two adapters move each layer, and in how far the same way."""
    found = mp.adapter_diff(first, second)
    if as_json:
        print_json(found)
    else:
        print(diff_text(found))
    return 0


def info_text(info: AdapterInfo) -> str:
    """An adapter's facts as a table."""
    quantized = info.base_quantization
    base = info.base_name or "not said"
    if quantized:
        base += f", {quantized.get('bits')} bits in groups of {quantized.get('group_size')}"
    training = ", ".join(f"{name} {value}" for name, value in sorted(info.training.items()))
    rows = [
        ("form", info.form),
        ("change", f"{info.fine_tune_type}, rank {info.rank}, scale {info.scale:g}"),
        ("projections", ", ".join(info.keys)),
        ("blocks", f"{len(info.layers)} ({_range(info.layers)})"),
        (
            "parameters",
            f"{info.parameters:,} in {info.tensors} tensors of {', '.join(info.dtypes)}",
        ),
        ("size", f"{size(info.bytes)} ({info.bytes:,} bytes)"),
        ("base", base),
        ("base fingerprint", info.base_fingerprint or "not said"),
        ("written by", f"mlx_medphi {info.package_version}" if info.package_version else "another"),
        ("weights sha256", info.weights_sha256),
        *([("training", training)] if training else []),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([str(info.path), *(f"  {name:{width}}  {value}" for name, value in rows)])


def diff_text(found: AdapterDiff) -> str:
    """Lengths and angles, the whole first."""
    head = ["", "first", "second", "cosine"]
    whole = ["all layers", f"{found.first:.4g}", f"{found.second:.4g}", f"{found.cosine:.4f}"]
    rows = [[d.name, f"{d.first:.4g}", f"{d.second:.4g}", f"{d.cosine:.4f}"] for d in found.layers]
    note = "" if found.exact else "\nDoRA: the numbers are of the low-rank parts alone"
    return table([head, whole, *rows]) + note


def _range(layers: tuple[int, ...]) -> str:
    if layers and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
