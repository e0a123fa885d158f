from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from mlx_medphi.data.assign import SplitPlan, assign
from mlx_medphi.data.load import load_examples
from mlx_medphi.data.splits import Dropped, prepare
from mlx_medphi.errors import DataError

NOTE = "the cough began two weeks ago and is getting worse"
TALK = "Doctor: " + " ".join(f"word{i}" for i in range(20))


def mts(example, split: str, row: int, talk: str, note: str, **rest):
    row_id = f"mts-dialog/{split}/{row:04d}"
    rest.setdefault("group", row_id)
    return example(row_id, talk, note, source="mts-dialog", split=split, **rest)


@pytest.fixture
def leaky(example):
    return [
        mts(example, "train", 0, "Doctor: one", "Clean."),
        mts(example, "train", 1, "Doctor: newly written", NOTE.upper()),
        mts(example, "train", 2, TALK + " more", "Other."),
        mts(example, "train", 3, "Doctor: one", "Clean."),
        mts(example, "valid", 0, "Doctor: first", NOTE),
        mts(example, "test1", 0, TALK, "Else."),
        mts(example, "test1", 1, "Doctor: third", "Clean."),
    ]


def test_leaking_and_repeated_rows_leave_train_with_reason_and_partner(leaky) -> None:
    splits = prepare(leaky)
    assert [row.id[-4:] for row in splits.train] == ["0000"]
    assert splits.report.dropped == (
        Dropped("mts-dialog/train/0001", "note leak", ("mts-dialog/valid/0000",), 1.0),
        Dropped("mts-dialog/train/0002", "dialogue leak", ("mts-dialog/test1/0000",), 1.0),
        Dropped("mts-dialog/train/0003", "duplicate", ("mts-dialog/train/0000",), 1.0),
    )
    assert splits.report.dropped_by_reason == {"note leak": 1, "dialogue leak": 1, "duplicate": 1}
    assert splits.report.given == 7
    assert splits.report.borderline == ()
    assert splits.report.counts == {"mts-dialog": {"train": 1, "valid": 1, "test": 2}}


def test_evaluation_rows_stay_and_the_clean_ones_are_known(leaky) -> None:
    splits = prepare(leaky)
    assert (len(splits.valid), len(splits.test)) == (1, 2)
    assert splits.report.leaked_evaluation == ("mts-dialog/test1/0000", "mts-dialog/valid/0000")
    assert [row.id for row in splits.clean("test")] == ["mts-dialog/test1/0001"]
    assert splits.clean("valid") == ()
    assert splits.clean("train") == splits.train


def test_no_leak_is_left(leaky) -> None:
    splits = prepare(leaky)
    again = prepare([*splits.train, *splits.valid, *splits.test])
    assert again.report.dropped == () and again.train == splits.train


def test_borderline_pairs_are_listed_and_kept(example) -> None:
    half = "Doctor: " + " ".join(f"word{i}" for i in range(14)) + " and then it went another way"
    splits = prepare([mts(example, "train", 0, half, "a"), mts(example, "test1", 0, TALK, "b")])
    assert len(splits.train) == 1
    (pair,) = splits.report.borderline
    assert 0.4 <= pair.share < 0.8 and pair.evaluation_id == "mts-dialog/test1/0000"
    assert splits.report.leaked_evaluation == ()


def test_leaks_are_found_across_sources(example) -> None:
    rows = [example("a", TALK, "x", split="train"), mts(example, "test1", 0, TALK, "y")]
    splits = prepare([*rows, example("b", "Doctor: b", split="train")])
    assert [row.id for row in splits.report.dropped] == ["a"]


def test_augmented_rows_are_left_out_unless_asked_for(example) -> None:
    rows = [
        mts(example, "train", 0, "Doctor: one", "First."),
        mts(example, "train", 1, TALK, "Second."),
        mts(example, "valid", 0, "Doctor: two", "Fourth."),
        mts(example, "test1", 0, TALK, "Third."),
    ]
    for row in (0, 1):
        original = f"mts-dialog/train/{row:04d}"
        copy = mts(
            example, "train", row, f"Doctor: turned {row}", "x", group=original, augmented=True
        )
        rows.append(type(copy)(**{**vars(copy), "id": copy.id + "+EN-FR-EN"}))
    without = prepare(rows)
    assert without.report.dropped_by_reason == {"augmented": 2, "dialogue leak": 1}
    splits = prepare(rows, include_augmented=True)
    assert [row.id for row in splits.train if row.augmented] == ["mts-dialog/train/0000+EN-FR-EN"]
    # The copy of a leaking row carries the same note, so it goes with its original.
    assert splits.report.dropped[-1] == Dropped(
        "mts-dialog/train/0001+EN-FR-EN", "original left out", ("mts-dialog/train/0001",)
    )


