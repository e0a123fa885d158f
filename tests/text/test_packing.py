"""Packing: every row seen once, few shapes, little padding, targets that are real.

Where another trainer is known to go wrong, its rule stands in the test in a few lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from mlx_medphi.data.examples import Conversation, Example, Note
from mlx_medphi.errors import ConfigError, DataError
from mlx_medphi.text.bins import MAX_WIDTHS, best_fit, choose_widths
from mlx_medphi.text.chat import EncodedExample, encode_examples
from mlx_medphi.text.packing import MicroBatch, Plan, evaluation_batches, plan
from mlx_medphi.text.tokenizer import Tokenizer


def rows_of(lengths: Sequence[int], seed: int = 0) -> list[EncodedExample]:
    """Examples of given lengths whose last 5 to 40 % is the note; every id is used once."""
    rng = np.random.default_rng(seed)
    rows, first = [], 10
    for at, length in enumerate(lengths):
        note = max(1, int(length * rng.uniform(0.05, 0.4)))
        mask = [0] * (length - note) + [1] * note
        rows.append(EncodedExample(f"row/{at}", list(range(first, first + length)), mask))
        first += length
    return rows


def mts_like(count: int = 1201, longest: int = 1024) -> list[int]:
    """Lengths spread as in MTS-Dialog: median 196, p90 640."""
    lengths = np.exp(np.random.default_rng(0).normal(np.log(196), 0.923, count))
    return [int(length) for length in np.clip(lengths, 40, longest)]


def padding(widths_and_lengths: list[tuple[int, list[int]]]) -> float:
    """Share of padding in batches given as (width, lengths)."""
    positions = sum(width * len(batch) for width, batch in widths_and_lengths)
    return 1 - sum(sum(batch) for _, batch in widths_and_lengths) / positions


def batches_of_four(lengths: list[int]) -> list[tuple[int, list[int]]]:
    batches = [lengths[at : at + 4] for at in range(0, len(lengths), 4)]
    return [(1 + 32 * -(-max(batch) // 32), batch) for batch in batches]


def same(one: Sequence[MicroBatch], other: Sequence[MicroBatch]) -> bool:
    fields = ("ids", "seg", "idx", "tgt", "weight")
    return len(one) == len(other) and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one, other, strict=True)
        for name in fields
    )


def companions(planned: Plan, epoch: int) -> set[frozenset[int]]:
    """Which examples come in one micro-batch."""
    return {frozenset(batch.examples) for batch in planned.epoch(epoch)}


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_padding_is_below_a_tenth(rows: int) -> None:
    lengths = mts_like()
    planned = plan(rows_of(lengths), rows=rows, seed=0, epochs=2)
    assert planned.padding_share < 0.03
    counted = [(b.ids.size, b.tokens_real) for e in (0, 1) for b in planned.epoch(e)]
    positions, real = (sum(column) for column in zip(*counted, strict=True))
    assert planned.padding_share == pytest.approx(1 - real / positions, abs=1e-12)
    # The rule of old: sort by the number of keys of a row, which is the same for all.
    assert padding(batches_of_four(sorted(lengths, key=lambda _: 1))) > 0.4


@pytest.mark.parametrize("longest", [1024, 2048, 4294])
@pytest.mark.parametrize("pack", [True, False])
def test_widths_are_few_and_known_before_the_first_step(longest: int, pack: bool) -> None:
    lengths = mts_like(longest=longest)
    planned = plan(rows_of(lengths), rows=4, seed=0, epochs=2, pack=pack)
    shapes = {(b.ids.shape, b.weight.shape) for e in (0, 1) for b in planned.epoch(e)}
    allowed = zip(planned.shapes.widths, planned.shapes.slots, strict=True)
    assert shapes <= {((4, width), (slots,)) for width, slots in allowed}
    assert len(planned.shapes.widths) <= MAX_WIDTHS
    # The rule of old: every multiple of 32 that occurs is one more trace.
    assert len({width for width, _ in batches_of_four(sorted(lengths))}) > 4 * MAX_WIDTHS


def test_neighbours_change_from_epoch_to_epoch_and_not_from_run_to_run() -> None:
    rows = rows_of(mts_like(200))
    one, other = (plan(rows, rows=2, seed=7, epochs=2) for _ in range(2))
    for epoch in (0, 1):
        assert same(list(one.epoch(epoch)), list(other.epoch(epoch)))
    kept = companions(one, 0) & companions(one, 1)
    assert len(kept) < 0.1 * len(companions(one, 0))
    # The rule of old: batches cut from one sorted list, and only their order drawn anew.
    by_length = sorted(range(200), key=lambda at: len(rows[at].ids))
    frozen = [frozenset(by_length[at : at + 4]) for at in range(0, 200, 4)]
    rng = np.random.default_rng(7)
    drawn = [{frozen[at] for at in rng.permutation(50)} for _ in (0, 1)]
    assert drawn[0] == drawn[1]


def test_another_seed_gives_another_order() -> None:
    rows = rows_of(mts_like(60))
    orders = [
        [batch.examples for batch in plan(rows, rows=2, seed=seed).epoch(0)] for seed in (0, 1)
    ]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("pack", [True, False])
def test_targets_are_the_supervised_tokens_and_nothing_else(pack: bool) -> None:
    rows = rows_of(mts_like(60))
    supervised = [
        number for row in rows for number, mask in zip(row.ids, row.loss_mask, strict=True) if mask
    ]
    found: list[int] = []
    for batch in plan(rows, rows=2, seed=0, pack=pack).epoch(0):
        used = batch.weight == 1
        assert used.sum() == batch.tokens_supervised == batch.weight.sum()
        found += batch.tgt[used].tolist()
        # Each target follows the position that predicts it, in the same example.
        before, seg = batch.idx[used], batch.seg.reshape(-1)
        np.testing.assert_array_equal(batch.ids.reshape(-1)[before + 1], batch.tgt[used])
        np.testing.assert_array_equal(seg[before], seg[before + 1])
        assert (seg[before] >= 0).all()
        assert not batch.idx[~used].any() and not batch.tgt[~used].any()
    assert sorted(found) == sorted(supervised)
    # The rule of old: steps <= length, one position too many in every row.
    extra = 0
    for row in rows:
        offset, steps = row.loss_mask.index(1), np.arange(1, len(row.ids) + 32)
        extra += int(((steps >= offset) & (steps <= len(row.ids))).sum()) - sum(row.loss_mask)
    assert extra == len(rows)


def test_target_of_the_first_token_does_not_exist() -> None:
    (batch,) = evaluation_batches([EncodedExample("a", [5, 6, 7], [1, 0, 1])], rows=1)
    assert batch.tokens_supervised == 1
    assert (batch.idx[0], batch.tgt[0]) == (1, 7)


def test_rows_without_targets_are_refused_by_name() -> None:
    rows = [*rows_of([50, 60]), EncodedExample("row/lost", [5, 6, 7], [1, 0, 0])]
    with pytest.raises(DataError, match="1 of 3 examples have nothing to train on: row/lost"):
        plan(rows, rows=2, seed=0)


def test_cutting_the_end_loses_the_targets_and_shortening_does_not(tokenizer: Tokenizer) -> None:
    said = Conversation.from_text("\n".join(f"Doctor: question {n}?" for n in range(60)))
    row = Example("row/0", "synthetic", said, Note("A short note."))
    (whole,) = encode_examples(tokenizer, [row], 10_000).examples
    # The rule of old: keep the first tokens. No target is left, and the loss is 0 / 0.
    assert sum(whole.loss_mask[:400]) == 0
    (short,) = encode_examples(tokenizer, [row], 400).examples
    (batch,) = evaluation_batches([short], rows=1)
    assert batch.tokens_supervised == sum(whole.loss_mask)


@pytest.mark.parametrize("count", [1, 3, 10, 57])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("seed", [0, None])
def test_every_row_is_seen_exactly_once_per_epoch(count: int, pack: bool, seed: int | None) -> None:
    rows = rows_of(mts_like(count))
    planned = plan(rows, rows=4, seed=seed, epochs=2, pack=pack)
    for epoch in (0, 1):
        batches = list(planned.epoch(epoch))
        assert Counter(at for batch in batches for at in batch.examples) == Counter(range(count))
        assert len(batches) == planned.micro_batches[epoch]
        seen = np.concatenate([batch.ids[batch.seg >= 0] for batch in batches])
        assert sorted(seen.tolist()) == sorted(number for row in rows for number in row.ids)
        assert sum(batch.tokens_real for batch in batches) == len(seen)
        # Rows that fill up the last micro-batch weigh nothing.
        assert all(batch.ids[batch.seg < 0].sum() == 0 for batch in batches)
    # The rule of old: whole batches only.
    assert len(range(0, count - 4 + 1, 4)) * 4 < count


def test_segments_are_whole_examples_in_order() -> None:
    rows = rows_of(mts_like(40))
    for batch in plan(rows, rows=2, seed=3).epoch(0):
        found = []
        for ids, seg in zip(batch.ids, batch.seg, strict=True):
            numbers = seg[seg >= 0]
            assert (np.diff(numbers) >= 0).all() and (seg[len(numbers) :] == -1).all()
            found += [ids[seg == number].tolist() for number in range(numbers.max(initial=-1) + 1)]
        assert found == [rows[at].ids for at in batch.examples]


def test_arrays_have_the_promised_types() -> None:
    batch = next(plan(rows_of([50, 60]), rows=2, seed=0).epoch(0))
    assert batch.ids.dtype == batch.seg.dtype == batch.idx.dtype == batch.tgt.dtype == np.int32
    assert batch.weight.dtype == np.float32
    assert batch.weight.size % 64 == 0


def test_order_does_not_depend_on_how_often_one_evaluates() -> None:
    rows, held_out = rows_of(mts_like(60)), rows_of(mts_like(30), seed=1)
    planned = plan(rows, rows=2, seed=0, epochs=2)
    undisturbed = [*planned.epoch(0), *planned.epoch(1)]
    disturbed = []
    for epoch in (0, 1):
        for batch in planned.epoch(epoch):
            disturbed.append(batch)
            np.random.permutation(10)
            evaluation_batches(held_out, rows=2)
    assert same(undisturbed, disturbed)

    # The rule of old: one generator for both orders.
    def orders(evaluations: int) -> list[list[int]]:
        one = np.random.default_rng(0)
        first, *_, second = [one.permutation(60).tolist() for _ in range(2 + evaluations)]
        return [first, second]

    assert orders(evaluations=1) != orders(evaluations=2)


def test_evaluation_is_the_same_every_time_and_in_the_order_of_the_rows() -> None:
    rows = rows_of(mts_like(50))
    assert same(evaluation_batches(rows, rows=2), evaluation_batches(rows, rows=2))
    alone = evaluation_batches(rows_of([50] * 10), rows=2, pack=False)
    assert [batch.examples for batch in alone] == [(at, at + 1) for at in range(0, 10, 2)]


def test_run_can_go_on_from_any_micro_batch() -> None:
    planned = plan(rows_of(mts_like(60)), rows=2, seed=0, epochs=3)
    run = [batch for epoch in range(3) for batch in planned.epoch(epoch)]
    for at in (0, 1, planned.micro_batches[0], len(run) - 1):
        epoch, start = planned.locate(at)
        rest = [*planned.epoch(epoch, start)]
        rest += [batch for later in range(epoch + 1, 3) for batch in planned.epoch(later)]
        assert same(rest, run[at:])
    with pytest.raises(IndexError, match="beyond"):
        planned.locate(len(run))
    with pytest.raises(IndexError, match="epoch 3"):
        next(planned.epoch(3))


def test_plan_grows_by_epochs_until_it_has_the_micro_batches_asked_for() -> None:
    rows = rows_of(mts_like(20))
    once = plan(rows, rows=2, seed=0).micro_batches[0]
    planned = plan(rows, rows=2, seed=0, micro_batches=3 * once + 1)
    assert sum(planned.micro_batches) >= 3 * once + 1
    assert sum(planned.micro_batches[:-1]) < 3 * once + 1


@pytest.mark.parametrize("pack", [True, False])
def test_rows_of_both_regimes_never_meet(pack: bool) -> None:
    lengths = mts_like(120)
    planned = plan(rows_of(lengths), rows=2, seed=0, pack=pack, long_threshold=300)
    kinds = set()
    for batch in planned.epoch(0):
        assert {lengths[at] > 300 for at in batch.examples} == {batch.long}
        kinds.add(batch.long)
    assert kinds == {True, False}
    assert not any(batch.long for batch in plan(rows_of(lengths), rows=2, seed=0).epoch(0))


def test_unpacked_rows_hold_one_example() -> None:
    for batch in plan(rows_of(mts_like(30)), rows=4, seed=0, pack=False).epoch(0):
        assert batch.seg.max() == 0


def test_best_fit_fills_the_tightest_row() -> None:
    bins = best_fit([60, 50, 40, 30, 10], range(5), (100, 200))
    assert [bin.members for bin in bins] == [(0, 2), (1, 3, 4)]
    assert [bin.width for bin in best_fit([150, 90, 50], range(3), (100, 200))] == [200, 100]


def test_long_rows_get_a_width_of_their_own_and_short_rows_fill_it() -> None:
    lengths = [200] * 50 + [2000]
    widths = choose_widths(lengths, [False] * 51, 1, pack=True)
    assert widths[-1] == 2016 and len(widths) > 1
    (wide,) = [bin for bin in best_fit(lengths, [50, *range(50)], widths) if bin.width == 2016]
    assert wide.members == (50,)
    bins = best_fit([2000, 10, 5], range(3), (64, 2016))
    assert [bin.members for bin in bins] == [(0, 1, 2)]


def test_widths_of_a_large_set_are_chosen_on_a_survey() -> None:
    lengths = mts_like(30_000)
    widths = choose_widths(lengths, [False] * len(lengths), 4, pack=True)
    assert widths[-1] == 1024 and len(widths) <= MAX_WIDTHS


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"epochs": 0}])
def test_impossible_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        plan(rows_of([50]), **{"rows": 1, "seed": 0, **wrong})  # type: ignore[arg-type]


def test_no_examples_are_refused() -> None:
    with pytest.raises(DataError, match="no examples"):
        plan([], rows=1, seed=0)
