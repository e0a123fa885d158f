"""Phi-3's shape: every form of config.json that Phi-3 was published with, read into one object.

Old files put `rope_theta`, `partial_rotary_factor` and `rope_scaling` at the top level; newer ones
(transformers 5) hold all of it in `rope_parameters`. What is not understood is an error: a guess
would be a different model. Written is the old form, which every Phi-3 loader reads.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from mlx_medphi.errors import CheckpointError

__all__ = ["MAX_LAYERS", "LongRoPE", "Phi3Config", "Quantization"]

# `su` and `yarn` are the names the first 128k checkpoints used for what is now called longrope.
LONGROPE_NAMES = ("longrope", "su", "yarn")
PLAIN_NAMES = ("default",)
ORIGINAL = "original_max_position_embeddings"

MAX_LAYERS = 10_000
"""Blocks that no Phi-3 has; lists of all blocks are made from numbers that a file gives."""
# Extents beyond this are no arrays of MLX.
MAX_WHOLE = 2**31 - 1

# MLX's affine formats.
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class LongRoPE:
    """The two sets of rotary divisors and the length at which the second takes over."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float


@dataclass(frozen=True)
class Quantization:
    """MLX's affine quantisation: bits and group for all layers but the exceptions in `layers`.

    An exception of None means: left unquantised.
    """

    bits: int
    group_size: int
    layers: Mapping[str, tuple[int, int] | None] = field(default_factory=dict)

    def of(self, layer: str) -> tuple[int, int] | None:
        """(bits, group size) of one layer, or None where it is not quantised."""
        return self.layers.get(layer, (self.bits, self.group_size))

    def to_mlx(self) -> dict[str, Any]:
        """The section as mlx-lm writes it into config.json."""
        section: dict[str, Any] = {
            "group_size": self.group_size,
            "bits": self.bits,
            "mode": "affine",
        }
        for name, exception in sorted(self.layers.items()):
            section[name] = (
                {"bits": exception[0], "group_size": exception[1]} if exception else False
            )
        return section


@dataclass(frozen=True)
class Phi3Config:
    """The architecture of one Phi-3 checkpoint."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rotary_dim: int
    longrope: LongRoPE | None
    sliding_window: int | None
    tie_word_embeddings: bool
    quantization: Quantization | None = None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> Phi3Config:
        """Read the parsed `config.json`.

        Raises:
            CheckpointError: not Phi-3, a missing or impossible value, or an unknown rope scaling.
        """
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{where}: expected a JSON object, found {type(raw).__name__}")
        if raw.get("model_type") != "phi3":
            raise CheckpointError(
                f"{where}: model_type is {raw.get('model_type')!r}, expected 'phi3'; "
                "only Phi-3 models can be used"
            )
        read = _Reader(raw, where)
        if raw.get("hidden_act", "silu") != "silu" or raw.get("attention_bias", False):
            raise CheckpointError(
                f"{where}: hidden_act must be 'silu' and attention_bias false for Phi-3"
            )
        hidden, heads = read.whole("hidden_size"), read.whole("num_attention_heads")
        kv_heads = read.whole("num_key_value_heads", heads)
        if heads % kv_heads or (raw.get("head_dim") is None and hidden % heads):
            raise CheckpointError(
                f"{where}: {heads} heads do not fit hidden_size {hidden} "
                f"or num_key_value_heads {kv_heads}"
            )
        head_dim = read.whole("head_dim", hidden // heads)
        positions = read.whole("max_position_embeddings")
        rope = _rope_section(raw, where)
        # Twice is as impossible as 1e308 times, and a whole number.
        rotary_dim = int(head_dim * min(float(rope["partial_rotary_factor"]), 2.0))
        if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
            raise CheckpointError(
                f"{where}: {rotary_dim} rotary dimensions of {head_dim} are not possible"
            )
        window = raw.get("sliding_window")
        return cls(
            vocab_size=read.whole("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.whole("intermediate_size"),
            num_hidden_layers=read.whole("num_hidden_layers", most=MAX_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=read.number("rms_norm_eps", 1e-5),
            max_position_embeddings=positions,
            rope_theta=float(rope["rope_theta"]),
            rotary_dim=rotary_dim,
            longrope=_longrope(raw, rope, rotary_dim, positions, where),
            sliding_window=None if window is None else read.whole("sliding_window"),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            quantization=_quantization(raw, where),
        )

    def to_hf(self) -> dict[str, Any]:
        """The architecture in the old form of config.json; `from_hf` reads the same object back."""
        section: dict[str, Any] = {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "hidden_act": "silu",
            "attention_bias": False,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            ORIGINAL: self.switch_length or self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": _partial_rotary_factor(self.rotary_dim, self.head_dim),
            "rope_scaling": None if self.longrope is None else self._rope_scaling(self.longrope),
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            section["head_dim"] = self.head_dim
        if self.quantization is not None:
            # mlx-lm reads the first name, the hub's pages the second.
            section["quantization"] = section["quantization_config"] = self.quantization.to_mlx()
        return section

    def _rope_scaling(self, longrope: LongRoPE) -> dict[str, Any]:
        scaling: dict[str, Any] = {
            "type": "longrope",
            "short_factor": list(longrope.short_factor),
            "long_factor": list(longrope.long_factor),
        }
        original = longrope.original_max_position_embeddings
        usual = _attention_factor(self.max_position_embeddings / original, original)
        if longrope.attention_factor != usual:
            scaling["attention_factor"] = longrope.attention_factor
        return scaling

    @property
    def switch_length(self) -> int | None:
        """Tokens beyond which LongRoPE's long factors apply; None without LongRoPE."""
        return self.longrope.original_max_position_embeddings if self.longrope else None

    def uses_long_factors(self, length: int) -> bool:
        """Whether a sequence of `length` tokens is rotated with the long factors."""
        return self.switch_length is not None and length > self.switch_length


