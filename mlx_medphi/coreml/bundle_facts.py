"""What an export knows about its bundle, gathered before anything of it is described."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.bundle_base import UNKNOWN_TERMS, Base
from mlx_medphi.coreml.manifest import AdapterEntry, Verification
from mlx_medphi.coreml.manifest_program import Memory, Quantization
from mlx_medphi.errors import ExportError
from mlx_medphi.model.config import Phi3Config

if TYPE_CHECKING:
    from mlx_medphi.text.tokenizer import Tokenizer

__all__ = ["NO_DATE", "BundleFacts", "FunctionFacts", "source_date", "terms"]

NO_DATE = "1970-01-01T00:00:00Z"
"""The date of a bundle made without SOURCE_DATE_EPOCH: none, so that the bytes repeat."""

FunctionFacts = Mapping[str, Sequence[Mapping[str, Any]]]
"""{"inputs": [{"name", "shape", "dtype"}, …], "outputs": […], "states": […]} of one function."""


@dataclass(frozen=True)
class BundleFacts:
    """What an export knows about its bundle.

    Attributes:
        name: the bundle's name without `.medphi`.
        config: the architecture.
        export: the settings.
        context: slots of the key/value cache.
        base: the model that was exported.
        tokenizer: its tokenizer.
        functions: function name -> its inputs, outputs and states.
        quantization: how the weights are stored.
        memory: bytes, by part.
        adapters: those in the bundle.
        slot_rank: rank of the slots; None without slots.
        cost: the cost sheet.
        verification: how far it was verified.
        tried: compute units that the package has run on.
        date: see `source_date`.
        commit: of the exporter's own source, where that is known.
    """

    name: str
    config: Phi3Config
    export: ExportConfig
    context: int
    base: Base
    tokenizer: Tokenizer
    functions: Mapping[str, FunctionFacts]
    quantization: Quantization
    memory: Memory
    adapters: tuple[AdapterEntry, ...] = ()
    slot_rank: int | None = None
    cost: Mapping[str, Any] = field(default_factory=dict)
    verification: Verification = Verification()
    tried: tuple[str, ...] = ()
    date: str = NO_DATE
    commit: str | None = None


def source_date(environ: Mapping[str, str] = os.environ) -> str:
    """The date that a bundle carries: SOURCE_DATE_EPOCH's, or `NO_DATE`.

    Raises:
        ExportError: the variable is no number of seconds.
    """
    seconds = environ.get("SOURCE_DATE_EPOCH")
    if not seconds:
        return NO_DATE
    try:
        moment = datetime.fromtimestamp(int(seconds), timezone.utc)
    except (ValueError, OverflowError, OSError) as exc:
        raise ExportError(
            f"SOURCE_DATE_EPOCH is {seconds[:40]!r}, expected a whole number of seconds since "
            "1970; set it so or unset it"
        ) from exc
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def terms(facts: BundleFacts) -> str:
    """The licence of the weights in one line: the settings' word, else the base's, else unknown."""
    return facts.export.licence or facts.base.licence.id or UNKNOWN_TERMS
