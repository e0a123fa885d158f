"""`medphi data`: what was kept and left out is said; nothing is overwritten unasked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_medphi.data.synthetic import sample

HEADER = "ID,section_header,section_text,dialogue\n"


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    rows = "".join(
        f'{at},GENHX,"{e.note.text}","{e.conversation.text()}"\n'
        for at, e in enumerate(sample(12, seed=3))
    )
    path = tmp_path / "mine.csv"
    path.write_text(HEADER + rows, encoding="utf-8")
    return path


def test_prepare_says_what_it_kept_and_where(run: Any, csv: Path, tmp_path: Path) -> None:
    done = run("data", "prepare", csv, "--out", tmp_path / "out", "--accept-identifiers")
    assert done.code == 0, done.err
    assert "12 rows read, 0 left out" in done.out
    assert f"{tmp_path / 'out'}: train.jsonl, valid.jsonl, test.jsonl, prepare.json" in done.out
    assert "data hash " in done.out
    assert (tmp_path / "out" / "prepare.json").is_file()


def test_prepare_stops_at_identifiers_unless_told_to_go_on(
    run: Any, csv: Path, tmp_path: Path
) -> None:
    done = run("data", "prepare", csv, "--out", tmp_path / "out")
    assert done.code == 1 and "--accept-identifiers" in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    done = run("data", "prepare", csv, "--out", tmp_path / "out", "--accept-identifiers")
    assert "personal identifiers, accepted: " in done.out


def test_prepare_as_json_is_the_whole_report(run: Any, csv: Path, tmp_path: Path) -> None:
    line = ["data", "prepare", csv, "--out", tmp_path / "out", "--accept-identifiers", "--json"]
    told = json.loads(run(*line).out)
    assert told["out"] == str(tmp_path / "out")
    assert told["report"]["given"] == 12
    kept = json.loads((tmp_path / "out" / "prepare.json").read_text(encoding="utf-8"))
    assert told["report"]["data_hash"] == kept["data_hash"]


def test_a_second_prepare_needs_to_be_told_to_replace(run: Any, csv: Path, tmp_path: Path) -> None:
    line = ["data", "prepare", csv, "--out", tmp_path / "out", "--accept-identifiers"]
    assert run(*line).code == 0
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    done = run(*line, "--seed", 7)
    assert done.code == 2 and "--replace" in done.err
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before
    assert run(*line, "--seed", 7, "--replace").code == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"ID,section_header,section_text\n0,GENHX,x\n", "dialogue"),
        (HEADER.encode() + b"0,GENHX,\xff\xfe,Doctor: Hi.\n", "UTF-8"),
        (HEADER.encode() + b"0,GENHX,,Doctor: Hi.\n", "note"),
    ],
    ids=["missing column", "not UTF-8", "empty note"],
)
def test_bad_data_is_one_line_and_leaves_nothing(
    run: Any, tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    done = run("data", "prepare", path, "--out", tmp_path / "out")
    assert done.code == 1 and "Traceback" not in done.err
    assert "bad.csv" in done.err.splitlines()[0] and expected in done.err
    assert not (tmp_path / "out").exists()


def test_stats_without_a_tokenizer_counts_words(run: Any, prepared: Path) -> None:
    done = run("data", "stats", prepared)
    assert done.code == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == ["train", "valid", "test"]
    assert "tokens" not in done.out


def test_stats_with_a_tokenizer_counts_tokens_and_rows_too_long(
    run: Any, prepared: Path, model: Path
) -> None:
    done = run("data", "stats", prepared, "--tokenizer", model, "--max-length", 10)
    assert "train, tokens" in done.out and "longer than 10: 8 of 8 rows" in done.out
    told = json.loads(run("data", "stats", prepared, "--tokenizer", model, "--json").out)
    train = told["sides"]["train"]
    assert train["summary"]["rows"] == 8
    assert train["tokens"]["example"]["count"] == 8
    assert sorted(train["tokens"]["over"]) == ["1024", "2048", "4096"]


def test_stats_reads_published_files_too(run: Any, csv: Path) -> None:
    assert "all " in run("data", "stats", csv).out


@pytest.mark.parametrize(
    "line",
    [["prepare", "--out", "none", "--seed", -1], ["stats", "--max-length", 0]],
    ids=["seed", "max length"],
)
def test_a_number_that_is_none_is_wrong_usage(
    run: Any, csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("data", *line, csv)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert line[-2] in done.err and not (tmp_path / "none").exists()


def test_stats_of_nothing_says_so(run: Any, tmp_path: Path) -> None:
    done = run("data", "stats", tmp_path / "none")
    assert done.code == 2 and "no such file or folder" in done.err
