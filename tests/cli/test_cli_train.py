"""`medphi train`: a run directory with an adapter, and a word on how to go on when stopped."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import mlx_medphi as mp
from mlx_medphi.cli import progress as progress_module
from mlx_medphi.training.events import Stepped

SMALL = ["--rank", 4, "--batch-size", 1, "--max-length", 1024, "--iters", 2]


def test_a_run_directory_has_what_repeats_it(trained: Path) -> None:
    manifest = json.loads((trained / "run.json").read_text(encoding="utf-8"))
    assert manifest["train"]["iters"] == 2 and manifest["lora"]["rank"] == 4
    assert (trained / "medical_changes.safetensors").is_file()
    assert (trained / "adapter" / "adapter_config.json").is_file()


def test_train_shows_plan_progress_and_result(
    run: Any, model: Path, prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = run("train", "--model", model, "--data", prepared, "--out", out, *SMALL)
    assert done.code == 0, done.err
    assert "8 rows to train on, 1 to measure" in done.err
    assert "of 110,912 parameters trained" in done.err
    assert "tokens/s" in done.err and "supervised" in done.err and "peak" in done.err
    assert "left" in done.err
    assert f"kept: {out / 'adapter'}" in done.out and "validation loss" in done.out


def test_json_is_one_document_and_nothing_else(
    run: Any, model: Path, prepared: Path, tmp_path: Path
) -> None:
    line = ["train", "--model", model, "--data", prepared, "--out", tmp_path / "run", "--json"]
    done = run(*line, *SMALL)
    assert done.err == ""
    told = json.loads(done.out)
    assert told["steps"] == 2 and told["stopped"] == "finished"
    assert told["out"] == str(tmp_path / "run")


def test_a_second_run_into_the_same_directory_is_refused(
    run: Any, model: Path, prepared: Path, trained: Path
) -> None:
    before = (trained / "run.json").read_bytes()
    done = run("train", "--model", model, "--data", prepared, "--out", trained, *SMALL)
    assert done.code == 1 and "--resume" in done.err and done.err.count("\n") == 1
    assert (trained / "run.json").read_bytes() == before


def test_ctrl_c_saves_and_says_how_to_go_on(
    run: Any,
    model: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    line = ["train", "--model", model, "--data", prepared, "--out", out, "--json", *SMALL]
    monkeypatch.setattr(sys, "argv", ["medphi", *map(str, line)])
    show = progress_module.Progress.__call__

    def press_ctrl_c(self: progress_module.Progress, event: Any) -> None:
        show(self, event)
        if isinstance(event, Stepped):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress_module.Progress, "__call__", press_ctrl_c)
    done = run(*line)
    assert done.code == 130 and json.loads(done.out)["stopped"] == "interrupted"
    assert (
        done.err == f"stopped and saved; go on with: medphi {' '.join(map(str, line))} --resume\n"
    )
    monkeypatch.setattr(progress_module.Progress, "__call__", show)
    again = run(*line, "--resume")
    assert again.code == 0, again.err
    assert json.loads(again.out)["stopped"] == "finished"


def test_full_parameter_training_hands_on_a_model(
    run: Any, model: Path, prepared: Path, tmp_path: Path
) -> None:
    line = ["--data", prepared, "--out", tmp_path / "run", "--fine-tune-type", "full"]
    small = ["--iters", 1, "--batch-size", 1, "--max-length", 1024]
    assert run("train", "--model", model, *line, *small).code == 0
    mp.load(tmp_path / "run" / "model")


def test_a_quantised_base_can_be_trained_on(
    run: Any, model: Path, prepared: Path, tmp_path: Path
) -> None:
    line = ["--quantize", 8, "--group-size", 32, "--data", prepared, "--out", tmp_path / "run"]
    done = run("train", "--model", model, *line, *SMALL, "--iters", 1)
    assert done.code == 0, done.err
    info = mp.adapter_info(tmp_path / "run" / "adapter")
    assert info.base_quantization is not None and info.base_quantization["bits"] == 8


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--data", "none", "none: no such folder"),
        ("--model", "none", "none: no such file or directory"),
        ("--config", "none.yaml", "none.yaml: cannot be read"),
        ("--keys", "self_attn.q_proj", "self_attn.q_proj"),
        ("--quantize", "7", "--quantize is 7, expected 4 or 8"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    run: Any, model: Path, prepared: Path, tmp_path: Path, option: str, value: str, expected: str
) -> None:
    options = {"--model": model, "--data": prepared, "--out": tmp_path / "run", option: value}
    done = run("train", *(word for pair in options.items() for word in pair), *SMALL)
    assert done.code in (1, 2) and done.err.startswith("error: ")
    assert expected in done.err and "Traceback" not in done.err
