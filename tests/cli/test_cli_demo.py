"""`medphi demo` shows the notes before and after, what is stored, and says what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_medphi import demo


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, quick_demo: Any) -> None:
    """A demo that has run already tells its events again."""
    result, events = quick_demo

    def run_again(out: Path, *, on_event: Callable[[Any], None]) -> demo.DemoResult:
        for event in events:
            on_event(event)
        return replace(result, out=out)

    monkeypatch.setattr(demo, "run_demo", run_again)


def test_the_demo_tells_its_story(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("demo")
    assert done.code == 0, done.err
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


def test_the_demo_as_json(run: Any, tmp_path: Path) -> None:
    done = run("demo", "--out", tmp_path / "demo", "--json")
    told = json.loads(done.out)
    assert done.err == "" and told["same_notes"] is True
    assert told["after"]["facts"] == 10 and len(told["after"]["notes"]) == 1
    assert told["report"]["base_bytes"] == told["report"]["fused_bytes"]
