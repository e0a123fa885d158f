"""Training, validation and test sets without leaks, and a report of everything left out.

`prepare` never loses a row silently: what is not in a split is in the report, with the reason and
the row it was left out for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_medphi.data.assign import SIDES, Side, SplitPlan, assign
from mlx_medphi.data.examples import Example
from mlx_medphi.data.identifiers import Screening, screen
from mlx_medphi.data.jsonl import row_from_example
from mlx_medphi.data.leaks import Overlap, find_overlaps, near_duplicates
from mlx_medphi.data.sources import attribution
from mlx_medphi.errors import DataError, capped
from mlx_medphi.files import json_hash

__all__ = [
    "Dropped",
    "PrepareReport",
    "Reason",
    "Splits",
    "content_hash",
    "count_rows",
    "prepare",
]

Reason = Literal["augmented", "original left out", "note leak", "dialogue leak", "duplicate"]


@dataclass(frozen=True)
class Dropped:
    """A row that is in no split.

    Args:
        id: the row.
        reason: why; a row that leaks both its note and its dialogue counts as a note leak.
        partners: the rows it was left out for, sorted.
        share: the largest share of 8-grams in common with a partner, where that was the reason.
    """

    id: str
    reason: Reason
    partners: tuple[str, ...] = ()
    share: float | None = None


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did.

    Args:
        seed: the seed of random draws.
        given: rows before anything was left out.
        counts: rows by source, then by side.
        dropped: every row left out, sorted by id.
        leaked_evaluation: validation and test rows that a training row leaked into, before that
            row was dropped; scores without them are the `clean` ones.
        borderline: pairs that share 0.4 to 0.8 and are kept.
        screening: personal identifiers found in what is kept; None when it was not screened.
        identifiers_accepted: whether the user said to go on in spite of them.
        hashes: SHA-256 of each side's canonical content.
        data_hash: SHA-256 over the three, by name.
        attribution: who made the sources, and their licences.
    """

    seed: int
    given: int
    counts: Mapping[str, Mapping[str, int]]
    dropped: tuple[Dropped, ...]
    leaked_evaluation: tuple[str, ...]
    borderline: tuple[Overlap, ...]
    screening: Screening | None
    identifiers_accepted: bool
    hashes: Mapping[str, str]
    data_hash: str
    attribution: tuple[str, ...]

    @property
    def dropped_by_reason(self) -> dict[str, int]:
        """How many rows were left out for each reason, the most frequent first."""
        return dict(Counter(row.reason for row in self.dropped).most_common())


@dataclass(frozen=True, repr=False)
class Splits:
    """The three sides, each sorted by id, and the report."""

    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    test: tuple[Example, ...]
    report: PrepareReport

    def clean(self, side: Side) -> tuple[Example, ...]:
        """A side without the rows that training rows, now dropped, had leaked into."""
        leaked = set(self.report.leaked_evaluation)
        rows: tuple[Example, ...] = getattr(self, side)
        return tuple(row for row in rows if row.id not in leaked)

    def __repr__(self) -> str:
        # The rows are conversations: a notebook that shows this object must not hold them.
        sides = f"train={len(self.train)}, valid={len(self.valid)}, test={len(self.test)}"
        return f"Splits({sides}, dropped={len(self.report.dropped)})"


