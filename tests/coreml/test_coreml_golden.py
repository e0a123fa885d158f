"""Golden logits are MLX's, at the rows that are compared; the certificate keeps them exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_cases import ADAPTERS, MINI, PHI3, mlx_rows
from safetensors.numpy import load_file, save_file

from mlx_medphi.coreml.certificate import GOLDEN_FILE, PARITY_FILE, read_golden, write_golden
from mlx_medphi.coreml.golden import (
    CONTINUED,
    Case,
    Golden,
    Prompt,
    make_golden,
    make_prompts,
    rows_of,
)
from mlx_medphi.coreml.parity import LIMITS
from mlx_medphi.errors import BundleError
from mlx_medphi.model.checkpoint import load
from mlx_medphi.model.lora import adapted_layers
from mlx_medphi.model.phi3 import Phi3ForCausalLM
from mlx_medphi.text.tokenizer import Tokenizer

# Two float32 sums in another order; logits end at 3.
SAME = 2e-5

PROMPT = Prompt("note", (5, 6, 7, 8, 9, 10), (1, 4, 5), 3)


@pytest.fixture(scope="module")
def loaded() -> tuple[Phi3ForCausalLM, Tokenizer]:
    return load(MINI, dtype="float32")


@pytest.fixture(scope="module")
def golden(loaded: tuple[Phi3ForCausalLM, Tokenizer]) -> Golden:
    """One prompt without and with each adapter."""
    return make_golden(loaded[0], [PROMPT], ADAPTERS)


@pytest.mark.parametrize(
    ("context", "prefill", "parameters"),
    [(2048, 64, 9), (512, 128, 9), (64, 64, 9), (128, 10, 9), (128, 2, 9), (2048, 64, 10**9)],
)
def test_prompts_fit_the_context_and_the_rows_fit_the_prompts(
    context: int, prefill: int, parameters: int, loaded: tuple[Phi3ForCausalLM, Tokenizer]
) -> None:
    tokenizer = loaded[1]
    note, *rest = make_prompts(tokenizer, context, prefill, parameters)
    assert (note.name, note.continued) == ("note", CONTINUED)
    if context >= 512:
        # Whole blocks and a padded one.
        assert len(note.ids) > prefill and len(note.ids) % prefill
    for prompt in (note, *rest):
        assert prompt.ids[0] == tokenizer.user_id
        assert prompt.ids[-2:] == (tokenizer.end_id, tokenizer.assistant_id)
        assert len(prompt.ids) + prompt.continued <= context
        assert list(prompt.rows) == sorted(set(prompt.rows))
        assert 0 <= min(prompt.rows) and max(prompt.rows) < len(prompt.ids)
        assert all(0 <= token < tokenizer.vocab_size for token in prompt.ids)
    # Every whole block has a row.
    assert {row // prefill for row in note.rows} >= set(range(len(note.ids) // prefill))


def test_one_prompt_fills_the_context_to_its_last_slot(
    loaded: tuple[Phi3ForCausalLM, Tokenizer],
) -> None:
    tokenizer = loaded[1]
    _, edge = make_prompts(tokenizer, 512, 64, 1000)
    assert (edge.name, len(edge.ids), edge.continued) == ("edge", 512, 0)
    assert edge.rows == (508, 509, 510, 511)
    # It costs too much for a large model, and is the note itself in a small context.
    assert [p.name for p in make_prompts(tokenizer, 4096, 64, 4 * 10**9)] == ["note"]
    assert [p.name for p in make_prompts(tokenizer, 64, 64, 1000)] == ["note"]


def test_the_same_prompts_every_time(loaded: tuple[Phi3ForCausalLM, Tokenizer]) -> None:
    first, again = (make_prompts(loaded[1], 256, 64, 1000) for _ in range(2))
    assert first == again
    assert len(set(first[0].ids)) > 20


def test_a_case_reads_all_of_its_continuation_but_the_last() -> None:
    case = Case(PROMPT, None, (20, 21, 22), np.zeros((5, 4), np.float32))
    assert case.ids == (5, 6, 7, 8, 9, 10, 20, 21) and case.fed == 2
    assert case.rows == (1, 4, 5, 6, 7)
    alone = Case(Prompt("edge", (5, 6, 7), (1,), 0), "soap", (), np.zeros((2, 4), np.float32))
    assert (alone.ids, alone.fed, alone.rows) == ((5, 6, 7), 0, (1, 2))
    assert (case.name, alone.name) == ("note-base", "edge-soap")


def test_golden_logits_are_what_mlx_says_in_one_pass(
    golden: Golden, loaded: tuple[Phi3ForCausalLM, Tokenizer]
) -> None:
    assert [case.adapter for case in golden.cases] == [None, "lora", "rslora"]
    for case in golden.cases:
        path = None if case.adapter is None else ADAPTERS[case.adapter]
        model, _ = load(MINI, dtype="float32", adapter=path)
        logits = mlx_rows(model, np.array([case.ids]))
        assert case.logits.shape == (len(case.rows), logits.shape[1])
        assert case.logits.dtype == np.float32
        np.testing.assert_allclose(case.logits, logits[list(case.rows)], rtol=0, atol=SAME)
        # Each token of the continuation is the most likely one after those before it.
        assert logits[len(PROMPT.ids) - 1 :].argmax(axis=1).tolist() == list(case.continuation)
        np.testing.assert_allclose(rows_of(model, case), case.logits, rtol=0, atol=SAME)


def test_adapters_are_heard_and_taken_off_again(
    golden: Golden, loaded: tuple[Phi3ForCausalLM, Tokenizer]
) -> None:
    assert not list(adapted_layers(loaded[0]))
    (base,), (lora,), (rslora,) = (list(golden.of(name)) for name in (None, "lora", "rslora"))
    for one, two in ((base, lora), (base, rslora), (lora, rslora)):
        assert np.abs(one.logits[0] - two.logits[0]).max() > 0.1
    only = make_golden(loaded[0], [PROMPT], {"lora": ADAPTERS["lora"]}, with_base=False)
    assert [case.adapter for case in only.cases] == ["lora"]
    np.testing.assert_allclose(only.cases[0].logits, lora.logits, rtol=0, atol=SAME)


def test_longrope_factors_are_those_of_all_that_is_read() -> None:
    model, tokenizer = load(PHI3 / "longrope-long", dtype="float32")
    for length, continued in ((30, 3), (30, 4), (33, 0)):  # the switch is at 32
        ids = tuple(tokenizer.encode_text("The patient has a cough. " * 9)[:length])
        (case,) = make_golden(model, [Prompt("note", ids, (3,), continued)], {}).cases
        logits = mlx_rows(model, np.array([case.ids]))
        assert len(case.ids) == length + max(continued - 1, 0)
        np.testing.assert_allclose(case.logits, logits[list(case.rows)], rtol=0, atol=SAME)


# --- certificate ----------------------------------------------------------------------------------


@pytest.fixture
def written(golden: Golden, tmp_path: Path) -> Path:
    write_golden(tmp_path, golden)
    return tmp_path


def test_what_is_read_is_what_was_written(written: Path, golden: Golden) -> None:
    found = read_golden(written)
    assert len(found.cases) == 3
    for one, other in zip(found.cases, golden.cases, strict=True):
        assert (one.prompt.name, one.prompt.ids) == (other.prompt.name, other.prompt.ids)
        assert (one.adapter, one.continuation) == (other.adapter, other.continuation)
        assert (one.ids, one.rows, one.name) == (other.ids, other.rows, other.name)
        np.testing.assert_array_equal(one.logits, other.logits)


def test_no_cases_are_read_back_as_none(tmp_path: Path) -> None:
    write_golden(tmp_path, Golden(()))
    assert read_golden(tmp_path) == Golden(())


def test_an_app_finds_ids_rows_and_limits_in_the_json(written: Path, golden: Golden) -> None:
    document = json.loads((written / PARITY_FILE).read_text())
    tensors = load_file(written / GOLDEN_FILE)
    assert document["logits"] == GOLDEN_FILE and document["schema"] == 1
    assert document["limits"].keys() == LIMITS.keys()
    assert document["limits"]["note"] == {"error": 0.02, "kl": 2e-4, "margin": 0.02}
    for entry, case in zip(document["cases"], golden.cases, strict=True):
        assert entry["ids"] == list(PROMPT.ids) and entry["adapter"] == case.adapter
        assert entry["rows"] == list(case.rows)
        assert entry["continuation"] == list(case.continuation)
        np.testing.assert_array_equal(tensors[entry["name"]], case.logits)


def test_the_same_logits_give_the_same_bytes(written: Path, golden: Golden, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    write_golden(again, golden)
    for name in (PARITY_FILE, GOLDEN_FILE):
        assert (again / name).read_bytes() == (written / name).read_bytes()


def entry(**changes: Any) -> Callable[[Path], None]:
    """A change of the first case's entry; None takes a key away."""

    def change(folder: Path) -> None:
        path = folder / PARITY_FILE
        document = json.loads(path.read_text())
        for key, value in changes.items():
            if value is None:
                del document["cases"][0][key]
            else:
                document["cases"][0][key] = value
        path.write_text(json.dumps(document))

    return change


