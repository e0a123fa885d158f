"""Examples to micro-batches of few static shapes, the same for the same seed.

Examples share rows (`seg` keeps them apart), every example is seen exactly once per epoch, and who
shares a row is drawn anew for each epoch from `rng([seed, epoch])`. Nothing is kept between
micro-batches, so a run can go on from any of them. Only supervised positions are targets, so that
the model's head runs on `slots` rows instead of on every position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mlx_medphi.errors import ConfigError, DataError, capped
from mlx_medphi.text.bins import Bin, best_fit, choose_widths, one_each
from mlx_medphi.text.chat import EncodedExample

__all__ = ["MicroBatch", "Plan", "Shapes", "evaluation_batches", "plan"]

_T = TypeVar("_T")

_SLOT_STEP = 64
# Lengths are ordered in steps of so many tokens and drawn freely within one: sorted to the token,
# long examples would meet the same neighbours in every epoch.
_ORDER_STEP = 32


@dataclass(frozen=True)
class Shapes:
    """The static shapes of a run, one per width: every further one is one more compiled trace.

    Args:
        widths: tokens per row, ascending, at most four.
        rows: rows of each micro-batch.
        slots: per width, room for targets: the most that any of its micro-batches has, rounded up.
    """

    widths: tuple[int, ...]
    rows: int
    slots: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One micro-batch.

    Args:
        ids: (R, P) int32 tokens, 0 where there is none.
        seg: (R, P) int32 number of the example within its row, -1 at padding.
        idx: (K,) int32 position in the flat ids of the token BEFORE each target; 0 if unused.
        tgt: (K,) int32 the target; 0 if unused.
        weight: (K,) float32, 1 for a target and 0 for an unused slot.
        long: whether its examples are longer than the plan's `long_threshold`.
        tokens_real: positions that hold a token of an example.
        tokens_supervised: targets, the sum of `weight`.
        examples: the examples in it, as numbers into the sequence that was planned.
    """

    ids: NDArray[np.int32]
    seg: NDArray[np.int32]
    idx: NDArray[np.int32]
    tgt: NDArray[np.int32]
    weight: NDArray[np.float32]
    long: bool
    tokens_real: int
    tokens_supervised: int
    examples: tuple[int, ...]


@dataclass(frozen=True)
class _Layout:
    """Which rows make up one micro-batch; fewer than it holds in the last one of a width."""

    width: int
    long: bool
    bins: tuple[Bin, ...]

    def members(self) -> list[int]:
        return [example for bin in self.bins for example in bin.members]


@dataclass(frozen=True, eq=False)
class Plan:
    """The micro-batches of a run, laid out before its first step. Made by `plan`.

    Args:
        shapes: hold for every micro-batch of every planned epoch.
        micro_batches: their number per epoch.
        padding_share: positions without a token, of all positions of all epochs.
    """

    shapes: Shapes
    micro_batches: tuple[int, ...]
    padding_share: float
    _layouts: tuple[tuple[_Layout, ...], ...] = field(repr=False)
    _source: _Source = field(repr=False)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[MicroBatch]:
        """The micro-batches of one planned epoch (the first is 0), from number `start` on."""
        if not 0 <= epoch < len(self.micro_batches):
            raise IndexError(f"epoch {epoch} of a plan for {len(self.micro_batches)}")
        for layout in self._layouts[epoch][start:]:
            slots = self.shapes.slots[self.shapes.widths.index(layout.width)]
            yield self._source.micro_batch(layout, slots)

    def locate(self, micro_batch: int) -> tuple[int, int]:
        """(epoch, number within it) of a micro-batch that is counted from the start of the run."""
        for epoch, number in enumerate(self.micro_batches):
            if micro_batch < number:
                return epoch, micro_batch
            micro_batch -= number
        raise IndexError(f"a micro-batch beyond the {sum(self.micro_batches)} of the plan")