def prepare(
    examples: Sequence[Example],
    *,
    plan: SplitPlan | None = None,
    include_augmented: bool = False,
    accept_identifiers: bool = False,
) -> Splits:
    """Divide examples into train, valid and test, and drop training rows that leak.

    Evaluation rows are never dropped, so that full test sets stay comparable with published runs.

    Args:
        examples: what the readers returned; ids are unique.
        plan: how rows are divided; None takes the defaults of `SplitPlan`.
        include_augmented: keep rows made from others by machine. Off by default: MTS-Dialog's
            back-translations lost line breaks and numbers, and teach inventing.
        accept_identifiers: go on although personal identifiers were found.

    Raises:
        DataError: no rows, two rows with one id, or personal identifiers that were not accepted.
        UsageError: a plan that does not fit the data.
    """
    plan = plan or SplitPlan()
    if not examples:
        raise DataError("there are no rows to prepare. Give at least one conversation and note.")
    twice = [row_id for row_id, count in Counter(e.id for e in examples).items() if count > 1]
    if twice:
        raise DataError(f"{len(twice)} ids occur twice: {capped(twice)}. Give each row its own id.")
    rows = sorted(examples, key=lambda example: example.id)
    dropped: list[Dropped] = []
    if not include_augmented:
        dropped += [Dropped(e.id, "augmented") for e in rows if e.augmented]
        rows = [example for example in rows if not example.augmented]
    sides = assign(rows, plan)
    by_side = {side: [row for row in rows if sides[row.id] == side] for side in SIDES}
    overlaps = find_overlaps(by_side["train"], by_side["valid"] + by_side["test"])
    left_out = _leaking(overlaps)
    left_out.update(_repeating([row for row in by_side["train"] if row.id not in left_out]))
    left_out.update(_orphaned(by_side["train"], left_out))
    by_side["train"] = [row for row in by_side["train"] if row.id not in left_out]
    dropped += left_out.values()
    kept = [row for side in SIDES for row in by_side[side]]
    screening = screen(kept)
    if screening.found and not accept_identifiers:
        raise DataError(_refusal(screening))
    hashes: dict[str, str] = {side: content_hash(by_side[side]) for side in SIDES}
    report = PrepareReport(
        seed=plan.seed,
        given=len(examples),
        counts=count_rows(by_side),
        dropped=tuple(sorted(dropped, key=lambda row: row.id)),
        leaked_evaluation=tuple(sorted({o.evaluation_id for o in overlaps if o.is_leak})),
        borderline=tuple(o for o in overlaps if not o.is_leak),
        screening=screening,
        identifiers_accepted=accept_identifiers,
        hashes=hashes,
        data_hash=json_hash(hashes),
        attribution=attribution(row.source for row in kept),
    )
    train, valid, test = (tuple(by_side[side]) for side in SIDES)
    return Splits(train, valid, test, report)


def content_hash(examples: Sequence[Example]) -> str:
    """SHA-256 of the rows' canonical content, in their order."""
    return json_hash([row_from_example(example) for example in examples])


def count_rows(by_side: Mapping[Side, Sequence[Example]]) -> dict[str, dict[str, int]]:
    """Rows by source, then by side."""
    sources = sorted({row.source for rows in by_side.values() for row in rows})
    return {
        source: {side: sum(row.source == source for row in by_side[side]) for side in SIDES}
        for source in sources
    }


def _leaking(overlaps: Sequence[Overlap]) -> dict[str, Dropped]:
    found: dict[str, list[Overlap]] = {}
    for overlap in overlaps:
        if overlap.is_leak:
            found.setdefault(overlap.train_id, []).append(overlap)
    return {
        row_id: Dropped(
            row_id,
            "note leak" if any(o.part == "note" for o in leaks) else "dialogue leak",
            tuple(sorted({o.evaluation_id for o in leaks})),
            max(o.share for o in leaks),
        )
        for row_id, leaks in found.items()
    }


def _repeating(train: Sequence[Example]) -> dict[str, Dropped]:
    return {
        o.train_id: Dropped(o.train_id, "duplicate", (o.evaluation_id,), o.share)
        for o in near_duplicates(train)
    }


def _orphaned(train: Sequence[Example], left_out: Mapping[str, Dropped]) -> dict[str, Dropped]:
    """Augmented rows whose original was dropped: they carry the same note into training."""
    groups = {row.group: row.id for row in train if row.id in left_out and not row.augmented}
    return {
        row.id: Dropped(row.id, "original left out", (groups[row.group],))
        for row in train
        if row.augmented and row.group in groups and row.group and row.id not in left_out
    }


def _refusal(screening: Screening) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in screening.counts.items() if count)
    rows = screening.row_ids
    return (
        f"personal identifiers found in {len(rows)} rows: {counts}. Rows: {capped(rows)}. Remove "
        "them, or go on with --accept-identifiers (accept_identifiers=True) when the data is "
        "synthetic, de-identified, or yours to use; the choice is recorded beside the data."
    )
