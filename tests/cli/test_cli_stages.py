"""Stages of long work: a line for each in a pipe, a bar with the time left on a terminal."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import mlx_medphi as mp
from mlx_medphi.cli.stages import STAGES, Stages


class Terminal(io.StringIO):
    """An error stream that a person looks at."""

    def isatty(self) -> bool:
        return True


def look(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Put a terminal in the place of the error stream, from within a test: pytest has its own."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return stream


def plain(text: str) -> str:
    """Without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def walk(stages: Stages) -> None:
    with stages:
        for step in range(5):
            stages("graph", step, 4)
        stages("weights", 10, 10)


def test_in_a_pipe_each_stage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    walk(Stages())
    done = capsys.readouterr()
    assert done.out == ""
    assert done.err == "building the program, layer by layer …\nwriting the weights …\n"


def test_a_line_is_there_when_its_stage_begins(capsys: pytest.CaptureFixture[str]) -> None:
    with Stages() as stages:
        stages("golden", 0, 1)
        assert capsys.readouterr().err == "asking MLX …\n"
        stages("golden", 1, 1)
        assert capsys.readouterr().err == ""


def test_quiet_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = look(monkeypatch)
    walk(Stages(quiet=True))
    assert capsys.readouterr().out == "" and terminal.getvalue() == ""


def test_on_a_terminal_each_stage_has_a_bar_that_fills(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = look(monkeypatch)
    walk(Stages())
    lines = plain(terminal.getvalue()).replace("\r", "\n").splitlines()
    last = [line for line in lines if line.strip()][-2:]
    assert re.match(r"building the program, layer by layer +━+ +100% +0:00:0\d", last[0])
    assert re.match(r"writing the weights +━+ +100% +0:00:0\d", last[1])


def test_a_stage_that_nobody_named_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with Stages() as stages:
        stages("polish", 1, 2)
    assert capsys.readouterr().err == "polish …\n"


def test_an_error_stops_the_bar_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = look(monkeypatch)
    with pytest.raises(KeyboardInterrupt), Stages() as stages:
        stages("graph", 1, 4)
        raise KeyboardInterrupt
    text = terminal.getvalue()
    # The cursor is shown again.
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0


def test_every_stage_of_the_work_has_words(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    def listen(stage: str, done: int, total: int) -> None:
        told.append(stage)

    config = mp.ExportConfig(context=64, prefill=16, group_size=32, adapters="none")
    bundle = mp.export(model, tmp_path / "a.medphi", config=config, progress=listen)
    mp.verify(bundle, "spec", progress=listen)
    assert told and set(told) <= set(STAGES)
    assert all(words == words.strip() and words for words in STAGES.values())
    assert capsys.readouterr().err == ""


def test_the_words_fit_beside_the_bar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = look(monkeypatch)
    any_stage: Any = max(STAGES, key=lambda name: len(STAGES[name]))
    with Stages() as stages:
        stages(any_stage, 1, 2)
    assert STAGES[any_stage] in plain(terminal.getvalue())
    assert max(map(len, STAGES.values())) <= 38
