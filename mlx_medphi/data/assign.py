"""Decide which side of the split each row belongs to.

MTS-Dialog keeps its official splits. PriMock57 has none, and notes of one day resemble each other
(ROUGE-1 .30 within a day, .19 across days), so it is split by whole days: a random split would
leak the clinicians' style. ACI-Bench's `valid` is a test set, unless its official test sets are
there too, and everything is test when none of it is trained on. Rows without a split of their own
are drawn by a seeded hash, whole groups at a time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_medphi.data.examples import Example
from mlx_medphi.data.leaks import NGRAM, normalised
from mlx_medphi.errors import UsageError, capped

__all__ = ["SIDES", "Side", "SplitPlan", "assign"]

Side = Literal["train", "valid", "test"]
SIDES: tuple[Side, ...] = ("train", "valid", "test")

_DAY = re.compile(r"day(\d+)")


@dataclass(frozen=True)
class SplitPlan:
    """How rows are divided.

    Args:
        seed: decides which rows are drawn where a source has no split of its own.
        valid_fraction: share drawn for validation, of sources that bring no validation rows.
        test_fraction: share drawn for the test, of sources that bring no split at all.
        valid_day: the PriMock57 day to validate on; None takes the last day but one.
        test_day: the PriMock57 day to test on; None takes the last day.
        hold_out: sources whose every row is test, as `("aci-bench",)`.
    """

    seed: int = 0
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    valid_day: int | None = None
    test_day: int | None = None
    hold_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fractions = (self.valid_fraction, self.test_fraction)
        if not all(0 <= fraction < 1 for fraction in fractions) or sum(fractions) >= 1:
            raise UsageError(
                f"valid_fraction {self.valid_fraction} and test_fraction {self.test_fraction}: "
                "expected shares from 0 to 1 that leave something to train on."
            )


def assign(examples: Sequence[Example], plan: SplitPlan) -> dict[str, Side]:
    """The side of each row, by its id.

    Raises:
        UsageError: a source to hold out, or a day, that is not among the examples.
    """
    by_source: dict[str, list[Example]] = {}
    for example in examples:
        by_source.setdefault(example.source, []).append(example)
    unknown = set(plan.hold_out) - set(by_source)
    if unknown:
        raise UsageError(
            f"nothing to hold out from {capped(unknown)}. The data has {capped(by_source)}."
        )
    sides: dict[str, Side] = {}
    for source, rows in by_source.items():
        if source in plan.hold_out:
            sides.update((row.id, "test") for row in rows)
        else:
            sides.update(_assign_source(rows, plan))
    return sides


def _assign_source(rows: Sequence[Example], plan: SplitPlan) -> dict[str, Side]:
    by_day = _days(rows, plan)
    sides: dict[str, Side] = {}
    free: list[Example] = []
    splits = {row.split for row in rows}
    for row in rows:
        side = by_day.get(row.split) if row.split in by_day else _official(row, splits)
        if side is None:
            free.append(row)
        else:
            sides[row.id] = side
    test = _draw(free, plan.test_fraction * len(free), plan.seed, "test")
    sides.update((row.id, "test" if row.id in test else "train") for row in free)
    train = [row for row in rows if sides[row.id] == "train"]
    if train and "valid" not in sides.values():
        # A share of what was there before the test was drawn, so that 0.1 means the same twice.
        share = plan.valid_fraction * (len(train) + len(test))
        valid = _draw(train, share, plan.seed, "valid")
        sides.update((row_id, "valid") for row_id in valid)
    return sides


def _official(row: Example, splits: set[str | None]) -> Side | None:
    if row.split in ("train", "valid"):
        if row.source == "aci-bench" and row.split == "valid":
            tested = any(name is not None and name.startswith("test") for name in splits)
            return "valid" if tested and "train" in splits else "test"
        return "train" if row.split == "train" else "valid"
    if row.split is not None and row.split.startswith("test"):
        return "test"
    return None


def _days(rows: Sequence[Example], plan: SplitPlan) -> Mapping[str | None, Side]:
    """The side of each `dayN` split; empty when there are no two days to tell apart."""
    days = sorted({int(m[1]) for row in rows if (m := _DAY.fullmatch(row.split or ""))})
    if not days:
        return {}
    wanted = [day for day in (plan.valid_day, plan.test_day) if day is not None]
    if set(wanted) - set(days) or len(set(wanted)) != len(wanted):
        raise UsageError(
            f"validation day {plan.valid_day} and test day {plan.test_day}: expected two different "
            f"days of those in the data, {', '.join(map(str, days))}."
        )
    if len(days) == 1:
        return {}
    test_day = plan.test_day or [day for day in days if day != plan.valid_day][-1]
    rest = [day for day in days if day != test_day]
    # With only two days one is left to train on, and validation rows are drawn from it.
    valid_day = plan.valid_day or (rest[-1] if len(rest) > 1 else None)
    sides: dict[str | None, Side] = {f"day{day}": "train" for day in days}
    if valid_day is not None:
        sides[f"day{valid_day}"] = "valid"
    sides[f"day{test_day}"] = "test"
    return sides


def _draw(rows: Sequence[Example], share: float, seed: int, purpose: Side) -> set[str]:
    """Ids of about `share` rows: whole groups, at least one, never all of them.

    A group's place in the draw depends on the seed and its own id alone, so further rows do not
    shuffle those that were there.
    """
    groups = _groups(rows)
    if share == 0 or len(groups) < 2:
        return set()

    def place(key: str) -> bytes:
        return hashlib.sha256(f"{seed}/{purpose}/{key}".encode()).digest()

    order = sorted(groups, key=place)
    wanted = max(1, round(share))
    drawn: set[str] = set()
    for key in order:
        if len(drawn) + len(groups[key]) <= wanted:
            drawn.update(groups[key])
    # Where every group is larger than the share wanted, the smallest is nearest to it.
    return drawn or set(groups[min(order, key=lambda key: len(groups[key]))])


def _groups(rows: Sequence[Example]) -> dict[str, list[str]]:
    """Row ids joined by group, by an equal dialogue, or by an equal note of 8 words or more."""
    parent: dict[object, object] = {}

    def root(key: object) -> object:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for row in rows:
        note = normalised(row.note.text)
        keys: list[object] = [("dialogue", normalised(row.conversation.words()))]
        if row.group is not None:
            keys.append(("group", row.group))
        if len(note) >= NGRAM:
            keys.append(("note", note))
        for key in keys:
            parent[root(key)] = root(("row", row.id))
    groups: dict[object, list[str]] = {}
    for row in rows:
        groups.setdefault(root(("row", row.id)), []).append(row.id)
    return {min(ids): ids for ids in groups.values()}
