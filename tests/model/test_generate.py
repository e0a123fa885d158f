"""Notes are written token by token as transformers would, and told as text that is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_medphi.config import GenerateConfig
from mlx_medphi.data.examples import Conversation, Turn
from mlx_medphi.errors import GenerationError
from mlx_medphi.model import generate
from mlx_medphi.model.cache import Cache
from mlx_medphi.model.checkpoint import load
from mlx_medphi.model.config import Phi3Config
from mlx_medphi.model.generate import generate_ids, generate_note, stream_note
from mlx_medphi.model.phi3 import Phi3ForCausalLM
from mlx_medphi.model.sampling import RECENT, adjusted_logits, next_token
from mlx_medphi.text.tokenizer import Tokenizer

TALK = "Doctor: Any fever?\nPatient: No, but a cough since Monday."
PROMPT = 16  # ids of row 0 that the reference continuations start from
# Sampling sorts and sums float32 probabilities; 1e-6 is their rounding.
PROBABILITY_ATOL = 1e-6


def greedy(folder: Path) -> list[int]:
    ids: list[int] = mx.load(str(folder / "reference.safetensors"))["greedy"][0].tolist()
    return ids


def uncached(model: Phi3ForCausalLM, ids: list[int], count: int) -> list[int]:
    """Greedy, the whole sequence read again for each token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1]).item()))
    return ids


# The sliding window is 20, LongRoPE's switch 32: the 40 ids go past both.
def test_greedy_equals_transformers(each_folder: Path) -> None:
    model, _ = load(each_folder, dtype="float32")
    ids = greedy(each_folder)
    found = list(generate_ids(model, ids[:PROMPT], GenerateConfig(max_tokens=24)))
    assert found == ids[PROMPT:]


def test_generation_with_a_cache_equals_generation_without(each_folder: Path) -> None:
    model, _ = load(each_folder, dtype="float32")
    ids = greedy(each_folder)[:5]
    found = list(generate_ids(model, ids, GenerateConfig(max_tokens=45)))
    assert ids + found == uncached(model, ids, 45)


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 15, 31, 32, 33, 40])
@pytest.mark.parametrize("folder", ["sliding-window", "longrope-long"])
def test_a_prompt_read_in_pieces_is_the_same_prompt(
    phi3: Path, monkeypatch: pytest.MonkeyPatch, folder: str, length: int
) -> None:
    monkeypatch.setattr(generate, "PREFILL", 7)
    model, _ = load(phi3 / folder)
    ids = greedy(phi3 / folder)[:length]
    found = list(generate_ids(model, ids, GenerateConfig(max_tokens=8)))
    assert ids + found == uncached(model, ids, 8)


