from __future__ import annotations

import pytest

from mlx_medphi.data.assign import SplitPlan, assign
from mlx_medphi.errors import UsageError


def sides(examples, **plan) -> dict[str, str]:
    return dict(assign(examples, SplitPlan(**plan)))


def rows(example, source: str, **splits: int):
    return [
        example(f"{split}/{i}", f"Doctor: {split} {i}", f"n{split}{i}", source=source, split=split)
        for split, count in splits.items()
        for i in range(count)
    ]


def count(found: dict[str, str]) -> dict[str, int]:
    return {side: list(found.values()).count(side) for side in ("train", "valid", "test")}


def test_official_splits_are_kept(example) -> None:
    found = sides(rows(example, "mts-dialog", train=5, valid=2, test1=1, test2=1))
    assert {row_id.split("/")[0]: side for row_id, side in found.items()} == {
        "train": "train", "valid": "valid", "test1": "test", "test2": "test",
    }  # fmt: skip


def test_primock_is_split_by_whole_days_the_last_one_is_the_test(example) -> None:
    found = sides(rows(example, "primock57", day1=3, day2=2, day3=2, day10=2))
    assert {row_id.split("/")[0]: side for row_id, side in found.items()} == {
        "day1": "train", "day2": "train", "day3": "valid", "day10": "test",
    }  # fmt: skip


def test_primock_days_can_be_chosen(example) -> None:
    examples = rows(example, "primock57", day1=3, day2=2, day3=2)
    assert sides(examples, test_day=1)["day1/0"] == "test"
    assert sides(examples, test_day=1)["day3/0"] == "valid"
    assert sides(examples, valid_day=3)["day2/0"] == "test"
    assert sides(examples, valid_day=1, test_day=2)["day3/0"] == "train"


def test_with_two_days_validation_rows_are_drawn_from_the_first(example) -> None:
    found = sides(rows(example, "primock57", day1=10, day2=3))
    assert count(found) == {"train": 9, "valid": 1, "test": 3}
    assert found["day2/0"] == "test"


def test_a_single_day_is_drawn_at_random(example) -> None:
    assert count(sides(rows(example, "primock57", day1=10))) == {"train": 8, "valid": 1, "test": 1}


@pytest.mark.parametrize("plan", [{"test_day": 9}, {"valid_day": 1, "test_day": 1}])
def test_a_day_that_is_not_there_or_named_twice_is_an_error(example, plan) -> None:
    with pytest.raises(UsageError, match="of those in the data, 1, 2"):
        sides(rows(example, "primock57", day1=1, day2=1), **plan)


def test_aci_valid_is_the_test_unless_the_official_tests_are_there(example) -> None:
    found = sides(rows(example, "aci-bench", train=10, valid=3))
    assert count(found) == {"train": 9, "valid": 1, "test": 3}
    assert found["valid/0"] == "test"
    found = sides(rows(example, "aci-bench", train=10, valid=3, test1=2))
    assert count(found) == {"train": 10, "valid": 3, "test": 2}


def test_aci_is_all_test_when_none_of_it_is_trained_on(example) -> None:
    assert count(sides(rows(example, "aci-bench", valid=3, test1=2))) == {
        "train": 0,
        "valid": 0,
        "test": 5,
    }
    held = sides(rows(example, "aci-bench", train=4, valid=3), hold_out=("aci-bench",))
    assert count(held) == {"train": 0, "valid": 0, "test": 7}


def test_holding_out_a_source_that_is_not_there_is_an_error(example) -> None:
    with pytest.raises(UsageError, match="nothing to hold out from aci"):
        sides([example("a")], hold_out=("aci",))


def test_free_rows_are_drawn_by_seed_in_the_shares_asked_for(example) -> None:
    examples = [example(f"r{i}", f"Doctor: {i}", f"n{i}") for i in range(100)]
    found = sides(examples, valid_fraction=0.2, test_fraction=0.1)
    assert count(found) == {"train": 70, "valid": 20, "test": 10}
    assert found == sides(list(reversed(examples)), valid_fraction=0.2, test_fraction=0.1)
    assert found != sides(examples, valid_fraction=0.2, test_fraction=0.1, seed=1)


def test_rows_of_one_group_note_or_dialogue_stay_together(example) -> None:
    note = "a note of eight words or rather more words"
    examples = [example(f"g{i}", f"Doctor: g{i}", f"n{i}", group="one") for i in range(5)]
    examples += [example(f"n{i}", f"Doctor: n{i}", note) for i in range(5)]
    examples += [example(f"d{i}", "Doctor: the same", f"m{i}") for i in range(5)]
    examples += [example(f"s{i}", f"Doctor: s{i}", "None.") for i in range(15)]
    for seed in range(20):
        found = sides(examples, seed=seed, valid_fraction=0.3, test_fraction=0.3)
        for letter in "gnd":
            assert len({found[f"{letter}{i}"] for i in range(5)}) == 1, (seed, letter)
        assert len({found[f"s{i}"] for i in range(15)}) > 1


def test_groups_are_joined_through_rows_they_share(example) -> None:
    examples = [
        example("a", "Doctor: one", group="x"),
        example("b", "Doctor: two", group="x"),
        example("c", "Doctor: two", group="y"),
        example("d", "Doctor: three", group="y"),
        *(example(f"r{i}", f"Doctor: r{i}") for i in range(8)),
    ]
    for seed in range(20):
        found = sides(examples, seed=seed, valid_fraction=0.3, test_fraction=0.3)
        assert len({found[name] for name in "abcd"}) == 1


def test_a_new_row_does_not_reshuffle_the_old_ones(example) -> None:
    examples = [example(f"r{i}", f"Doctor: {i}") for i in range(50)]
    before = sides(examples, valid_fraction=0.2, test_fraction=0.2)
    after = sides([*examples, example("new", "Doctor: new")], valid_fraction=0.2, test_fraction=0.2)
    assert sum(before[row_id] != after[row_id] for row_id in before) <= 2


@pytest.mark.parametrize(("groups", "expected"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1))])
def test_something_is_always_left_to_train_on(example, groups, expected) -> None:
    found = count(sides([example(f"r{i}", f"Doctor: {i}") for i in range(groups)]))
    assert tuple(found.values()) == expected


def test_where_every_group_is_larger_than_the_share_the_smallest_is_drawn(example) -> None:
    examples = [
        example(f"{group}{i}", f"Doctor: {group}{i}", group=group)
        for group, size in (("a", 9), ("b", 5), ("c", 8))
        for i in range(size)
    ]
    found = sides(examples, test_fraction=0.1, valid_fraction=0.0)
    assert {row_id[0] for row_id, side in found.items() if side == "test"} == {"b"}


@pytest.mark.parametrize("shares", [(-0.1, 0.1), (0.5, 0.5), (0.1, 1.0)])
def test_shares_that_leave_nothing_to_train_on_are_refused(shares) -> None:
    with pytest.raises(UsageError, match="expected shares"):
        SplitPlan(valid_fraction=shares[0], test_fraction=shares[1])
