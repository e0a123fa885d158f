"""One update: gradients of sums, added up, divided once, clipped, applied only when finite.

A micro-batch with five targets and one with fifty-five weigh as sixty tokens, not as two means. A
gradient that is not finite leaves the weights, the moments and the step count as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_medphi.config import TrainConfig
from mlx_medphi.model.phi3 import Phi3ForCausalLM
from mlx_medphi.text.packing import MicroBatch
from mlx_medphi.training.loss import loss_sum
from mlx_medphi.training.schedule import cosine_schedule

__all__ = ["Trainer", "Update", "batch_arrays", "dropout_key", "leaves"]

Tree = Any  # nested dicts and lists of arrays, as MLX hands them out


@dataclass(frozen=True)
class Update:
    """What one update did: mean loss, norm before clipping, rate, and whether it was skipped."""

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool


def leaves(tree: Tree) -> dict[str, mx.array]:
    """The arrays of a tree by their paths."""
    return dict(cast("list[tuple[str, mx.array]]", tree_flatten(tree)))


def dropout_key(seed: int, step: int, micro: int) -> mx.array:
    """The random key of one micro-batch, (2,) uint32: a function of its place in the run alone."""
    words = np.random.SeedSequence([seed, step, micro]).generate_state(2, np.uint32)
    return mx.array(words)


class Trainer:
    """A model with its optimiser and compiled functions.

    `trainable_parameters` of the model are float32 masters; their optimiser state is float32 too.
    """

    def __init__(
        self, model: Phi3ForCausalLM, config: TrainConfig, updates: int, *, compiled: bool = True
    ) -> None:
        self.model, self.config = model, config
        self.optimizer = optim.AdamW(
            learning_rate=cosine_schedule(config, updates),
            weight_decay=config.weight_decay,
            bias_correction=True,
        )
        self.optimizer.init(model.trainable_parameters())
        self.has_dropout = any(getattr(m, "dropout", 0.0) > 0 for m in model.modules())
        mx.eval(model.parameters(), self.optimizer.state)
        self._compiled = compiled
        self._functions: dict[tuple[str, bool], Callable[..., Any]] = {}
        self._zeros = tree_map(mx.zeros_like, model.trainable_parameters())
        self.traces = 0  # how often a function was traced anew; the tests watch it

    def update(self, batches: list[MicroBatch], step: int) -> Update:
        """Run the micro-batches of update number `step` (from 1) and apply them."""
        total, count = mx.array(0.0), mx.array(0.0)
        gradients = self._zeros
        for micro, batch in enumerate(batches):
            key = dropout_key(self.config.seed, step, micro) if self.has_dropout else None
            function = self._function("micro", batch.long)
            arguments = batch_arrays(batch) if key is None else (*batch_arrays(batch), key)
            gradients, total, count = function(gradients, total, count, *arguments)
            mx.eval(gradients, total, count)
        apply = self._function("apply", False)
        loss, norm, ok = apply(gradients, total, count)
        mx.eval(self.model.parameters(), self.optimizer.state, loss, norm, ok)
        return Update(loss.item(), norm.item(), self.optimizer.learning_rate.item(), not ok.item())

    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[float, int]:
        """(mean loss per supervised token, number of those tokens), without dropout."""
        total, tokens = 0.0, 0
        for batch in batches:
            loss = self._function("loss", batch.long)(*batch_arrays(batch))
            total += loss.item()
            tokens += batch.tokens_supervised
        return total / max(tokens, 1), tokens

    def optimizer_leaves(self) -> dict[str, mx.array]:
        """Every array of the optimiser's state by its path."""
        return leaves(self.optimizer.state)

    def restore_optimizer(self, leaves: dict[str, mx.array]) -> None:
        """Put saved leaves back one by one.

        Assigning a whole tree would lose the empty branches of frozen layers.

        Raises:
            KeyError: the saved leaves are not the live ones.
        """
        live = self.optimizer_leaves()
        if set(live) != set(leaves):
            raise KeyError(sorted(set(live) ^ set(leaves)))
        for path, value in leaves.items():
            _set_leaf(self.optimizer.state, path, value)
        mx.eval(self.optimizer.state)

    def _function(self, name: str, long_factors: bool) -> Callable[..., Any]:
        found = self._functions.get((name, long_factors))
        if found is None:
            found = self._functions[name, long_factors] = self._make(name, long_factors)
        return found

    def _make(self, name: str, long_factors: bool) -> Callable[..., Any]:
        model_state, optimizer_state = self.model.state, self.optimizer.state
        compute = partial(
            loss_sum,
            self.model,
            long_factors=long_factors,
            grad_checkpoint=self.config.grad_checkpoint and name == "micro",
        )
        if name == "loss":
            return self._compile(compute, [model_state], None)
        if name == "apply":
            state = [model_state, optimizer_state]
            return self._compile(self._apply, state, state)
        return self._compile(partial(self._micro, compute), [model_state], [model_state])

    def _compile(
        self, function: Callable[..., Any], inputs: list[Any], outputs: list[Any] | None
    ) -> Callable[..., Any]:
        def traced(*arguments: Any) -> Any:
            self.traces += 1
            return function(*arguments)

        if not self._compiled:
            return traced
        compiled: Callable[..., Any] = mx.compile(traced, inputs=inputs, outputs=outputs)
        return compiled

    def _micro(
        self,
        compute: Callable[..., mx.array],
        gradients: Tree,
        total: mx.array,
        count: mx.array,
        ids: mx.array,
        segments: mx.array,
        positions: mx.array,
        targets: mx.array,
        weights: mx.array,
        key: mx.array | None = None,
    ) -> tuple[Tree, mx.array, mx.array]:
        run = nn.value_and_grad(self.model, compute)
        loss, new = run(ids, segments, positions, targets, weights, key)
        gradients = tree_map(lambda a, g: a + g.astype(mx.float32), gradients, new)
        return gradients, total + loss, count + weights.sum()

    def _apply(
        self, gradients: Tree, total: mx.array, count: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        tokens = mx.maximum(count, 1.0)
        gradients = tree_map(lambda g: g / tokens, gradients)
        gradients, norm = _clipped(gradients, self.config.max_grad_norm)
        # count > 0: weight decay must not act on a step without targets.
        ok = mx.isfinite(norm) & mx.isfinite(total) & (count > 0)
        old_weights = self.model.trainable_parameters()
        old_state = tree_map(lambda leaf: leaf, self.optimizer.state)
        weights = self.optimizer.apply_gradients(gradients, old_weights)
        self.model.update(tree_map(lambda new, old: mx.where(ok, new, old), weights, old_weights))
        # In place and leaf by leaf: rebinding the state would break what the compiler captured.
        before = leaves(old_state)
        for path, leaf in leaves(self.optimizer.state).items():
            _set_leaf(self.optimizer.state, path, mx.where(ok, leaf, before[path]))
        return total / tokens, norm, ok


def _clipped(gradients: Tree, limit: float) -> tuple[Tree, mx.array]:
    """Scale all gradients to a global norm of at most `limit`; the norm returned is before that."""
    squares = [mx.square(leaf).sum() for leaf in leaves(gradients).values()]
    norm = mx.sqrt(mx.stack(squares).sum())
    factor = mx.minimum(limit / (norm + 1e-6), 1.0)
    return tree_map(lambda g: g * factor, gradients), norm


def batch_arrays(batch: MicroBatch) -> tuple[mx.array, ...]:
    """A micro-batch as the arrays that `loss_sum` takes."""
    return (
        mx.array(batch.ids),
        mx.array(batch.seg),
        mx.array(batch.idx),
        mx.array(batch.tgt),
        mx.array(batch.weight),
    )


def _set_leaf(tree: Tree, path: str, value: mx.array) -> None:
    *branches, last = path.split(".")
    for branch in branches:
        tree = tree[int(branch)] if isinstance(tree, list) else tree[branch]
    tree[last] = value