def test_the_head_reads_one_position_per_token(phi3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PREFILL", 16)
    model, _ = load(phi3 / "mini-4k")
    shapes: list[tuple[int, ...]] = []
    read = type(model).__call__

    def spy(self: Any, ids: mx.array, cache: Any = None) -> mx.array:
        shapes.append(ids.shape)
        return read(self, ids, cache)

    monkeypatch.setattr(type(model), "__call__", spy)
    list(generate_ids(model, list(range(3, 43)), GenerateConfig(max_tokens=3)))
    assert shapes == [(1, 16), (1, 16), (1, 7), (1, 1), (1, 1), (1, 1)]


def test_a_stop_id_ends_the_sequence_and_is_not_given_out(phi3: Path) -> None:
    model, _ = load(phi3 / "mini-4k")
    ids = greedy(phi3 / "mini-4k")
    stop = ids[PROMPT + 5]
    expected = ids[PROMPT : ids.index(stop, PROMPT)]
    found = generate_ids(model, ids[:PROMPT], GenerateConfig(max_tokens=24), {stop})
    assert list(found) == expected


@pytest.mark.parametrize("config", [{}, {"temperature": 2.0, "top_p": 0.9, "seed": 3}])
def test_rows_behind_the_vocabulary_are_never_chosen(phi3: Path, config: Any) -> None:
    model, _ = load(phi3 / "mini-4k")
    settings = GenerateConfig(max_tokens=30, **config)
    free = list(generate_ids(model, [5, 6, 7], settings))
    assert max(free) >= 100
    kept = list(generate_ids(model, [5, 6, 7], settings, vocabulary=100))
    assert len(kept) == 30 and max(kept) < 100
    # Where no row is behind it, nothing changes.
    whole = model.config.vocab_size
    assert list(generate_ids(model, [5, 6, 7], settings, vocabulary=whole)) == free


def test_a_sequence_that_would_outgrow_the_context_is_refused_at_once(phi3: Path) -> None:
    model, _ = load(phi3 / "longrope-long")  # a context of 256
    config = GenerateConfig(max_tokens=200)
    with pytest.raises(GenerationError, match="57 tokens of prompt and 200 to write .* 256"):
        generate_ids(model, [5] * 57, config)
    generate_ids(model, [5] * 56, config)
    with pytest.raises(GenerationError, match="the prompt is empty"):
        generate_ids(model, [], config)


def test_logits_that_are_no_numbers_are_an_error(phi3: Path) -> None:
    model, tokenizer = load(phi3 / "mini-4k")
    model.model.norm.weight = model.model.norm.weight * mx.nan
    with pytest.raises(GenerationError, match="not finite numbers after 1 tokens"):
        list(generate_ids(model, [5]))


# --- which token comes next


def probabilities(
    logits: list[float], written: tuple[int, ...] = (), **settings: Any
) -> np.ndarray:
    config = GenerateConfig(**{"temperature": 1.0, **settings})
    scores = adjusted_logits(mx.array(logits), config, written)
    return np.array(mx.softmax(scores))


def softmax(values: np.ndarray) -> np.ndarray:
    exp = np.exp(values - values.max())
    return exp / exp.sum()


def test_temperature_divides_the_logits() -> None:
    logits = [1.0, 3.0, -2.0, 0.5]
    np.testing.assert_allclose(
        probabilities(logits, temperature=0.7),
        softmax(np.array(logits) / 0.7),
        rtol=0,
        atol=PROBABILITY_ATOL,
    )


def test_top_p_keeps_the_smallest_set_that_holds_it() -> None:
    logits = np.log([0.5, 0.1, 0.3, 0.1]).tolist()
    for top_p, kept in [
        (0.2, [0]),
        (0.49, [0]),
        (0.51, [0, 2]),
        (0.79, [0, 2]),
        (1.0, [0, 1, 2, 3]),
    ]:
        found = probabilities(logits, top_p=top_p)
        assert np.flatnonzero(found).tolist() == kept
        assert found.sum() == pytest.approx(1, abs=PROBABILITY_ATOL)
    assert np.count_nonzero(probabilities(logits, top_p=0.85)) == 3  # one of two equals


def test_min_p_drops_what_is_less_likely_than_a_share_of_the_best() -> None:
    logits = np.log([0.5, 0.1, 0.3, 0.1]).tolist()
    for min_p, kept in [(0.19, [0, 1, 2, 3]), (0.21, [0, 2]), (0.61, [0]), (1.0, [0])]:
        assert np.flatnonzero(probabilities(logits, min_p=min_p)).tolist() == kept


def test_cuts_come_after_the_temperature_as_in_transformers() -> None:
    # At temperature 2 the shares 0.6, 0.3, 0.1 become 0.47, 0.33, 0.19.
    logits = np.log([0.6, 0.3, 0.1]).tolist()
    assert np.count_nonzero(probabilities(logits, top_p=0.7, temperature=2.0)) == 2
    assert np.count_nonzero(probabilities(logits, top_p=0.85, temperature=2.0)) == 3
    assert np.count_nonzero(probabilities(logits, min_p=0.4, temperature=2.0)) == 3


def test_a_repetition_penalty_makes_recent_tokens_less_likely_whatever_their_sign() -> None:
    scores = adjusted_logits(
        mx.array([2.0, -2.0, 1.0, -1.0]), GenerateConfig(repetition_penalty=2.0), (0, 1, 1)
    )
    assert scores.tolist() == [1.0, -4.0, 1.0, -1.0]
    long_ago = (0, *[3] * RECENT)
    scores = adjusted_logits(
        mx.array([2.0, -2.0, 1.0, -1.0]), GenerateConfig(repetition_penalty=2.0), long_ago
    )
    assert scores.tolist() == [2.0, -2.0, 1.0, -2.0]


def test_words_of_the_conversation_are_not_penalised(phi3: Path) -> None:
    model, _ = load(phi3 / "mini-4k")
    ids = greedy(phi3 / "mini-4k")
    prompt = [*ids[:PROMPT], ids[PROMPT], *ids[:PROMPT]]  # holds what would come next
    config = GenerateConfig(max_tokens=1, repetition_penalty=10.0)
    assert list(generate_ids(model, prompt, config)) == uncached(model, prompt, 1)[-1:]


def test_draws_follow_the_probabilities() -> None:
    logits = mx.array(np.log([0.6, 0.3, 0.1]))
    config = GenerateConfig(temperature=1.0, seed=3)
    drawn = [int(next_token(logits, config, [0] * step).item()) for step in range(2000)]
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    # Four standard deviations of a share of 0.6 in 2000 draws.
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], rtol=0, atol=0.044)


