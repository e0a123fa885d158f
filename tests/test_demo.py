"""The demo walks the whole path, shows what is on the disk, and says what it is."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_medphi.cli import demo as demo_verb
from mlx_medphi.cli.main import main
from mlx_medphi.config import ExportConfig, LoRAConfig, TrainConfig
from mlx_medphi.coreml.bundle import open_bundle
from mlx_medphi.coreml.verify import verify
from mlx_medphi.data.synthetic import facts, note_text, sample
from mlx_medphi.demo import (
    BASE,
    DemoResult,
    DemoSettings,
    Exported,
    Notes,
    Prepared,
    _export,
    _right,
    run_demo,
)
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
    # Room for one conversation and its note; two functions of the usual widths.
    export=ExportConfig(bits=16, context=256),
)


@pytest.fixture(scope="module")
def quick_demo(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The demo's result and events, with one update on four rows in place of the whole."""

    events: list[Any] = []
    out = tmp_path_factory.mktemp("runs") / "demo"
    return run_demo(out, settings=QUICK, on_event=events.append), events


def test_the_path_is_told_in_its_order(quick_demo: Shown) -> None:
    _, events = quick_demo
    kinds = [Prepared, Notes, Started, Evaluated, Stepped, FuseReport, Exported]
    told = [type(event) for event in events if type(event) in kinds]
    assert list(dict.fromkeys(told)) == kinds
    assert isinstance(events[-1], Exported)
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


def test_it_ends_with_a_bundle_that_is_proved(quick_demo: Shown) -> None:
    done, events = quick_demo
    exported = done.exported
    assert exported is events[-1] and exported.seconds > 0
    assert exported.bundle.path == done.out / "notes.medphi"
    bundle = open_bundle(exported.bundle.path)
    assert bundle.level == "graph" and set(bundle.adapters) == {"soap"}
    facts = bundle.manifest.medphi
    assert (facts.quantization.bits, facts.adapters.mode) == (16, "slots")
    # The training that the run directory knows of.
    (entry,) = facts.adapters.list
    assert entry.rank == 2 and entry.training["updates"] == 1
    report = verify(bundle, "spec")
    assert report.passed


def test_the_saved_package_writes_the_adapted_models_note(quick_demo: Shown) -> None:
    done, _ = quick_demo
    assert done.after.notes[0] and done.exported.note == done.after.notes[0]
    assert done.exported.same


def test_another_note_is_not_said_to_be_the_same(
    quick_demo: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, _ = quick_demo
    monkeypatch.setattr("mlx_medphi.demo.export", lambda *given, **more: done.exported.bundle)
    monkeypatch.setattr("mlx_medphi.demo.rehearse", lambda *given, **more: "Another note.")
    exported = _export(done.result.adapter, tmp_path / "a.medphi", QUICK.export, done.after)
    assert exported.note == "Another note." and not exported.same


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
    assert not (tmp_path / "demo" / "notes.medphi").exists()


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
    # `make check` names a place where the Swift tests find what the demo made.
    out = Path(os.environ.get("MEDPHI_DEMO_OUT") or tmp_path / "demo")
    done = run_demo(out, settings=DemoSettings(), on_event=lambda event: None)
    assert done.before.right == 0
    # Names, drug, dose and duration of conversations never seen; one slip in twenty is tolerated.
    assert done.after.right >= 0.95 * done.after.facts
    assert done.result.best_loss is not None and done.result.first_loss is not None
    assert done.result.best_loss < 0.2 * done.result.first_loss
    assert done.same_notes
    assert done.exported.same and done.exported.bundle.level == "graph"


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
        "exported for Core ML:",
        "  verified: graph, the saved program against MLX: off by ",
        "  the saved package, run here by the interpreter, writes the same first note",
        "fused == adapted: every note the same",
        "what is stored:",
        "  adapter ",
        "  bundle ",
        "medphi adapter inspect runs/demo/medical_changes.safetensors",
        "medphi verify runs/demo/notes.medphi --layers",
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
    exported = told["exported"]
    assert exported["same"] is True and exported["note"] == told["after"]["notes"][0]
    assert exported["bundle"]["path"].endswith("notes.medphi")
    assert exported["bundle"]["manifest"]["medphi"]["verification"]["level"] == "graph"


def test_a_note_that_differs_is_said_to_differ(quick_demo: Shown) -> None:
    exported = quick_demo[0].exported
    assert "writes the same first note" in demo_verb.exported_text(exported)
    text = demo_verb.exported_text(replace(exported, same=False))
    assert "writes NOT the same first note" in text
