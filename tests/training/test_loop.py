"""A run from examples to a directory: what is evaluated, kept, refused, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest_training import FIXTURES, Base

from mlx_medphi.config import LoRAConfig, TrainConfig, to_dict
from mlx_medphi.data.examples import Conversation, Example, Note
from mlx_medphi.errors import AdapterError, TrainingError, UsageError
from mlx_medphi.model.adapter import adapter_info, load_adapter
from mlx_medphi.model.checkpoint import load
from mlx_medphi.model.lora import adapted_layers, apply_lora
from mlx_medphi.text.tokenizer import Tokenizer
from mlx_medphi.training.batches import RunData
from mlx_medphi.training.checkpointing import Progress, restore_weights
from mlx_medphi.training.events import Evaluated, Event, Saved, Started, Stepped, Stopped
from mlx_medphi.training.loop import MAX_SKIPPED_IN_A_ROW, train
from mlx_medphi.training.step import Trainer

LORA = LoRAConfig(rank=4, dropout=0.1)
CONFIG = TrainConfig(iters=6, learning_rate=5e-3, eval_every=2, max_length=256, batch_size=2)
IDS = mx.array([[5, 60, 200, 31, 7, 99]])


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Compiling a kernel on a CPU takes a second; test_step.py shows that it changes no bit."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def _run(base: Base, tokenizer: Tokenizer, rows: list[Example], out: Path, **options):
    events: list[Event] = []
    settings = {"config": CONFIG, "lora": LORA, "on_event": events.append} | options
    model = settings.pop("model", None) or base()
    result = train(model, tokenizer, rows[:8], rows[8:], out=out, **settings)
    return result, events, model


def _of(kind: type, events: list[Event]) -> list:
    return [event for event in events if isinstance(event, kind)]


def _metrics(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory")} for row in rows]


def _tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(tensor) for name, tensor in mx.load(str(path)).items()}


def _same_run(a: Path, b: Path) -> None:
    assert _metrics(a) == _metrics(b)
    for name in ("adapter/adapters.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        left, right = _tensors(a / name), _tensors(b / name)
        assert left.keys() == right.keys()
        for tensor in left:
            assert np.array_equal(left[tensor], right[tensor]), tensor


def test_a_run_learns_and_says_what_it_did(base: Base, tokenizer, rows, tmp_path: Path) -> None:
    result, events, model = _run(base, tokenizer, rows, tmp_path / "run")
    started = _of(Started, events)
    assert len(started) == 1 and started[0].updates == 6 and started[0].train_rows == 8
    assert started[0].trainable_parameters == sum(
        layer.lora_a.size + layer.lora_b.size for _, layer in adapted_layers(model)
    )
    assert [event.step for event in _of(Stepped, events)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in _of(Evaluated, events)] == [0, 2, 4, 6]
    assert [event.step for event in _of(Saved, events)] == [2, 4, 6]
    assert _of(Stopped, events) == [Stopped(6, "finished")]
    assert result.best_loss < result.first_loss
    assert result.best_loss == min(loss for step, loss in result.valid_losses if step)
    assert len(result.train_losses) == 6 and result.adapter == tmp_path / "run" / "adapter"
    assert "<svg" in result._repr_html_() and str(result.steps) in result._repr_html_()


def test_run_json_holds_what_a_repeat_needs(base: Base, tokenizer, rows, tmp_path: Path) -> None:
    _, _, model = _run(base, tokenizer, rows, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["train"] == to_dict(CONFIG) and manifest["lora"] == to_dict(LORA)
    assert manifest["base_fingerprint"] == model.fingerprint and manifest["base"] == "mini-4k"
    assert len(manifest["data_hash"]) == 64 and "mlx" in manifest["versions"]
    assert str(tmp_path) not in json.dumps(manifest)


def test_no_file_of_a_run_holds_text_of_a_row(base: Base, tokenizer, rows, tmp_path: Path) -> None:
    _run(base, tokenizer, rows, tmp_path / "run")
    words = [turn.text for row in rows for turn in row.conversation.turns if len(turn.text) > 12]
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(text.encode() in content for text in words), path


def test_equal_runs_are_equal_bit_for_bit(base: Base, tokenizer, rows, tmp_path: Path) -> None:
    _run(base, tokenizer, rows, tmp_path / "a")
    mx.random.seed(123)
    _run(base, tokenizer, rows, tmp_path / "b")
    _same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_how_often_is_evaluated_does_not_change_training(
    base: Base, tokenizer, rows, tmp_path: Path
) -> None:
    losses = []
    for every in (1, 6):
        config = replace(CONFIG, eval_every=every)
        result, _, _ = _run(base, tokenizer, rows, tmp_path / str(every), config=config)
        losses.append(result.train_losses)
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_the_kept_weights_are_the_best_ones_that_were_measured(
    base: Base, tokenizer, rows, tmp_path: Path
) -> None:
    """The validation notes are of another kind: learning the training notes makes them worse."""
    config = replace(CONFIG, iters=12, learning_rate=0.05, eval_every=1, final_learning_rate=1.0)
    other = [replace(row, note=Note("zzz 8 q Q !" + row.id)) for row in rows[8:]]
    result, _, model = _run(base, tokenizer, [*rows[:8], *other], tmp_path / "run", config=config)
    losses = dict(result.valid_losses)
    losses.pop(0)
    assert result.best_step == min(losses, key=losses.get) != 12
    again = base()
    load_adapter(again, tmp_path / "run" / "adapter")
    assert mx.array_equal(again(IDS), model(IDS))
    # The label of an evaluation is the label of its weights: measured again, the number is equal.
    trainer = Trainer(model, config, 12)
    data = RunData.prepare(model, tokenizer, rows[:8], other, config)
    assert trainer.evaluate(data.valid_batches)[0] == result.best_loss


def test_the_last_update_takes_the_micro_batches_that_are_left(
    base: Base, tokenizer, rows, tmp_path: Path
) -> None:
    config = replace(CONFIG, iters=None, epochs=1, batch_size=1, pack=False, eval_every=None)
    config = replace(config, grad_accumulation_steps=3)
    result, events, _ = _run(base, tokenizer, rows, tmp_path / "run", config=config)
    assert result.steps == 3  # 8 micro-batches: 3 + 3 + 2, where iters % 3 == 0 alone gives 2
    supervised = sum(event.tokens_supervised for event in _of(Stepped, events))
    assert supervised == _of(Started, events)[0].supervised_tokens_per_epoch


def test_fewer_rows_than_a_batch_train(base: Base, tokenizer, rows, tmp_path: Path) -> None:
    config = replace(CONFIG, iters=None, epochs=2, batch_size=8, eval_every=None)
    result = train(base(), tokenizer, rows[:3], out=tmp_path / "run", config=config, lora=LORA)
    assert result.steps >= 2 and result.first_loss is None and result.best_step is None


@pytest.mark.slow
def test_patience_ends_the_run(base: Base, tokenizer, rows, tmp_path: Path) -> None:
    config = replace(CONFIG, iters=40, learning_rate=0.5, eval_every=1, patience=2)
    config = replace(config, final_learning_rate=1.0)
    result, events, _ = _run(base, tokenizer, rows, tmp_path / "run", config=config)
    assert result.stopped == "patience" and result.steps == result.best_step + 2 < 40


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on_as_if_nothing_was(
    base: Base, tokenizer, rows, tmp_path: Path, number: signal.Signals
) -> None:
    _run(base, tokenizer, rows, tmp_path / "whole")

    def interrupt(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    first, _, _ = _run(base, tokenizer, rows, tmp_path / "parts", on_event=interrupt)
    assert (first.stopped, first.steps) == ("interrupted", 3)
    assert signal.getsignal(number) is handler
    second, _, _ = _run(base, tokenizer, rows, tmp_path / "parts", resume=True)
    assert (second.stopped, second.steps) == ("finished", 6)
    _same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_killed_run_goes_on_as_if_nothing_was(
    base: Base, tokenizer, rows, tmp_path: Path
) -> None:
    _run(base, tokenizer, rows, tmp_path / "whole")
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from mlx_medphi.blas import load_blas
        load_blas()
        from mlx_medphi.config import LoRAConfig, TrainConfig
        from conftest_training import small_rows
        from mlx_medphi.model.checkpoint import load
        from mlx_medphi.training.events import Stepped
        from mlx_medphi.training.loop import train
        def kill(event):
            if isinstance(event, Stepped) and event.step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        model, tokenizer = load({str(FIXTURES / "mini-4k")!r}, dtype="float32")
        rows = small_rows()
        train(model, tokenizer, rows[:8], rows[8:], out={str(tmp_path / "parts")!r},
              config={CONFIG!r}, lora={LORA!r}, on_event=kill)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=False,
        env=os.environ | {"MLX_DISABLE_COMPILE": "1"},
    )
    assert ended.returncode == -signal.SIGKILL
    assert len(_metrics(tmp_path / "parts")) == 5 + 3  # update 5 is on disk, and will be done again
    result, _, _ = _run(base, tokenizer, rows, tmp_path / "parts", resume=True)
    assert result.steps == 6
    _same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_directory_in_use_is_refused_and_left_alone(
    base: Base, tokenizer, rows, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    _run(base, tokenizer, rows, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(TrainingError, match="already in use; go on with it by --resume"):
        _run(base, tokenizer, rows, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises(TrainingError, match="already in use; choose another"):
        _run(base, tokenizer, rows, tmp_path / "mine")


def test_going_on_needs_a_run_and_the_same_settings_and_data(
    base: Base, tokenizer, rows, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="no run to go on with"):
        _run(base, tokenizer, rows, tmp_path / "none", resume=True)
    out = tmp_path / "run"
    _run(base, tokenizer, rows, out)
    with pytest.raises(TrainingError, match=r"made by another run .train\.seed was 0, now 9\)"):
        _run(base, tokenizer, rows, out, resume=True, config=replace(CONFIG, seed=9))
    with pytest.raises(TrainingError, match="data_hash"):
        _run(base, tokenizer, rows[::-1], out, resume=True)
    with pytest.raises(TrainingError, match="base_fingerprint"):
        _run(base, tokenizer, rows, out, resume=True, model=base("sliding-window"))


def test_a_damaged_checkpoint_is_named(base: Base, tokenizer, rows, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _run(base, tokenizer, rows, out)
    weights = out / "checkpoints" / "step-000006" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(TrainingError, match="weights.safetensors: missing or changed"):
        _run(base, tokenizer, rows, out, resume=True)
    (weights.parent / "state.json").unlink()
    resumed, _, _ = _run(base, tokenizer, rows, out, resume=True)  # from the checkpoint before it
    assert resumed.steps == 6


def test_a_diverged_run_stops_with_advice(base: Base, tokenizer, rows, tmp_path: Path) -> None:
    model = base()
    model.model.norm.weight = model.model.norm.weight * float("nan")
    with pytest.raises(TrainingError, match="not finite .*Lower the learning rate"):
        _run(base, tokenizer, rows, tmp_path / "run", model=model, config=replace(CONFIG, iters=40))
    steps = [row["step"] for row in _metrics(tmp_path / "run") if "train_loss" in row]
    assert steps[-1] == MAX_SKIPPED_IN_A_ROW


def test_rows_that_cannot_be_trained_on_are_listed(
    base: Base, tokenizer, rows, tmp_path: Path
) -> None:
    silent = Example("mine/1", "jsonl", Conversation.from_text("Doctor: Hello."), Note(""))
    long_note = replace(rows[0], id="mine/2", note=Note("word " * 500))
    events: list[Event] = []
    train(
        base(), tokenizer, [*rows, silent, long_note], out=tmp_path / "run", config=CONFIG,
        lora=LORA, on_event=events.append,
    )  # fmt: skip
    refused = dict(_of(Started, events)[0].refused)
    assert set(refused) == {"mine/1", "mine/2"}
    with pytest.raises(TrainingError, match="none of 1 training rows can be used: mine/1"):
        train(base(), tokenizer, [silent], out=tmp_path / "other", config=CONFIG, lora=LORA)


def test_full_parameter_training_writes_a_model(
    base: Base, tokenizer, rows, tmp_path: Path
) -> None:
    result, _, model = _run(base, tokenizer, rows, tmp_path / "run", lora=None)
    assert result.best_loss < result.first_loss
    again, _ = load(result.adapter)
    assert mx.array_equal(again(IDS), model(IDS))
    for options in ({"dtype": "bfloat16"}, {"quantize": (8, 32)}):
        with pytest.raises(TrainingError, match="plain float32 weights"):
            _run(base, tokenizer, rows, tmp_path / "no", lora=None, model=base(**options))


def test_a_base_in_half_precision_trains_float32_masters(
    base: Base, tokenizer, rows, tmp_path: Path
) -> None:
    result, _, model = _run(base, tokenizer, rows, tmp_path / "run", model=base(dtype="bfloat16"))
    assert result.best_loss < result.first_loss
    for _, layer in adapted_layers(model):
        assert layer.lora_a.dtype == layer.lora_b.dtype == mx.float32
        assert layer(mx.zeros((1, layer.lora_a.shape[0]), mx.bfloat16)).dtype == mx.bfloat16


def test_going_on_before_the_first_checkpoint_begins_again(
    base: Base, tokenizer, rows, tmp_path: Path
) -> None:
    class Unplugged(Exception):
        pass

    def unplug(event: Event) -> None:
        if isinstance(event, Stepped):
            raise Unplugged

    out = tmp_path / "run"
    with pytest.raises(Unplugged):
        _run(base, tokenizer, rows, out, on_event=unplug)
    with pytest.raises(TrainingError, match=r"made by another run .train\.seed was 0, now 9\)"):
        _run(base, tokenizer, rows, out, resume=True, config=replace(CONFIG, seed=9))
    result, _, _ = _run(base, tokenizer, rows, out, resume=True)
    assert result.steps == 6
    steps = [row["step"] for row in _metrics(out) if "train_loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_is_said_and_older_checkpoints_stay(
    base: Base, tokenizer, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = mx.save_safetensors, []

    def full(path: str, *rest: object) -> None:
        calls.append(path)
        if len(calls) > 2:
            Path(path).write_bytes(b"half")
            raise RuntimeError("[write] Unable to write 3704 bytes to file.")
        save(path, *rest)

    monkeypatch.setattr(mx, "save_safetensors", full)
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match="cannot be written .No space left.*--resume"):
        _run(base, tokenizer, rows, out)
    monkeypatch.undo()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    result, _, _ = _run(base, tokenizer, rows, out, resume=True)
    _run(base, tokenizer, rows, tmp_path / "whole")
    assert result.steps == 6
    _same_run(out, tmp_path / "whole")


def test_an_evaluation_that_is_no_number_is_never_the_best(
    base: Base, tokenizer, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([5.0, float("nan"), 4.0, 4.5])
    monkeypatch.setattr(Trainer, "evaluate", lambda self, batches: (next(losses), 1))
    result, _, _ = _run(base, tokenizer, rows, tmp_path / "run")
    assert (result.best_loss, result.best_step, result.improved) == (4.0, 4, True)
    assert "nan" not in result.loss_svg()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in lines and '"valid_loss": null' in lines


def test_a_run_that_is_out_of_patience_does_not_step_again(
    base: Base, tokenizer, rows, tmp_path: Path
) -> None:
    other = [replace(row, note=Note("zzz 8 q Q !" + row.id)) for row in rows[8:]]
    config = replace(CONFIG, iters=40, learning_rate=0.1, eval_every=1, patience=1)
    first, _, _ = _run(base, tokenizer, [*rows[:8], *other], tmp_path / "run", config=config)
    before = _metrics(tmp_path / "run")
    again, _, _ = _run(
        base, tokenizer, [*rows[:8], *other], tmp_path / "run", config=config, resume=True
    )
    assert (again.stopped, again.steps) == ("patience", first.steps)
    assert _metrics(tmp_path / "run") == before


def test_one_directory_holds_one_run_at_a_time(base: Base, tokenizer, rows, tmp_path: Path) -> None:
    def intrude(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 2:
            with pytest.raises(TrainingError, match="another process is training here"):
                _run(base, tokenizer, rows, tmp_path / "run", resume=True)

    result, _, _ = _run(base, tokenizer, rows, tmp_path / "run", on_event=intrude)
    assert result.steps == 6 and not (tmp_path / "run" / ".lock").exists()


def test_a_run_that_is_refused_leaves_nothing(base: Base, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="none of 0 training rows"):
        train(base(), tokenizer, [], out=tmp_path / "run", config=CONFIG, lora=LORA)
    assert not (tmp_path / "run").exists()


def test_an_adapted_model_is_not_trained_whole(base: Base, tokenizer, rows, tmp_path: Path) -> None:
    model = base()
    apply_lora(model, LORA)
    with pytest.raises(TrainingError, match="carries an adapter"):
        _run(base, tokenizer, rows, tmp_path / "run", model=model, lora=None)


def test_limits_of_the_process_stay_and_no_step_clears_the_cache(
    base: Base, tokenizer, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise AssertionError("the cache was cleared")

    limit = 3 << 30
    before = mx.set_cache_limit(limit), mx.set_memory_limit(limit)
    try:
        monkeypatch.setattr(mx, "clear_cache", refuse)
        _run(base, tokenizer, rows, tmp_path / "run")
        after = mx.set_cache_limit(before[0]), mx.set_memory_limit(before[1])
    finally:
        mx.set_cache_limit(before[0])
        mx.set_memory_limit(before[1])
    assert after == (limit, limit)


def test_the_seconds_of_an_update_include_making_its_batch(
    base: Base, tokenizer, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    batches = RunData.batches

    def slow(self: RunData, step: int) -> list:
        clock[0] += 10.0
        return batches(self, step)

    monkeypatch.setattr("mlx_medphi.training.loop.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(RunData, "batches", slow)
    _, events, _ = _run(base, tokenizer, rows, tmp_path / "run")
    assert {event.seconds for event in _of(Stepped, events)} == {10.0}
    for event in _of(Stepped, events):
        assert event.tokens_supervised < event.tokens_real <= event.tokens_padded


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["progress"].update(step="x"),
        lambda state: state["progress"].update(step=1_000_000),
        lambda state: state["progress"].update(unknown=1),
        lambda state: state.update(progress=[]),
        lambda state: state.update(identity=[]),
        lambda state: state.update(sha256={}),
        lambda state: state.update(sha256=3),
        lambda state: state.pop("identity"),
    ],
)
def test_a_checkpoint_state_that_is_not_whole_is_refused(tmp_path: Path, damage) -> None:
    path = tmp_path / "step-000002"
    path.mkdir()
    state = {
        "progress": asdict(Progress(step=2, best_step=2, best_loss=1.5)),
        "identity": {"seed": 0},
        "sha256": {"weights.safetensors": "", "optimizer.safetensors": ""},
    }
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(TrainingError, match="weights.safetensors: missing or changed"):
        restore_weights(path, None)
    damage(state)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(TrainingError, match="not a complete checkpoint .*delete it"):
        restore_weights(path, None)


def test_a_rank_above_the_smaller_side_is_refused(base: Base, tokenizer, rows, tmp_path) -> None:
    with pytest.raises(AdapterError, match="rank is 65, .* above its smaller side"):
        _run(base, tokenizer, rows, tmp_path / "run", lora=LoRAConfig(rank=65))


@pytest.mark.slow
def test_a_listener_that_fails_loses_no_update(base: Base, tokenizer, rows, tmp_path: Path) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            raise ValueError("a plot")

    model = base()
    with pytest.raises(ValueError, match="a plot"):
        _run(base, tokenizer, rows, tmp_path / "run", on_event=fail, model=model)
    events: list[Event] = []
    # The same model goes on: it need not be loaded again.
    _run(base, tokenizer, rows, tmp_path / "run", on_event=events.append, model=model, resume=True)
    assert [event.step for event in _of(Stepped, events)] == [4, 5, 6]
    _run(base, tokenizer, rows, tmp_path / "whole")
    _same_run(tmp_path / "run", tmp_path / "whole")


def test_a_model_loaded_here_trains_in_another_thread(
    base: Base, tokenizer, rows, tmp_path: Path
) -> None:
    model, done = base(), []

    def work() -> None:
        done.append(_run(base, tokenizer, rows, tmp_path / "run", model=model)[0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done and done[0].steps == 6


def test_what_was_mixed_up_is_said_in_one_line(base: Base, tokenizer, rows, tmp_path) -> None:
    with pytest.raises(UsageError, match="model: .*; train_examples: .*; config: .*; lora: "):
        train((base(), tokenizer), tokenizer, iter(rows), out=tmp_path / "run", config={}, lora={})  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_an_adapter_carries_the_facts_of_its_training(
    base: Base, tokenizer, rows, tmp_path: Path
) -> None:
    result, _, _ = _run(base, tokenizer, rows, tmp_path / "run")
    for path in (result.adapter, tmp_path / "run" / "medical_changes.safetensors"):
        facts = adapter_info(path).training
        assert facts["updates"] == 6 and facts["rows"] == 8
        assert facts["valid_loss"] == result.best_loss
