"""`medphi generate`: a conversation from a file, a pipe or a prepared row; its note, streamed."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import mlx_medphi as mp
from mlx_medphi.cli.generate import read_conversation
from mlx_medphi.demo import BASE
from mlx_medphi.errors import UsageError

SHORT = ["--max-tokens", 4]
TEXT = "Doctor: Any fever?\nPatient: 38.5 °C since Monday.\n"


@pytest.fixture
def visit(tmp_path: Path) -> Path:
    path = tmp_path / "visit.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_the_note_goes_to_standard_output(run: Any, model: Path, visit: Path) -> None:
    done = run("generate", "--model", model, "--conversation", visit, *SHORT)
    assert done.code == 0, done.err
    loaded, tokenizer = mp.load(model)
    config = mp.GenerateConfig(max_tokens=4)
    note = mp.generate_note(loaded, tokenizer, TEXT, config=config)
    assert done.out.strip() == note.strip()


def test_json_tells_why_it_stopped_and_what_was_left_out(
    run: Any, model: Path, visit: Path
) -> None:
    done = run("generate", "--model", model, "--conversation", visit, *SHORT, "--json")
    told = json.loads(done.out)
    assert told["note_tokens"] == 4 and told["finish_reason"] == "length"
    assert told["left_out_turns"] == 0 and told["prompt_tokens"] > 20


def test_an_adapter_changes_the_note(run: Any, model: Path, visit: Path, trained: Path) -> None:
    line = ["generate", "--model", model, "--conversation", visit, "--max-tokens", 8, "--json"]
    base = json.loads(run(*line).out)
    for adapter in ("adapter", "medical_changes.safetensors"):
        adapted = json.loads(run(*line, "--adapter", trained / adapter).out)
        assert adapted["note"] != base["note"]


def test_a_pipe_and_a_file_are_read_alike(visit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert read_conversation("-", None) == read_conversation(str(visit), None)


def test_a_row_is_found_by_number_and_by_id(prepared: Path) -> None:
    rows = mp.load_examples(prepared / "train.jsonl")
    path = str(prepared / "train.jsonl")
    assert read_conversation(path, "2") == (rows[1].conversation, rows[1].note.section)
    assert read_conversation(path, rows[1].id) == read_conversation(path, "2")


@pytest.mark.parametrize("row", [None, "0", "9", "no-such-id"])
def test_a_row_that_is_not_there_is_wrong_usage(prepared: Path, row: str | None) -> None:
    with pytest.raises(UsageError, match="row"):
        read_conversation(str(prepared / "train.jsonl"), row)


@pytest.mark.parametrize(
    ("content", "code", "expected"),
    [
        (None, 2, "no such file"),
        (b"", 1, "no words"),
        (b"  \n\n", 1, "no words"),
        (b"Doctor: \xff\n", 1, "byte 8 is not UTF-8"),
    ],
    ids=["missing", "empty", "blank", "not UTF-8"],
)
def test_a_bad_conversation_is_one_line(
    run: Any, model: Path, tmp_path: Path, content: bytes | None, code: int, expected: str
) -> None:
    path = tmp_path / "visit.txt"
    if content is not None:
        path.write_bytes(content)
    done = run("generate", "--model", model, "--conversation", path, *SHORT)
    assert (done.code, done.out) == (code, "")
    assert done.err.count("\n") == 1
    assert "visit.txt" in done.err and expected in done.err


def test_a_folder_is_not_called_missing(run: Any, model: Path, tmp_path: Path) -> None:
    done = run("generate", "--model", model, "--conversation", tmp_path)
    assert done.code == 2 and f"{tmp_path}: a folder, not a file" in done.err


@pytest.mark.parametrize("section", ["", " ", " GENHX", "A\nB"])
def test_a_section_without_a_name_is_wrong_usage(
    run: Any, model: Path, visit: Path, section: str
) -> None:
    line = ["generate", "--model", model, "--conversation", visit, "--section", section]
    done = run(*line, *SHORT)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "--section" in done.err and "limit" not in done.err


def test_no_room_for_the_conversation_says_what_to_lower(
    run: Any, model: Path, visit: Path
) -> None:
    done = run("generate", "--model", model, "--conversation", visit, "--max-tokens", 4090)
    assert done.code == 1 and "lower max_tokens (--max-tokens)" in done.err
    assert "row" not in done.err
    done = run("generate", "--model", model, "--conversation", visit, "--max-tokens", 5000)
    assert done.code == 1 and "lower max_tokens (--max-tokens)" in done.err


def test_a_row_of_a_text_file_is_wrong_usage(run: Any, model: Path, visit: Path) -> None:
    done = run("generate", "--model", model, "--conversation", visit, "--row", 1)
    assert done.code == 2 and "--row" in done.err


def test_one_word_and_two_hundred_turns_are_conversations(run: Any, tmp_path: Path) -> None:
    word, long = tmp_path / "word.txt", tmp_path / "long.txt"
    word.write_text("Cough.\n")
    long.write_text("Doctor: How are you today?\nPatient: My knee still hurts.\n" * 200)
    # The embedded base has the shortest context of those at hand.
    model = ["--model", BASE, "--dtype", "float32"]
    line = ["generate", *model, *SHORT, "--json", "--conversation"]
    assert run(*line, word).code == 0
    told = json.loads(run(*line, long).out)
    assert told["left_out_turns"] > 100
    done = run(*line, long, "--no-shorten")
    assert done.code == 1 and "does not fit" in done.err and done.err.count("\n") == 1


def test_offline_never_asks_the_network(
    run: Any, visit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    line = ["generate", "--model", "owner/no-such-model", "--conversation", visit]
    done = run(*line, "--offline")
    assert done.code == 1 and "switched off" in done.err and done.err.count("\n") == 1
