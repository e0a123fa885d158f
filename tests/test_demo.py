"""The demo walks the whole path, shows what is on the disk, and says what it is."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_medphi.cli import demo as demo_verb
from mlx_medphi.cli.main import main
from mlx_medphi.config import LoRAConfig, TrainConfig
from mlx_medphi.data.synthetic import facts, note_text, sample
from mlx_medphi.demo import BASE, DemoResult, DemoSettings, Notes, Prepared, _right, run_demo
from mlx_medphi.errors import TrainingError
from mlx_medphi.model.adapter import adapter_info
from mlx_medphi.model.fuse import FuseReport
from mlx_medphi.training.events import Evaluated, Started, Stepped

Shown = tuple[DemoResult, list[Any]]
# One update on four rows in place of the whole.
QUICK = DemoSettings(
    train_rows=4,
    valid_rows=2,
    held_out=1,
    fuse_rows=1,
    train=TrainConfig(iters=1, learning_rate=1e-3, batch_size=1, max_length=512),
    lora=LoRAConfig(rank=2),
)


@pytest.fixture(scope="module")
def quick_demo(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The demo's result and events, with one update on four rows in place of the whole."""

    events: list[Any] = []
    out = tmp_path_factory.mktemp("runs") / "demo"
    return run_demo(out, settings=QUICK, on_event=events.append), events


def test_the_path_is_told_in_its_order(quick_demo: Shown) -> None:
    _, events = quick_demo
    kinds = [Prepared, Notes, Started, Stepped, Evaluated, FuseReport]
    told = [type(event) for event in events if type(event) in kinds]
    assert list(dict.fromkeys(told)) == [Prepared, Notes, Started, Evaluated, Stepped, FuseReport]
    moments = [event.moment for event in events if isinstance(event, Notes)]
    assert moments == ["before", "after", "fused"]


def test_what_is_said_to_be_stored_is_stored(quick_demo: Shown) -> None:
    done, _ = quick_demo
    adapter = done.out / "medical_changes.safetensors"
    assert adapter.stat().st_size == done.adapter_bytes
    assert adapter_info(adapter).rank == 2
    assert (done.out / "fused" / "model.safetensors").is_file()
    assert done.report.same_size and done.report.fidelity.top1 > 0.99
    assert done.same_notes


def test_the_embedded_base_is_small(quick_demo: Shown) -> None:
    prepared = quick_demo[1][0]
    assert 1_500_000 < prepared.parameters < 3_500_000
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 6_000_000


def test_a_second_demo_does_not_touch_the_first(quick_demo: Shown) -> None:
    done, _ = quick_demo
    before = (done.out / "run.json").read_bytes()
    with pytest.raises(TrainingError, match="already in use"):
        run_demo(done.out, settings=QUICK, on_event=lambda event: None)
    assert (done.out / "run.json").read_bytes() == before


def test_a_demo_stopped_from_the_keyboard_does_not_go_on(tmp_path: Path) -> None:
    events: list[Any] = []

    def press_ctrl_c(event: Any) -> None:
        events.append(event)
        if isinstance(event, Stepped):
            signal.raise_signal(signal.SIGINT)

    settings = replace(QUICK, train=TrainConfig(iters=5, batch_size=1, max_length=512))
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "demo", settings=settings, on_event=press_ctrl_c)
    assert sum(isinstance(event, Stepped) for event in events) == 1
    assert not (tmp_path / "demo" / "fused").exists()


def test_facts_are_counted_one_by_one() -> None:
    wanted = facts(sample(1, seed=3)[0])
    assert _right(wanted, note_text(wanted)) == 10
    assert _right(wanted, note_text(wanted).replace(wanted.drug, "Nothing")) == 9
    assert _right(wanted, "I cannot say.") == 0


def test_the_next_free_directory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "demo"
    assert demo_verb._next_free(path) == path
    path.mkdir()
    (tmp_path / "demo-2").mkdir()
    assert demo_verb._next_free(path) == tmp_path / "demo-3"


@pytest.mark.slow
def test_the_demo_writes_notes_that_are_right(tmp_path: Path) -> None:
    done = run_demo(tmp_path / "demo", settings=DemoSettings(), on_event=lambda event: None)
    assert done.before.right == 0
    # Names, drug, dose and duration of conversations never seen; one slip in twenty is tolerated.
    assert done.after.right >= 0.95 * done.after.facts
    assert done.result.best_loss is not None and done.result.first_loss is not None
    assert done.result.best_loss < 0.2 * done.result.first_loss
    assert done.same_notes


@pytest.fixture
def told_again(monkeypatch: pytest.MonkeyPatch, quick_demo: Shown) -> None:
    """A demo that has run already tells its events again."""
    result, events = quick_demo

    def run_again(out: Path, *, on_event: Callable[[Any], None]) -> DemoResult:
        for event in events:
            on_event(event)
        return replace(result, out=out)

    monkeypatch.setattr("mlx_medphi.demo.run_demo", run_again)


def test_the_demo_tells_its_story(
    told_again: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    done = capfd.readouterr()
    parts = [
        "made by this project",
        "base: ",
        "a conversation that is held out:",
        "note before training:",
        "note after training:",
        "fused into the base:",
        "fused == adapted: every note the same",
        "what is stored:",
        "  adapter ",
        "medphi adapter inspect runs/demo/medical_changes.safetensors",
    ]
    places = [done.out.find(part) for part in parts]
    assert -1 not in places and places == sorted(places)
    assert "validation loss" in done.err


def test_the_demo_as_json(
    told_again: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--json"]) == 0
    done = capfd.readouterr()
    told = json.loads(done.out)
    assert done.err == "" and told["same_notes"] is True
    assert told["after"]["facts"] == 10 and len(told["after"]["notes"]) == 1
    assert told["report"]["base_bytes"] == told["report"]["fused_bytes"]
