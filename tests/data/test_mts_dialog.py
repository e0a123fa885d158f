from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mlx_medphi.data import mts_dialog
from mlx_medphi.data.examples import Turn
from mlx_medphi.data.summary import summarise
from mlx_medphi.errors import DataError

HEADER = "ID,section_header,section_text,dialogue\r\n"


def write(tmp_path: Path, rows: str, name: str = "MTS-Dialog-TrainingSet.csv") -> Path:
    file = tmp_path / name
    file.write_bytes((HEADER + rows).encode())
    return file


def test_crlf_inside_a_dialogue_reads_as_lf_does(tmp_path: Path) -> None:
    crlf = '7,CC,Cough.,"Doctor: Hi. \r\nPatient: I cough."\r\n'
    one = mts_dialog.read(write(tmp_path, crlf))
    other = mts_dialog.read(write(tmp_path, crlf.replace(". \r\nP", ".\nP")))
    assert one == other
    assert one[0].conversation.text() == "Doctor: Hi.\nPatient: I cough."
    assert "\r" not in repr(one)


def test_ids_carry_the_split_because_they_restart_in_each(tmp_path: Path) -> None:
    row = '0,CC,Cough.,"Doctor: Hi."\r\n'
    names = {
        "MTS-Dialog-TrainingSet.csv": "train",
        "MTS-Dialog-ValidationSet.csv": "valid",
        "MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv": "test1",
        "MTS-Dialog-TestSet-2-MEDIQA-Sum-2023.csv": "test2",
    }
    for name, split in names.items():
        (found,) = mts_dialog.read(write(tmp_path, row, name))
        assert (found.id, found.split, found.note.section) == (
            f"mts-dialog/{split}/0000",
            split,
            "CC",
        )


def test_a_file_of_ones_own_has_no_split(tmp_path: Path) -> None:
    (found,) = mts_dialog.read(write(tmp_path, 'x1,,Cough.,"Doctor: Hi."\r\n', "clinic.csv"))
    assert (found.id, found.split, found.note.section) == ("mts-dialog/clinic/x1", None, None)


@pytest.mark.parametrize(
    ("number", "padded"),
    [("0", "0000"), ("7", "0007"), ("00012", "0012"), ("12345", "12345"), ("9" * 5000, "9" * 5000)],
    ids=["zero", "short", "padded already", "long", "longer than int() reads"],
)
def test_a_number_is_padded_to_four_digits(tmp_path: Path, number: str, padded: str) -> None:
    (found,) = mts_dialog.read(write(tmp_path, f'{number},CC,Cough.,"Doctor: Hi."\r\n'))
    assert found.id == f"mts-dialog/train/{padded}"


@pytest.mark.parametrize(
    ("dialogue", "turns"),
    [
        ("Guest_family. Hello.", [("Guest_family", "Hello.")]),
        ("Patient: Here. Doctor: Migraine.", [("Patient", "Here."), ("Doctor", "Migraine.")]),
        (
            "Patient: Yes, I am, Doctor: \nDoctor: Ok",
            [("Patient", "Yes, I am, Doctor:"), ("Doctor", "Ok")],
        ),
        ("Patient: Yes. Doctor: \nDoctor: Ok", [("Patient", "Yes. Doctor:"), ("Doctor", "Ok")]),
        ("Patient: Soccer.\n\nSp 3", [("Patient", "Soccer.")]),
        ("Patient: I know.\n.", [("Patient", "I know.")]),
        ('"Doctor: Married? \nPatient: No."', [("Doctor", "Married?"), ("Patient", 'No."')]),
        (" Docotr_2: Hi", [("Doctor_2", "Hi")]),
    ],
)
def test_quirks_of_the_dialogues(dialogue: str, turns: list[tuple[str, str]]) -> None:
    assert mts_dialog.read_dialogue(dialogue).turns == tuple(Turn(*turn) for turn in turns)


def test_augmented_rows_are_grouped_with_their_original(tmp_path: Path) -> None:
    rows = '12,CC,Cough.,"Doctor: Hi."\r\nTR=EN-FR-EN 12,CC,Cough.,"Doctor: Hello."\r\n'
    name = "MTS-Dialog-Augmented-TrainingSet-1-En-FR-EN-2402-Pairs.csv"
    original, copy = mts_dialog.read(write(tmp_path, rows, name))
    assert (original.id, original.augmented) == ("mts-dialog/train/0012", False)
    assert (copy.id, copy.augmented) == ("mts-dialog/train/0012+EN-FR-EN", True)
    assert original.group == copy.group == "mts-dialog/train/0012"
    assert copy.split == "train"


def test_every_empty_field_and_repeated_id_is_listed(tmp_path: Path) -> None:
    rows = (
        ',CC,Cough.,"Doctor: Hi."\r\n1,CC, ,"Doctor: Hi."\r\n2,CC,Ok,\r\n1,CC,Ok,"Doctor: Hi."\r\n'
    )
    with pytest.raises(DataError, match="4 faults") as caught:
        mts_dialog.read(write(tmp_path, rows))
    for fault in (
        "line 2 (ID ): the ID is empty",
        "line 3 (ID 1): the note (section_text) is empty",
        "line 4 (ID 2): the dialogue is empty",
        "line 5 (ID 1): the ID occurs twice",
    ):
        assert fault in str(caught.value)


# Row counts, speaker tags and lengths as published and counted by others over the same files.
def test_the_published_files(shared_data: Path) -> None:
    folder = shared_data / "mts-dialog"
    train = mts_dialog.read(folder / "MTS-Dialog-TrainingSet.csv")
    valid = mts_dialog.read(folder / "MTS-Dialog-ValidationSet.csv")
    test1 = mts_dialog.read(folder / "MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv")
    assert [len(rows) for rows in (train, valid, test1)] == [1201, 100, 200]
    rows = {example.id: example for example in [*train, *valid, *test1]}
    speakers = Counter(turn.speaker for row in train for turn in row.conversation.turns)
    # The counts of raw tags, plus the typos, plus the tags that stood in the middle of a line.
    assert speakers == {
        "Doctor": 5807 + 1,
        "Patient": 4894 + 1,
        "Guest_family": 559 + 2,
        "Guest_clinician": 119 + 2,
        "Doctor_2": 43 + 1,
        "Guest_family_1": 16,
        "Guest_family_2": 9 + 1,
    }
    assert not any("\r" in row.conversation.text() + row.note.text for row in rows.values())
    assert rows["mts-dialog/train/0307"].conversation.turns[-1].speaker == "Patient"
    assert rows["mts-dialog/test1/0194"].conversation.turns[0] == Turn("Doctor", "Are you married?")
    assert "." not in [turn.text for turn in rows["mts-dialog/test1/0102"].conversation.turns]
    summary = summarise(train)
    assert (summary.note_words.median, summary.note_words.p95, summary.note_words.maximum) == (
        14,
        150,
        1020,
    )
    assert (summary.turns.median, summary.turns.maximum) == (6, 94)
    assert len(summary.sections) == 20 and summary.sections["FAM/SOCHX"] == 351
