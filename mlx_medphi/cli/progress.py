"""A training run's progress: one live line on a terminal, lines per evaluation elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mlx_medphi.cli.show import duration, number_of, size
from mlx_medphi.config import to_dict
from mlx_medphi.training.events import Evaluated, Event, Saved, Started, Stepped

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["Progress"]

# Rates and the loss are means over this many updates, so that they can be read.
WINDOW = 20


class Progress:
    """Shows a run's events on the error stream; call it with each of them."""

    def __init__(self, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._quiet, self._clock = quiet, clock
        self._recent: deque[Stepped] = deque(maxlen=WINDOW)
        self._updates = self._before = 0
        self._began = 0.0
        self._live: RichProgress | None = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        if self._quiet:
            return
        if isinstance(event, Started):
            self._start(event)
        elif isinstance(event, Stepped):
            self._recent.append(event)
            if self._live is not None:
                self._live.update(self._task, completed=event.step, description=self.line())
        elif isinstance(event, Evaluated):
            mark = " (best so far)" if event.best else ""
            self._say(f"update {event.step:,}: validation loss {event.loss:.4f}{mark}")
            if self._live is None and self._recent:
                self._say(f"  {self.line()}")
        elif isinstance(event, Saved) and self._live is None:
            self._say(f"  saved {event.path}")

    def line(self) -> str:
        """Loss, rates, memory and time left over the last updates."""
        steps = list(self._recent)
        seconds = sum(step.seconds for step in steps) or 1e-9
        rates = [
            sum(getattr(step, name) for step in steps) / seconds
            for name in ("tokens_supervised", "tokens_real", "tokens_padded")
        ]
        supervised, real, padded = (f"{rate:,.0f}" for rate in rates)
        # By the clock, because evaluations and checkpoints take time too.
        done = steps[-1].step - self._before
        left = (self._updates - steps[-1].step) * (self._clock() - self._began) / done
        loss = sum(step.loss for step in steps) / len(steps)
        return (
            f"loss {loss:.3f} · tokens/s {supervised} supervised, {real} real, {padded} padded · "
            f"peak {size(steps[-1].peak_memory)} · {duration(left)} left"
        )

    def _start(self, event: Started) -> None:
        self._updates, self._before = event.updates, event.first_step - 1
        self._began = self._clock()
        share = event.trainable_parameters / event.total_parameters
        widths = ", ".join(str(width) for width in event.widths)
        for name, config in (("train", event.config), ("lora", event.lora)):
            if config is not None:
                said = ", ".join(f"{k} {_short(v)}" for k, v in to_dict(config).items())
                self._say(f"{name}: {said}")
        self._say(
            f"{number_of(event.train_rows, 'row')} to train on, {event.valid_rows:,} to measure, "
            f"{len(event.shortened):,} shortened, {len(event.refused):,} refused"
        )
        self._say(
            f"{number_of(event.updates, 'update')} from {event.first_step:,}, "
            f"rows of {widths} tokens ({event.padding_share:.1%} padding), "
            f"{event.supervised_tokens_per_epoch:,} supervised tokens a pass"
        )
        self._say(
            f"{event.trainable_parameters:,} of {event.total_parameters:,} parameters "
            f"trained ({share:.2%})"
        )
        if sys.stderr.isatty():
            self._live = _live_progress()
            self._task = self._live.add_task("", total=event.updates, completed=self._before)
            self._live.start()

    def _say(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _live_progress() -> RichProgress:
    # Only a terminal needs it, and it takes longer to import than the rest of the command line.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
    )


def _short(value: object) -> str:
    """A setting as YAML would have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return " + ".join(value) if isinstance(value, list) else str(value)
