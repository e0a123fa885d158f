"""The loss is a sum over exactly the supervised targets, whatever the rows look like."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest_training import FIXTURES, Base, micro_batch

from mlx_medphi.text.chat import EncodedExample
from mlx_medphi.text.packing import evaluation_batches
from mlx_medphi.training.loss import loss_sum, segment_mask
from mlx_medphi.training.step import batch_arrays

# float32 sums of some fifty terms near 6 in another order.
SUM_TOLERANCE = 2e-5


def _loss(model, batch, **options):
    options = {"long_factors": batch.long, "grad_checkpoint": False} | options
    return loss_sum(model, *batch_arrays(batch), **options)


@pytest.mark.parametrize("folder", sorted(path.name for path in FIXTURES.iterdir()))
def test_mean_loss_equals_transformers(base: Base, folder: str) -> None:
    model = base(folder)
    reference = mx.load(str(FIXTURES / folder / "reference.safetensors"))
    spans = json.loads((FIXTURES / folder / "reference.json").read_text())["completion_spans"]
    ids = np.array(reference["ids"])
    long = model.config.uses_long_factors(ids.shape[1])
    batch = micro_batch(ids, spans, long=long)
    mean = _loss(model, batch).item() / batch.tokens_supervised
    assert mean == pytest.approx(reference["completion_loss"].item(), abs=SUM_TOLERANCE)


def test_a_pad_token_is_never_a_target(base: Base) -> None:
    ids = np.arange(10, 58).reshape(1, 48)
    batch = micro_batch(ids, [(20, 25)])
    lengths = np.array([25])
    # the rule of mlx-lm's trainer: steps <= length, one more than there are
    steps = np.arange(1, 49)
    old = int(((steps >= 20) & (steps <= lengths[:, None])).sum())
    assert (old, batch.tokens_supervised, int(batch.weight.sum())) == (6, 5, 5)


@pytest.mark.parametrize("folder", ["mini-4k", "sliding-window", "longrope-short"])
def test_packed_rows_have_the_loss_of_separate_rows(base: Base, folder: str) -> None:
    model = base(folder)
    rng = np.random.default_rng(0)
    examples = [
        EncodedExample(str(n), rng.integers(3, 300, n).tolist(), [0] * 6 + [1] * (n - 6))
        for n in (90, 17, 25, 9, 40)
    ]
    packed = evaluation_batches(examples, rows=1)
    apart = evaluation_batches(examples, rows=1, pack=False)
    assert (len(packed), len(apart)) == (2, 5)
    total = sum(_loss(model, batch).item() for batch in apart)
    assert sum(_loss(model, batch).item() for batch in packed) == pytest.approx(total, rel=1e-6)


def test_rows_use_the_rotary_factors_of_their_own_length(base: Base) -> None:
    model = base("longrope-long")
    switch = model.config.switch_length
    assert switch == 32
    rng = np.random.default_rng(0)
    examples = [
        EncodedExample(str(n), rng.integers(3, 300, n).tolist(), [0] * 6 + [1] * (n - 6))
        for n in (20, 20, 40)
    ]
    batches = evaluation_batches(examples, rows=2, long_threshold=switch)
    total = sum(_loss(model, batch).item() for batch in batches)
    expected = 0.0
    for example in examples:
        ids = mx.array([example.ids])
        logits = model(ids)[0]
        chosen = mx.take_along_axis(logits[5:-1], ids[0, 6:, None], axis=-1)[:, 0]
        expected += (mx.logsumexp(logits[5:-1], axis=-1) - chosen).sum().item()
    assert total == pytest.approx(expected, rel=1e-6)


def test_the_head_sees_only_supervised_slots(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = base(), []
    head = type(model).head
    monkeypatch.setattr(
        type(model), "head", lambda self, h: (seen.append(h.shape), head(self, h))[1]
    )
    batch = micro_batch(np.arange(3, 99).reshape(2, 48), [(40, 48), (30, 40)], slots=64)
    _loss(model, batch)
    assert seen == [(64, 64)]  # (slots, hidden), not (2 · 48, hidden)


def test_the_loss_is_float32_in_a_half_precision_model(base: Base) -> None:
    batch = micro_batch(np.arange(3, 51).reshape(1, 48), [(40, 48)])
    exact = _loss(base(), batch)
    half = _loss(base(dtype="bfloat16"), batch)
    assert half.dtype == mx.float32
    # bfloat16 keeps 8 bits: 1/256 of a logit near 3, averaged over eight targets near 6 nats
    assert half.item() == pytest.approx(exact.item(), rel=0.01)


def test_padding_sees_itself_so_no_softmax_row_is_empty() -> None:
    mask = np.array(segment_mask(mx.array([[0, 0, 1, -1, -1]]), None))[0, 0]
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert mask.astype(int).tolist() == expected


def test_the_window_hides_far_tokens_of_the_same_example() -> None:
    mask = np.array(segment_mask(mx.array([[0, 0, 0, 0]]), 2))[0, 0]
    assert mask.astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
