"""Settings: frozen dataclasses, each default written once, unknown names refused.

Precedence is default, then YAML, then the value given by hand. The resolved object is saved beside
every result.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from mlx_medphi.errors import ConfigError

__all__ = ["PROJECTIONS", "GenerateConfig", "LoRAConfig", "TrainConfig", "load_config", "to_dict"]

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
        _check_types(self)
        # YAML and notebooks hand over lists.
        object.__setattr__(self, "keys", tuple(self.keys))
        problems = [
            _at_least("rank", self.rank, 1),
            _finite_positive("scale", self.scale),
            _in_range("dropout", self.dropout, 0.0, 0.9),
            None if self.keys else "keys is empty: name at least one projection",
            None if self.num_layers is None else _at_least("num_layers", self.num_layers, 1),
            _one_of("fine_tune_type", self.fine_tune_type, get_args(FineTuneType)),
        ]
        _raise_all(type(self).__name__, problems)

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
        _check_types(self)
        problems = [
            None if self.iters is None else _in_range("iters", self.iters, 1, MAX_ITERS),
            _finite_positive("epochs", self.epochs),
            _in_range("epochs", self.epochs, 0.0, MAX_EPOCHS),
            _finite_positive("learning_rate", self.learning_rate),
            _in_range("learning_rate", self.learning_rate, 0.0, MAX_LEARNING_RATE),
            _in_range("warmup", self.warmup, 0.0, 1.0),
            _in_range("final_learning_rate", self.final_learning_rate, 0.0, 1.0),
            _in_range("weight_decay", self.weight_decay, 0.0, 1.0),
            _finite_positive("max_grad_norm", self.max_grad_norm),
            _in_range("batch_size", self.batch_size, 1, MAX_ROWS),
            _in_range("grad_accumulation_steps", self.grad_accumulation_steps, 1, MAX_ROWS),
            _at_least("max_length", self.max_length, 16),
            None if self.eval_every is None else _at_least("eval_every", self.eval_every, 1),
            None if self.patience is None else _at_least("patience", self.patience, 1),
            _in_range("seed", self.seed, 0, MAX_SEED),
        ]
        _raise_all(type(self).__name__, problems)


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
        _check_types(self)
        problems = [
            _at_least("max_tokens", self.max_tokens, 1),
            _in_range("temperature", self.temperature, 0.0, 10.0),
            _in_range("top_p", self.top_p, 1e-6, 1.0),
            _in_range("min_p", self.min_p, 0.0, 1.0),
            _in_range("repetition_penalty", self.repetition_penalty, 1.0, 10.0),
            _in_range("seed", self.seed, 0, MAX_SEED),
        ]
        _raise_all(type(self).__name__, problems)


Config = TypeVar("Config", LoRAConfig, TrainConfig, GenerateConfig)


def to_dict(config: LoRAConfig | TrainConfig | GenerateConfig) -> dict[str, Any]:
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
            problems.append(_type_problem(key, value, hints[key]))
    _raise_all(where, problems)
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


def _check_types(config: LoRAConfig | TrainConfig | GenerateConfig) -> None:
    hints = get_type_hints(type(config))
    names = [field.name for field in fields(config)]
    problems = [_type_problem(name, getattr(config, name), hints[name]) for name in names]
    _raise_all(type(config).__name__, problems)
    for name in names:
        value = getattr(config, name)
        # A sweep hands over numpy's numbers; run.json and repr want Python's.
        if type(value) is not bool and isinstance(value, Integral):
            object.__setattr__(config, name, int(value))
        elif type(value) is not bool and isinstance(value, Real):
            object.__setattr__(config, name, float(value))


def _type_problem(name: str, value: Any, hint: Any) -> str | None:
    if _fits(value, hint):
        return None
    problem = f"{name} is {value!r}, expected {_words(hint)}"
    if isinstance(value, str) and _fits(0.5, hint):
        with suppress(ValueError):
            # YAML 1.1 takes 2e-4 for text; with a point it is a number.
            problem = f"{problem}; write {float(value):.12f}".rstrip("0")
    return problem


def _fits(value: Any, hint: Any) -> bool:
    options = get_args(hint) if get_origin(hint) not in (tuple, Literal) else ()
    if options:  # a union
        return any(_fits(value, option) for option in options)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return "a list of names"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
        str: "text",
    }
    options = get_args(hint) or (hint,)
    return " or ".join(names.get(option, str(option)) for option in options)


def _at_least(name: str, value: int, low: int) -> str | None:
    return None if value >= low else f"{name} is {value}, expected at least {low}"


def _finite_positive(name: str, value: float) -> str | None:
    good = 0 < value < math.inf
    return None if good else f"{name} is {value}, expected a positive number"


def _in_range(name: str, value: float, low: float, high: float) -> str | None:
    return (
        None
        if low <= value <= high
        else f"{name} is {value}, expected between {low:g} and {high:g}"
    )


def _one_of(name: str, value: str, options: tuple[str, ...]) -> str | None:
    return (
        None if value in options else f"{name} is {value!r}, expected one of {', '.join(options)}"
    )


def _raise_all(where: str, problems: list[str | None]) -> None:
    found = list(dict.fromkeys(problem for problem in problems if problem))
    if found:
        raise ConfigError(f"{where}: " + "; ".join(found))
