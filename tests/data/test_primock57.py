from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_medphi.data import primock57
from mlx_medphi.data.examples import Turn
from mlx_medphi.errors import DataError

Label = tuple[float, float, str]


def textgrid(labels: list[Label], size: int | None = None) -> str:
    count = len(labels) if size is None else size
    lines = [
        'File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0 ", "xmax = 9.5 ",
        "tiers? <exists> ", "size = 1 ", "item []: ", "    item [1]:",
        '        class = "IntervalTier" ', '        name = "Speaker" ', "        xmin = 0 ",
        "        xmax = 9.5 ", f"        intervals: size = {count} ",
    ]  # fmt: skip
    for number, (start, end, text) in enumerate(labels, start=1):
        lines += [
            f"        intervals [{number}]:", f"            xmin = {start} ",
            f"            xmax = {end} ", f'            text = "{text}" ',
        ]  # fmt: skip
    return "\r\n".join(lines) + "\r\n"


def consultation(
    folder: Path,
    doctor: list[Label],
    patient: list[Label],
    name: str = "day1_consultation02",
    **note: object,
) -> Path:
    (folder / "transcripts").mkdir(exist_ok=True)
    (folder / "notes").mkdir(exist_ok=True)
    for role, labels in (("doctor", doctor), ("patient", patient)):
        file = folder / "transcripts" / f"{name}_{role}.TextGrid"
        file.write_bytes(textgrid(labels).encode())
    content = {"day": 1, "consultation": 2, "note": "PC:\tcough\n", "highlights": []} | note
    (folder / "notes" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def labelled(tmp_path: Path, label: str) -> list[str]:
    file = tmp_path / "a.TextGrid"
    file.write_bytes(textgrid([(0, 1, label)]).encode())
    return [utterance.text for utterance in primock57.parse_textgrid(file, "Doctor")]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("<UNSURE>Hello how</UNSURE> um.", ["Hello how um."]),
        ("<UNIN/> Sorry", ["[inaudible] Sorry"]),
        ("I<UNIN/>am <INAUDIBLE_SPEECH/>, so", ["I [inaudible] am [inaudible], so"]),
        ("<UNIN/> <INAUDIBLE_SPEECH/><UNIN/>", ["[inaudible]"]),
        ("<UNSURE></UNSURE> ", []),
        ("", []),
        ('he said ""ow""', ['he said "ow"']),
    ],
)
def test_unsure_words_are_kept_and_gaps_stay_visible(
    tmp_path: Path, label: str, words: list[str]
) -> None:
    assert labelled(tmp_path, label) == words


def test_an_unknown_tag_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="interval 1 has an unknown tag"):
        labelled(tmp_path, "oh <LAUGHTER/> yes")


def test_overlapping_turns_are_sorted_by_start_and_neighbours_joined(tmp_path: Path) -> None:
    doctor = [(0.0, 3.0, "Hello."), (3.0, 4.0, ""), (4.0, 6.0, "What is wrong?")]
    patient = [(2.5, 3.5, "Hi."), (6.5, 9.0, "I cough"), (8.0, 8.5, "a lot.")]
    (found,) = primock57.read(consultation(tmp_path, doctor, patient))
    assert found.conversation.turns == (
        Turn("Doctor", "Hello.", 0.0, 3.0),
        Turn("Patient", "Hi.", 2.5, 3.5),
        Turn("Doctor", "What is wrong?", 4.0, 6.0),
        Turn("Patient", "I cough a lot.", 6.5, 9.0),
    )
    assert found.note.text == "PC: cough"
    assert (found.id, found.split) == ("primock57/day1_consultation02", "day1")


