"""Checkpoints of a run: complete or absent, hashed, and refused when they belong to another run.

A checkpoint is taken between updates, so nothing but the trained weights, the optimiser and a few
numbers is needed: order and dropout are functions of the seed and the update's number.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_medphi.errors import TrainingError, capped
from mlx_medphi.files import atomic_directory, read_safetensors_header, sha256_file, write_json
from mlx_medphi.training.step import Trainer, leaves

__all__ = [
    "Progress",
    "check_same_run",
    "checkpoint_at",
    "load_checkpoint",
    "newest_checkpoint",
    "restore_weights",
    "save_checkpoint",
]

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
KEPT = 2  # a damaged newest checkpoint still leaves one to go on from


@dataclass
class Progress:
    """Where a run stands, beside its weights.

    `step` counts updates including skipped ones; `best_step` is None before the first evaluation.
    """

    step: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    evaluations_without_gain: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


def save_checkpoint(
    directory: Path, trainer: Trainer, progress: Progress, identity: dict[str, Any]
) -> Path:
    """Write `directory`/step-N with weights, optimiser, state and hashes, then drop the oldest.

    Args:
        identity: what must be equal for a run to go on from here (config, data, base, versions).

    Raises:
        TrainingError: the disk is full or cannot be written; older checkpoints are unchanged.
    """
    path = checkpoint_at(directory, progress.step)
    with atomic_directory(path, replace=True) as temporary:
        _save(temporary / WEIGHTS, leaves(trainer.model.trainable_parameters()))
        _save(temporary / OPTIMIZER, trainer.optimizer_leaves())
        hashes = {name: sha256_file(temporary / name) for name in (WEIGHTS, OPTIMIZER)}
        write_json(
            temporary / STATE,
            {"progress": asdict(progress), "identity": identity, "sha256": hashes},
        )
    keep = {path.name, f"step-{progress.best_step:06d}" if progress.best_step is not None else ""}
    found = _checkpoints(directory)
    for old in found[: -KEPT if KEPT < len(found) else 0]:
        if old.name not in keep:
            shutil.rmtree(old)
    return path


def load_checkpoint(path: Path, trainer: Trainer, identity: dict[str, Any]) -> Progress:
    """Put weights and optimiser of a checkpoint into a fresh trainer.

    Raises:
        TrainingError: an incomplete or changed checkpoint, or one of another run, with every
            difference.
    """
    state = _read_state(path)
    check_same_run(path, state["identity"], identity)
    restore_weights(path, trainer)
    try:
        trainer.restore_optimizer(_load(path / OPTIMIZER))
    except KeyError as exc:
        raise TrainingError(
            f"{path / OPTIMIZER}: optimiser state does not fit ({capped(exc.args[0])})"
        ) from exc
    return Progress(**state["progress"])


def restore_weights(path: Path, trainer: Trainer) -> None:
    """Put the trained weights of a checkpoint into the model.

    Raises:
        TrainingError: a file is missing, changed or has other tensors.
    """
    hashes = _read_state(path)["sha256"]
    for name, expected in hashes.items():
        if not (path / name).is_file() or sha256_file(path / name) != expected:
            raise TrainingError(
                f"{path / name}: missing or changed since it was saved; delete {path} to go "
                "on from the checkpoint before it"
            )
    weights = _load(path / WEIGHTS)
    live = leaves(trainer.model.trainable_parameters())
    wrong = [
        f"{name} {tuple(weights[name].shape) if name in weights else 'missing'}"
        for name in set(live) | set(weights)
        if name not in weights or name not in live or weights[name].shape != live[name].shape
    ]
    if wrong:
        raise TrainingError(f"{path / WEIGHTS}: does not fit this model: {capped(wrong)}")
    trainer.model.update(tree_unflatten(list(weights.items())))
    mx.eval(trainer.model.parameters())


def _changes(name: str, old: Any, new: Any) -> list[str]:
    """Every value that differs, by its dotted name."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [c for key in keys for c in _changes(f"{name}.{key}", old.get(key), new.get(key))]
    return [] if old == new else [f"{name} was {old!r}, now {new!r}"]


def check_same_run(path: Path, saved: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuse what was made by a run with other settings, data, base or versions.

    Raises:
        TrainingError: names every difference.
    """
    differences = [
        change
        for key, value in sorted(identity.items())
        for change in _changes(key, saved.get(key), value)
    ]
    if differences:
        raise TrainingError(
            f"{path}: made by another run ({capped(differences)}). Go on with the same settings "
            "and data, or start a new run in another directory."
        )


def newest_checkpoint(directory: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    complete = [path for path in _checkpoints(directory) if (path / STATE).is_file()]
    return complete[-1] if complete else None


def checkpoint_at(directory: Path, step: int) -> Path:
    """Where the checkpoint of an update lies."""
    return directory / f"step-{step:06d}"


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if path.is_dir())


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        _check_state(path, state)
        return state
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise TrainingError(
            f"{path}: not a complete checkpoint ({STATE} is missing or damaged); delete it to go "
            "on from the checkpoint before it"
        ) from exc


def _check_state(path: Path, state: dict[str, Any]) -> None:
    """Raise one of the errors of a malformed file unless the state is whole."""
    hints = get_type_hints(Progress)
    if set(state["progress"]) != set(hints) or set(state["sha256"]) != {WEIGHTS, OPTIMIZER}:
        raise KeyError(STATE)
    for name, value in state["progress"].items():
        expected = get_args(hints[name]) or (hints[name],)
        if type(value) not in expected:
            raise TypeError(name)
    if checkpoint_at(path.parent, state["progress"]["step"]) != path:
        raise ValueError("step")
    if not isinstance(state["identity"], dict):
        raise TypeError("identity")


def _save(path: Path, arrays: dict[str, mx.array]) -> None:
    try:
        mx.save_safetensors(str(path), arrays, {"format": "mlx"})
    except RuntimeError as exc:
        # MLX reports a full disk so; with the arrays already in memory nothing else can fail.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from exc


def _load(path: Path) -> dict[str, mx.array]:
    read_safetensors_header(path, TrainingError)
    loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    mx.eval(loaded)  # the file may be replaced while the arrays live on
    return loaded
