"""The tokenizer's vectors: made-up text, true for their tokenizer and for no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundle_cases import MINI, TINY

from mlx_medphi.coreml import vector_cases
from mlx_medphi.coreml.vectors import build_vectors, check_vectors, write_vectors
from mlx_medphi.errors import BundleError
from mlx_medphi.text.tokenizer import Tokenizer

Json = dict[str, Any]
GROUPS = ("encode", "special", "decode", "chat", "note")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(MINI)


@pytest.fixture(scope="module")
def vectors(tokenizer: Tokenizer) -> Json:
    return build_vectors(tokenizer)


def written(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def refused(tokenizer: Tokenizer, path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        check_vectors(tokenizer, path)
    return str(caught.value)


@pytest.mark.parametrize("checkpoint", [MINI, TINY])
def test_vectors_are_true_for_their_tokenizer(tmp_path: Path, checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    path = tmp_path / "vectors.json"
    write_vectors(tokenizer, path)
    count = check_vectors(Tokenizer.load(checkpoint), path)
    value = json.loads(path.read_text(encoding="utf-8"))
    assert count == sum(len(value[group]) for group in GROUPS) >= 200


def test_vectors_are_true_for_phi3s_own_tokenizer(tmp_path: Path, shared_tokenizer: Path) -> None:
    tokenizer = Tokenizer.load(shared_tokenizer)
    write_vectors(tokenizer, tmp_path / "vectors.json")
    assert check_vectors(tokenizer, tmp_path / "vectors.json") >= 200
    # The pairs that look alike have ids of their own.
    ids = {name: tokenizer.encode_text(name) for name in vector_cases.GREEK.replace(" ", "")}
    assert len({tuple(numbers) for numbers in ids.values()}) == 12


def test_the_file_is_ascii_and_its_bytes_repeat(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_vectors(Tokenizer.load(MINI), tmp_path / name)
    data = (tmp_path / "one").read_bytes()
    assert data == (tmp_path / "two").read_bytes()
    assert data.isascii() and data.endswith(b"}\n")
    assert json.loads(data) == build_vectors(tokenizer)


def test_names_are_unique_within_a_group(vectors: Json) -> None:
    for group in GROUPS:
        keys = [(case["name"], case.get("generation")) for case in vectors[group]]
        assert len(keys) == len(set(keys)), group


def test_all_that_tokenizers_stumble_over_is_there(vectors: Json) -> None:
    texts = [case["text"] for case in vectors["encode"]]
    assert "" in texts and " " in texts and "\ufeff" in texts and "\U0010ffff" in texts
    assert any(len(text) >= 300 for text in texts)
    greek = "".join(texts)
    for pair in ("\u03ac\u1f71", "\u03ad\u1f73", "\u03ae\u1f75", "\u03af\u1f77", "\u03cc\u1f79",
                 "\u03cd\u1f7b"):  # fmt: skip
        assert pair in greek
    assert any(text.startswith("Doctor: ") for text in texts)


def test_plain_text_never_holds_an_added_token_and_the_pipelines_does(
    tokenizer: Tokenizer, vectors: Json
) -> None:
    added = {tokenizer.end_id, tokenizer.user_id, tokenizer.system_id, tokenizer.eos_id, 0, 1, 2}
    for case in vectors["encode"]:
        assert added.isdisjoint(case["ids"]), case["name"]
    fooled = [case for case in vectors["special"] if added.intersection(case["ids"])]
    assert len(fooled) > 20


def test_ids_give_their_text_back_where_nothing_else_is_said(
    tokenizer: Tokenizer, vectors: Json
) -> None:
    for case in vectors["encode"]:
        assert tokenizer.decode(case["ids"]) == case.get("decoded", case["text"]), case["name"]
    told = [case["text"] for case in vectors["encode"] if "decoded" in case]
    assert told and all("\u2581" in text for text in told)


def test_streamed_pieces_join_to_the_decoded_text(vectors: Json) -> None:
    for case in vectors["decode"]:
        assert len(case["pieces"]) == len(case["ids"])
        assert "".join(case["pieces"]) + case["flush"] == case["text"], case["name"]
    assert any(case["flush"] for case in vectors["decode"])
    assert any("\ufffd" in case["text"] for case in vectors["decode"])
    assert any(case["text"] != case["with_special"] for case in vectors["decode"])


def test_chats_are_those_of_the_template_and_forge_nothing(
    tokenizer: Tokenizer, vectors: Json
) -> None:
    special = {case["name"]: case["ids"] for case in vectors["special"]}
    forged = 0
    for case in vectors["chat"]:
        assert case["ids"].count(tokenizer.end_id) == len(case["messages"])
        last = tokenizer.assistant_id if case["generation"] else tokenizer.eos_id
        assert case["ids"][-1] == last
        if not case["generation"]:
            forged += special[f"{case['name']}, rendered"] != case["ids"]
    assert forged == 2  # the two chats whose content holds tokens


def test_notes_are_shortened_by_turns_and_by_words(vectors: Json) -> None:
    for case in vectors["note"]:
        assert len(case["ids"]) <= case["max_length"] - case["reserve"]
        assert case["prompt"].startswith("Write the ")
    assert any(case["left_out_turns"] for case in vectors["note"])
    assert any(case["left_out_words"] for case in vectors["note"])
    assert any(not case["left_out_turns"] for case in vectors["note"])
    assert {case["section"] for case in vectors["note"]} == {None, "GENHX"}


Case = dict[str, Any]


def another_id(case: Case) -> None:
    case["ids"][-1] += 1


def one_id_less(case: Case) -> None:
    del case["ids"][-1]


def one_id_more(case: Case) -> None:
    case["ids"].append(0)


def other(key: str) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        value = case[key]
        case[key] = [*value[:-1], value[-1] + "x"] if isinstance(value, list) else f"{value}x"

    return change


def more(key: str) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        case[key] += 1

    return change


CHANGES: list[tuple[str, str, Callable[[Case], None]]] = [
    *((group, "ids", change) for group in ("encode", "special", "chat", "note")
      for change in (another_id, one_id_less, one_id_more)),
    ("encode", "ids", other("text")),
    ("encode", "decoded", lambda case: case.update(decoded="x")),
    ("special", "ids", other("text")),
    ("decode", "text", other("text")),
    ("decode", "with_special", other("with_special")),
    ("decode", "pieces", other("pieces")),
    ("decode", "flush", other("flush")),
    ("note", "prompt", other("prompt")),
    ("note", "left_out_turns", more("left_out_turns")),
    ("note", "left_out_words", more("left_out_words")),
]  # fmt: skip


@pytest.mark.parametrize(("group", "key", "change"), CHANGES)
def test_the_first_difference_is_named(
    tokenizer: Tokenizer,
    vectors: Json,
    tmp_path: Path,
    group: str,
    key: str,
    change: Callable[[Case], None],
) -> None:
    value = json.loads(json.dumps(vectors))
    at = next(i for i, case in enumerate(value[group]) if len(case["ids"]) > 4)
    change(value[group][at])
    text = refused(tokenizer, written(tmp_path / "v.json", value))
    assert f"{group}[{at}], {value[group][at]['name']!r}: {key} differs" in text


def test_a_difference_says_where_the_ids_part(
    tokenizer: Tokenizer, vectors: Json, tmp_path: Path
) -> None:
    value = json.loads(json.dumps(vectors))
    at, case = next((i, c) for i, c in enumerate(value["encode"]) if c["text"] == "Hello, World!")
    right = case["ids"][2]
    case["ids"][2] = 7
    text = refused(tokenizer, written(tmp_path / "v.json", value))
    assert f"encode[{at}]" in text and f"ids differs at place 2: {right}, expected 7" in text
    value["encode"][at]["ids"] = case["ids"][:2]
    value["encode"][at]["ids"][2:] = []
    text = refused(tokenizer, written(tmp_path / "v.json", value))
    assert f"at place 2: {right}, expected the end" in text


def test_a_tokenizer_that_falls_for_lookalikes_is_caught(
    tokenizer: Tokenizer, vectors: Json, tmp_path: Path
) -> None:
    naive = replace(tokenizer, _plain=tokenizer._pipeline)
    text = refused(naive, written(tmp_path / "v.json", vectors))
    assert "look-alike 0" in text and "ids differs" in text


def test_another_tokenizer_is_refused_at_once(vectors: Json, tmp_path: Path) -> None:
    text = refused(Tokenizer.load(TINY), written(tmp_path / "v.json", vectors))
    assert "tokenizer_sha256" in text and "not from the same checkpoint" in text


def test_the_same_tokenizer_with_another_template_is_refused(vectors: Json, tmp_path: Path) -> None:
    shutil.copytree(MINI, tmp_path / "base")
    config = json.loads((MINI / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = config["chat_template"].replace("{% endif %}{% endfor %}", "{% endif %}{%endfor%}")
    (tmp_path / "base" / "chat_template.jinja").write_text(template, encoding="utf-8")
    changed = Tokenizer.load(tmp_path / "base")
    assert "chat_template_sha256" in refused(changed, written(tmp_path / "v.json", vectors))


def test_chats_with_a_system_message_are_left_out_where_the_template_has_none(
    tokenizer: Tokenizer,
) -> None:
    plain = replace(tokenizer, template=replace(tokenizer.template, knows_system=False))
    with_system, without = (
        {case["name"] for case in build_vectors(one)["chat"]} for one in (tokenizer, plain)
    )
    assert with_system - without == {"system", "empty system"} and "one question" in without


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(version=2), "version 2"),
        (lambda v: v.update(format="x"), "format 'x'"),
        (lambda v: v.pop("note"), "no list of cases 'note'"),
        (lambda v: v.update(chat=[]), "no list of cases 'chat'"),
        (lambda v: v["encode"][0].pop("text"), "encode[0] is no such case"),
        (lambda v: v["encode"].insert(0, 5), "encode[0] is no such case"),
        (lambda v: v["decode"][1].update(ids=["x"]), "decode[1] is no such case"),
        (lambda v: v["decode"][1].update(ids=[2**40]), "decode[1] is no such case"),
        (lambda v: v["decode"][1].update(ids=[-1]), "decode[1] is no such case"),
        (lambda v: v["decode"][1].pop("pieces"), "decode[1] is no such case"),
        (lambda v: v["chat"][0]["messages"][0].update(role="tool"), "chat[0] cannot be encoded"),
        (lambda v: v["chat"][0].update(messages=None), "chat[0] is no such case"),
        (lambda v: v["note"][0].update(max_length=40), "note[0] cannot be encoded"),
        (lambda v: v["note"][0].update(max_length="x"), "note[0] is no such case"),
        (lambda v: v["note"][0]["turns"].insert(0, {}), "note[0] is no such case"),
    ],
)
def test_damaged_files_are_told_apart_from_differences(
    tokenizer: Tokenizer, vectors: Json, tmp_path: Path, change: Callable[[Json], object], says: str
) -> None:
    value = json.loads(json.dumps(vectors))
    change(value)
    assert says in refused(tokenizer, written(tmp_path / "v.json", value))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"[" * 200_000])
def test_what_is_no_vectors_file_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, data: bytes
) -> None:
    (tmp_path / "v.json").write_bytes(data)
    assert "v.json: damaged" in refused(tokenizer, tmp_path / "v.json")
    assert "cannot be read" in refused(tokenizer, tmp_path / "none.json")
