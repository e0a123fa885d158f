from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_medphi.data import prepared
from mlx_medphi.data.examples import Conversation, Turn
from mlx_medphi.data.load import load_examples
from mlx_medphi.data.prepared import read_splits, report_from_dict, report_to_dict, write_splits
from mlx_medphi.data.splits import prepare
from mlx_medphi.errors import DataError, UsageError


@pytest.fixture
def splits(example):
    note = "eight words and more are in this leaking note"
    rows = [
        example("t1", "Doctor: one", note, split="train", group="g", section="CC"),
        example("t2", "Doctor: two words\nPatient: My name is Jane.", "Ünder", split="train"),
        example("v1", "Doctor: three", note, split="valid"),
        example("e1", "no tags\nat all", "Nothing.", split="test"),
    ]
    return prepare(rows, accept_identifiers=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_reads_back_equal(splits, tmp_path: Path) -> None:
    out = write_splits(splits, tmp_path / "out")
    assert names(out) == ["prepare.json", "test.jsonl", "train.jsonl", "valid.jsonl"]
    assert read_splits(out) == splits
    assert load_examples(out / "train.jsonl") == list(splits.train)
    assert {e.id for e in load_examples(out)} == {"t2", "v1", "e1"}
    assert (out / "train.jsonl").read_bytes().isascii()
    assert names(tmp_path) == ["out"]


def test_prepare_json_says_what_happened_without_quoting_anyone(splits, tmp_path: Path) -> None:
    text = (write_splits(splits, tmp_path / "out") / "prepare.json").read_text(encoding="utf-8")
    content = json.loads(text)
    assert content["dropped"] == [
        {"id": "t1", "reason": "note leak", "partners": ["v1"], "share": 1.0}
    ]
    assert content["dropped_by_reason"] == {"note leak": 1}
    assert content["identifiers_accepted"] is True
    assert content["screening"]["counts"]["introduced_name"] == 1
    assert content["data_hash"] == splits.report.data_hash
    assert "Jane" not in text and "leaking" not in text


def test_a_report_survives_json(splits) -> None:
    assert report_from_dict(json.loads(json.dumps(report_to_dict(splits.report)))) == splits.report


def test_a_side_without_rows_gets_no_file(example, tmp_path: Path) -> None:
    only = prepare([example("a", split="train")])
    out = write_splits(only, tmp_path / "out")
    assert names(out) == ["prepare.json", "train.jsonl"]
    assert read_splits(out) == only


def test_an_empty_folder_may_be_there(splits, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert read_splits(write_splits(splits, tmp_path / "out")) == splits


def test_a_prepared_folder_is_replaced_only_on_request(splits, example, tmp_path: Path) -> None:
    out = write_splits(splits, tmp_path / "out")
    before = (out / "train.jsonl").read_bytes()
    with pytest.raises(UsageError, match="already prepared"):
        write_splits(splits, out)
    other = prepare([example("z", split="train")])
    assert (out / "train.jsonl").read_bytes() == before
    write_splits(other, out, replace=True)
    assert names(out) == ["prepare.json", "train.jsonl"]
    assert read_splits(out) == other


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    ("file", "content"),
    [("notes.txt", "mine"), ("prepare.json", "{}"), ("prepare.json", "[1]"), ("prepare.json", "{")],
)
def test_a_folder_that_is_not_ours_is_never_replaced(
    splits, tmp_path: Path, replace: bool, file: str, content: str
) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match="not a prepared folder"):
        write_splits(splits, tmp_path, replace=replace)
    assert names(tmp_path) == [file]


def test_a_prepared_folder_with_other_files_in_it_is_not_replaced(splits, tmp_path: Path) -> None:
    out = write_splits(splits, tmp_path / "out")
    (out / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UsageError, match="it holds mine.txt"):
        write_splits(splits, out, replace=True)
    assert "mine.txt" in names(out)


def test_a_file_in_the_way_is_an_error(splits, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x", encoding="utf-8")
    with pytest.raises(UsageError, match="a file is there"):
        write_splits(splits, tmp_path / "out", replace=True)


def test_a_write_that_fails_leaves_the_old_folder(
    splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_splits(splits, tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared, "write_json", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        write_splits(splits, out, replace=True)
    assert read_splits(out) == splits
    assert names(tmp_path) == ["out"]


def test_a_row_that_would_not_read_back_is_an_error_and_nothing_is_written(
    example, tmp_path: Path
) -> None:
    row = example("padded", split="train")
    row = type(row)(**{**vars(row), "conversation": Conversation((Turn("Doctor", " Hi "),))})
    with pytest.raises(DataError, match="1 rows would not read back as they are: padded"):
        write_splits(prepare([row]), tmp_path / "out")
    assert names(tmp_path) == []


def test_rows_changed_by_hand_are_noticed(splits, tmp_path: Path) -> None:
    out = write_splits(splits, tmp_path / "out")
    file = out / "valid.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace("three", "four"), encoding="utf-8")
    with pytest.raises(DataError, match=r"valid.jsonl changed since prepare.json was written"):
        read_splits(out)
    (out / "prepare.json").unlink()
    found = read_splits(out)
    assert found.valid[0].conversation.turns[0].text == "four"
    assert found.report.screening is None
    assert found.report.counts == {"jsonl": {"train": 1, "valid": 1, "test": 1}}


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"screening": 3}'])
def test_a_damaged_report_is_an_error(splits, tmp_path: Path, content: str) -> None:
    out = write_splits(splits, tmp_path / "out")
    (out / "prepare.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="not a report of medphi data prepare"):
        read_splits(out)


def test_a_folder_without_rows_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read_splits(tmp_path / "none")
    with pytest.raises(UsageError, match="no train.jsonl, valid.jsonl or test.jsonl"):
        read_splits(tmp_path)


@pytest.mark.slow
def test_real_data_survives_the_round_trip(shared_data: Path, tmp_path: Path) -> None:
    folders = [shared_data / name for name in ("mts-dialog", "primock57", "aci-bench")]
    whole = prepare(load_examples(folders)[::4], accept_identifiers=True)
    out = write_splits(whole, tmp_path / "out")
    assert read_splits(out) == whole
    timed = [e for e in load_examples(out / "test.jsonl") if e.source == "primock57"]
    assert timed and all(turn.start is not None for e in timed for turn in e.conversation.turns)
