from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_medphi.data import jsonl
from mlx_medphi.data.examples import Conversation, Message, Note, Turn
from mlx_medphi.data.prompt import user_prompt
from mlx_medphi.errors import DataError


def write(tmp_path: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def chat(user: str = "q", assistant: str = "a") -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def test_chat_rows_keep_their_messages(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *chat("one", "two"),
        *chat("x\ny", "z "),
    ]
    (found,) = jsonl.read(write(tmp_path, {"messages": messages}))
    assert found.messages == tuple(Message(m["role"], m["content"]) for m in messages)
    assert found.conversation == Conversation((Turn("", "one\nx\ny"),))
    assert (found.note, found.id, found.split) == (Note("z "), "jsonl/rows/000001", None)


def test_prompt_and_completion_rows_become_a_chat(tmp_path: Path) -> None:
    row = {"prompt": "q", "completion": "a", "messages": chat("other", "other")}
    (found,) = jsonl.read(write(tmp_path, row))
    assert found.messages == (Message("user", "q"), Message("assistant", "a"))


def test_rows_in_our_own_prompt_form_become_conversations(tmp_path: Path) -> None:
    prompt = user_prompt("Doctor: Hi.\nPatient: I cough.", "CC")
    rows = [{"prompt": prompt, "completion": "Cough."}, {"messages": chat(prompt, "Cough.")}]
    for found in jsonl.read(write(tmp_path, *rows)):
        assert found.messages is None
        assert found.note == Note("Cough.", "CC")
        assert [turn.speaker for turn in found.conversation.turns] == ["Doctor", "Patient"]


@pytest.mark.parametrize("said", ["Dr: Hi.", "Doctor: Hi. ", "", "Doctor:  Hi."])
def test_a_prompt_that_would_not_come_back_letter_by_letter_is_kept_as_it_is(
    tmp_path: Path, said: str
) -> None:
    (found,) = jsonl.read(write(tmp_path, {"messages": chat(user_prompt(said, None))}))
    assert found.messages is not None and found.messages[0].content == user_prompt(said, None)


def test_rows_name_themselves_and_files_name_their_split(tmp_path: Path) -> None:
    named = {"messages": chat(), "id": 7, "source": "clinic", "group": "p1", "split": "day3"}
    first, second = jsonl.read(write(tmp_path, named, {"messages": chat()}, name="valid.jsonl"))
    assert (first.id, first.source, first.group, first.split) == ("7", "clinic", "p1", "day3")
    assert (second.id, second.source, second.split) == ("jsonl/valid/000002", "jsonl", "valid")


def test_line_separators_inside_text_do_not_split_a_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    row = {"prompt": "one\u2028two", "completion": "three\u0085four"}
    file.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    (found,) = jsonl.read(file)
    assert found.note.text == "three\u0085four"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "not a JSON object"),
        ({"text": "all of it"}, 'plain "text" does not say which part is the note'),
        ({"question": "?"}, 'neither "messages" nor "prompt"'),
        ({"prompt": 1, "completion": "a"}, "must be text"),
        ({"prompt": "q", "completion": " "}, "assistant message that holds a note"),
        ({"prompt": " ", "completion": "a"}, "no user message"),
        ({"messages": "hi"}, '"messages" is not a list'),
        ({"messages": []}, "assistant message that holds a note"),
        ({"messages": chat()[:1]}, "assistant message that holds a note"),
        ({"messages": chat()[1:]}, "no user message"),
        ({"messages": [{"role": "user"}, *chat()]}, "message 1 has no text"),
        ({"messages": ["hi"]}, "message 1 has no text"),
        ({"messages": [{"role": "tool", "content": "x"}, *chat()]}, "message 1 has a role other"),
        ({"messages": chat(), "tools": [{}]}, '"tools"'),
        ({"messages": chat(), "id": ["x"]}, '"id" is not a text'),
        ({"messages": chat(), "augmented": "yes"}, '"augmented"'),
        ({"messages": chat(), "times": [[0, 1], [1, 2]]}, '"times"'),
        ({"messages": chat(), "times": [[0, True]]}, '"times"'),
        ({"messages": chat(), "times": 4}, '"times"'),
    ],
)
def test_a_row_of_another_form_is_named_by_its_line(
    tmp_path: Path, row: object, message: str
) -> None:
    file = write(tmp_path, {"messages": chat()}, row)
    with pytest.raises(DataError) as caught:
        jsonl.read(file)
    assert f"line 2: {message}" in str(caught.value) or message in str(caught.value)
    assert "line 2" in str(caught.value)


def test_all_faulty_lines_are_listed_at_once(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "q", "comp\n\n{"text": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="2 faults") as caught:
        jsonl.read(file)
    assert "line 1: not JSON" in str(caught.value) and "line 3: plain" in str(caught.value)


def test_an_id_that_occurs_twice_is_an_error(tmp_path: Path) -> None:
    row = {"messages": chat(), "id": "a"}
    with pytest.raises(DataError, match="line 2: its id occurs twice"):
        jsonl.read(write(tmp_path, row, row))


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        jsonl.read(write(tmp_path))


def test_every_kind_of_example_reads_back_equal(example) -> None:
    timed = Conversation((Turn("Doctor", "Hi.", 0.1, 2.0), Turn("Patient", "Hm.", None, 3)))
    for row in (
        example("a"),
        example("b", section="CC", split="test1", group="g", source="mts-dialog", augmented=True),
        example("c", "plain words\n\non two lines", "Note\nof two lines"),
        jsonl.Example("d", "primock57", timed, Note("Cough.")),
        jsonl.example_from_row({"messages": chat("x", "y")}, "e", "train"),
    ):
        content = json.loads(json.dumps(jsonl.row_from_example(row)))
        assert jsonl.example_from_row(content, "other", "") == row


@pytest.mark.slow
def test_mlx_lm_reads_the_rows_as_chats(example) -> None:
    datasets = pytest.importorskip("mlx_lm.tuner.datasets")
    rows = [jsonl.row_from_example(example("a", section="CC"))]
    found = datasets.create_dataset(rows, tokenizer=None, config=object())
    assert type(found).__name__ == "ChatDataset"
    assert [m["role"] for m in found[0]["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (r'{"prompt": "He is ill \ud83d", "completion": "Ill."}', r"holds \\ud83d, half of"),
        (r'{"prompt": "He is ill", "completion": "Ill.\uDC00"}', r"holds \\udc00, half of"),
        (r'{"prompt": "He is ill", "completion": "Ill.", "\uD800": 1}', r"holds \\ud800, half of"),
        ('{"prompt": ' + "[" * 100_000, "too deep"),
        ('{"prompt": ' + "1" * 5000 + "}", "too long"),
    ],
    ids=["prompt", "completion", "key", "deep", "long"],
)
def test_a_row_that_no_file_could_hold_is_named_without_its_text(
    tmp_path: Path, row: str, expected: str
) -> None:
    file = tmp_path / "train.jsonl"
    good = r'{"prompt": "A smile \ud83d\ude42", "completion": "Fine."}'
    file.write_text(f"{good}\n{row}\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=rf"train.jsonl: 1 fault.*\n  line 2: .*{expected}"
    ) as caught:
        jsonl.read(file)
    assert "ill" not in str(caught.value).lower()
