"""The run directory: what was asked for, what happened, and what is kept.

run.json         settings, versions, data hash, base fingerprint: enough to repeat the run
metrics.jsonl    one line for each update and each evaluation; numbers only, never text of a row
checkpoints/     where an interrupted run goes on
adapter/         the adapter of the best evaluation, for mlx-lm, PEFT and mlx-swift-lm
medical_changes.safetensors   the same adapter as one self-describing file
model/           in place of the two above, after full-parameter training
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx

from mlx_medphi import __version__
from mlx_medphi.config import LoRAConfig, TrainConfig, to_dict
from mlx_medphi.errors import TrainingError
from mlx_medphi.files import write_json, write_text
from mlx_medphi.model.adapter import save_adapter
from mlx_medphi.model.checkpoint import save_model
from mlx_medphi.model.phi3 import Phi3ForCausalLM
from mlx_medphi.text.tokenizer import Tokenizer
from mlx_medphi.training.checkpointing import check_same_run
from mlx_medphi.training.events import Evaluated, Event, Stepped

__all__ = ["ADAPTER_FILE", "RunDirectory", "identity"]

ADAPTER_FILE = "medical_changes.safetensors"
NOT_WRITABLE = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EROFS}
MANIFEST, METRICS, LOCK = "run.json", "metrics.jsonl", ".lock"


@dataclass
class RunDirectory:
    """The files of one run. Made by `open`."""

    path: Path
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _file: TextIO | None = None

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, resume: bool) -> Iterator[RunDirectory]:
        """A new directory, or with `resume` one that holds a run; held until the context ends.

        Raises:
            TrainingError: the directory is in use, there is no run to go on with, or the disk
                cannot be written.
        """
        manifest = path / MANIFEST
        if resume and not manifest.is_file():
            raise TrainingError(
                f"{path}: no run to go on with ({MANIFEST} is missing); start one without --resume"
            )
        if not resume and path.exists() and (not path.is_dir() or set(_names(path)) - {LOCK}):
            hint = "go on with it by --resume, or " if manifest.is_file() else ""
            raise TrainingError(
                f"{path}: already in use; {hint}choose another directory with --out"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            with (path / LOCK).open("w") as lock:
                _take(lock, path)
                try:
                    yield cls(path)
                finally:
                    (path / LOCK).unlink(missing_ok=True)
                    if not _names(path):
                        path.rmdir()  # it was refused before it began
        except OSError as exc:
            if exc.errno not in NOT_WRITABLE:
                raise
            raise TrainingError(
                f"{exc.filename or path}: cannot be written ({exc.strerror or exc}). Free some "
                "space or choose another directory; a run that has a checkpoint goes on by --resume"
            ) from exc

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def check_manifest(self, identity: dict[str, Any]) -> None:
        """Refuse to go on with a run that had other settings, data, base or versions.

        Raises:
            TrainingError: run.json is damaged, or names every difference.
        """
        path = self.path / MANIFEST
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as exc:
            raise TrainingError(f"{path}: not valid JSON; start a new run elsewhere") from exc
        check_same_run(path, saved if isinstance(saved, dict) else {}, identity)

    def write_manifest(self, identity: dict[str, Any], tokenizer: Tokenizer) -> None:
        """Write run.json: what would have to be equal to repeat the run, and where it ran."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        machine = {
            "system": platform.system(),
            "machine": platform.machine(),
            "device": str(mx.default_device()),
        }
        files = sorted(tokenizer.files)
        write_json(self.path / MANIFEST, {**identity, "machine": machine, "tokenizer_files": files})

    def keep_metrics_up_to(self, step: int) -> None:
        """Drop what was recorded after the checkpoint that the run goes on from."""
        path = self.path / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self._rows = [row for row in map(_parsed, lines) if row is not None and row["step"] <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in self._rows))

    @contextmanager
    def metrics(self) -> Iterator[None]:
        """Hold metrics.jsonl open; each row is on disk at once."""
        with (self.path / METRICS).open("a", encoding="utf-8") as handle:
            self._file = handle
            try:
                yield
            finally:
                self._file = None
                os.fsync(handle.fileno())

    def record(self, event: Event) -> None:
        """Write an update or an evaluation as one line; other events are not metrics."""
        if isinstance(event, Stepped):
            row = asdict(event)
            row["train_loss"] = row.pop("loss")
        elif isinstance(event, Evaluated):
            row = {
                "step": event.step,
                "valid_loss": event.loss,
                "best": event.best,
                "seconds": event.seconds,
            }
        else:
            return
        # JSON has no NaN: a figure that is no number is null.
        row = {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in row.items()}
        self._rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def series(self, name: str) -> tuple[tuple[int, float], ...]:
        """(step, value) of one metric over the whole run."""
        return tuple((row["step"], row[name]) for row in self._rows if row.get(name) is not None)

    def save_kept(
        self,
        model: Phi3ForCausalLM,
        tokenizer: Tokenizer,
        lora: LoRAConfig | None,
        facts: dict[str, Any],
    ) -> Path:
        """Write the weights the model holds now as what the run hands on; returns the directory.

        Args:
            facts: what an adapter says of its training.
        """
        if lora is None:
            kept = self.path / "model"
            save_model(model, tokenizer, kept, replace=True)
        else:
            kept = self.path / "adapter"
            save_adapter(model, kept, training=facts)
            save_adapter(model, self.path / ADAPTER_FILE, training=facts)
        return kept


def identity(
    model: Phi3ForCausalLM, data_hash: str, config: TrainConfig, lora: LoRAConfig | None
) -> dict[str, Any]:
    """What two runs must share to give the same weights on the same machine."""
    return {
        "train": to_dict(config),
        "lora": None if lora is None else to_dict(lora),
        "base": None if model.source is None else model.source.path.name,
        "base_fingerprint": model.fingerprint,
        "data_hash": data_hash,
        "versions": {"mlx": version("mlx"), "mlx_medphi": __version__},
    }


def _names(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir()]


def _take(lock: TextIO, path: Path) -> None:
    """Hold the directory until the file is closed, which the end of the process does too."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise TrainingError(
            f"{path}: another process is training here; wait for it or choose another directory"
        ) from exc


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None  # a line cut short when the machine went down
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