def test_a_draw_is_a_function_of_the_seed_and_nothing_else(phi3: Path) -> None:
    model, _ = load(phi3 / "mini-4k")

    def written(seed: int) -> list[int]:
        config = GenerateConfig(max_tokens=20, temperature=1.5, seed=seed)
        return list(generate_ids(model, [5, 6, 7], config))

    mx.random.seed(1)
    state = mx.random.state[0].tolist()
    first = written(seed=7)
    assert mx.random.state[0].tolist() == state
    mx.random.seed(2)
    assert written(seed=7) == first
    assert written(seed=8) != first


# --- text


class Script:
    """A model that says given ids after any prompt."""

    def __init__(self, config: Phi3Config, says: list[int], prompt_tokens: int) -> None:
        self.config, self.says, self.prompt_tokens = config, says, prompt_tokens

    def __call__(self, ids: mx.array, cache: Cache) -> mx.array:
        for layer in cache.layers:
            layer.offset += ids.shape[1]
        step = max(cache.offset - self.prompt_tokens, 0)
        return mx.eye(self.config.vocab_size)[mx.array([[self.says[step]] * ids.shape[1]])]


def saying(phi3: Path, ids: list[int]) -> Any:
    """A model whose note for TALK is these ids and `<|end|>`."""
    model, tokenizer = load(phi3 / "mini-4k")
    prompt = stream_note(model, tokenizer, TALK).prompt_tokens
    return Script(model.config, [*ids, tokenizer.end_id], prompt)


@pytest.mark.parametrize(
    "text",
    ["Cough since Monday.", "Temperature 38.5 °C, naïve 🤒", "Two\nlines\n\n and  spaces", "🤒"],
)
def test_the_pieces_join_to_the_note(phi3: Path, text: str) -> None:
    tokenizer = Tokenizer.load(phi3 / "mini-4k")
    script = saying(phi3, tokenizer.encode_text(text))
    stream = stream_note(script, tokenizer, TALK)
    assert "".join(stream) == text
    assert stream.finish_reason == "stop"
    assert generate_note(script, tokenizer, TALK) == text


def test_a_character_is_given_out_when_it_is_whole(phi3: Path) -> None:
    tokenizer = Tokenizer.load(phi3 / "mini-4k")
    script = saying(phi3, tokenizer.encode_text("a🤒b"))
    pieces = list(stream_note(script, tokenizer, TALK))
    assert len(pieces) >= 2
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert any("🤒" in piece for piece in pieces)


