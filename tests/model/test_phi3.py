"""Logits equal those of transformers, however the model is run."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_medphi.errors import GenerationError
from mlx_medphi.model.cache import GROWTH, Cache
from mlx_medphi.model.checkpoint import load
from mlx_medphi.model.phi3 import Phi3ForCausalLM, attention_mask

# Both sides sum some 100 float32 products in another order; the measured difference is 2.3e-6.
LOGITS_ATOL = 1e-4


def float32_model(folder: Path) -> Phi3ForCausalLM:
    return load(folder, dtype="float32")[0]


def logits(model: Phi3ForCausalLM, ids: mx.array) -> np.ndarray:
    return np.array(model(ids).astype(mx.float32))


def test_logits_equal_transformers(each_folder: Path) -> None:
    reference = mx.load(str(each_folder / "reference.safetensors"))
    found = logits(float32_model(each_folder), reference["ids"])
    np.testing.assert_allclose(found, np.array(reference["logits"]), rtol=0, atol=LOGITS_ATOL)


def test_completion_loss_equals_transformers(each_folder: Path) -> None:
    reference = mx.load(str(each_folder / "reference.safetensors"))
    spans = json.loads((each_folder / "reference.json").read_text())["completion_spans"]
    ids = reference["ids"]
    weights = mx.zeros(ids.shape)
    for row, (begin, end) in enumerate(spans):
        weights[row, begin:end] = 1
    scores = float32_model(each_folder)(ids)[:, :-1]
    losses = nn.losses.cross_entropy(scores, ids[:, 1:]) * weights[:, 1:]
    loss = (losses.sum() / weights[:, 1:].sum()).item()
    assert loss == pytest.approx(reference["completion_loss"].item(), abs=1e-5)


def test_rows_read_with_a_mask_equal_rows_read_without(each_folder: Path) -> None:
    model = float32_model(each_folder)
    ids = mx.load(str(each_folder / "reference.safetensors"))["ids"]
    length, window = ids.shape[1], model.config.sliding_window or ids.shape[1]
    rows, columns = mx.arange(length)[:, None], mx.arange(length)[None]
    mask = ((columns <= rows) & (columns > rows - window))[None, None]
    hidden = model.hidden(ids, mask, model.config.uses_long_factors(length))
    np.testing.assert_allclose(
        np.array(model.head(hidden)), logits(model, ids), rtol=0, atol=LOGITS_ATOL
    )


@pytest.mark.parametrize("pieces", [[48], [1] * 48, [7, 1, 30, 10]])
def test_logits_with_a_cache_equal_logits_without(each_folder: Path, pieces: list[int]) -> None:
    model = float32_model(each_folder)
    ids = mx.load(str(each_folder / "reference.safetensors"))["ids"]
    cache = Cache(model.config, ids.shape[1])
    found, at = [], 0
    for count in pieces:
        found.append(model(ids[:, at : at + count], cache))
        at += count
    assert cache.offset == ids.shape[1]
    np.testing.assert_allclose(
        np.array(mx.concatenate(found, axis=1)), logits(model, ids), rtol=0, atol=LOGITS_ATOL
    )


def test_a_cache_keeps_what_it_holds_when_it_grows(phi3: Path) -> None:
    model = float32_model(phi3 / "sliding-window")
    length = GROWTH + 40
    ids = mx.array(np.random.default_rng(0).integers(0, 300, (1, length)), dtype=mx.int32)
    cache = Cache(model.config, length)
    first = model(ids[:, : GROWTH - 3], cache)
    rest = [model(ids[:, i : i + 1], cache) for i in range(GROWTH - 3, length)]
    found = np.array(mx.concatenate([first, *rest], axis=1))
    np.testing.assert_allclose(found, logits(model, ids), rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 100])
@pytest.mark.parametrize(("queries", "offset"), [(1, 0), (6, 0), (1, 7), (4, 7)])
def test_a_query_sees_itself_and_the_keys_of_its_window(
    window: int | None, queries: int, offset: int
) -> None:
    mask = attention_mask(queries, offset, window)
    total = offset + queries
    rows, columns = np.arange(offset, total)[:, None], np.arange(total)[None]
    seen = columns <= rows
    expected = seen if window is None else seen & (columns > rows - window)
    if mask is None:
        found = np.ones((queries, total), dtype=bool)
    elif isinstance(mask, str):
        assert mask == "causal"
        found = np.tril(np.ones((queries, total), dtype=bool), offset)
    else:
        found = np.array(mask)
    np.testing.assert_array_equal(found, expected)


def test_the_length_of_a_sequence_chooses_the_factors_of_all_its_positions(phi3: Path) -> None:
    model = float32_model(phi3 / "longrope-long")
    ids = mx.load(str(phi3 / "longrope-long" / "reference.safetensors"))["ids"]
    short, long = logits(model, ids[:, :32]), logits(model, ids[:, :33])
    # Position 0 is not turned by either set; position 1 is, by different angles.
    assert np.abs(short[:, 1] - long[:, 1]).max() > 100 * LOGITS_ATOL
    kept = Cache(model.config, 48)
    np.testing.assert_allclose(np.array(model(ids[:, :33], kept)), long, rtol=0, atol=LOGITS_ATOL)


def test_keys_of_the_short_factors_are_not_used_for_a_long_sequence(phi3: Path) -> None:
    model = float32_model(phi3 / "longrope-long")
    cache = Cache(model.config, 32)
    model(mx.zeros((1, 32), dtype=mx.int32), cache)
    with pytest.raises(GenerationError, match="33 tokens need LongRoPE's long factors"):
        model(mx.zeros((1, 1), dtype=mx.int32), cache)


def test_a_model_computes_in_the_dtype_it_is_stored_in(phi3: Path) -> None:
    folder = phi3 / "gqa"
    model, _ = load(folder)
    reference = mx.load(str(folder / "reference.safetensors"))
    found = model(reference["ids"])
    assert found.dtype == mx.bfloat16
    cache = Cache(model.config, 4)
    model(reference["ids"][:, :4], cache)
    assert {array.dtype for array in cache.arrays()} == {mx.bfloat16}
    # bfloat16 keeps 8 bits: logits of size 3 are 0.012 apart, and a few roundings add up.
    assert np.abs(np.array(found.astype(mx.float32)) - np.array(reference["logits"])).max() < 0.06
