"""The weights that are exported: the base as it lies, with an adapter folded in, or quantised anew.

Whatever has to be made is made as a checkpoint on disk, so that one path carries all of them over,
and MLX can load the very weights that are exported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil

from mlx_medphi.coreml.blobs import BlobFile
from mlx_medphi.coreml.program import Plan
from mlx_medphi.coreml.request import Request
from mlx_medphi.coreml.staging import check_groups, quantise
from mlx_medphi.model.adapter_formats import Adapter
from mlx_medphi.model.checkpoint import build_model
from mlx_medphi.model.fingerprint import quantized_as
from mlx_medphi.model.fuse import FuseReport, fuse
from mlx_medphi.model.fuse_plan import Precision
from mlx_medphi.model.layout import linear_shapes
from mlx_medphi.model.phi3 import Phi3ForCausalLM
from mlx_medphi.model.weights import Checkpoint, open_checkpoint

__all__ = ["Prepared", "original_model", "prepare", "reference_model", "staged_forms"]

Progress = Callable[[str, int, int], None]

SMALLEST_NORMAL = 2.0**-14
"""Of float16."""

# Beyond this share of the memory a model is computed in the dtype it is stored in.
MEMORY_SHARE = 0.6


@dataclass(frozen=True)
class Prepared:
    """What is exported.

    Attributes:
        checkpoint: the weights, on disk.
        fused: how folding an adapter in went; None where none was.
        made: whether these are not the base's own weights.
    """

    checkpoint: Checkpoint
    fused: FuseReport | None
    made: bool


def prepare(request: Request, directory: Path, progress: Progress | None = None) -> Prepared:
    """Fold in and quantise what the request asks for.

    Args:
        request: what is exported.
        directory: for checkpoints that have to be made; it exists.
        progress: called with ("fuse" or "quantise", bytes done, bytes in all).

    Raises:
        FuseError: the fused model is not the adapted one.
        ExportError: the base cannot be quantised so.
        OSError: the disk is full.
    """

    def tell(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: None if progress is None else progress(stage, done, total)

    checkpoint, report = request.checkpoint, None
    if request.config.adapters == "fused":
        (source,) = request.sources.values()
        out = directory / "fused"
        report = fuse(
            checkpoint.path, source, out, precision=_precision(request), progress=tell("fuse")
        )
        checkpoint = open_checkpoint(out)
    plain = checkpoint.config.quantization is None
    if plain and request.bits < 16 and request.config.scheme == "block":
        out = directory / "quantised"
        out.mkdir()
        forms = staged_forms(request)
        checkpoint = quantise(checkpoint, request.config, out, tell("quantise"), forms=forms)
    made = checkpoint is not request.checkpoint or (plain and request.bits < 16)
    return Prepared(checkpoint, report, made)


def staged_forms(request: Request) -> dict[str, tuple[int, int]]:
    """(bits, group size) of each layer that is exported in other codes than the base's own.

    Raises:
        ExportError: a layer's width is no multiple of the group.
    """
    if request.bits == 16 or request.config.scheme == "channel":
        return {}
    forms = dict(request.checkpoint.quantized_layers)
    if request.quantizes:
        trained = (_trained_on(request, adapter) for adapter in request.adapters.values())
        own = next((form for form in trained if form is not None), None)
        if own is not None:
            # Trained on this base quantised on loading, embedding and head included.
            shapes = linear_shapes(request.checkpoint.config)
            forms = {layer: own for layer, (_, inputs) in shapes.items() if inputs % own[1] == 0}
        else:
            forms = check_groups(request.checkpoint, request.config)
    if request.config.adapters == "fused":
        (adapter,) = request.adapters.values()
        # 4 bits would round the change away: a change of 2 % comes out of them with cosine 0.07 to
        # the wanted one, of 8 bits with 0.97.
        lifted = {layer: (8, forms[layer][1]) for layer in adapter.layers if layer in forms}
        return forms | lifted if request.quantizes else lifted
    return forms if request.quantizes else {}


def _trained_on(request: Request, adapter: Adapter) -> tuple[int, int] | None:
    """(bits, group size) to which an adapter's training quantised the base on loading."""
    return quantized_as(adapter.origin.base_fingerprint or "", request.base.fingerprint)


def _precision(request: Request) -> Precision:
    """How the fused checkpoint is stored on the way: never coarser than training saw it."""
    (adapter,) = request.adapters.values()
    if request.checkpoint.config.quantization is None and _trained_on(request, adapter) is None:
        return "same"
    # One scale for each row is made of plain numbers.
    plain = request.bits == 16 or request.config.scheme == "channel"
    return "float16" if plain else "8bit"


def reference_model(prepared: Prepared, plan: Plan, weight_file: Path) -> Phi3ForCausalLM:
    """MLX with the exported weights: the checkpoint's codes, with the package's scales and offsets.

    MLX stores where a group's zero lies as a number that bfloat16 rounds, the package as a whole
    step; what that changes is told by `against`, so that the comparison of programs need not allow
    for it. Weights quantised row by row have no form in MLX; they are read back from the weight
    file.
    """
    model = build_model(prepared.checkpoint, dtype=_dtype(prepared.checkpoint))
    _take_whole_offsets(model, plan)
    by_rows = [
        weight
        for weight in plan.weights.layers.values()
        if weight.group is not None and weight.layer not in prepared.checkpoint.quantized_layers
    ]
    if by_rows:
        blobs, offsets = BlobFile(weight_file), plan.blobs.offsets
        read_back = []
        for weight in by_rows:
            data, scale, offset = (
                blobs.array(offsets[part.id], part.shape).astype(np.float32)
                for part in (weight.parts[kind] for kind in ("data", "scale", "offset"))
            )
            read_back.append((f"{weight.layer}.weight", mx.array((data - offset) * scale)))
        model.load_weights(read_back, strict=False)
        mx.eval(model.parameters())
    return model


def _take_whole_offsets(model: Phi3ForCausalLM, plan: Plan) -> None:
    whole = {
        name
        for name, weight in plan.weights.layers.items()
        if weight.form in ("integer offset", "no offset")
    }
    for name, layer in model.named_modules():
        if name in whole and "biases" in layer:
            step, low = (layer[part].astype(mx.float32) for part in ("scales", "biases"))
            half = step.astype(mx.float16).astype(mx.float32)
            # Steps below float16's normal range are those of groups that are one value.
            tiny = mx.abs(step) < SMALLEST_NORMAL
            zero = mx.round(-low / mx.where(tiny, 1.0, step))
            dtype = layer.scales.dtype
            layer.scales = mx.where(tiny, step, half).astype(dtype)
            layer.biases = mx.where(tiny, low, -zero * half).astype(dtype)
            mx.eval(layer.scales, layer.biases)


def original_model(request: Request) -> Phi3ForCausalLM:
    """MLX with the weights an adapter was trained on."""
    forms = {_trained_on(request, adapter) for adapter in request.adapters.values()}
    form = forms.pop() if len(forms) == 1 else None
    return build_model(request.checkpoint, dtype=_dtype(request.checkpoint), quantize=form)


def _dtype(checkpoint: Checkpoint) -> str | None:
    """float32, which rounds nothing; what is stored where that would not fit a laptop's memory."""
    widened = parameter_bytes(checkpoint)
    return "float32" if widened <= MEMORY_SHARE * psutil.virtual_memory().total else None


def parameter_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a model in memory that computes in float32; packed codes stay packed."""
    sizes = {"F16": 2, "BF16": 2}
    return sum(t.info.nbytes * sizes.get(t.info.dtype, 1) for t in checkpoint.tensors.values())