def test_the_hash_depends_on_content_and_split_but_not_on_the_order_given(leaky, example) -> None:
    report = prepare(leaky).report
    assert prepare(list(reversed(leaky))).report == report
    assert len(report.data_hash) == 64 and set(report.hashes) == {"train", "valid", "test"}
    changed = [*leaky[:-1], mts(example, "test1", 1, "Doctor: third", "Clean!")]
    other = prepare(changed).report
    assert other.data_hash != report.data_hash
    assert other.hashes["test"] != report.hashes["test"]
    assert other.hashes["train"] == report.hashes["train"]


def test_identifiers_stop_the_preparation_and_name_counts_but_no_text(example) -> None:
    rows = [example("a", "Doctor: My name is Jane.", "Seen 1/2/2003."), example("b", "Doctor: Hi.")]
    with pytest.raises(DataError) as caught:
        prepare(rows)
    assert "date 1, introduced_name 1" in str(caught.value)
    assert "Rows: a." in str(caught.value) and "--accept-identifiers" in str(caught.value)
    assert "Jane" not in str(caught.value)
    report = prepare(rows, accept_identifiers=True).report
    assert report.identifiers_accepted
    assert report.screening is not None and report.screening.row_ids == ("a",)


def test_identifiers_in_rows_that_are_left_out_do_not_stop_it(leaky, example) -> None:
    named = mts(example, "train", 9, TALK + " my name is Jane", "Other.")
    assert [row.id for row in prepare([*leaky, named]).report.dropped].count(named.id) == 1


def test_the_report_says_whom_to_thank(leaky, example) -> None:
    report = prepare([*leaky, example("own", "Doctor: mine")]).report
    (line,) = report.attribution
    assert "MTS-Dialog" in line and "CC BY 4.0" in line


def test_no_rows_and_repeated_ids_are_errors(example) -> None:
    with pytest.raises(DataError, match="no rows to prepare"):
        prepare([])
    with pytest.raises(DataError, match="1 ids occur twice: a"):
        prepare([example("a"), example("a", "Doctor: other")])


# The training rows that leak, by the rule stated in leaks.py. With the second test set, which the
# folder lacks, the list grows by 210, 241, 543, 901 and 989.
MTS_LEAKS = [56, 284, 318, 583, 693, 803, 863, 926, 1007, 1011, 1027, 1069, 1155]
MTS_LEAKED = {
    # Valid 4 equals train 284 word for word once the tag in the middle of its line is read as one;
    # left in as a word, it hides more than half of the 8-grams.
    "valid": [4, 8, 39, 43, 48, 58, 89],
    "test1": [19, 33, 96, 106, 120, 133, 162],
}


def test_the_leaks_of_mts_dialog_are_found_in_seconds(shared_data: Path) -> None:
    examples = load_examples(shared_data / "mts-dialog")
    start = time.perf_counter()
    splits = prepare(examples, accept_identifiers=True)
    seconds = time.perf_counter() - start
    report = splits.report
    leaks = [row for row in report.dropped if row.reason.endswith("leak")]
    assert [int(row.id[-4:]) for row in leaks] == MTS_LEAKS
    rest = [row for row in report.dropped if row not in leaks]
    assert rest == [Dropped("mts-dialog/train/1109", "duplicate", ("mts-dialog/train/0256",), 1.0)]
    for split, rows in MTS_LEAKED.items():
        found = [name for name in report.leaked_evaluation if f"/{split}/" in name]
        assert [int(name[-4:]) for name in found] == rows
    borderline = {(int(o.train_id[-4:]), o.evaluation_id[11:]) for o in report.borderline}
    assert borderline == {
        (421, "test1/0193"), (554, "test1/0184"), (481, "test1/0140"), (366, "test1/0111"),
    }  # fmt: skip
    assert report.counts == {"mts-dialog": {"train": 1201 - 14, "valid": 100, "test": 200}}
    assert (len(splits.clean("valid")), len(splits.clean("test"))) == (93, 193)
    # 1.5 s measured on two shared cores; the limit is there to notice a quadratic search.
    assert seconds < 15


@pytest.mark.slow
def test_primock_and_aci_have_no_leaks_between_their_splits(shared_data: Path) -> None:
    examples = load_examples([shared_data / "primock57", shared_data / "aci-bench"])
    with pytest.raises(DataError, match="personal identifiers found"):
        prepare(examples[::5])
    report = prepare(examples, accept_identifiers=True).report
    assert report.dropped == () and report.leaked_evaluation == ()
    assert report.counts == {
        "aci-bench": {"train": 60, "valid": 7, "test": 20},
        "primock57": {"train": 25, "valid": 10, "test": 10},
    }
    held = assign(examples, SplitPlan(hold_out=("aci-bench",)))
    assert Counter(held[row.id] for row in examples if row.source == "aci-bench") == {"test": 87}