class _Reader:
    """Typed access to config values, with the file named in each complaint."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def whole(self, name: str, default: int | None = None, most: int = MAX_WHOLE) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise CheckpointError(
                f"{self.where}: {name} is {value!r:.40}, expected a positive whole number up to "
                f"{most}"
            )
        return value

    def number(self, name: str, default: float) -> float:
        value = self.raw.get(name)
        value = default if value is None else value
        if not _is_positive(value):
            raise CheckpointError(
                f"{self.where}: {name} is {value!r:.40}, expected a positive number"
            )
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; absent and null are false."""
        value = self.raw.get(name)
        if not isinstance(value, (bool, type(None))):
            raise CheckpointError(f"{self.where}: {name} is {value!r:.40}, expected true or false")
        return bool(value)


def _is_positive(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number above 0 that fits a float; JSON's Infinity does not."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return 0 < value <= sys.float_info.max


def _rope_section(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Both forms as one: rope_theta, partial_rotary_factor, type and, for longrope, the factors."""
    # Where a file holds both forms, transformers takes the old one (configuration_phi3.py).
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters")
    if scaling is not None and not isinstance(scaling, Mapping):
        raise CheckpointError(
            f"{where}: rope settings must be an object, found {type(scaling).__name__}"
        )
    section = dict(scaling or {})
    kind = section.get("rope_type", section.get("type", "default"))
    if kind not in PLAIN_NAMES + LONGROPE_NAMES:
        raise CheckpointError(
            f"{where}: rope scaling {kind!r} is unknown; "
            f"Phi-3 has {', '.join(PLAIN_NAMES + LONGROPE_NAMES)}"
        )
    section["type"] = "longrope" if kind in LONGROPE_NAMES else "default"
    for name, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 1.0)):
        values = section if section.get(name) is not None else raw
        section[name] = _Reader(values, where).number(name, default)
    return section


def _longrope(
    raw: Mapping[str, Any], rope: Mapping[str, Any], rotary_dim: int, positions: int, where: str
) -> LongRoPE | None:
    if rope["type"] != "longrope":
        return None
    factors: dict[str, tuple[float, ...]] = {}
    for name in ("short_factor", "long_factor"):
        value = rope.get(name)
        good = isinstance(value, list) and all(map(_is_positive, value))
        if not good or len(value or ()) != rotary_dim // 2:
            found = f"{len(value)} values" if isinstance(value, list) else repr(value)
            raise CheckpointError(
                f"{where}: {name} holds {found}, expected {rotary_dim // 2} positive numbers"
            )
        factors[name] = tuple(float(v) for v in value or ())
    # transformers prefers the top-level value (modeling_rope_utils, longrope).
    original = raw.get(ORIGINAL) or rope.get(ORIGINAL)
    if not isinstance(original, int) or not 2 <= original <= MAX_WHOLE:
        raise CheckpointError(
            f"{where}: {ORIGINAL} is {original!r:.40}, longrope needs a whole number above 1"
        )
    read = _Reader(rope, where)
    stretch = read.number("factor", positions / original)
    attention = read.number("attention_factor", _attention_factor(stretch, original))
    return LongRoPE(factors["short_factor"], factors["long_factor"], original, attention)


def _attention_factor(stretch: float, original: int) -> float:
    # LongRoPE (Ding et al. 2024), section 3, as transformers computes it.
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def _partial_rotary_factor(rotary_dim: int, head_dim: int) -> float:
    """The factor from which `int(head_dim * factor)` gives `rotary_dim` back."""
    factor = rotary_dim / head_dim
    return factor if int(head_dim * factor) == rotary_dim else math.nextafter(factor, 1.0)


def _quantization(raw: Mapping[str, Any], where: str) -> Quantization | None:
    section = raw.get("quantization")
    if section is None:
        if raw.get("quantization_config") is not None:
            raise CheckpointError(
                f"{where}: quantised in a form MLX does not write (quantization_config without "
                "quantization); use the unquantised model or an MLX one"
            )
        return None
    if not isinstance(section, Mapping):
        raise CheckpointError(
            f"{where}: quantization must be an object, found {type(section).__name__}"
        )
    layers: dict[str, tuple[int, int] | None] = {}
    for name, value in section.items():
        if isinstance(value, Mapping):
            layers[name] = _bits_and_group(value, f"{where}: quantization of {name}")
        elif value is False:
            layers[name] = None
    bits, group = _bits_and_group(section, f"{where}: quantization")
    return Quantization(bits, group, layers)


def _bits_and_group(section: Mapping[str, Any], where: str) -> tuple[int, int]:
    if section.get("mode", "affine") != "affine":
        raise CheckpointError(f"{where}: mode {section['mode']!r} is unknown, expected 'affine'")
    bits, group = section.get("bits"), section.get("group_size")
    if bits not in BITS or group not in GROUPS:
        raise CheckpointError(
            f"{where}: bits {bits!r} and group_size {group!r} are not an MLX affine format"
        )
    return int(bits), int(group)
