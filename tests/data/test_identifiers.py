"""Every name, number and address below is made up or reserved for documentation."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from mlx_medphi.data import aci_bench, primock57
from mlx_medphi.data.examples import Message
from mlx_medphi.data.identifiers import CATEGORIES, find_identifiers, screen
from mlx_medphi.data.load import load_examples


def found(text: str) -> list[tuple[str, str]]:
    return [(category, text[start:end]) for category, start, end in find_identifiers(text)]


@pytest.mark.parametrize(
    ("text", "category", "span"),
    [
        ("number 943 476 5919 on file", "nhs_number", "943 476 5919"),
        ("number 9434765919 on file", "nhs_number", "9434765919"),
        ("social 078-05-1120.", "ssn", "078-05-1120"),
        ("card 4111 1111 1111 1111 please", "card_number", "4111 1111 1111 1111"),
        ("MRN 000-000-00 seen", "record_number", "MRN 000-000-00"),
        ("medical record number is 123546 .", "record_number", "medical record number is 123546"),
        ("sample 12345678 sent", "record_number", "12345678"),
        ("on 07/29/2008 with", "date", "07/29/2008"),
        ("on 29/07/08 with", "date", "29/07/08"),
        ("on 2008-07-29 with", "date", "2008-07-29"),
        ("on 29.07.2008 with", "date", "29.07.2008"),
        ("in 12/2004 with", "date", "12/2004"),
        ("on March 8, 2006", "date", "March 8"),
        ("the 24th of october", "date", "24th of october"),
        ("in September of 2005", "date", "September of 2005"),
        ("born may 5th", "date", "may 5th"),
        ("ring 555-123-4567 now", "phone", "555-123-4567"),
        ("ring (555) 123-4567 now", "phone", "(555) 123-4567"),
        ("call 555-0123 now", "phone", "call 555-0123"),
        ("ring 07700 900123 now", "phone", "07700 900123"),
        ("ring 020 7946 0958 now", "phone", "020 7946 0958"),
        ("ring +44 20 7946 0958 now", "phone", "+44 20 7946 0958"),
        ("at a.b@example.org today", "email", "a.b@example.org"),
        ("see https://example.org/x today", "url", "https://example.org/x"),
        ("see www.example.org today", "url", "www.example.org"),
        ("host 192.0.2.17.", "ip_address", "192.0.2.17"),
        ("a 93-year-old man", "age_over_89", "93-year-old"),
        ("died at age 91.", "age_over_89", "age 91"),
        ("is ninety-three years old", "age_over_89", "ninety-three years old"),
        ("aged 104", "age_over_89", "aged 104"),
        ("My name is jane.", "introduced_name", "My name is jane"),
        ("my name is uh, Dr Example", "introduced_name", "my name is uh, Dr Example"),
        ("Hi, I'm Dr. O'Neil.", "introduced_name", "I'm Dr. O'Neil"),
        ("people call me Jo.", "introduced_name", "call me Jo"),
        ("seen by Dr. Example's team", "titled_name", "Dr. Example's"),
        ("hello mrs. example .", "titled_name", "mrs. example"),
        ("Thanks, Doctor Example.", "titled_name", "Doctor Example"),
        ("Jo Example is a fit 50-year-old", "described_name", "Example is a fit 50-year-old"),
    ],
)  # fmt: skip
def test_each_kind_is_found_once_and_whole(text: str, category: str, span: str) -> None:
    assert found(text) == [(category, span)]


@pytest.mark.parametrize(
    "text",
    [
        "4/7 of diarrhoea, review 2/52, scan 1/12, pain 8/10, vision 20/20, BP 120/80",
        "Dr. X and Dr. ABC of XYZ saw Mr. Y and Miss A",
        "My name is Doctor X",
        "Hello Dr. I'm ill. Thank you Doctor. I've a cold. Nurse already asked.",
        "The patient is a 50-year-old man; she is an 89-year-old woman",
        "take 2 may repeat, you may 2 times march on",
        "943 476 59 and 2-1/2 and 20/25/2000 and 0/5/2000 and 1.2.3 and 31.12.99",
        "platelets 250,000, weight 95 kg, 95% of days, aged 12, age of 95% of them",
        "call me later, my name is not important",
        "1000000.5 units",
    ],
)
def test_clinical_shorthand_and_stand_ins_are_no_identifiers(text: str) -> None:
    assert found(text) == []


def test_check_digits_tell_numbers_apart() -> None:
    assert [category for category, _ in found("943 476 5918")] == ["phone"]
    assert found("4111 1111 1111 1112") == []
    assert found("0000 0000 0000 0000") == []
    assert found("078-05-0000 and 666-05-1120") == []


def test_a_span_counts_in_one_category_only() -> None:
    assert found("write to jo@example.org") == [("email", "jo@example.org")]


def test_screening_reports_counts_and_rows_but_no_text(example) -> None:
    rows = [
        example(
            "a", "Doctor: My name is Jane.\nPatient: Hi Mrs. Example.", "Seen 1/2/2003, 1/3/2003."
        ),
        example("b", "Doctor: Hello.", "Well."),
        example("c", "Doctor: Hello.", "Mr. Example is well."),
    ]
    result = screen(rows)
    assert {name: count for name, count in result.counts.items() if count} == {
        "date": 2, "introduced_name": 1, "titled_name": 2,
    }  # fmt: skip
    assert set(result.counts) == set(result.rows) == set(CATEGORIES)
    assert result.rows["titled_name"] == ("a", "c")
    assert result.row_ids == ("a", "c")
    assert result.found and not screen(rows[1:2]).found
    assert "Jane" not in repr(result) and "Example" not in repr(result)


def test_own_messages_are_screened_too(example) -> None:
    messages = (Message("system", "Write to a@example.org"), Message("user", "q"))
    assert screen([example("a", messages=messages)]).counts["email"] == 1


def test_no_pattern_reaches_from_one_turn_into_the_next(example) -> None:
    assert not screen([example("a", "Doctor: My name is\nPatient: Jane who?", "Dr.")]).found


@pytest.mark.slow
def test_recall_on_names_planted_by_the_authors(shared_data: Path) -> None:
    folder = shared_data / "aci-bench"
    rows = {row.id.rsplit("/", 1)[1]: row for row in load_examples(folder)}
    named = flagged = 0
    for split in ("train", "valid"):
        with (folder / f"{split}_metadata.csv").open(encoding="utf-8", newline="") as handle:
            for person in csv.DictReader(handle):
                row = rows[person["encounter_id"]]
                names = [
                    person[f"patient_{part}name"].strip().lower() for part in ("first", "family")
                ]
                names = [name for name in names if name]
                if any(name in row.conversation.words().lower() for name in names):
                    named += 1
                    flagged += any(
                        screen([row]).rows[kind] for kind in CATEGORIES if "name" in kind
                    )
    assert named == 82
    # Measured 65 of 82: what is missed is named without a title or an introduction.
    assert flagged >= 60
    assert aci_bench.SOURCE == next(iter(rows.values())).source


@pytest.mark.slow
def test_self_introductions_are_found_in_role_played_consultations(shared_data: Path) -> None:
    rows = primock57.read(shared_data / "primock57")
    plain = [
        r.id
        for r in rows
        if re.search(r"(?i)my name(?:'s| is) (?!Doctor \[)", r.conversation.words())
    ]
    hits = screen(rows).rows["introduced_name"]
    assert len(hits) >= 30
    assert set(plain) - set(hits) == set()
