from __future__ import annotations

from pathlib import Path

import pytest

from mlx_medphi.data import aci_bench
from mlx_medphi.data.examples import Turn
from mlx_medphi.errors import DataError

HEADER = "dataset,encounter_id,dialogue,note\n"


def write(tmp_path: Path, rows: str, name: str = "train.csv") -> Path:
    file = tmp_path / name
    file.write_text(HEADER + rows, encoding="utf-8")
    return file


def test_bracketed_tags_and_odd_unicode(tmp_path: Path) -> None:
    dialogue = "[doctor] hi .\n[patient_guest] hello .\n\nand more .\n"
    row = f'aci,D2N001,"{dialogue}","PLAN\n•\u202fRest\u200b."\n'
    (found,) = aci_bench.read(write(tmp_path, row))
    assert found.conversation.turns == (
        Turn("Doctor", "hi ."),
        Turn("Guest_family", "hello . and more ."),
    )
    assert found.note.text == "PLAN\n• Rest."
    assert found.note.section is None
    assert (found.id, found.split) == ("aci-bench/train/D2N001", "train")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("valid.csv", "valid"),
        ("clinicalnlp_taskB_test1.csv", "test1"),
        ("clinicalnlp_taskC_test2.csv", "test2"),
        ("clef_taskC_test3.csv", "test3"),
        ("mine.csv", None),
    ],
)
def test_the_split_follows_from_the_official_name(
    tmp_path: Path, name: str, split: str | None
) -> None:
    (found,) = aci_bench.read(write(tmp_path, 'aci,D1,"[doctor] hi .",A note.\n', name))
    assert found.split == split


def test_every_empty_field_and_repeated_id_is_listed(tmp_path: Path) -> None:
    rows = "aci,,[doctor] hi,x\naci,D1,,x\naci,D2,[doctor] hi, \naci,D1,[doctor] hi,x\n"
    with pytest.raises(DataError, match="4 faults") as caught:
        aci_bench.read(write(tmp_path, rows))
    for fault in ("the encounter_id is empty", "(encounter_id D1): the dialogue is empty",
                  "the note is empty", "the encounter_id occurs twice"):  # fmt: skip
        assert fault in str(caught.value)


def test_the_published_files(shared_data: Path) -> None:
    folder = shared_data / "aci-bench"
    train, valid = (aci_bench.read(folder / f"{split}.csv") for split in ("train", "valid"))
    assert (len(train), len(valid)) == (67, 20)
    turns = [turn for row in [*train, *valid] for turn in row.conversation.turns]
    assert {turn.speaker for turn in turns} == {"Doctor", "Patient", "Guest_family"}
    # One turn per tag, but for three tags with nothing behind them: untagged lines went on with
    # the turn before them.
    assert len(turns) == 1928 + 1807 + 547 + 466 + 38 - 3
    notes = "".join(row.note.text for row in [*train, *valid])
    assert "\u202f" not in notes and "•" in notes
