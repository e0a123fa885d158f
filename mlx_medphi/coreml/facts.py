"""What an export knows, in the words of the manifest and of the package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from mlx_medphi import __version__
from mlx_medphi.coreml.bundle_facts import FunctionFacts
from mlx_medphi.coreml.manifest import DECODE, PREFILL, AdapterEntry, Verification
from mlx_medphi.coreml.manifest_program import Quantization, Stored
from mlx_medphi.coreml.package import PackageText
from mlx_medphi.coreml.parity import CaseResult
from mlx_medphi.coreml.program import Feature, Plan
from mlx_medphi.coreml.request import Request
from mlx_medphi.coreml.slot_file import pack_path
from mlx_medphi.coreml.slots import function_name
from mlx_medphi.coreml.sources import Prepared
from mlx_medphi.coreml.verify import ParityReport
from mlx_medphi.coreml.weights import EMBEDDING, HEAD, Weight, Weights
from mlx_medphi.files import sha256_file

__all__ = [
    "ADAPTER_FOLDER",
    "adapter_entries",
    "function_facts",
    "package_text",
    "quantization_facts",
    "verification_facts",
]

ADAPTER_FOLDER = "adapters"
NOTICE = (
    "Writes drafts of medical notes. Not a medical device: a note must be read and corrected by a "
    "clinician."
)
OFFSETS: Mapping[str, Literal["integer", "float16", "none"]] = {
    "integer offset": "integer",
    "float16 offset": "float16",
    "no offset": "none",
    "float16": "none",
}


def package_text(request: Request, weights: Weights) -> PackageText:
    """What the package says about itself in Xcode."""
    licence = request.config.licence or request.base.licence.id or ""
    bits = _usual_bits(weights)
    return PackageText(
        description=f"Phi-3 ({request.base.name}), {bits} bits, context "
        f"{request.context} tokens. {NOTICE}",
        author=request.config.author,
        licence=licence,
        version=__version__,
        facts={
            "mlx_medphi.version": __version__,
            "mlx_medphi.base": request.base.name,
            "mlx_medphi.base_fingerprint": request.base.fingerprint,
            "mlx_medphi.bits": str(bits),
            "mlx_medphi.adapters": request.config.adapters,
        },
    )


def function_facts(plan: Plan) -> dict[str, FunctionFacts]:
    """Inputs, outputs and states of every function."""

    def named(features: Mapping[str, Feature]) -> list[dict[str, Any]]:
        return [
            {"name": name, "shape": list(shape), "dtype": dtype}
            for name, (shape, dtype) in features.items()
        ]

    return {
        function: {
            "inputs": named(plan.inputs(width)),
            "outputs": named(plan.outputs),
            "states": named(plan.states),
        }
        for function, (width, _) in plan.functions.items()
    }


def quantization_facts(weights: Weights, request: Request, prepared: Prepared) -> Quantization:
    """How the weights are stored."""
    layers = weights.layers
    matrices = [w for w in layers.values() if len(w.shape) == 2]
    coded = [w for w in _projections(weights) if w.group is not None]
    usual = Counter(OFFSETS[w.form] for w in coded).most_common(1)
    source: Literal["mlx", "exported", "none"] = "none"
    if any(w.group is not None for w in matrices):
        source = "exported" if prepared.made else "mlx"
    return Quantization(
        source=source,
        scheme=request.config.scheme,
        bits=_usual_bits(weights),
        group=coded[0].group if coded and request.config.scheme == "block" else None,
        offset=usual[0][0] if usual else "none",
        embedding=_stored(layers[EMBEDDING]),
        head=_stored(layers.get(HEAD, layers[EMBEDDING])),
        exceptions=weights.exceptions,
        error=weights.worst_error,
        errors={w.layer: w.error for w in matrices if w.error is not None},
        subnormal_scales=weights.subnormal_scales,
    )


def _projections(weights: Weights) -> list[Weight]:
    layers = weights.layers.values()
    return [w for w in layers if len(w.shape) == 2 and w.layer not in (EMBEDDING, HEAD)]


def _usual_bits(weights: Weights) -> int:
    """Bits of the projections as they are stored; where they differ, those that most of them have,
    and never 16 where one is in codes."""
    stored = _projections(weights)
    usual = Counter(w.bits for w in stored if w.group is not None).most_common(1)
    return usual[0][0] if usual else 16


def _stored(weight: Weight) -> Stored:
    return Stored(weight.bits, weight.group)


def adapter_entries(request: Request, directory: Path) -> tuple[AdapterEntry, ...]:
    """The adapters of a bundle whose packs lie in `directory`."""
    entries = []
    for name, adapter in request.adapters.items():
        path = pack_path(directory / ADAPTER_FOLDER, name)
        there = path.is_file()
        functions = {}
        if request.config.adapters == "functions":
            functions = {role: function_name(role, name) for role in (PREFILL, DECODE)}
        entries.append(
            AdapterEntry(
                name=name,
                path=path.relative_to(directory).as_posix() if there else None,
                sha256=sha256_file(path) if there else None,
                rank=adapter.scaling.rank,
                functions=functions,
                training=dict(adapter.origin.training),
            )
        )
    return tuple(entries)


def verification_facts(report: ParityReport, fidelity: tuple[CaseResult, ...]) -> Verification:
    """The levels that were reached; seconds are left out, as they would change the bytes.

    Args:
        report: of the verification.
        fidelity: the exported weights against those the adapters were trained on.
    """
    graph = None
    if report.graph is not None:
        graph = {**_plain(report.graph), "fidelity": [_plain(case) for case in fidelity]}
    return Verification(
        level=report.level,
        spec=report.spec.to_dict(),
        graph=graph,
        predict=None if report.predict is None else _plain(report.predict),
    )


def _plain(value: Any) -> dict[str, Any]:
    return dict(asdict(value))
