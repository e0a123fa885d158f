"""PEFT's adapter form: read with all its patterns, and written so that PEFT gives the same logits.

PEFT stores A as (r, in) and B as (out, r), scales by alpha / r or, with rsLoRA, alpha / sqrt(r),
and lets every module have its own r and alpha. Here all layers get one rank, by zeros, and one
scale, by a factor in B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_medphi.config import PROJECTIONS
from mlx_medphi.errors import AdapterError
from mlx_medphi.model.adapter_formats import (
    CONFIG_NAME,
    LAYER_NUMBER,
    PEFT_NAME,
    Adapter,
    LowRank,
    Origin,
    Scaling,
    assemble,
    base_label,
    check_scaling,
    differences,
    is_number,
    layer_index,
    load_tensors,
    uneven_layers,
    unknown_names,
)
from mlx_medphi.model.unfused import SEPARATE, merge_parts, padded

__all__ = ["peft_config", "peft_tensors", "read_peft"]

PREFIX = "base_model.model."
# PEFT's last part of a name -> ours; some versions end the magnitude with ".weight".
PARTS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector.weight": "m",
    "lora_magnitude_vector": "m",
}
# Settings that may say anything: they do not change what the tensors mean.
FREE = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules",
    "fine_tune_type", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "lora_parameters", "medphi", "megatron_core", "num_layers", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_dora", "use_rslora",
})  # fmt: skip
# Settings of which this library computes some values as PEFT does. All others must be empty.
ONLY: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",),
    # pissa, olora, loftq, corda and others change the base's own weights before training.
    "init_lora_weights": (True, False, "gaussian", "eva"),
    "peft_type": ("LORA",),
}

_TENSOR = re.compile(
    rf"{re.escape(PREFIX)}(model\.layers\.{LAYER_NUMBER}\."
    rf"(?:{'|'.join(map(re.escape, (*PROJECTIONS, *SEPARATE)))}))\."
    rf"({'|'.join(map(re.escape, PARTS))})"
)


@dataclass(frozen=True)
class _Settings:
    """The parts of adapter_config.json that give tensors their meaning."""

    r: int
    alpha: float
    rslora: bool
    dora: bool
    dropout: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    @property
    def scale(self) -> float:
        """The multiplier of modules without a pattern."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def scale_of(self, name: str) -> float:
        """The multiplier of one module."""
        alpha, rank = _of_pattern(self.alphas, name, self.alpha), self.rank_of(name)
        return float(alpha / (math.sqrt(rank) if self.rslora else rank))

    def rank_of(self, name: str) -> int:
        return int(_of_pattern(self.ranks, name, self.r))


# What PEFT's patterns may be here: names with a few wildcards. Any other regular expression from a
# file could take forever to match.
_PATTERN = re.compile(r"\^?(?:(?:[\w.]|\\[.d])[*+]?)+\$?", re.ASCII)
MAX_PATTERN, MAX_REPEATS = 200, 2


def _is_pattern(text: str) -> bool:
    repeats = text.count("*") + text.count("+")
    return (
        len(text) <= MAX_PATTERN and repeats <= MAX_REPEATS and _PATTERN.fullmatch(text) is not None
    )


def _of_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that matches, by the rule of PEFT's `get_pattern_key`."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def read_peft(path: Path, config: Mapping[str, Any], model: nn.Module | None) -> Adapter:
    """Read a PEFT directory whose adapter_config.json is `config`.

    Raises:
        AdapterError: a feature this library does not have, or missing or impossible tensors.
    """
    settings = _settings(path / CONFIG_NAME, config)
    file = path / PEFT_NAME
    if not file.exists() and file.with_suffix(".bin").exists():
        raise AdapterError(f"{path}: holds {file.stem}.bin; save it with PEFT as {PEFT_NAME}")
    tensors, _, problems = load_tensors(file)
    if not tensors and not problems:
        raise AdapterError(f"{file}: holds no tensors, so there is no adapter in it")
    modules = _modules(tensors, settings, problems)
    problems += _lost(modules, config, model)
    if not problems:
        modules = merge_parts(modules, model, problems)
    if problems:
        raise differences(
            path, "cannot be used as an adapter of this model", problems,
            "Load it on its base model, or save it again with PEFT.",
        )  # fmt: skip
    rank = max(change.a.shape[1] for change in modules.values())
    layers = {name: padded(change, rank) for name, change in sorted(modules.items())}
    known = 0 if model is None else len(model.model.layers)
    return Adapter(
        layers,
        Scaling(rank, settings.scale, settings.dora, settings.dropout),
        max(known, *(layer_index(name) + 1 for name in layers)),
        Origin(base_name=base_label(config.get("base_model_name_or_path"))),
        "PEFT directory",
    )


