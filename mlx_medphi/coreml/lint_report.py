"""What a package must be, and what was found when it was checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlx_medphi.coreml.manifest import DECODE, METADATA, PACKAGE, PREFILL, Manifest
from mlx_medphi.coreml.manifest_program import CoreML, Model
from mlx_medphi.coreml.package import WEIGHT_FILE
from mlx_medphi.errors import BundleError

__all__ = ["Expected", "FunctionCounts", "SpecReport"]


@dataclass(frozen=True)
class Expected:
    """What a package must be.

    Attributes:
        coreml: functions and extents, as the manifest says.
        model: the architecture.
        pairs: (prefill, decode) function names over the same weights; the base's pair first.
        attention: whether it is one operation or its steps.
        residual: dtype of the sum that runs through all layers.
        slot_rank: rank of the adapter slots; None without slots.
        slot_kind: "state" or "input"; None without slots.
        quantized: the least and the largest number of weights stored as codes.
        weight_bytes: of the weight file.
        exact: whether these are its bytes, not a plan's.
    """

    coreml: CoreML
    model: Model
    pairs: tuple[tuple[str, str], ...]
    attention: Literal["fused", "decomposed"]
    residual: Literal["float16", "float32"]
    slot_rank: int | None
    slot_kind: Literal["state", "input"] | None
    quantized: tuple[int, int]
    weight_bytes: int
    exact: bool

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> Expected:
        """What a bundle's metadata.json says of its package.

        Raises:
            BundleError: it does not say all of that.
        """
        facts = manifest.medphi
        built_in = [entry.functions for entry in facts.adapters.list if entry.functions]
        if any(names.keys() != {PREFILL, DECODE} for names in built_in):
            raise BundleError(
                f"{METADATA}: an adapter has other functions than {PREFILL} and {DECODE}; "
                "export again"
            )
        stored, layers = facts.quantization, facts.model.layers
        coded = [
            stored.embedding.bits < 16,
            stored.head.bits < 16 and not facts.model.tied_embeddings,
        ]
        # One layer or another of a quantised checkpoint may have stayed in float16.
        most = sum(coded) + (4 * layers if stored.bits < 16 else 0)
        listed = [f.bytes for f in facts.files if f.path == f"{PACKAGE}/{WEIGHT_FILE}"]
        return cls(
            coreml=facts.coreml,
            model=facts.model,
            pairs=((PREFILL, DECODE), *((names[PREFILL], names[DECODE]) for names in built_in)),
            attention=_setting(manifest, "attention", ("fused", "decomposed")),
            residual=_setting(manifest, "residual", ("float16", "float32")),
            slot_rank=facts.adapters.rank_slot,
            slot_kind=facts.adapters.slot_kind,
            quantized=(min(most, 1), most),
            weight_bytes=listed[0] if listed else facts.memory.weights,
            exact=bool(listed),
        )


def _setting(manifest: Manifest, name: str, choices: tuple[str, ...]) -> Any:
    value = manifest.medphi.export.get(name)
    if value not in choices:
        raise BundleError(
            f"{METADATA}: medphi.export.{name} is {str(value)[:40]!r}, expected "
            f"{' or '.join(choices)}; export again"
        )
    return value


@dataclass(frozen=True)
class FunctionCounts:
    """What one function consists of.

    Attributes:
        operations: type -> how many.
        norms: norms whose sum of squares is float32.
        softmaxes: softmaxes between casts to float32 and back.
    """

    operations: Mapping[str, int]
    norms: int
    softmaxes: int


@dataclass(frozen=True)
class SpecReport:
    """What was found.

    Attributes:
        functions: name -> what it consists of.
        constants: constants of the weight file.
        shared: of these, how many more than one function uses.
        quantized: weights stored as codes.
        weight_bytes: of the weight file.
        findings: what is wrong, a line each; the last says how many more there are.
    """

    functions: Mapping[str, FunctionCounts]
    constants: int
    shared: int
    quantized: int
    weight_bytes: int
    findings: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "findings": list(self.findings), "passed": self.passed}
