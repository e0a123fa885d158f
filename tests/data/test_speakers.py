from __future__ import annotations

import pytest

from mlx_medphi.data.speakers import canonical_speaker, is_canonical, split_tag


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("Doctor", "Doctor"),
        (" dr ", "Doctor"),
        ("Patient", "Patient"),
        ("pt", "Patient"),
        ("Doctor_2", "Doctor_2"),
        ("Doctor 2", "Doctor_2"),
        ("Doctor_02", "Doctor_2"),
        ("Docotr_2", "Doctor_2"),
        ("Guest_family2", "Guest_family_2"),
        ("Gest_family", "Guest_family"),
        ("Guest_clinican", "Guest_clinician"),
        ("patient_guest", "Guest_family"),
        ("Mother", "Guest_family"),
        ("Nurse", "Guest_clinician"),
        ("Speaker 3", "Speaker_3"),
    ],
)
def test_variants_and_typos_become_one_canonical_name(tag: str, name: str) -> None:
    assert canonical_speaker(tag) == name
    assert is_canonical(name)


@pytest.mark.parametrize("word", ["Plan", "Factor", "Note", "Allergies", "Pain", "patio", "2"])
def test_ordinary_words_are_no_speakers(word: str) -> None:
    assert canonical_speaker(word) is None


@pytest.mark.parametrize("name", ["doctor", "Doctor_0", "Doctor_2_3", "Bob", "Doctor:", "Doctor "])
def test_other_spellings_are_not_canonical(name: str) -> None:
    assert not is_canonical(name)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("Doctor: Hello. ", ("Doctor", "Hello.")),
        ("  [doctor] hello", ("Doctor", "hello")),
        ("[patient_guest]: yes", ("Guest_family", "yes")),
        ("Guest_family. I am his wife.", ("Guest_family", "I am his wife.")),
        ("Patient:", ("Patient", "")),
        ("Doctor: Plan: rest", ("Doctor", "Plan: rest")),
    ],
)
def test_a_tag_is_split_from_its_words(line: str, parts: tuple[str, str]) -> None:
    assert split_tag(line) == parts


@pytest.mark.parametrize(
    "line",
    ["Plan: rest", "I told the doctor: no", "Doctor. Please help", "[laughs] yes", "", "10:30"],
)
def test_a_line_without_a_speaker_is_left_whole(line: str) -> None:
    assert split_tag(line) is None
