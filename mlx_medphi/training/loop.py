"""The training loop: from examples to a run directory with the best adapter in it.

Order, packing and dropout are functions of the seed and the update's number, evaluation runs after
the update over all validation rows in a fixed order, and the weights that are kept are the ones
that were measured.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_medphi.config import LoRAConfig, TrainConfig
from mlx_medphi.data.examples import Example
from mlx_medphi.errors import TrainingError, UsageError, capped
from mlx_medphi.model.lora import adapted_layers, apply_lora, remove_lora
from mlx_medphi.model.phi3 import Phi3ForCausalLM, parameter_count
from mlx_medphi.text.tokenizer import Tokenizer
from mlx_medphi.training.batches import RunData
from mlx_medphi.training.checkpointing import (
    Progress,
    checkpoint_at,
    load_checkpoint,
    newest_checkpoint,
    restore_weights,
    save_checkpoint,
)
from mlx_medphi.training.events import (
    Evaluated,
    Event,
    OnEvent,
    Saved,
    Started,
    Stepped,
    Stopped,
)
from mlx_medphi.training.result import TrainResult
from mlx_medphi.training.run_directory import RunDirectory, identity
from mlx_medphi.training.step import Trainer, leaves

__all__ = ["train"]

MAX_SKIPPED_IN_A_ROW = 10  # by then the run has diverged and only costs time
EVALUATIONS = 10  # in a run, unless eval_every says otherwise


def train(
    model: Phi3ForCausalLM,
    tokenizer: Tokenizer,
    train_examples: Sequence[Example],
    valid_examples: Sequence[Example] = (),
    *,
    out: str | Path,
    config: TrainConfig = TrainConfig(),
    lora: LoRAConfig | None = LoRAConfig(),
    resume: bool = False,
    on_event: OnEvent | None = None,
) -> TrainResult:
    """Train an adapter, or with `lora=None` every parameter; keep what measured best.

    The model is changed in place and holds the kept weights afterwards. `out` gets run.json,
    metrics.jsonl, checkpoints/ and adapter/ (model/ after full-parameter training).

    Args:
        model: a base as `load` returns it; full-parameter training needs plain float32 weights.
        tokenizer: the base's own.
        train_examples: what is learned.
        valid_examples: what is only measured; without it the last weights are kept.
        out: a new directory, or with `resume` the directory of an interrupted run.
        config: how long, how fast, how large.
        lora: which low-rank changes; None trains the whole model.
        resume: go on from the newest checkpoint in `out`, with the same settings and data.
        on_event: called with each event of `mlx_medphi.training.events`, in this thread; `print`
            will do. What it raises ends the run, which can go on by `resume`.

    Raises:
        TrainingError: nothing to train on, a directory in use, a checkpoint of another run, a
            diverged loss.
        AdapterError: projections or layers that this model does not have.
    """
    started = time.perf_counter()
    mx.reset_peak_memory()
    _check_arguments(model, train_examples, config, lora)
    with RunDirectory.open(Path(out), resume=resume) as directory:
        data = RunData.prepare(model, tokenizer, train_examples, valid_examples, config)
        facts = identity(model, data.hash, config, lora)
        if resume:
            directory.check_manifest(facts)
            remove_lora(model)  # the checkpoint brings the adapter's values
        _make_trainable(model, lora, config)
        trainer = Trainer(model, config, data.updates)
        run = _Run(directory, trainer, data, config, facts, on_event or _ignore)
        checkpoint = newest_checkpoint(directory.checkpoints) if resume else None
        if checkpoint is not None:
            run.progress = load_checkpoint(checkpoint, trainer, facts)
        # A run that stopped before its first checkpoint begins again: nothing of it counts.
        directory.keep_metrics_up_to(-1 if checkpoint is None else run.progress.step)
        directory.write_manifest(facts, tokenizer)
        run.tell(_started(run, config, lora))
        with directory.metrics(), _interruptible() as interrupted:
            reason = run.go(interrupted)
        run.tell(Stopped(run.progress.step, reason))
        run.restore_best()
        kept = directory.save_kept(model, tokenizer, lora, run.facts())
    return TrainResult(
        out=directory.path,
        adapter=kept,
        steps=run.progress.step,
        skipped=run.progress.skipped,
        first_loss=run.progress.first_loss,
        best_loss=run.progress.best_loss,
        best_step=run.progress.best_step,
        stopped=reason,
        train_losses=directory.series("train_loss"),
        valid_losses=directory.series("valid_loss"),
        shortened=data.train.shortened,
        refused=data.train.refused,
        seconds=time.perf_counter() - started,
        peak_memory=mx.get_peak_memory(),
    )


class _Run:
    """One run: the state that moves, and the three things that happen to it."""

    def __init__(
        self,
        directory: RunDirectory,
        trainer: Trainer,
        data: RunData,
        config: TrainConfig,
        identity: dict[str, object],
        on_event: OnEvent,
    ) -> None:
        self.directory, self.trainer, self.data = directory, trainer, data
        self.config, self.identity, self.on_event = config, identity, on_event
        self.progress = Progress()
        self.eval_every = config.eval_every or max(1, data.updates // EVALUATIONS)

    def tell(self, event: Event) -> None:
        """Record an event, then hand it on; what the listener raises ends the run, saved."""
        self.directory.record(event)
        try:
            self.on_event(event)
        except BaseException:
            # Events come between updates, so the state is whole.
            if isinstance(event, Stepped):
                self.save()
            raise

    def save(self) -> Path:
        return save_checkpoint(
            self.directory.checkpoints, self.trainer, self.progress, self.identity
        )

    def go(self, interrupted: threading.Event) -> str:
        """Run to the end, to the end of patience or to Ctrl-C; returns which."""
        if self.progress.step == 0 and self.data.valid_batches:
            self.evaluate()
        while self.progress.step < self.data.updates:
            patience = self.config.patience
            if patience is not None and self.progress.evaluations_without_gain >= patience:
                return "patience"
            self.step()
            last = self.progress.step == self.data.updates
            due = last or self.progress.step % self.eval_every == 0
            stop = interrupted.is_set()
            if due or stop:
                if due and self.data.valid_batches:
                    self.evaluate()
                self.tell(Saved(self.progress.step, self.save()))
            if stop and not last:
                return "interrupted"
        return "finished"

    def step(self) -> None:
        began = time.perf_counter()
        number = self.progress.step + 1
        batches = self.data.batches(number)
        update = self.trainer.update(batches, number)
        self.progress.step = number
        self.progress.skipped += update.skipped
        self.progress.skipped_in_a_row = self.progress.skipped_in_a_row + 1 if update.skipped else 0
        self.tell(
            Stepped(
                step=number,
                loss=update.loss,
                learning_rate=update.learning_rate,
                grad_norm=update.grad_norm,
                skipped=update.skipped,
                tokens_supervised=sum(batch.tokens_supervised for batch in batches),
                tokens_real=sum(batch.tokens_real for batch in batches),
                tokens_padded=sum(batch.ids.size for batch in batches),
                seconds=time.perf_counter() - began,
                peak_memory=mx.get_peak_memory(),
            )
        )
        if self.progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"the loss or gradient of {MAX_SKIPPED_IN_A_ROW} updates in a row was not finite "
                f"(last: update {number}); the weights are as before them. Lower the learning "
                f"rate ({self.config.learning_rate:g})."
            )

    def evaluate(self) -> None:
        began = time.perf_counter()
        loss, tokens = self.trainer.evaluate(self.data.valid_batches)
        state = self.progress
        # Update 0 is the base itself: it is measured, but there is nothing of it to keep.
        lower = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
        best = state.step > 0 and lower
        if state.step == 0:
            state.first_loss = loss
        elif best:
            state.best_loss, state.best_step, state.evaluations_without_gain = loss, state.step, 0
        else:
            state.evaluations_without_gain += 1
        state.last_loss = loss
        self.tell(Evaluated(state.step, loss, best, tokens, time.perf_counter() - began))

    def facts(self) -> dict[str, object]:
        """What the adapter carries of its training: numbers and hashes, no text."""
        return {
            "data_hash": self.data.hash,
            "rows": len(self.data.train.examples),
            "seed": self.config.seed,
            "updates": self.progress.step,
            "valid_loss": self.progress.best_loss,
            "valid_loss_before": self.progress.first_loss,
        }

    def restore_best(self) -> None:
        """Put the weights of the best evaluation back; without one the last weights stay."""
        step = self.progress.best_step
        if step is not None and step != self.progress.step:
            restore_weights(checkpoint_at(self.directory.checkpoints, step), self.trainer)


def _check_arguments(model: object, rows: object, config: object, lora: object) -> None:
    """Say in one line what was mixed up, where Python would fail much later."""
    wrong = [
        (not isinstance(model, Phi3ForCausalLM), "model: give the first of what load returns"),
        (
            not isinstance(rows, Sequence),
            "train_examples: give a list, as splits.train",
        ),
        (not isinstance(config, TrainConfig), "config: give a TrainConfig(...)"),
        (not isinstance(lora, (LoRAConfig, type(None))), "lora: give a LoRAConfig(...) or None"),
    ]
    problems = [advice for mixed_up, advice in wrong if mixed_up]
    if problems:
        raise UsageError("; ".join(problems))


def _make_trainable(model: Phi3ForCausalLM, lora: LoRAConfig | None, config: TrainConfig) -> None:
    if lora is not None:
        apply_lora(model, lora, config.seed)
        return
    if next(adapted_layers(model), None) is not None:
        raise TrainingError(
            "this model carries an adapter; full-parameter training needs the bare base, or the "
            "two fused"
        )
    model.unfreeze()
    wrong = [name for name, leaf in leaves(model.parameters()).items() if leaf.dtype != mx.float32]
    if wrong:
        raise TrainingError(
            f"full-parameter training needs plain float32 weights, found {len(wrong)} others "
            f"({capped(wrong[:3])}); load the unquantised model with dtype 'float32'"
        )


def _started(run: _Run, config: TrainConfig, lora: LoRAConfig | None) -> Started:
    model, data = run.trainer.model, run.data
    sizes = [leaf.size for leaf in leaves(model.trainable_parameters()).values()]
    return Started(
        config=config,
        lora=lora,
        updates=data.updates,
        first_step=run.progress.step + 1,
        train_rows=len(data.train.examples),
        valid_rows=len(data.valid.examples),
        shortened=data.train.shortened,
        refused=data.train.refused,
        widths=data.plan.shapes.widths,
        padding_share=data.plan.padding_share,
        supervised_tokens_per_epoch=sum(sum(row.loss_mask) for row in data.train.examples),
        trainable_parameters=sum(sizes),
        total_parameters=parameter_count(model),
    )


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into a flag read between updates; a second acts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag  # only the main thread may handle signals; a notebook's worker just runs on
        return

    def handler(number: int, frame: object) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _ignore(event: Event) -> None:
    del event