def test_a_cut_file_is_named_with_what_it_declares(tmp_path: Path) -> None:
    whole = textgrid([(0, 1, "one"), (1, 2, "two"), (2, 3, "three")])
    file = tmp_path / "a.TextGrid"
    for cut in (len(whole) // 2 + 100, whole.index("three") + 2):
        file.write_bytes(whole[:cut].encode())
        with pytest.raises(DataError, match=r"whole intervals, expected 3"):
            primock57.parse_textgrid(file, "Doctor")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hello", "not a long-form Praat TextGrid"),
        ('File type = "ooTextFile"\nObject class = "TextGrid"\n', "0 interval tiers"),
        (textgrid([(0, 1, "a")], size=2), "1 whole intervals, expected 2"),
        (textgrid([(0, 1, "a"), (1, 2, "b")], size=1), "2 whole intervals, expected 1"),
        (textgrid([(0, 1, "a")], size=10**13), "1 whole intervals, expected 10000000000000 "),
        (
            textgrid([(0, 1, "a")]).replace("size = 1 \r\n        i", f"size = {'9' * 5000}\r\n i"),
            "1 whole intervals, expected 99999999999999999999 ",
        ),
        (
            textgrid([(0, 1, "a")]).replace("[1]:\r\n            x", f"[{'9' * 5000}]:\r\n x"),
            "1 whole intervals, expected 1 ",
        ),
    ],
)
def test_a_malformed_textgrid_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "a.TextGrid"
    file.write_bytes(content.encode())
    with pytest.raises(DataError, match=message):
        primock57.parse_textgrid(file, "Doctor")


def test_a_missing_channel_and_a_missing_note_are_named_together(tmp_path: Path) -> None:
    folder = consultation(tmp_path, [(0, 1, "a")], [(1, 2, "b")])
    (folder / "transcripts" / "day1_consultation02_patient.TextGrid").rename(
        folder / "transcripts" / "day1_consultation03_patient.TextGrid"
    )
    (folder / "notes" / "summary.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        primock57.read(folder)
    assert "transcripts missing: day1_consultation02_patient, summary_doctor" in str(caught.value)
    assert "transcripts without a note: day1_consultation03_patient" in str(caught.value)
    assert "notes not named dayD_consultationNN: summary" in str(caught.value)


def test_a_folder_without_notes_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "transcripts").mkdir()
    with pytest.raises(DataError, match=r"no notes/\*\.json"):
        primock57.read(tmp_path)


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ({"note": " \n"}, "the note is empty"),
        ({"note": None}, 'no text under "note"'),
        ({"day": 3}, "says day 3, consultation 2; its name says day 1, consultation 2"),
        ({"day": "my chest hurts"}, r"day is not a number\. Correct or remove it\.$"),
        ({"day": True, "consultation": 2.0}, "day and consultation is not a number"),
    ],
)
def test_a_note_that_is_empty_or_of_another_consultation_is_an_error(
    tmp_path: Path, note: dict[str, object], message: str
) -> None:
    folder = consultation(tmp_path, [(0, 1, "a")], [(1, 2, "b")], **note)
    with pytest.raises(DataError, match=message):
        primock57.read(folder)


def test_a_note_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    folder = consultation(tmp_path, [(0, 1, "a")], [(1, 2, "b")])
    (folder / "notes" / "day1_consultation02.json").write_text('{"note": "cut', encoding="utf-8")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        primock57.read(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, f'{{"day": {"1" * 5000}}}'])
def test_a_note_that_json_cannot_hold_is_an_error(tmp_path: Path, content: str) -> None:
    folder = consultation(tmp_path, [(0, 1, "a")], [(1, 2, "b")])
    (folder / "notes" / "day1_consultation02.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="nested too deep, or a number in it is too long"):
        primock57.read(folder)


def test_two_silent_channels_are_an_error(tmp_path: Path) -> None:
    folder = consultation(tmp_path, [(0, 1, "")], [(1, 2, "")])
    with pytest.raises(DataError, match="holds any words"):
        primock57.read(folder)


# Counts of utterances and tags as taken from the files by a plain text search.
def test_the_published_files(shared_data: Path) -> None:
    folder = shared_data / "primock57"
    examples = primock57.read(folder)
    assert len(examples) == 45
    utterances = 0
    for path in sorted((folder / "transcripts").iterdir()):
        utterances += len(primock57.parse_textgrid(path, "Doctor"))
    assert utterances == 5580
    text = "".join(example.conversation.text() for example in examples)
    assert "<" not in text and ">" not in text
    # 1172 <UNIN/> and 683 <INAUDIBLE_SPEECH/>, less those that followed one another directly.
    assert 1700 < text.count(primock57.INAUDIBLE) <= 1172 + 683
    for example in examples:
        speakers = [turn.speaker for turn in example.conversation.turns]
        assert set(speakers) == {"Doctor", "Patient"}
        assert all(one != other for one, other in zip(speakers, speakers[1:], strict=False))
        starts = [turn.start for turn in example.conversation.turns]
        assert starts == sorted(starts, key=lambda start: start or 0.0)
    assert not any("\t" in example.note.text for example in examples)
    assert any("℅" in example.note.text for example in examples)
