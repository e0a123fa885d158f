"""The loop an app runs around the two functions: masks, blocks, positions, one token after another.

It drives anything that can call a function of the package: the interpreter on any machine, Core ML
itself on a Mac. A prompt is read in blocks of `prefill` tokens, the last one padded; where a padded
block would reach beyond the cache, and for single tokens, `decode` is called.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mlx_medphi.coreml.manifest import MASK_VALUE
from mlx_medphi.errors import BundleError

__all__ = ["Predictor", "Runner", "Shape", "causal_mask"]

Array = npt.NDArray[Any]
State = MutableMapping[str, Array]


class Predictor(Protocol):
    """What runs one function of a package."""

    def new_state(self, function: str) -> State:
        """Zeroed states, shared by all functions that declare the same ones."""
        ...

    def run(
        self, function: str, inputs: Mapping[str, Array], state: State | None = None
    ) -> dict[str, Array]:
        """The outputs of one call; states are changed in place."""
        ...


@dataclass(frozen=True)
class Shape:
    """What the loop must know of a package.

    Attributes:
        context: slots of the key/value cache.
        prefill: tokens one call of `prefill` reads.
        window: keys a query sees, itself included; None: all.
        functions: the names of the prefill and the decode function.
        slot_kind: how adapters are handed over, "state" or "input"; None: no slots.
        switch: tokens beyond which the second set of rotary tables is used, by `ropeRow`; None: the
            package has one set.
    """

    context: int
    prefill: int
    window: int | None
    functions: tuple[str, str]
    slot_kind: str | None = None
    switch: int | None = None


def causal_mask(
    position: int, width: int, context: int, window: int | None, start: int = 0
) -> npt.NDArray[np.float16]:
    """The mask of `width` tokens from `position` on, (1, 1, width, context): 0 sees, −1e4 hides.

    A query sees itself and what came before from slot `start` on, at most `window` keys
    (transformers, `masking_utils.sliding_window_overlay`).
    """
    queries = position + np.arange(width)[:, None]
    keys = np.arange(context)[None, :]
    seen = (keys <= queries) & (keys >= start)
    if window is not None:
        seen &= keys > queries - window
    return np.where(seen, np.float16(0), np.float16(MASK_VALUE))[None, None]


class Runner:
    """One conversation with a package: tokens in, logits out.

    Attributes:
        length: tokens read since the last reset.
    """

    def __init__(
        self,
        predictor: Predictor,
        shape: Shape,
        slots: Mapping[str, Array] | None = None,
        *,
        start: int = 0,
    ) -> None:
        """Start with an empty cache.

        Args:
            predictor: runs the functions.
            shape: the package's extents.
            slots: an adapter's arrays by slot name; None leaves the slots empty.
            start: the slot of the first token; those before it are never seen. Rotation is
                relative, so the logits are those of a conversation that starts at 0.
        """
        self.predictor, self.shape, self.start = predictor, shape, start
        self.state = predictor.new_state(shape.functions[0])
        self._inputs: dict[str, Array] = {}
        self.reset()
        if slots is not None:
            self.use(slots)

    def use(self, slots: Mapping[str, Array]) -> None:
        """Fill the slots and forget the conversation: its keys belong to the old weights.

        Raises:
            BundleError: the package has no slots.
        """
        if self.shape.slot_kind is None:
            raise BundleError("this package has no adapter slots; export it with adapters='slots'")
        self.reset()
        if self.shape.slot_kind == "input":
            self._inputs = dict(slots)
        else:
            for name, values in slots.items():
                self.state[name] = values

    def reset(self) -> None:
        """Begin a new conversation; slots keep what they hold."""
        self._ids: list[int] = []
        self._begin(0)

    def _begin(self, total: int) -> None:
        """Start from the first slot, with the rotary set of a sequence of `total` tokens."""
        self.length = 0
        self._long = self.shape.switch is not None and total > self.shape.switch

    def feed(self, ids: Sequence[int]) -> Array:
        """Read tokens and return the logits after the last one, (vocab,) float16.

        A sequence that grows beyond LongRoPE's switch is read again from its start, as the keys in
        the cache were rotated with the other set (transformers, `modeling_phi3.py`).

        Raises:
            BundleError: no token, or more than the cache has room for.
        """
        if not ids:
            raise BundleError("no token to read")
        last: Array = self.rows(ids, [len(ids) - 1])[-1]
        return last

    def rows(self, ids: Sequence[int], wanted: Sequence[int] | None = None) -> Array:
        """Read tokens and return the logits after each wanted one (default: all), (n, vocab).

        A block is run again for each further row it must return; that changes nothing it wrote.

        Raises:
            BundleError: more tokens than the cache has room for; none of them was read.
        """
        indices = range(len(ids)) if wanted is None else sorted(wanted)
        again: list[int] = []
        total = self.length + len(ids)
        if len(ids) > self._room:
            raise BundleError(
                f"{len(ids)} tokens after {self.length} do not fit the context of "
                f"{self.shape.context}; shorten the conversation or export with a longer context"
            )
        if self.shape.switch is not None and total > self.shape.switch and not self._long:
            again = self._ids
            self._begin(total)
        self._ids = [*self._ids, *ids]
        rows, begin = [], -len(again)
        for block, wide in self._blocks([*again, *ids]):
            inside = [at - begin for at in indices if begin <= at < begin + len(block)]
            rows += [self._call(block, wide, at) for at in inside]
            if not inside:
                self._call(block, wide, len(block) - 1)
            self.length += len(block)
            begin += len(block)
        return np.stack(rows)

    @property
    def _room(self) -> int:
        """Slots that are left."""
        return self.shape.context - self.start - self.length

    def greedy(
        self,
        ids: Sequence[int],
        count: int,
        *,
        allowed: int | None = None,
        stop: Container[int] = (),
    ) -> list[int]:
        """The most likely tokens one after the other.

        Args:
            ids: the prompt.
            count: most tokens to return.
            allowed: size of the tokenizer's vocabulary; rows beyond it are padding. None: all.
            stop: ids that end the text; they are not returned.
        """
        found: list[int] = []
        logits = self.feed(ids)
        while len(found) < count and (token := int(np.argmax(logits[:allowed]))) not in stop:
            found.append(token)
            if len(found) < count:
                logits = self.feed([token])
        return found

    def _blocks(self, ids: Sequence[int]) -> Iterator[tuple[Sequence[int], bool]]:
        at = 0
        while at < len(ids):
            left = len(ids) - at
            wide = left > 1 and self._room >= self.shape.prefill
            count = min(left, self.shape.prefill) if wide else 1
            yield ids[at : at + count], wide
            at += count

    def _call(self, block: Sequence[int], wide: bool, row: int) -> Array:
        width, position = self.shape.prefill if wide else 1, self.start + self.length
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(block)] = block
        inputs: dict[str, Array] = {
            "inputIds": padded,
            "position": np.array([position], np.int32),
            "causalMask": causal_mask(
                position, width, self.shape.context, self.shape.window, self.start
            ),
            "lastIndex": np.array([row], np.int32),
            **self._inputs,
        }
        if self.shape.switch is not None:
            rope = position + (self.shape.context if self._long else 0)
            inputs["ropeRow"] = np.array([rope], np.int32)
        function = self.shape.functions[0 if wide else 1]
        return self.predictor.run(function, inputs, self.state)["logits"].reshape(-1)
