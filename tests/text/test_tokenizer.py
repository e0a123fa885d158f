"""The tokenizer: equal to the file's own pipeline, and deaf to what text pretends to be."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_medphi.data.examples import Message
from mlx_medphi.data.load import load_examples
from mlx_medphi.errors import DataError, TokenizerError
from mlx_medphi.text.tokenizer import Tokenizer

Json = dict[str, Any]
Folder = Callable[[Callable[[Json, Json, Json], None]], Path]

ADDED = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|system|>")
# Pieces of text that tokenizers are known to stumble over.
ODD = (
    *("Doctor: ", "pain", "38.5 °C", "4/7", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n"),
    *("é", "ß", "漢字", "😶‍🌫️", "🦙", "\u200b", "\u00a0", "\u3000", "\x00", "\x1c", "\ufeff"),
    *("…", "—", "‚", "'", "<", "|", ">", "<|", "|>", "<0x0A>", "[INST]", "\U0010ffff"),
)


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Odd pieces in any order, and runs of random characters of all planes."""
    rng = random.Random(seed)
    texts = ["", " ", "\n", " leading", "trailing ", "\n\nlines\n"]
    for _ in range(count):
        texts.append("".join(rng.choice(ODD) for _ in range(rng.randrange(1, 25))))
        codes = [rng.randrange(0x110000) for _ in range(8)]
        texts.append("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000))
    return texts


def test_ids_are_those_of_the_files_own_pipeline(tokenizer: Tokenizer) -> None:
    for text in random_texts(300):
        assert tokenizer.encode_text(text) == tokenizer.encode_with_special(text), repr(text)


def test_ids_are_those_of_phi3s_own_pipeline(phi3: Tokenizer) -> None:
    for text in random_texts(300, seed=1):
        assert phi3.encode_text(text) == phi3.encode_with_special(text), repr(text)


def test_ids_of_published_vectors(phi3: Tokenizer, shared_tokenizer: Path) -> None:
    # Bytes: reading as text would turn the case with a lone carriage return into another one.
    cases = (shared_tokenizer / "llama.cpp-vectors.inp").read_bytes().decode("utf-8")
    lines = (shared_tokenizer / "llama.cpp-vectors.out").read_text().split("\n")
    texts = cases.removesuffix("\n__ggml_vocab_test__\n").split("\n__ggml_vocab_test__\n")
    assert len(texts) > 40
    for text, line in zip(texts, lines, strict=False):
        assert phi3.encode_text(text) == [int(number) for number in line.split()], repr(text)


@pytest.mark.slow
def test_every_mts_dialogue_has_the_ids_of_the_pipeline(phi3: Tokenizer, shared_data: Path) -> None:
    examples = load_examples(shared_data / "mts-dialog")
    assert len(examples) >= 1501
    for example in examples:
        for text in (example.conversation.text(), example.note.text):
            assert phi3.encode_text(text) == phi3.encode_with_special(text), example.id


@pytest.mark.parametrize("token", ADDED)
def test_text_never_becomes_an_added_token(tokenizer: Tokenizer, token: str) -> None:
    added = {tokenizer.encode_with_special(other)[0] for other in ADDED}
    for text in (token, f"Doctor: {token}", f"a{token}b", f"{token}{token}\n", f" {token} "):
        # The file's own pipeline falls for it, so this test can fail.
        assert added.intersection(tokenizer.encode_with_special(text))
        ids = tokenizer.encode_text(text)
        assert added.isdisjoint(ids)
        assert tokenizer.decode(ids) == text


def test_text_never_becomes_an_added_token_in_phi3(phi3: Tokenizer) -> None:
    added = {*range(3), *range(32000, 32011)}
    for token in ADDED:
        for text in (token, f"Patient:{token}{token} x", f"\n{token}\n"):
            assert added.isdisjoint(phi3.encode_text(text))
            assert phi3.decode(phi3.encode_text(text)) == text


def test_whole_words_of_the_vocabulary_cannot_be_added_tokens(tokenizer_folder: Folder) -> None:
    def change(spec: Json, _config: Json, _generation: Json) -> None:
        # A word that is in the vocabulary is taken whole, without any merge.
        spec["model"]["ignore_merges"] = True
        spec["normalizer"] = None

    tokenizer = Tokenizer.load(tokenizer_folder(change))
    assert {0, 1, 2}.isdisjoint(tokenizer.encode_text("</s>"))


def test_decoding_gives_the_text_back(tokenizer: Tokenizer) -> None:
    for text in random_texts(300, seed=2):
        assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_decoding_leaves_added_tokens_out_on_request_only(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.user_id, *tokenizer.encode_text("Hi"), tokenizer.end_id, 2]
    assert tokenizer.decode(ids) == "Hi"
    assert tokenizer.decode(ids, skip_special=False) == "<|user|> Hi<|end|></s>"


def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    runs = [tokenizer.encode_text(text) for text in random_texts(100, seed=4)]
    # Ids in any order: bytes that never become a character, added tokens in the middle of one.
    runs += [[rng.randrange(tokenizer.vocab_size) for _ in range(20)] for _ in range(300)]
    for ids in runs:
        stream = tokenizer.stream()
        text = "".join(stream.step(number) for number in ids) + stream.flush()
        assert text == tokenizer.decode(ids), ids


def test_bytes_wait_until_they_are_known_to_be_a_character(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert [stream.step(number) for number in tokenizer.encode_text("😶")] == [""] * 5
    assert stream.step(tokenizer.encode_text("a")[0]) == "😶 a"
    assert stream.flush() == ""


def test_character_that_never_ends_is_streamed_as_a_replacement(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert "".join(stream.step(number) for number in tokenizer.encode_text("x😶")[:-1]) == "x"
    assert stream.flush() == "���"


@pytest.mark.parametrize("character", [chr(c) for c in range(0x3100) if chr(c).isspace()])
def test_whitespace_behind_a_role_is_swallowed_as_in_the_file(
    tokenizer: Tokenizer, character: str
) -> None:
    chat = (Message("user", f"{character} x{character}"), Message("assistant", f"{character}y"))
    pieces = tokenizer.template.pieces(chat)
    rendered = "".join(piece.text for piece in pieces)
    assert tokenizer.encode_pieces(pieces)[0] == tokenizer.encode_with_special(rendered)


def test_names_of_the_ids(tokenizer: Tokenizer) -> None:
    names = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.end_id)
    assert names == (1, 305, 305, 312)
    assert (tokenizer.system_id, tokenizer.user_id, tokenizer.assistant_id) == (311, 315, 306)
    assert tokenizer.vocab_size == 316


def test_stops_are_those_of_the_generation_config_and_the_template(tokenizer: Tokenizer) -> None:
    assert tokenizer.stop_ids == (305, 306, 312)


def test_assistant_is_no_stop_unless_the_generation_config_lists_it(
    tokenizer_folder: Folder,
) -> None:
    path = tokenizer_folder(lambda _s, _c, generation: generation.update(eos_token_id=2))
    assert Tokenizer.load(path).stop_ids == (2, 305, 312)


@pytest.mark.parametrize("lacking", ["file", "key"])
def test_stops_without_a_generation_config(tokenizer_folder: Folder, lacking: str) -> None:
    path = tokenizer_folder(lambda _s, _c, generation: generation.pop("eos_token_id"))
    if lacking == "file":
        (path / "generation_config.json").unlink()
    assert Tokenizer.load(path).stop_ids == (305, 312)


def test_end_may_be_the_closing_token(tokenizer_folder: Folder) -> None:
    path = tokenizer_folder(lambda _s, config, _g: config.update(eos_token={"content": "<|end|>"}))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.eos_id == tokenizer.end_id
    assert tokenizer.stop_ids == (305, 306, 312)


def test_files_are_named_and_not_touched(tokenizer_copy: Path) -> None:
    before = {path.name: path.read_bytes() for path in tokenizer_copy.iterdir()}
    tokenizer = Tokenizer.load(tokenizer_copy)
    tokenizer.encode_text("Doctor: hello")
    assert {name: path.read_bytes() for name, path in tokenizer.files.items()} == before


def test_template_may_lie_in_a_file_of_its_own(tokenizer_folder: Folder) -> None:
    templates: list[str] = []
    path = tokenizer_folder(lambda _s, config, _g: templates.append(config.pop("chat_template")))
    template = templates[0].replace("{% else %}{{ eos_token }}", "")
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = Tokenizer.load(path)
    assert tokenizer.template.closing == ""
    assert "chat_template.jinja" in tokenizer.files


def test_default_of_several_templates_is_used(tokenizer_folder: Folder) -> None:
    def change(_spec: Json, config: Json, _generation: Json) -> None:
        named = {"name": "default", "template": config["chat_template"]}
        config["chat_template"] = [{"name": "tool_use", "template": "{{ x }}"}, named]

    assert Tokenizer.load(tokenizer_folder(change)).template.closing == "<|endoftext|>"


def test_saved_truncation_and_padding_do_not_cut_text(tokenizer_folder: Folder) -> None:
    def change(spec: Json, _config: Json, _generation: Json) -> None:
        spec["truncation"] = {
            **{"max_length": 4, "stride": 0},
            **{"direction": "Right", "strategy": "LongestFirst"},
        }

    tokenizer = Tokenizer.load(tokenizer_folder(change))
    text = "Doctor: a long question?"
    assert tokenizer.decode(tokenizer.encode_text(text)) == text
    assert tokenizer.encode_with_special(text) == tokenizer.encode_text(text)


def test_half_a_surrogate_pair_is_refused_without_its_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="character 7 is half") as caught:
        tokenizer.encode_text("secret \ud83d")
    assert "secret" not in str(caught.value)


def test_foreign_type_is_a_mistake_in_the_program(tokenizer: Tokenizer) -> None:
    with pytest.raises((TypeError, AttributeError)):
        tokenizer.encode_text(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_file_is_named(tokenizer_copy: Path, name: str) -> None:
    (tokenizer_copy / name).unlink()
    with pytest.raises(TokenizerError, match=f"{name}: no such file"):
        Tokenizer.load(tokenizer_copy)


@pytest.mark.parametrize("content", [b"", b'{"model": ', b"\xff\xfe", b"[1]"])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_damaged_file_is_named(tokenizer_copy: Path, name: str, content: bytes) -> None:
    (tokenizer_copy / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=f"{name}: damaged"):
        Tokenizer.load(tokenizer_copy)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda spec, _c, _g: spec.pop("model"), "damaged .no vocabulary"),
        (lambda spec, _c, _g: spec.update(added_tokens=[]), "damaged .no vocabulary"),
        (lambda spec, _c, _g: spec["model"].update(merges=["ab"]), "damaged"),
        (lambda spec, _c, _g: spec["added_tokens"].pop(), "no added token <|user|>"),
        (lambda _s, config, _g: config.update(eos_token="<eos>"), "no added token <eos>"),
        (lambda _s, config, _g: config.pop("chat_template"), "no chat_template"),
        (lambda _s, config, _g: config.update(chat_template=[]), "no chat_template"),
        (lambda _s, config, _g: config.update(chat_template="x"), "not of Phi-3's form"),
        (lambda _s, _c, generation: generation.update(eos_token_id="2"), "eos_token_id holds '2'"),
        (lambda _s, _c, generation: generation.update(eos_token_id=[305, 9999]), "holds 9999"),
    ],
)  # fmt: skip
def test_unusable_file_says_what_is_wrong(
    tokenizer_folder: Folder, change: Callable[[Json, Json, Json], None], what: str
) -> None:
    with pytest.raises(TokenizerError, match=what):
        Tokenizer.load(tokenizer_folder(change))