def schema(value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = json.loads((folder / PARITY_FILE).read_text())
        (folder / PARITY_FILE).write_text(json.dumps({**document, "schema": value}))

    return change


def content(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def fewer_rows(folder: Path) -> None:
    tensors = load_file(folder / GOLDEN_FILE)
    tensors["note-base"] = tensors["note-base"][:-1]
    save_file(tensors, folder / GOLDEN_FILE)


def no_tensor(folder: Path) -> None:
    tensors = load_file(folder / GOLDEN_FILE)
    del tensors["note-base"]
    save_file(tensors, folder / GOLDEN_FILE)


@pytest.mark.parametrize(
    "damage",
    [
        content(PARITY_FILE, b"{"), content(PARITY_FILE, b"\xff"), content(PARITY_FILE, b"[]"),
        content(PARITY_FILE, b"[" * 100_000), content(PARITY_FILE, b'{"schema": 1}'),
        content(PARITY_FILE, b'{"schema": 1, "cases": [3]}'),
        content(GOLDEN_FILE, b""), content(GOLDEN_FILE, b"\0" * 64),
        schema(2), schema("1"), fewer_rows, no_tensor,
        entry(ids=None), entry(ids=[]), entry(ids=[-1, 3]), entry(ids="no"), entry(rows=[1, 4]),
        entry(rows=None), entry(continuation=None), entry(continuation=[1]), entry(adapter=None),
        entry(name="other"),
    ],
)  # fmt: skip
def test_a_damaged_certificate_is_refused(written: Path, damage: Callable[[Path], None]) -> None:
    damage(written)
    with pytest.raises(BundleError):
        read_golden(written)


@pytest.mark.parametrize("name", [PARITY_FILE, GOLDEN_FILE])
def test_a_missing_certificate_is_refused(written: Path, name: str) -> None:
    (written / name).unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        read_golden(written)


def test_golden_logits_repeat_bit_for_bit(
    golden: Golden, loaded: tuple[Phi3ForCausalLM, Tokenizer]
) -> None:
    again = make_golden(loaded[0], [PROMPT], {})
    np.testing.assert_array_equal(again.cases[0].logits, golden.cases[0].logits)
