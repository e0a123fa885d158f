"""The loop around the two functions: which blocks are read where, with which mask, and by whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlx_medphi.coreml.runner import Runner, Shape, causal_mask
from mlx_medphi.errors import BundleError

Array = npt.NDArray[Any]

SHAPE = Shape(context=32, prefill=8, window=None, functions=("read", "step"))
VOCABULARY = 50


@dataclass
class Call:
    """What a function was given."""

    function: str
    ids: list[int]
    position: int
    last: int
    inputs: Mapping[str, Array]


class Recorder:
    """A package whose state is the ids in its slots; token t makes t + 1 the most likely one."""

    def __init__(self, row: Sequence[float] | None = None) -> None:
        self.calls: list[Call] = []
        self.row = row

    def new_state(self, function: str) -> dict[str, Array]:
        assert function == "read"
        return {"slots": np.full(SHAPE.context, -1)}

    def run(
        self, function: str, inputs: Mapping[str, Array], state: Any = None
    ) -> dict[str, Array]:
        ids, position = inputs["inputIds"], int(inputs["position"][0])
        width = {"read": SHAPE.prefill, "step": 1}[function]
        assert ids.shape == (1, width) and ids.dtype == np.int32
        assert inputs["position"].shape == inputs["lastIndex"].shape == (1,)
        assert position + width <= SHAPE.context
        state["slots"][position : position + width] = ids[0]
        last = int(inputs["lastIndex"][0])
        self.calls.append(Call(function, ids[0].tolist(), position, last, inputs))
        logits = np.zeros((1, 1, VOCABULARY), np.float16)
        logits[0, 0, (ids[0, last] + 1) % VOCABULARY] = 1
        if self.row is not None:
            logits[0, 0, : len(self.row)] = self.row
        return {"logits": logits}


def read(recorder: Recorder) -> list[tuple[str, int, int]]:
    """Function, position and last index of each call."""
    return [(call.function, call.position, call.last) for call in recorder.calls]


def tokens(count: int) -> list[int]:
    return list(range(1, count + 1))


@pytest.mark.parametrize("window", [None, 1, 3, 8, 40])
@pytest.mark.parametrize(("position", "width"), [(0, 1), (0, 8), (5, 8), (24, 8), (31, 1)])
def test_a_query_sees_itself_and_what_came_before_within_the_window(
    position: int, width: int, window: int | None
) -> None:
    mask = causal_mask(position, width, 32, window)
    assert mask.shape == (1, 1, width, 32) and mask.dtype == np.float16
    for query in range(width):
        at = position + query
        oldest = 0 if window is None else max(0, at - window + 1)
        for key in range(32):
            assert mask[0, 0, query, key] == (0 if oldest <= key <= at else -10000)


@pytest.mark.parametrize(
    ("count", "calls"),
    [
        (1, [("step", 0, 0)]),
        (2, [("read", 0, 1)]),
        (8, [("read", 0, 7)]),
        (9, [("read", 0, 7), ("step", 8, 0)]),
        (10, [("read", 0, 7), ("read", 8, 1)]),
        (32, [("read", 0, 7), ("read", 8, 7), ("read", 16, 7), ("read", 24, 7)]),
    ],
)
def test_a_prompt_is_read_in_blocks(count: int, calls: list[tuple[str, int, int]]) -> None:
    recorder = Recorder()
    runner = Runner(recorder, SHAPE)
    logits = runner.feed(tokens(count))
    assert logits.shape == (VOCABULARY,) and logits.dtype == np.float16
    assert np.argmax(logits) == count + 1
    assert read(recorder) == calls and runner.length == count
    assert runner.state["slots"][:count].tolist() == tokens(count)


def test_a_padded_block_ends_in_zeros_that_the_next_tokens_replace() -> None:
    recorder = Recorder()
    runner = Runner(recorder, SHAPE)
    runner.feed(tokens(3))
    assert recorder.calls[0].ids == [1, 2, 3, 0, 0, 0, 0, 0]
    runner.feed([9])
    assert runner.state["slots"][:4].tolist() == [1, 2, 3, 9]


def test_a_block_that_would_reach_beyond_the_cache_is_read_token_by_token() -> None:
    recorder = Recorder()
    runner = Runner(recorder, SHAPE)
    runner.feed([7])  # blocks now begin at 1, 9 and 17; one at 25 would end at 33
    runner.feed(tokens(31))
    expected = [("step", 0, 0), ("read", 1, 7), ("read", 9, 7), ("read", 17, 7)]
    assert read(recorder) == expected + [("step", at, 0) for at in range(25, 32)]
    assert runner.state["slots"].tolist() == [7, *tokens(31)]


def test_each_call_has_the_mask_of_its_place_and_the_packages_window() -> None:
    recorder = Recorder()
    Runner(recorder, replace(SHAPE, window=5)).feed(tokens(17))
    for call in recorder.calls:
        wanted = causal_mask(call.position, len(call.ids), 32, 5)
        np.testing.assert_array_equal(call.inputs["causalMask"], wanted)
    assert [len(call.ids) for call in recorder.calls] == [8, 8, 1]


def test_every_row_is_that_of_its_token() -> None:
    runner = Runner(Recorder(), SHAPE)
    runner.feed([40])
    rows = runner.rows(tokens(20))
    assert rows.shape == (20, VOCABULARY)
    assert rows.argmax(axis=1).tolist() == [token + 1 for token in tokens(20)]


def test_only_wanted_rows_are_computed_and_all_tokens_are_read() -> None:
    recorder = Recorder()
    runner = Runner(recorder, SHAPE)
    rows = runner.rows(tokens(20), [18, 3, 1])
    assert rows.argmax(axis=1).tolist() == [3, 5, 20]
    # The second block is read though nobody wants its rows.
    assert read(recorder) == [("read", 0, 1), ("read", 0, 3), ("read", 8, 7), ("read", 16, 2)]
    assert runner.length == 20


@pytest.mark.parametrize("count", [30, 31])
def test_what_does_not_fit_is_refused_and_nothing_is_lost(count: int) -> None:
    recorder = Recorder()
    runner = Runner(recorder, replace(SHAPE, switch=20))
    runner.feed(tokens(4))
    before = read(recorder)
    with pytest.raises(BundleError, match=f"{count} tokens after 4 do not fit the context of 32"):
        runner.feed(tokens(count))
    assert runner.length == 4 and read(recorder) == before
    runner.feed(tokens(28))
    assert runner.state["slots"].tolist() == [*tokens(4), *tokens(28)]


def test_no_token_is_refused() -> None:
    with pytest.raises(BundleError, match="no token"):
        Runner(Recorder(), SHAPE).feed([])


def test_a_new_conversation_begins_at_the_first_slot() -> None:
    recorder = Recorder()
    runner = Runner(recorder, SHAPE)
    runner.feed(tokens(9))
    runner.reset()
    assert runner.length == 0
    runner.feed(tokens(2))
    assert read(recorder)[-1] == ("read", 0, 1)


def test_a_conversation_may_begin_in_a_later_slot_and_sees_nothing_before_it() -> None:
    recorder = Recorder()
    runner = Runner(recorder, replace(SHAPE, window=5, switch=30), start=16)
    runner.feed(tokens(9))
    assert read(recorder) == [("read", 16, 7), ("step", 24, 0)] and runner.length == 9
    assert [row for _, row in rope_rows(recorder)] == [16, 24]
    for call in recorder.calls:
        mask = call.inputs["causalMask"]
        wanted = causal_mask(call.position, len(call.ids), 32, 5)
        np.testing.assert_array_equal(mask[..., 16:], wanted[..., 16:])
        assert (mask[..., :16] == -10000).all()
    with pytest.raises(BundleError, match="8 tokens after 9 do not fit"):
        runner.feed(tokens(8))
    runner.feed(tokens(7))
    assert runner.state["slots"][16:].tolist() == [*tokens(9), *tokens(7)]
    assert runner.state["slots"][:16].tolist() == [-1] * 16


# --- LongRoPE -------------------------------------------------------------------------------------


def rope_rows(recorder: Recorder) -> list[tuple[int, int]]:
    """Position and rotary row of each call."""
    return [(call.position, int(call.inputs["ropeRow"][0])) for call in recorder.calls]


def test_a_package_with_one_set_of_tables_is_given_no_row() -> None:
    recorder = Recorder()
    Runner(recorder, SHAPE).feed(tokens(20))
    assert all("ropeRow" not in call.inputs for call in recorder.calls)


def test_up_to_the_switch_the_first_tables_are_used_and_beyond_it_the_second() -> None:
    for count, start in ((12, 0), (13, 32)):
        recorder = Recorder()
        Runner(recorder, replace(SHAPE, switch=12)).feed(tokens(count))
        assert rope_rows(recorder) == [(0, start), (8, start + 8)]


def test_text_that_grows_beyond_the_switch_is_read_again_from_its_start() -> None:
    recorder = Recorder()
    runner = Runner(recorder, replace(SHAPE, switch=12))
    runner.feed(tokens(10))
    runner.feed([11])
    runner.feed([12])
    assert runner.length == 12
    recorder.calls.clear()
    # All 12 are read again before the row of the new one is returned, once.
    rows = runner.rows([13, 14])
    assert rows.argmax(axis=1).tolist() == [14, 15] and runner.length == 14
    assert rope_rows(recorder) == [(0, 32), (8, 40), (8, 40)]
    assert recorder.calls[1].ids[:6] == [9, 10, 11, 12, 13, 14]
    runner.feed([15])
    assert rope_rows(recorder)[3:] == [(14, 46)]
    assert runner.state["slots"][:15].tolist() == tokens(15)


def test_text_that_begins_beyond_the_switch_is_read_once() -> None:
    recorder = Recorder()
    runner = Runner(recorder, replace(SHAPE, switch=12))
    runner.feed(tokens(16))
    runner.feed([17])
    assert rope_rows(recorder) == [(0, 32), (8, 40), (16, 48)]


def test_a_new_conversation_begins_with_the_first_tables() -> None:
    recorder = Recorder()
    runner = Runner(recorder, replace(SHAPE, switch=12))
    runner.feed(tokens(13))
    runner.reset()
    recorder.calls.clear()
    runner.feed(tokens(12))
    assert rope_rows(recorder) == [(0, 0), (8, 8)]
    # What is read again is this conversation alone.
    runner.feed([20])
    assert runner.length == 13
    assert runner.state["slots"][:13].tolist() == [*tokens(12), 20]
    assert rope_rows(recorder)[2:] == [(0, 32), (8, 40)]


# --- slots ----------------------------------------------------------------------------------------

SLOTS = {"loraA_qkv": np.ones((1, 2, 3), np.float16)}


def test_slots_that_are_states_are_filled_once_and_stay() -> None:
    recorder = Recorder()
    runner = Runner(recorder, replace(SHAPE, slot_kind="state"), SLOTS)
    runner.reset()
    runner.feed(tokens(2))
    np.testing.assert_array_equal(runner.state["loraA_qkv"], SLOTS["loraA_qkv"])
    assert "loraA_qkv" not in recorder.calls[0].inputs


def test_slots_that_are_inputs_are_given_to_every_call() -> None:
    recorder = Recorder()
    runner = Runner(recorder, replace(SHAPE, slot_kind="input"), SLOTS)
    runner.feed(tokens(9))
    runner.reset()
    runner.feed([3])
    assert [call.function for call in recorder.calls] == ["read", "step", "step"]
    assert all(call.inputs["loraA_qkv"] is SLOTS["loraA_qkv"] for call in recorder.calls)
    assert "loraA_qkv" not in runner.state


def test_another_adapter_begins_a_new_conversation() -> None:
    recorder = Recorder()
    runner = Runner(recorder, replace(SHAPE, slot_kind="state"))
    runner.feed(tokens(9))
    runner.use(SLOTS)
    assert runner.length == 0
    runner.feed([4])
    assert read(recorder)[-1] == ("step", 0, 0)


def test_a_package_without_slots_takes_no_adapter() -> None:
    runner = Runner(Recorder(), SHAPE)
    with pytest.raises(BundleError, match="adapters='slots'"):
        runner.use(SLOTS)
    with pytest.raises(BundleError, match="no adapter slots"):
        Runner(Recorder(), SHAPE, SLOTS)


# --- greedy ---------------------------------------------------------------------------------------


def test_the_most_likely_tokens_follow_each_other() -> None:
    recorder = Recorder()
    assert Runner(recorder, SHAPE).greedy(tokens(10), 3) == [11, 12, 13]
    # The last token is returned and never read.
    assert read(recorder) == [("read", 0, 7), ("read", 8, 1), ("step", 10, 0), ("step", 11, 0)]


def test_a_stop_id_ends_the_text_and_is_not_returned() -> None:
    assert Runner(Recorder(), SHAPE).greedy(tokens(5), 9, stop=(8,)) == [6, 7]
    assert Runner(Recorder(), SHAPE).greedy(tokens(5), 9, stop={6}) == []


def test_ids_that_the_tokenizer_does_not_have_are_never_chosen() -> None:
    # Id 7 leads where it may; without it the first id does.
    row = [1.0, *[0.0] * 6, 2.0]
    assert Runner(Recorder(row), SHAPE).greedy([20], 2) == [7, 7]
    assert Runner(Recorder(row), SHAPE).greedy([20], 2, allowed=8) == [7, 7]
    assert Runner(Recorder(row), SHAPE).greedy([20], 2, allowed=7) == [0, 0]


def test_no_more_tokens_are_returned_than_asked_for() -> None:
    assert Runner(Recorder(), SHAPE).greedy([3], 0) == []
    assert Runner(Recorder(), SHAPE).greedy([3], 1) == [4]
    # Filled to the last slot: the last token needs none.
    assert len(Runner(Recorder(), SHAPE).greedy(tokens(30), 3)) == 3
