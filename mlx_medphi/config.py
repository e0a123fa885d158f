"""Settings: frozen dataclasses, each default written once, unknown names refused.

Precedence is default, then YAML, then the value given by hand. The resolved object is saved beside
every result.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from mlx_medphi.errors import ConfigError
from mlx_medphi.validation import (
    at_least,
    check_types,
    finite_positive,
    in_range,
    one_of,
    raise_all,
    type_problem,
)

__all__ = [
    "PROJECTIONS",
    "ExportConfig",
    "GenerateConfig",
    "LoRAConfig",
    "TrainConfig",
    "load_config",
    "to_dict",
]

FineTuneType = Literal["lora", "rslora", "dora"]

PROJECTIONS = (
    "self_attn.qkv_proj",
    "self_attn.o_proj",
    "mlp.gate_up_proj",
    "mlp.down_proj",
)
"""The four linear layers of a Phi-3 block, by the names its checkpoint gives them."""

# A LoRA step larger than this has diverged in every published recipe; it is a slip of the keyboard.
MAX_LEARNING_RATE = 1.0
# Above these a run could not end, or its plan not be held in memory.
MAX_ITERS, MAX_EPOCHS, MAX_ROWS = 10_000_000, 10_000, 4096
# Extents of a Core ML program: caches grow by 64, a prefill beyond 512 only costs memory.
BLOCK, MAX_PREFILL, MAX_CONTEXT, MAX_RANK = 64, 512, 131072, 1024
MAX_SEED = 2**63 - 1  # what a random key of MLX is made from


@dataclass(frozen=True)
class LoRAConfig:
    """Which low-rank changes are trained.

    Attributes:
        rank: inner size r of the two factors.
        scale: strength, alpha / rank in PEFT's words. With rsLoRA the layer multiplies by
            scale · sqrt(rank).
        dropout: probability of dropping an input of the first factor, in training only.
        keys: names of the projections inside a block.
        num_layers: how many blocks from the last one upward are adapted; None means all.
        fine_tune_type: "lora", "rslora" (Kalajdzievski 2023) or "dora" (Liu et al. 2024).
    """

    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.05
    keys: tuple[str, ...] = PROJECTIONS
    num_layers: int | None = None
    fine_tune_type: FineTuneType = "lora"

    def __post_init__(self) -> None:
        check_types(self)
        # YAML and notebooks hand over lists.
        object.__setattr__(self, "keys", tuple(self.keys))
        problems = [
            at_least("rank", self.rank, 1),
            finite_positive("scale", self.scale),
            in_range("dropout", self.dropout, 0.0, 0.9),
            None if self.keys else "keys is empty: name at least one projection",
            None if self.num_layers is None else at_least("num_layers", self.num_layers, 1),
            one_of("fine_tune_type", self.fine_tune_type, get_args(FineTuneType)),
        ]
        raise_all(type(self).__name__, problems)

    @property
    def multiplier(self) -> float:
        """What the product of the two factors is multiplied by."""
        return self.scale * math.sqrt(self.rank) if self.fine_tune_type == "rslora" else self.scale


@dataclass(frozen=True)
class TrainConfig:
    """How the changes are trained.

    Attributes:
        iters: number of updates; None means as many as `epochs` need.
        epochs: passes over the training rows when `iters` is None.
        learning_rate: peak of the cosine schedule.
        warmup: share of the updates over which the rate rises from zero.
        final_learning_rate: share of the peak that the cosine ends at.
        weight_decay: decoupled weight decay of AdamW.
        max_grad_norm: global norm to which a gradient is clipped.
        batch_size: packed rows in one micro-batch.
        grad_accumulation_steps: micro-batches in one update.
        max_length: longest row in tokens; longer conversations are shortened, never notes.
        pack: put several short examples into one row.
        eval_every: updates between evaluations; None means ten evaluations in a run.
        patience: evaluations without improvement after which training stops; None means never.
        grad_checkpoint: recompute each block in the backward pass: less memory, more time.
        seed: everything random is a function of this and the update's number.
    """

    iters: int | None = None
    epochs: float = 3.0
    learning_rate: float = 2e-4
    warmup: float = 0.03
    final_learning_rate: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    batch_size: int = 2
    grad_accumulation_steps: int = 1
    max_length: int = 2048
    pack: bool = True
    eval_every: int | None = None
    patience: int | None = None
    grad_checkpoint: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        problems = [
            None if self.iters is None else in_range("iters", self.iters, 1, MAX_ITERS),
            finite_positive("epochs", self.epochs),
            in_range("epochs", self.epochs, 0.0, MAX_EPOCHS),
            finite_positive("learning_rate", self.learning_rate),
            in_range("learning_rate", self.learning_rate, 0.0, MAX_LEARNING_RATE),
            in_range("warmup", self.warmup, 0.0, 1.0),
            in_range("final_learning_rate", self.final_learning_rate, 0.0, 1.0),
            in_range("weight_decay", self.weight_decay, 0.0, 1.0),
            finite_positive("max_grad_norm", self.max_grad_norm),
            in_range("batch_size", self.batch_size, 1, MAX_ROWS),
            in_range("grad_accumulation_steps", self.grad_accumulation_steps, 1, MAX_ROWS),
            at_least("max_length", self.max_length, 16),
            None if self.eval_every is None else at_least("eval_every", self.eval_every, 1),
            None if self.patience is None else at_least("patience", self.patience, 1),
            in_range("seed", self.seed, 0, MAX_SEED),
        ]
        raise_all(type(self).__name__, problems)


@dataclass(frozen=True)
class GenerateConfig:
    """How a note is written.

    Attributes:
        max_tokens: longest note in tokens.
        temperature: 0 takes the most likely token each time (greedy).
        top_p: keep the smallest set of tokens that holds this probability; 1 keeps all.
        min_p: drop tokens less likely than this share of the most likely one; 0 keeps all.
        repetition_penalty: divide the logits of recent tokens by this; 1 changes nothing.
        seed: start of the random numbers when temperature is above 0.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        problems = [
            at_least("max_tokens", self.max_tokens, 1),
            in_range("temperature", self.temperature, 0.0, 10.0),
            in_range("top_p", self.top_p, 1e-6, 1.0),
            in_range("min_p", self.min_p, 0.0, 1.0),
            in_range("repetition_penalty", self.repetition_penalty, 1.0, 10.0),
            in_range("seed", self.seed, 0, MAX_SEED),
        ]
        raise_all(type(self).__name__, problems)


