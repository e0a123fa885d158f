"""metadata.json of a bundle: the package, its architecture and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "ComputeUnits",
    "CoreML",
    "Memory",
    "Model",
    "Quantization",
    "Rope",
    "Signature",
    "Stored",
    "Tensor",
]


@dataclass(frozen=True)
class Tensor:
    """An input, output or state of a function."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["int32", "float16", "float32"]


@dataclass(frozen=True)
class Signature:
    """What one function takes, gives and keeps."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    states: tuple[Tensor, ...]


@dataclass(frozen=True)
class ComputeUnits:
    """Which to ask Core ML for, and on which the package has run so far."""

    recommended: Literal["cpu_and_gpu", "cpu_and_neural_engine", "cpu_only", "all"]
    tried: tuple[str, ...]


@dataclass(frozen=True)
class CoreML:
    """How the package is called. `min_os` maps a system ("ios", "macos") to its version."""

    functions: Mapping[str, Signature]
    default_function: str
    context_length: int
    prefill_width: int
    mask_value: float
    compute_units: ComputeUnits
    min_os: Mapping[str, str]


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    LongRoPE takes its short factors up to `switch_length` tokens, beyond it the long ones for all
    of the sequence. A package whose context ends before has the "short" set only; one that reaches
    further has "both", chosen by the input `ropeRow`.
    """

    type: Literal["default", "longrope"]
    theta: float
    factors: Literal["none", "short", "both"]
    attention_factor: float
    rotary_dim: int
    switch_length: int | None


@dataclass(frozen=True)
class Model:
    """The architecture."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    max_position_embeddings: int
    sliding_window: int | None
    tied_embeddings: bool
    rope: Rope


@dataclass(frozen=True)
class Stored:
    """How one matrix is stored: bits per weight, and inputs per scale (None for float16)."""

    bits: int
    group: int | None


@dataclass(frozen=True)
class Quantization:
    """How the weights are stored.

    Attributes:
        source: "mlx": the base's own codes; "exported": quantised on the way; "none": float16.
        scheme: "block" (a scale per group) or "channel" (one per row).
        bits: of the projections.
        group: their inputs per scale; None for float16.
        offset: what most layers subtract: "integer", "float16" or "none".
        embedding: the embedding.
        head: the output head; the embedding's where the two are tied.
        exceptions: layer -> form of those that could not be stored as most are.
        error: the largest difference from the values that MLX computes with, as a share of the
            largest value of its group; None where nothing is quantised.
        subnormal_scales: scales too small for a normal float16.
        errors: layer -> the same as `error` for it alone.
    """

    source: Literal["mlx", "exported", "none"]
    scheme: Literal["block", "channel"]
    bits: int
    group: int | None
    offset: Literal["integer", "float16", "none"]
    embedding: Stored
    head: Stored
    exceptions: Mapping[str, str]
    error: float | None
    subnormal_scales: int
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Bytes: weights, keys and values per token and at the context, slots, and all of it resident
    as predicted."""

    weights: int
    kv_per_token: int
    kv: int
    adapter_slots: int
    resident: int
