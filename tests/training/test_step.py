"""One update: sums, clipping, the guard, dropout keys, checkpointing and compilation."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest_training import Base, micro_batch
from mlx.utils import tree_map

from mlx_medphi.config import LoRAConfig, TrainConfig
from mlx_medphi.model.lora import adapted_layers
from mlx_medphi.model.phi3 import Block
from mlx_medphi.text.chat import EncodedExample
from mlx_medphi.text.packing import plan
from mlx_medphi.training.loss import loss_sum
from mlx_medphi.training.schedule import cosine_schedule
from mlx_medphi.training.step import Trainer, batch_arrays, dropout_key, leaves

DROPOUT = LoRAConfig(rank=4, dropout=0.3)


def _batch(seed: int = 0, spans=((30, 48), (10, 40)), slots: int = 64):
    ids = np.random.default_rng(seed).integers(3, 300, (len(spans), 48))
    return micro_batch(ids, list(spans), slots=slots)


def _weights(trainer: Trainer) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in leaves(trainer.model.trainable_parameters()).items()}


def _state(trainer: Trainer) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in trainer.optimizer_leaves().items()}


def _same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_accumulated_micro_batches_equal_one_batch(adapted: Base) -> None:
    """Unequal target counts: 5 and 30. A mean of means is far off, sums are not."""
    both = _batch(spans=((43, 48), (10, 40)))
    first = micro_batch(both.ids[:1], [(43, 48)])
    second = micro_batch(both.ids[1:], [(10, 40)])

    def gradient(batch) -> mx.array:
        model = adapted()
        grad = mx.grad(lambda a: _loss_with(model, a, batch) / batch.tokens_supervised)
        return grad(_first_b(model))

    whole = gradient(both)
    mean_of_means = (gradient(first) + gradient(second)) / 2
    by_tokens = (5 * gradient(first) + 30 * gradient(second)) / 35
    scale = mx.linalg.norm(whole).item()
    assert mx.linalg.norm(mean_of_means - whole).item() / scale > 0.1
    assert mx.linalg.norm(by_tokens - whole).item() / scale < 1e-5

    one, two = (Trainer(adapted(), TrainConfig(), 10) for _ in range(2))
    a, b = one.update([both], 1), two.update([first, second], 1)
    assert b.loss == pytest.approx(a.loss, rel=1e-6)
    assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)
    # Adam's first step is the sign of the gradient times the rate: compare the moments instead.
    for path, leaf in _state(one).items():
        assert np.allclose(leaf, _state(two)[path], rtol=0, atol=1e-6), path


def _first_b(model) -> mx.array:
    return next(adapted_layers(model))[1].lora_b


def _loss_with(model, b: mx.array, batch, **options) -> mx.array:
    next(adapted_layers(model))[1].lora_b = b
    options = {"long_factors": False, "grad_checkpoint": False} | options
    return loss_sum(model, *batch_arrays(batch), **options)


def test_checkpointed_compiled_gradient_is_the_slope_of_the_loss(adapted: Base) -> None:
    """Central differences through the first block's dropout, beside the compiled step's own."""
    config = TrainConfig(grad_checkpoint=True, max_grad_norm=1e9, seed=3)
    model, batch = adapted(lora=DROPOUT), _batch()
    key = dropout_key(3, 1, 0)
    start = mx.array(np.array(_first_b(model)))
    direction = mx.random.normal(start.shape, key=mx.random.key(9))
    step = 2e-3

    def loss(amount: float) -> float:
        return _loss_with(model, start + amount * direction, batch, key=key).item()

    slope = (loss(step) - loss(-step)) / (2 * step)
    _first_b(model)[:] = start
    trainer = Trainer(adapted(lora=DROPOUT), config, 10)
    trainer.update([batch], 1)
    # Adam's first moment after one update is (1 - 0.9) · the mean gradient.
    moment = trainer.optimizer_leaves()["model.layers.0.self_attn.qkv_proj.lora_b.m"]
    by_autograd = (moment * 10 * direction).sum().item() * batch.tokens_supervised
    # float32 losses near 300 resolve 3e-5; over 0.004 that is 0.3 % of a slope near 2.5
    assert by_autograd == pytest.approx(slope, rel=0.01)
    assert abs(slope) > 0.1


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_checkpointing_and_compilation_change_no_bit(adapted: Base, kind: str) -> None:
    lora = replace(DROPOUT, fine_tune_type=kind)
    results = []
    for checkpoint in (False, True):
        for compiled in (False, True):
            config = TrainConfig(grad_checkpoint=checkpoint)
            trainer = Trainer(adapted(lora=lora), config, 10, compiled=compiled)
            for step in (1, 2, 3):
                trainer.update([_batch(step), _batch(step + 10)], step)
            results.append(_weights(trainer))
    assert all(_same(results[0], other) for other in results[1:])


def test_masks_drawn_again_in_the_backward_pass_would_give_another_gradient(adapted: Base) -> None:
    """The old way of checkpointing, as a control for the two tests above."""
    model, batch = adapted(lora=DROPOUT), _batch()
    keys = iter([dropout_key(0, 1, n) for n in range(8)])

    def fresh(b: mx.array) -> mx.array:
        return _loss_with(model, b, batch, key=next(keys))

    right = mx.grad(lambda b: _loss_with(model, b, batch, key=dropout_key(0, 1, 0)))
    wrong = mx.grad(lambda b: mx.checkpoint(fresh)(b))
    b = _first_b(model)
    difference = mx.linalg.norm(wrong(b) - right(b)) / mx.linalg.norm(right(b))
    assert difference.item() > 0.1


def test_dropout_is_a_function_of_seed_step_and_place(adapted: Base) -> None:
    trainer = Trainer(adapted(lora=DROPOUT), TrainConfig(seed=5), 10)
    keys = {
        tuple(dropout_key(*place).tolist())
        for place in [(5, 1, 0), (5, 1, 1), (5, 2, 0), (6, 1, 0)]
    }
    assert len(keys) == 4
    before = trainer.evaluate([_batch()])
    mx.random.seed(0)  # the global state of the caller plays no part
    again = Trainer(adapted(lora=DROPOUT), TrainConfig(seed=5), 10)
    assert again.evaluate([_batch()]) == before
    a, b = trainer.update([_batch()], 1), again.update([_batch()], 1)
    assert a == b
    other = Trainer(adapted(lora=DROPOUT), TrainConfig(seed=6), 10).update([_batch()], 1)
    assert other.loss != a.loss


def test_a_gradient_that_is_not_finite_changes_nothing(adapted: Base) -> None:
    trainer = Trainer(adapted(), TrainConfig(), 10)
    trainer.update([_batch(1)], 1)
    weights, state = _weights(trainer), _state(trainer)
    poisoned = _batch(2)
    poisoned.weight[0] = np.nan
    assert trainer.update([_batch(3), poisoned], 2).skipped
    assert _same(_weights(trainer), weights)
    assert _same(_state(trainer), state)
    after = trainer.update([_batch(4)], 3)
    assert not after.skipped
    assert not _same(_weights(trainer), weights)
    assert _state(trainer)["step"] == 2  # the schedule counts applied updates only


def test_a_step_without_targets_changes_nothing(adapted: Base) -> None:
    """Weight decay must not act on it, and nothing is divided by zero."""
    trainer = Trainer(adapted(), TrainConfig(weight_decay=0.5), 10)
    weights = _weights(trainer)
    empty = _batch()
    empty.weight[:] = 0
    update = trainer.update([empty], 1)
    assert update.skipped and update.loss == 0
    assert _same(_weights(trainer), weights)


def test_gradients_are_clipped_to_the_global_norm(adapted: Base) -> None:
    free = Trainer(adapted(), TrainConfig(max_grad_norm=1e9), 10)
    tight = Trainer(adapted(), TrainConfig(max_grad_norm=1e-3), 10)
    norm = free.update([_batch()], 1).grad_norm
    assert tight.update([_batch()], 1).grad_norm == pytest.approx(norm, rel=1e-6)
    moments = [v for k, v in tight.optimizer_leaves().items() if k.endswith(".m")]
    total = math.sqrt(sum(mx.square(10 * m).sum().item() for m in moments))
    assert total == pytest.approx(1e-3, rel=1e-3)


def test_shapes_seen_before_are_not_traced_again(adapted: Base) -> None:
    trainer = Trainer(adapted(lora=DROPOUT), TrainConfig(grad_checkpoint=True), 10)
    call = Block.__call__
    trainer.update([_batch(1)], 1)
    trainer.evaluate([_batch(1)])
    traces = trainer.traces
    for step in range(2, 6):
        trainer.update([_batch(step), _batch(step + 10)], step)
        trainer.evaluate([_batch(step)])
    assert trainer.traces == traces == 3  # micro, apply, loss
    assert Block.__call__ is call  # nothing was patched


def test_the_same_weights_score_the_same_twice(adapted: Base) -> None:
    trainer = Trainer(adapted(lora=DROPOUT), TrainConfig(), 10)
    trainer.update([_batch(1)], 1)
    batches = [_batch(2), _batch(3)]
    assert trainer.evaluate(batches) == trainer.evaluate(batches)


def test_training_a_quantised_base_lowers_the_loss(base: Base) -> None:
    from mlx_medphi.model.lora import apply_lora

    for bits in (4, 8):
        model = base(quantize=(bits, 32))
        apply_lora(model, LoRAConfig(rank=8, dropout=0.0))
        trainer = Trainer(model, TrainConfig(learning_rate=1e-2), 20)
        losses = [trainer.update([_batch()], step).loss for step in range(1, 16)]
        assert losses[-1] < losses[0] - 0.5, (bits, losses)


def test_the_schedule_is_a_warm_up_and_a_cosine() -> None:
    config = TrainConfig(learning_rate=1e-3, warmup=0.1, final_learning_rate=0.1)
    rate = cosine_schedule(config, 100)
    for applied in (0, 4, 9, 10, 50, 99, 150):
        if applied < 10:
            expected = 1e-3 * (applied + 1) / 10
        else:
            done = min((applied - 10 + 1) / 90, 1.0)
            expected = 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * done))
        assert rate(mx.array(applied)).item() == pytest.approx(expected, rel=1e-5)
    assert rate(mx.array(99)).item() == pytest.approx(1e-4, rel=1e-5)


def test_restoring_the_optimiser_refuses_other_leaves(adapted: Base) -> None:
    trainer = Trainer(adapted(), TrainConfig(), 10)
    saved = tree_map(lambda leaf: leaf + 1, trainer.optimizer_leaves())
    trainer.restore_optimizer(saved)
    assert _same(_state(trainer), {k: np.array(v) for k, v in saved.items()})
    saved.pop("step")
    with pytest.raises(KeyError, match="step"):
        trainer.restore_optimizer(saved)


def test_a_whole_epoch_is_traced_once_for_each_of_few_widths(adapted: Base) -> None:
    """Widths of whole multiples of 32, as mlx-lm pads them, would be traced nine times here."""
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(20, 60, 30).tolist(), *range(65, 320, 28)]
    old_widths = {1 + 32 * -(-length // 32) for length in lengths}
    examples = [
        EncodedExample(str(n), rng.integers(3, 300, n).tolist(), [0] * (n - 5) + [1] * 5)
        for n in lengths
    ]
    layout = plan(examples, rows=2, seed=0, epochs=1)
    trainer = Trainer(adapted(), TrainConfig(), 100)
    for step, batch in enumerate(layout.epoch(0), start=1):
        trainer.update([batch], step)
    assert len(old_widths) >= 9
    assert len(layout.shapes.widths) <= 4
    assert trainer.traces == len(layout.shapes.widths) + 1  # and one to apply them
