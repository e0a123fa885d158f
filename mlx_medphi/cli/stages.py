"""Long work in stages: a bar with the time left on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["STAGES", "Stages"]

STAGES: Mapping[str, str] = {
    "fuse": "folding the adapter in",
    "quantise": "quantising",
    "graph": "building the program, layer by layer",
    "weights": "writing the weights",
    "golden": "asking MLX",
    "files": "reading the files",
    "run": "running the saved package",
    "predict": "running Core ML",
}
"""Stage -> what a person reads."""


class Stages:
    """Shows stages on the error stream; call it with (stage, steps done, steps in all)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._tasks: dict[str, Any] = {}
        self._live: RichProgress | None = None
        if not quiet and sys.stderr.isatty():
            self._live = _live()
            self._live.start()

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._quiet:
            return
        words = STAGES.get(stage, stage)
        if self._live is None:
            if stage not in self._tasks:
                print(f"{words} …", file=sys.stderr, flush=True)
            self._tasks[stage] = None
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._live.add_task(words, total=total)
        self._live.update(self._tasks[stage], completed=done, total=total)


def _live() -> RichProgress:
    # Only a terminal needs it, and it takes longer to import than the rest of the command line.
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description:<38}", markup=False),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    )