def plan(
    examples: Sequence[EncodedExample],
    *,
    rows: int,
    seed: int | None,
    epochs: int = 1,
    micro_batches: int = 0,
    pack: bool = True,
    long_threshold: int | None = None,
) -> Plan:
    """Lay out a run.

    Args:
        examples: at least one, each with a position to train on.
        rows: rows per micro-batch.
        seed: with the epoch's number, decides who shares a row and in which order rows come; None
            keeps the order given, for evaluation.
        epochs: how often each example is seen.
        micro_batches: plan more epochs where this many micro-batches need them.
        pack: whether examples share rows.
        long_threshold: longer examples never share a micro-batch with the others. A model with two
            sets of rotary factors picks one by this length.

    Raises:
        ConfigError: `rows` or `epochs` below 1.
        DataError: no examples, or one without a position to train on.
    """
    if rows < 1 or epochs < 1:
        raise ConfigError(f"rows={rows} and epochs={epochs}: expected at least 1 of each.")
    source = _Source.of(examples, rows, seed, pack, long_threshold)
    layouts: list[tuple[_Layout, ...]] = []
    while len(layouts) < epochs or sum(map(len, layouts)) < micro_batches:
        layouts.append(source.layouts(len(layouts)))
    slots = dict.fromkeys(source.widths, 1)
    positions = 0
    for layout in (layout for epoch in layouts for layout in epoch):
        slots[layout.width] = max(slots[layout.width], source.supervised(layout))
        positions += layout.width * rows
    return Plan(
        shapes=Shapes(
            widths=source.widths,
            rows=rows,
            slots=tuple(-(-most // _SLOT_STEP) * _SLOT_STEP for most in slots.values()),
        ),
        micro_batches=tuple(len(epoch) for epoch in layouts),
        padding_share=1 - len(layouts) * sum(source.lengths) / positions,
        _layouts=tuple(layouts),
        _source=source,
    )


def evaluation_batches(
    examples: Sequence[EncodedExample],
    *,
    rows: int,
    pack: bool = True,
    long_threshold: int | None = None,
) -> tuple[MicroBatch, ...]:
    """Every example once, always in the same rows and the same order. Arguments as in `plan`.

    >>> batches = evaluation_batches([EncodedExample("a", [5, 6, 7], [0, 1, 1])], rows=2)
    >>> batches[0].tokens_supervised, batches[0].ids.shape
    (2, (2, 32))
    """
    fixed = plan(examples, rows=rows, seed=None, pack=pack, long_threshold=long_threshold)
    return tuple(fixed.epoch(0))


@dataclass(frozen=True, eq=False)
class _Source:
    """The examples of a plan, and all that decides their order."""

    ids: Sequence[NDArray[np.int32]]
    targets: Sequence[NDArray[np.intp]]
    lengths: Sequence[int]
    long: Sequence[bool]
    widths: tuple[int, ...]
    rows: int
    seed: int | None
    pack: bool

    @classmethod
    def of(
        cls,
        examples: Sequence[EncodedExample],
        rows: int,
        seed: int | None,
        pack: bool,
        long_threshold: int | None,
    ) -> _Source:
        if not examples:
            raise DataError("no examples to lay out. Expected at least one with a note.")
        # The first token has none before it that could predict it.
        targets = [np.flatnonzero(np.asarray(row.loss_mask[1:])) + 1 for row in examples]
        empty = [row.id for row, at in zip(examples, targets, strict=True) if not at.size]
        if empty:
            raise DataError(
                f"{len(empty)} of {len(examples)} examples have nothing to train on: "
                f"{capped(empty)}. Give them notes or leave them out."
            )
        lengths = [len(row.ids) for row in examples]
        long = [long_threshold is not None and length > long_threshold for length in lengths]
        return cls(
            ids=[np.asarray(row.ids, np.int32) for row in examples],
            targets=targets,
            lengths=lengths,
            long=long,
            widths=choose_widths(lengths, long, rows, pack),
            rows=rows,
            seed=seed,
            pack=pack,
        )

    def supervised(self, layout: _Layout) -> int:
        return sum(self.targets[example].size for example in layout.members())

    def layouts(self, epoch: int) -> tuple[_Layout, ...]:
        """The micro-batches of an epoch: a function of the examples, the seed and the epoch."""
        rng = None if self.seed is None else np.random.default_rng([self.seed, epoch])
        order = np.arange(len(self.lengths)) if rng is None else rng.permutation(len(self.lengths))
        steps = -(-np.asarray(self.lengths)[order] // _ORDER_STEP)
        longest_first = order[np.argsort(-steps, kind="stable")].tolist()
        place = best_fit if self.pack else one_each
        out: list[_Layout] = []
        for long in (False, True):
            group = [example for example in longest_first if self.long[example] == long]
            bins = place(self.lengths, group, self.widths)
            bins = _shuffled(bins, rng) if rng else sorted(bins, key=lambda bin: min(bin.members))
            for width in self.widths:
                same = [bin for bin in bins if bin.width == width]
                for at in range(0, len(same), self.rows):
                    out.append(_Layout(width, long, tuple(same[at : at + self.rows])))
        if rng:
            return tuple(_shuffled(out, rng))
        return tuple(sorted(out, key=lambda batch: min(batch.members())))

    def micro_batch(self, layout: _Layout, slots: int) -> MicroBatch:
        shape = (self.rows, layout.width)
        ids, seg = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        idx, tgt = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
        weight = np.zeros(slots, np.float32)
        used = 0
        for row, bin in enumerate(layout.bins):
            start = 0
            for segment, example in enumerate(bin.members):
                end = start + self.lengths[example]
                ids[row, start:end] = self.ids[example]
                seg[row, start:end] = segment
                at = self.targets[example]
                filled = slice(used, used + at.size)
                idx[filled] = row * layout.width + start + at - 1
                tgt[filled] = self.ids[example][at]
                weight[filled] = 1
                start, used = end, used + at.size
        members = tuple(layout.members())
        real = sum(self.lengths[example] for example in members)
        return MicroBatch(ids, seg, idx, tgt, weight, layout.long, real, used, members)


def _shuffled(items: Sequence[_T], rng: np.random.Generator) -> list[_T]:
    return [items[at] for at in rng.permutation(len(items))]