@dataclass(frozen=True)
class ExportConfig:
    """What the Core ML package is made of.

    Attributes:
        bits: bits of the projections: 16, 8 or 4; None means a quantised base's own, 4 for a plain
            one.
        group_size: weights that share a scale, where a plain base is quantised.
        scheme: "block": one scale per group, for the GPU; "channel": one per row, for the Neural
            Engine.
        embedding_bits: bits of the embedding, 8 or 16; `bits` 16 makes it 16.
        head_bits: bits of the output head, 8 or 16; at 8 a quantised head keeps its own.
        context: tokens that the key/value cache holds, a multiple of 64; None means 2048, or all
            the model has.
        prefill: tokens that one call of the prefill function reads.
        adapters: "slots": filled at run time; "functions": one pair of functions for each;
            "fused": one adapter folded into the weights; "none": the base alone.
        slot_rank: rank of the slots; None means the smallest of 8, 16, 32, 64 … that holds every
            adapter given, 16 without one.
        slot_kind: "state": slots are states of the model; "input": inputs of every call.
        attention: "fused": one operation; "decomposed": its steps, with the softmax in float32.
        residual: dtype of the sum that runs through all blocks; "float32" where its numbers come
            near float16's end, which a verification with its layers shows.
        compute_units: what an app is advised to run on.
        author: who made the model, for its metadata.
        licence: terms of the weights, for its metadata; empty takes those the base names.
    """

    bits: Literal[4, 8, 16] | None = None
    group_size: Literal[32, 64, 128] = 64
    scheme: Literal["block", "channel"] = "block"
    embedding_bits: Literal[8, 16] = 8
    head_bits: Literal[8, 16] = 8
    context: int | None = None
    prefill: int = 64
    adapters: Literal["slots", "functions", "fused", "none"] = "slots"
    slot_rank: int | None = None
    slot_kind: Literal["state", "input"] = "state"
    attention: Literal["fused", "decomposed"] = "fused"
    residual: Literal["float16", "float32"] = "float16"
    compute_units: Literal["cpu_and_gpu", "cpu_and_neural_engine", "cpu_only", "all"] = (
        "cpu_and_gpu"
    )
    author: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        context = self.context if self.context is not None else BLOCK
        problems = [
            in_range("prefill", self.prefill, 2, MAX_PREFILL),
            in_range("context", context, BLOCK, MAX_CONTEXT),
            None if context % BLOCK == 0 else f"context is {context}, expected a multiple of 64",
            None
            if context >= self.prefill
            else f"prefill is {self.prefill}, more than the context of {context} tokens",
            in_range("slot_rank", 1 if self.slot_rank is None else self.slot_rank, 1, MAX_RANK),
        ]
        raise_all(type(self).__name__, problems)


AnyConfig = LoRAConfig | TrainConfig | GenerateConfig | ExportConfig
Config = TypeVar("Config", LoRAConfig, TrainConfig, GenerateConfig, ExportConfig)


def to_dict(config: AnyConfig) -> dict[str, Any]:
    """The settings as plain JSON values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def updated(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """A copy with `values` put in; unknown names and wrong types are reported together.

    Raises:
        ConfigError: names `where`, every unknown key with the nearest known one, every wrong type.
    """
    known = {field.name for field in fields(config)}
    hints = get_type_hints(type(config))
    problems: list[str | None] = []
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = (
                f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
            )
            problems.append(f"unknown key {key!r}{hint}")
        else:
            problems.append(type_problem(key, value, hints[key]))
    raise_all(where, problems)
    try:
        return replace(config, **values)
    except ConfigError as exc:
        raise ConfigError(
            f"{where}: {str(exc).removeprefix(f'{type(config).__name__}: ')}"
        ) from exc


def load_config(path: Path) -> tuple[LoRAConfig, TrainConfig]:
    """Read a YAML file with the optional sections `lora` and `train`.

    Raises:
        ConfigError: missing or malformed file, unknown section or key, wrong type or value.
    """
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:  # bad dates, huge numbers, depth
        mark = getattr(exc, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML in UTF-8") from exc
    loaded = {} if loaded is None else loaded
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{path}: expected the sections 'lora' and 'train', found {type(loaded).__name__}"
        )
    unknown = sorted(str(key) for key in loaded if key not in ("lora", "train"))
    if unknown:
        raise ConfigError(f"{path}: unknown section {unknown[0]!r}; known: lora, train")
    sections = {name: loaded.get(name) or {} for name in ("lora", "train")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: section {name!r} must map names to values")
    return (
        updated(LoRAConfig(), sections["lora"], f"{path}, section lora"),
        updated(TrainConfig(), sections["train"], f"{path}, section train"),
    )
