"""What a finished run says about itself: an object, a picture of the loss, a notebook's view."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

__all__ = ["TrainResult", "loss_svg"]

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 260, 56, 36


@dataclass(frozen=True)
class TrainResult:
    """A finished or interrupted run.

    Attributes:
        out: the run directory.
        adapter: what to hand on: the adapter directory, or the model's after full training.
        steps: updates done, skipped ones included.
        skipped: updates left out because a gradient was not finite.
        first_loss: validation loss before training; None without validation rows.
        best_loss: lowest validation loss; its weights are the ones kept.
        best_step: the update it was measured after.
        stopped: `finished`, `patience` or `interrupted`.
        train_losses: (update, mean loss per supervised token) of every update.
        valid_losses: (update, the same over all validation rows) of every evaluation.
        shortened: ids of rows whose conversation was shortened to fit.
        refused: (id, reason) of rows that could not be trained on.
        seconds: time of this call.
        peak_memory: bytes MLX held at most.
    """

    out: Path
    adapter: Path
    steps: int
    skipped: int
    first_loss: float | None
    best_loss: float | None
    best_step: int | None
    stopped: str
    train_losses: tuple[tuple[int, float], ...]
    valid_losses: tuple[tuple[int, float], ...]
    shortened: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    seconds: float
    peak_memory: int

    @property
    def improved(self) -> bool | None:
        """Whether the kept weights measured better than the base; None if nothing was measured."""
        if self.first_loss is None or self.best_loss is None:
            return None
        return self.best_loss < self.first_loss

    def loss_svg(self) -> str:
        """The loss curves as SVG."""
        return loss_svg(self.train_losses, self.valid_losses)

    def _repr_html_(self) -> str:
        rows = {
            "updates": f"{self.steps} ({self.stopped})",
            "validation loss": _fall(self.first_loss, self.best_loss, self.best_step),
            "conversations shortened": str(len(self.shortened)),
            "rows refused": str(len(self.refused)),
            "updates skipped": str(self.skipped),
            "peak memory": f"{self.peak_memory / 1e9:.2f} GB",
            "time": f"{self.seconds:.0f} s",
            "kept": str(self.adapter),
        }
        cells = "".join(
            f"<tr><th style='text-align:left'>{k}</th><td>{escape(v)}</td></tr>"
            for k, v in rows.items()
        )
        return f"<div>{self.loss_svg()}<table>{cells}</table></div>"


def loss_svg(train: tuple[tuple[int, float], ...], valid: tuple[tuple[int, float], ...]) -> str:
    """Training and validation loss against the update number, as a stand-alone SVG."""
    points = [*train, *valid]
    if not points:
        return f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{HEIGHT}'/>"
    last = max(max(step for step, _ in points), 1)
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    high = high if high > low else low + 1.0

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 16) * step / last

    def y(loss: float) -> float:
        return 16 + (HEIGHT - BOTTOM - 16) * (high - loss) / (high - low)

    def line(series: tuple[tuple[int, float], ...], color: str, width: float) -> str:
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in series)
        return f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='{width}'/>"

    marks = "".join(
        f"<line x1='{LEFT}' x2='{WIDTH - 16}' y1='{y(v):.1f}' y2='{y(v):.1f}' stroke='#ddd'/>"
        f"<text x='{LEFT - 6}' y='{y(v) + 4:.1f}' text-anchor='end'>{v:.2f}</text>"
        for v in (low, (low + high) / 2, high)
    )
    ticks = "".join(
        f"<text x='{x(step):.1f}' y='{HEIGHT - BOTTOM + 18}' text-anchor='middle'>{step}</text>"
        for step in sorted({0, last // 2, last})
    )
    dots = "".join(
        f"<circle cx='{x(s):.1f}' cy='{y(v):.1f}' r='3' fill='#d1495b'/>" for s, v in valid
    )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{HEIGHT}' "
        f"viewBox='0 0 {WIDTH} {HEIGHT}' font-family='sans-serif' font-size='11' fill='#444'>"
        f"{marks}{ticks}{line(train, '#8fb8de', 1.5)}{line(valid, '#d1495b', 2)}{dots}"
        f"<text x='{WIDTH - 16}' y='{HEIGHT - 4}' text-anchor='end'>"
        "updates · mean loss per supervised token · blue: training, red: validation</text></svg>"
    )


def _fall(first: float | None, best: float | None, step: int | None) -> str:
    if first is None:
        return "not measured: no validation rows"
    if best is None:
        return f"{first:.4f} before training, not measured since"
    return f"{first:.4f} before training, {best:.4f} after update {step}"
