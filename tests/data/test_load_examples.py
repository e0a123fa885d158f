from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mlx_medphi.data.load import load_examples
from mlx_medphi.errors import DataError, UsageError

MTS = 'ID,section_header,section_text,dialogue\r\n0,CC,Cough.,"Doctor: Hi."\r\n'
ACI = "dataset,encounter_id,dialogue,note\naci,D2N001,[doctor] hi,A note.\n"
SCORES = (
    "FactualPrecision,FactualRecall,FactualF1,HallucinationRate,OmissionRate,Edit\n1,1,1,0,0,1\n"
)
SUMMARIES = "ID,Dialogue,Reference Summary,Automatic Summary\n0,a,b,c\n"
METADATA = "dataset,encounter_id,id,doctor_name,patient_familyname\naci,D2N001,A1,,Example\n"
ROW = {"prompt": "q", "completion": "a"}


def fill(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        (folder / f"{stem}.{ending}").write_bytes(content.encode())
    return folder


def test_a_csv_is_known_by_its_header(tmp_path: Path) -> None:
    fill(tmp_path, one_csv=MTS, two_csv="\ufeff" + ACI)
    assert load_examples(tmp_path / "one.csv")[0].source == "mts-dialog"
    assert load_examples(str(tmp_path / "two.csv"))[0].source == "aci-bench"


def test_a_folder_of_csv_files_leaves_out_what_accompanies_them_and_logs_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(
        tmp_path, TrainingSet_csv=MTS, ValidationSet_csv=MTS, scores_csv="\ufeff" + SCORES,
        sums_csv=SUMMARIES, train_csv=ACI, train_metadata_csv=METADATA, LICENSE_txt="CC BY",
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        found = load_examples(tmp_path)
    assert [example.id for example in found] == [
        "mts-dialog/train/0000",
        "mts-dialog/valid/0000",
        "aci-bench/train/D2N001",
    ]
    for name in ("scores.csv", "sums.csv", "train_metadata.csv"):
        assert any(name in message for message in caplog.messages)


def test_a_folder_of_jsonl_files_takes_splits_from_their_names(tmp_path: Path) -> None:
    line = json.dumps(ROW) + "\n"
    fill(tmp_path, train_jsonl=line, valid_jsonl=line, extra_jsonl=line)
    found = {example.id: example.split for example in load_examples(tmp_path)}
    assert found == {
        "jsonl/extra/000001": None,
        "jsonl/train/000001": "train",
        "jsonl/valid/000001": "valid",
    }


def test_several_paths_are_read_in_turn_and_equal_rows_kept_once(tmp_path: Path) -> None:
    fill(tmp_path, TrainingSet_csv=MTS, AugmentedTrainingSet_csv=MTS)
    assert len(load_examples([tmp_path, tmp_path / "TrainingSet.csv"])) == 1


def test_different_rows_with_one_id_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, TrainingSet_csv=MTS, AugmentedTrainingSet_csv=MTS.replace("Cough", "Pain"))
    with pytest.raises(DataError, match="share an id with a different row: mts-dialog/train/0000"):
        load_examples(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MTS.replace("dialogue", "dialog"), "column dialogue missing"),
        (ACI.replace("note\n", "notes\n"), "column note missing"),
        ("a,b\n1,2\n", "none of the known csv headers. Found 2 columns, none of them known"),
        ("", "none of the known csv headers. Found nothing"),
        (SCORES, "holds no conversations"),
    ],
)
def test_a_csv_of_another_form_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    fill(tmp_path, x_csv=content)
    with pytest.raises(DataError, match=message):
        load_examples(tmp_path / "x.csv")


def test_an_unknown_csv_in_a_folder_is_not_passed_over(tmp_path: Path) -> None:
    fill(tmp_path, TrainingSet_csv=MTS, other_csv="a,b\n1,2\n")
    with pytest.raises(DataError, match="none of the known csv headers"):
        load_examples(tmp_path)


@pytest.mark.parametrize(("name", "kind"), [("a.txt", "a .txt file"), ("a", "without an ending")])
def test_other_endings_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=kind):
        load_examples(tmp_path / name)


def test_an_empty_folder_names_the_folders_in_it(tmp_path: Path) -> None:
    (tmp_path / "Main-Dataset").mkdir()
    (tmp_path / ".git").mkdir()
    with pytest.raises(DataError, match=r"It has the folders Main-Dataset: name one") as caught:
        load_examples(tmp_path)
    assert ".git" not in str(caught.value)


def test_a_path_that_does_not_exist_and_no_path_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        load_examples(tmp_path / "none")
    with pytest.raises(UsageError, match="no data was given"):
        load_examples([])


def test_the_published_folders(shared_data: Path) -> None:
    found = load_examples([shared_data / name for name in ("mts-dialog", "primock57", "aci-bench")])
    assert len(found) == 1501 + 45 + 87
    assert len({example.id for example in found}) == len(found)


@pytest.mark.parametrize("name", ["x.csv", "."])
def test_patient_text_in_place_of_a_header_is_not_quoted(tmp_path: Path, name: str) -> None:
    fill(tmp_path, x_csv='1,GENHX,"Mr Smith coughs","Doctor: Hello Mr Smith"\n' * 3)
    with pytest.raises(DataError, match="Found 4 columns, none of them known") as caught:
        load_examples(tmp_path / name)
    assert "Smith" not in str(caught.value)
