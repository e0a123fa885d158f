"""Tables line up, sizes and times read well, and the live line shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_medphi.cli import show
from mlx_medphi.cli.progress import Progress
from mlx_medphi.config import LoRAConfig, TrainConfig
from mlx_medphi.training.events import Evaluated, Saved, Started, Stepped, Stopped


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (53_400, "53.4 kB"),
        (5e7, "50.0 MB"),
        (7.64e12, "7640.0 GB"),
    ],
)
def test_sizes_are_decimal(count: float, text: str) -> None:
    assert show.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (65, "1 min 05 s"), (7801, "2 h 10 min")]
)
def test_times_are_for_people(seconds: float, text: str) -> None:
    assert show.duration(seconds) == text


def test_columns_line_up() -> None:
    rows = [["", "rows"], ["train", 1187], ["a", 2]]
    assert show.table(rows) == "       rows\ntrain  1187\na         2"
    assert show.table([]) == ""


def test_one_thing_is_singular() -> None:
    assert show.number_of(1, "row") == "1 row" and show.number_of(1201, "row") == "1,201 rows"


def test_json_writes_dataclasses_and_paths(capsys: pytest.CaptureFixture[str]) -> None:
    show.print_json({"event": Saved(3, Path("runs/a")), "text": "38.5 °C"})
    assert json.loads(capsys.readouterr().out) == {
        "event": {"step": 3, "path": "runs/a"},
        "text": "38.5 °C",
    }
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        show.print_json(object())


STARTED = Started(
    config=TrainConfig(iters=10),
    lora=LoRAConfig(rank=4, keys=("self_attn.qkv_proj", "mlp.down_proj")),
    updates=10,
    first_step=3,
    train_rows=8,
    valid_rows=1,
    shortened=("a",),
    refused=(),
    widths=(128, 512),
    padding_share=0.034,
    supervised_tokens_per_epoch=4321,
    trainable_parameters=10,
    total_parameters=1000,
)


def stepped(step: int, loss: float = 2.0) -> Stepped:
    return Stepped(
        step=step,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=1.0,
        skipped=False,
        tokens_supervised=50,
        tokens_real=200,
        tokens_padded=250,
        seconds=0.5,
        peak_memory=12_000_000,
    )


def test_the_line_has_means_rates_memory_and_the_time_left_by_the_clock() -> None:
    now = 100.0
    progress = Progress(quiet=False, clock=lambda: now)
    progress(STARTED)
    progress(stepped(3, loss=2.0))
    progress(stepped(4, loss=1.0))
    # Two updates took 8 s by the clock, evaluations included; six are left.
    now = 108.0
    assert progress.line() == (
        "loss 1.500 · tokens/s 100 supervised, 400 real, 500 padded · peak 12.0 MB · 24 s left"
    )


def test_without_a_terminal_there_are_lines_on_the_error_stream(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress(clock=lambda: 0.0) as progress:
        for event in (
            STARTED,
            stepped(3),
            Evaluated(3, 1.25, True, 9, 0.1),
            Stopped(3, "finished"),
        ):
            progress(event)
        progress(Saved(3, Path("runs/a/step-3")))
    written = capsys.readouterr()
    assert written.out == ""
    assert "8 rows to train on, 1 to measure, 1 shortened, 0 refused" in written.err
    assert "rows of 128, 512 tokens (3.4% padding), 4,321 supervised tokens a pass" in written.err
    assert "10 of 1,000 parameters trained (1.00%)" in written.err
    assert "update 3: validation loss 1.2500 (best so far)" in written.err
    assert "saved runs/a/step-3" in written.err


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress: Any = Progress(quiet=True)
    for event in (STARTED, stepped(3), Evaluated(3, 1.25, True, 9, 0.1)):
        progress(event)
    written = capsys.readouterr()
    assert written.out + written.err == ""


def test_a_terminal_gets_one_live_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with Progress(clock=lambda: 0.0) as progress:
        for event in (STARTED, stepped(3), Evaluated(3, 1.25, False, 9, 0.1), stepped(4)):
            progress(event)
    written = capsys.readouterr().err
    assert "4/10" in written and "loss 2.000" in written
    assert "update 3: validation loss 1.2500" in written


def test_the_settings_of_a_run_are_said_as_they_were_resolved(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress() as progress:
        progress(STARTED)
    said = capsys.readouterr().err
    assert "train: iters 10, epochs 3.0, learning_rate 0.0002, warmup 0.03," in said
    assert "patience null, grad_checkpoint false, seed 0\n" in said
    assert "lora: rank 4, scale 2.0, dropout 0.05, keys self_attn.qkv_proj + mlp.down_proj," in said