def _settings(where: Path, config: Mapping[str, Any]) -> _Settings:
    problems = [
        f"{key} is {value!r}, which this library does not have"
        for key, value in config.items()
        if (value not in ONLY[key] if key in ONLY else key not in FREE and bool(value))
    ]
    patterns = {}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns[name] = config.get(name) or {}
        if not isinstance(patterns[name], Mapping):
            problems.append(f"{name} is {patterns[name]!r}, expected an object")
            patterns[name] = {}
    numbers = {"lora_alpha": config.get("lora_alpha"), "r": config.get("r")}
    for name, pattern in patterns.items():
        problems += [
            f"{name} {key[:60]!r} is no name or pattern that is read here: letters, digits, _ and "
            f"., with at most {MAX_REPEATS} of * and +"
            for key in pattern
            if not _is_pattern(key)
        ]
        numbers |= {f"{name} {key}": value for key, value in pattern.items()}
    for name, value in numbers.items():
        whole = name == "r" or name.startswith("rank_pattern")
        if not is_number(value) or value <= 0 or (whole and not isinstance(value, int)):
            kind = "positive whole" if whole else "positive"
            problems.append(f"{name[:80]} is {value!r:.40}, expected a {kind} number")
    problems += [
        f"{name} is {config[name]!r:.40}, expected true or false"
        for name in ("use_rslora", "use_dora")
        if not isinstance(config.get(name) or False, bool)
    ]
    dropout = config.get("lora_dropout") or 0.0
    if not problems:
        check_scaling(Scaling(config["r"], config["lora_alpha"], False, dropout), problems)
    if problems:
        raise differences(where, "cannot be used", problems, "Merge or convert it with PEFT.")
    return _Settings(
        config["r"],
        config["lora_alpha"],
        bool(config.get("use_rslora")),
        bool(config.get("use_dora")),
        dropout,
        patterns["rank_pattern"],
        patterns["alpha_pattern"],
    )


def _modules(
    tensors: Mapping[str, mx.array], settings: _Settings, problems: list[str]
) -> dict[str, LowRank]:
    """Every module in our orientation, all of them with the scale of a module without pattern."""
    parts: dict[str, dict[str, mx.array]] = {}
    unknown = []
    for name, array in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            unknown.append(name)
            continue
        parts.setdefault(match[1], {})[PARTS[match[2]]] = array.T if array.ndim == 2 else array
    problems += unknown_names(unknown)
    modules: dict[str, LowRank] = {}
    for name, found in parts.items():
        own = Scaling(settings.rank_of(name), settings.scale_of(name), settings.dora)
        for layer, change in assemble({name: found}, own, problems).items():
            ratio = own.scale / settings.scale
            # Untouched when there is nothing to do: the usual adapter keeps its bits and its dtype.
            b = change.b if ratio == 1 else change.b.astype(mx.float32) * ratio
            modules[layer] = replace(change, b=b)
    return modules


def _lost(
    modules: Mapping[str, LowRank], config: Mapping[str, Any], model: nn.Module | None
) -> list[str]:
    """Modules that the configuration promises and the file lacks, as far as it says so plainly."""
    targets = config.get("target_modules")
    plain = isinstance(targets, list) and not any("." in str(target) for target in targets)
    if not modules or not plain or config.get("exclude_modules"):
        return []
    chosen = config.get("layers_to_transform")
    if isinstance(chosen, int):
        return uneven_layers(modules, [chosen])
    if isinstance(chosen, list) and chosen:
        return uneven_layers(modules, [index for index in chosen if isinstance(index, int)])
    known = 0 if model is None else len(model.model.layers)
    return uneven_layers(modules, range(max(known, *(layer_index(name) + 1 for name in modules))))


def peft_tensors(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The same numbers under PEFT's names and in its orientation, sorted."""
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
    renamed = {}
    for name, array in tensors.items():
        layer, part = name.rsplit(".", 1)
        renamed[f"{PREFIX}{layer}.{names[part]}"] = array.T if array.ndim == 2 else array
    return dict(sorted(renamed.items()))


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """The settings PEFT needs to load `peft_tensors`; rsLoRA has become an ordinary scale."""
    scaling = adapter.scaling
    alpha = scaling.scale * scaling.rank
    all_blocks = adapter.indices == tuple(range(adapter.model_layers))
    names = [key.split(".")[-1] for key in adapter.keys]
    if not adapter.is_even:  # every module by its full name, which needs no list of blocks
        names, all_blocks = list(adapter.layers), True
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.origin.base_name,
        "r": scaling.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": scaling.dropout,
        "target_modules": sorted(names),
        "layers_to_transform": None if all_blocks else list(adapter.indices),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": scaling.dora,
        "use_rslora": False,
    }