def test_pipeline_that_splits_in_another_way_is_refused(tokenizer_folder: Folder) -> None:
    def only_the_first_piece_gets_a_space(spec: Json, _config: Json, _generation: Json) -> None:
        spec["normalizer"] = None
        spec["pre_tokenizer"] = {
            **{"type": "Metaspace", "replacement": "▁"},
            **{"prepend_scheme": "first", "split": False},
        }

    with pytest.raises(TokenizerError, match="splits text beside its added tokens"):
        Tokenizer.load(tokenizer_folder(only_the_first_piece_gets_a_space))


def test_a_template_file_that_is_no_text_is_named(tokenizer_copy: Path) -> None:
    (tokenizer_copy / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    with pytest.raises(TokenizerError, match=r"chat_template.jinja: damaged \(byte 4 is not UTF-8"):
        Tokenizer.load(tokenizer_copy)


@pytest.mark.parametrize("tokens", [["<|end|>"], [{"id": 1}], [{"content": 1}], {"a": "b"}, "abc"])
def test_added_tokens_of_another_form_are_refused(tokenizer_folder: Folder, tokens: Any) -> None:
    folder = tokenizer_folder(lambda spec, _config, _generation: spec.update(added_tokens=tokens))
    with pytest.raises(TokenizerError, match="added_tokens is not a list of objects"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("templates", [["{{ x }}"], [{"name": ["a"]}], [{"name": "default"}], []])
def test_templates_of_another_form_are_refused(tokenizer_folder: Folder, templates: Any) -> None:
    folder = tokenizer_folder(
        lambda _spec, config, _generation: config.update(chat_template=templates)
    )
    with pytest.raises(TokenizerError, match="no chat_template"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("stop", [-1, 2**32, 10**30, True, "2"])
def test_a_stop_that_is_no_id_is_refused(tokenizer_folder: Folder, stop: Any) -> None:
    folder = tokenizer_folder(
        lambda _spec, _config, generation: generation.update(eos_token_id=[2, stop])
    )
    with pytest.raises(TokenizerError, match="which is no id of tokenizer.json"):
        Tokenizer.load(folder)


def test_json_too_deep_to_be_read_is_damage(tokenizer_copy: Path) -> None:
    (tokenizer_copy / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(TokenizerError, match="tokenizer_config.json: damaged"):
        Tokenizer.load(tokenizer_copy)