def test_a_character_cut_by_the_limit_is_left_out(
    phi3: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Tokenizer.load(phi3 / "mini-4k")
    ids = tokenizer.encode_text("a🤒")
    script = saying(phi3, ids)
    config = GenerateConfig(max_tokens=len(ids) - 1)
    stream = stream_note(script, tokenizer, TALK, config=config)
    assert "".join(stream) == "a"
    assert stream.finish_reason == "length"
    assert "cut at max_tokens" in caplog.text


def test_tokens_that_are_not_text_and_a_leading_space_are_left_out(phi3: Path) -> None:
    tokenizer = Tokenizer.load(phi3 / "mini-4k")
    words = tokenizer.encode_text(" \n Cough.")
    script = saying(phi3, [tokenizer.bos_id, *words, tokenizer.user_id])
    pieces = list(stream_note(script, tokenizer, TALK))
    assert "".join(pieces) == "Cough."
    assert pieces[0] and not pieces[0].startswith((" ", "\n"))


def test_a_stream_that_is_done_stays_done(phi3: Path) -> None:
    tokenizer = Tokenizer.load(phi3 / "mini-4k")
    script = saying(phi3, tokenizer.encode_text("Cough."))
    stream = stream_note(script, tokenizer, TALK)
    list(stream)
    assert list(stream) == []


# --- conversations


def test_a_conversation_and_its_text_give_the_same_note(phi3: Path) -> None:
    model, tokenizer = load(phi3 / "mini-4k")
    config = GenerateConfig(max_tokens=20)
    talk = Conversation.from_text(TALK)
    assert generate_note(model, tokenizer, talk, config=config) == generate_note(
        model, tokenizer, TALK, config=config
    )


def test_the_section_is_part_of_the_prompt(phi3: Path) -> None:
    model, tokenizer = load(phi3 / "mini-4k")
    whole = stream_note(model, tokenizer, TALK)
    part = stream_note(model, tokenizer, TALK, section="GENHX")
    assert whole.prompt_tokens != part.prompt_tokens


@pytest.mark.parametrize(
    "talk", ["", " \n ", Conversation(()), Conversation((Turn("Doctor", ""), Turn("Patient", " ")))]
)
def test_a_conversation_without_words_is_refused(phi3: Path, talk: Any) -> None:
    model, tokenizer = load(phi3 / "mini-4k")
    with pytest.raises(GenerationError, match="the conversation has no words"):
        stream_note(model, tokenizer, talk)


def test_a_conversation_of_one_word_is_enough(phi3: Path) -> None:
    model, tokenizer = load(phi3 / "mini-4k")
    assert isinstance(
        generate_note(model, tokenizer, "Cough", config=GenerateConfig(max_tokens=4)), str
    )


LONG_TALK = Conversation(
    tuple(Turn("Doctor" if i % 2 == 0 else "Patient", f"word {i}") for i in range(200))
)


def test_a_conversation_beyond_the_context_is_shortened_and_says_so(
    phi3: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load(phi3 / "mini-4k")  # a context of 4096
    stream = stream_note(model, tokenizer, LONG_TALK, config=GenerateConfig(max_tokens=3600))
    assert 0 < stream.left_out_turns < 200
    assert stream.prompt_tokens + 3600 <= 4096
    assert f"{stream.left_out_turns} of its 200 turns are left out" in caplog.text
    assert "word" not in caplog.text  # no text of the conversation in a log
    next(stream, "")


def test_words_left_out_of_an_overlong_turn_are_told(
    phi3: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load(phi3 / "mini-4k")
    talk = Conversation((Turn("Patient", "word " * 3000),))
    stream = stream_note(model, tokenizer, talk)
    assert stream.left_out_words > 0
    assert f"{stream.left_out_words} words" in caplog.text


def test_a_conversation_that_fits_is_not_shortened(
    phi3: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load(phi3 / "mini-4k")
    stream = stream_note(model, tokenizer, TALK)
    assert (stream.left_out_turns, stream.left_out_words) == (0, 0)
    assert caplog.text == ""


def test_shortening_can_be_forbidden(phi3: Path) -> None:
    model, tokenizer = load(phi3 / "mini-4k")
    config = GenerateConfig(max_tokens=3600)
    with pytest.raises(GenerationError, match="context of 4096 tokens, 3600 of them") as caught:
        stream_note(model, tokenizer, LONG_TALK, config=config, shorten=False)
    assert "of its 200 turns would have to be left out" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_note_longer_than_the_context_is_refused(
    phi3: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load(phi3 / "mini-4k")
    with pytest.raises(GenerationError, match="max_tokens is 4096, the model's context holds 4096"):
        stream_note(model, tokenizer, TALK, config=GenerateConfig(max_tokens=4096))
    with pytest.raises(GenerationError, match="The limit is 4096 tokens less 4090 for the note"):
        stream_note(model, tokenizer, TALK, config=GenerateConfig(max_tokens=4090))
