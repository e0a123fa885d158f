from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mlx_medphi.data.reading import Faults, read_csv, read_header, read_text
from mlx_medphi.errors import DataError, UsageError


def test_bytes_that_are_not_utf8_are_named_by_line_and_byte(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xef\xbb\xbfone\ntwo\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"byte 14 \(line 3\) is 0xe9") as caught:
        read_text(file)
    assert "caf" not in str(caught.value)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xef\xbb\xbfa,b\n1,2\n")
    assert read_header(file) == ["a", "b"]
    assert read_csv(file, ["a", "b"])[0].fields == {"a": "1", "b": "2"}


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_text(tmp_path / "none.csv")


def test_a_folder_in_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path)


def test_fields_may_hold_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'a,b\r\n1,"x, ""y""\r\nz"\r\n\r\n2,w\r\n')
    rows = read_csv(file, ["a"])
    assert [row.fields["b"] for row in rows] == ['x, "y"\r\nz', "w"]
    assert [row.line for row in rows] == [2, 5]


def test_a_missing_column_is_named_with_what_was_found(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("ID,notes\n1,x\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"column note missing. Found 2 columns, ID among them"):
        read_csv(file, ["ID", "note"])


def test_a_column_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("a,b,a\n1,2,3\n", encoding="utf-8")
    with pytest.raises(DataError, match="columns 1 and 3 have the same name"):
        read_csv(file, ["a", "b"])


def test_every_ragged_row_is_listed_at_once(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("a,b\n1\n1,2\n1,2,3\n", encoding="utf-8")
    with pytest.raises(DataError, match="2 faults") as caught:
        read_csv(file, ["a", "b"])
    assert "line 2: 1 fields, expected 2" in str(caught.value)
    assert "line 4: 3 fields, expected 2" in str(caught.value)


def test_a_header_without_rows_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("a,b\n", encoding="utf-8")
    with pytest.raises(DataError, match="no rows below the header"):
        read_csv(file, ["a", "b"])


def test_an_empty_file_has_no_header(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"")
    assert read_header(file) == []
    with pytest.raises(DataError, match="Found nothing"):
        read_csv(file, ["a"])


def test_a_file_cut_inside_a_quoted_field_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('a,b\n1,"whole"\n2,"cut he', encoding="utf-8")
    with pytest.raises(DataError, match="starts on line 3 is not csv") as caught:
        read_csv(file, ["a", "b"])
    assert "cut he" not in str(caught.value)


def test_a_header_that_is_not_csv_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('"a,b\n', encoding="utf-8")
    with pytest.raises(DataError, match="not csv"):
        read_header(file)


def test_faults_are_capped_at_ten() -> None:
    faults = Faults(Path("a"))
    faults.raise_if_any("nothing to do")
    for line in range(12):
        faults.add(f"line {line}", "bad")
    with pytest.raises(DataError) as caught:
        faults.raise_if_any("Repair them.")
    assert str(caught.value).startswith("a: 12 faults. Repair them.\n  line 0: bad")
    assert str(caught.value).endswith("line 9: bad\n  … and 2 more")


def test_long_fields_are_read_and_the_limit_of_the_process_is_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f"a,b\n1,{'x' * 200_000}\n", encoding="utf-8")
    before = csv.field_size_limit()
    assert len(read_csv(file, ["a"])[0].fields["b"]) == 200_000
    file.write_text(f"{'x' * 200_000}\n", encoding="utf-8")
    assert len(read_header(file)[0]) == 200_000
    with pytest.raises(DataError):
        read_csv(file, ["a"])
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("columns", [["ID"], ["ID", "dialogue"]])
def test_the_first_row_of_a_file_without_header_is_not_quoted(
    tmp_path: Path, columns: list[str]
) -> None:
    file = tmp_path / "a.csv"
    file.write_text('dialogue,"Doctor: Hello Mr Smith",cough,cough\n' * 2, encoding="utf-8")
    with pytest.raises(DataError, match="Found 4 columns, ") as caught:
        read_csv(file, columns)
    assert "Smith" not in str(caught.value) and "cough" not in str(caught.value)
    with pytest.raises(DataError, match="columns 3 and 4 have the same name") as caught:
        read_csv(file, ["dialogue"])
    assert "cough" not in str(caught.value)
