"""Every verb has help with examples, and every error is one line with the right exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import mlx_medphi as mp
from mlx_medphi.cli import check as check_verb
from mlx_medphi.cli import main as main_module
from mlx_medphi.cli.main import app, main


def verbs(command: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    below = getattr(command, "commands", {})
    return [path] if not below else [v for n, c in below.items() for v in verbs(c, (*path, n))]


VERBS = verbs(get_command(app))


def raising(error: BaseException) -> Any:
    def look() -> Any:
        raise error

    return look


def test_the_verbs_are_the_documented_ones() -> None:
    assert sorted(" ".join(verb) for verb in VERBS) == [
        "adapter convert",
        "adapter diff",
        "adapter inspect",
        "check",
        "data prepare",
        "data stats",
        "demo",
        "export",
        "fuse",
        "generate",
        "swift-kit",
        "train",
        "verify",
    ]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_help_with_examples(run: Any, verb: tuple[str, ...]) -> None:
    done = run(*verb, "--help")
    assert done.code == 0 and done.err == ""
    usage, _, shown = done.out.partition("Examples:\n")
    assert usage.startswith(f"Usage: medphi {' '.join(verb)} ")
    # Help that is cut or names Python's None was written for another reader.
    assert "None" not in usage
    commands = [line for line in shown.splitlines() if line.strip()]
    assert any(f"medphi {' '.join(verb)}" in line for line in commands)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_that_reports_can_do_so_as_json(run: Any, verb: tuple[str, ...]) -> None:
    assert "--json" in run(*verb, "--help").out


def test_version_is_the_package_version(run: Any) -> None:
    assert run("--version").out == f"medphi {mp.__version__}\n"


def test_completion_can_be_installed(run: Any) -> None:
    assert "--install-completion" in run("--help").out


@pytest.mark.parametrize("line", [[], ["data"], ["adapter"]])
def test_without_a_verb_the_verbs_are_shown(run: Any, line: list[str]) -> None:
    done = run(*line)
    assert done.code == 2
    assert "Usage: medphi" in done.err and "Commands:" in done.err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["trian"], "trian"),
        (["--no-such-option"], "--no-such-option"),
        (["train", "--iter", "3"], "--iters"),
        (["train", "--iters", "many"], "--iters"),
        (["train", "--model", "m", "--data", "d"], "--out"),
        (["data", "prepare"], "SRC"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run: Any, line: list[str], expected: str) -> None:
    done = run(*line)
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert expected in done.err and "--help`" in done.err


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (mp.DataError("notes.csv:3: no note"), 1, "error: notes.csv:3: no note\n"),
        (mp.ConfigError("rank is 0"), 2, "error: rank is 0\n"),
        (mp.AdapterError("does not fit:\n  a\n  b"), 1, "error: does not fit:\n  a\n  b\n"),
        (KeyboardInterrupt(), 130, "error: stopped from the keyboard\n"),
        (
            OSError(28, "No space left on device", "runs/a"),
            1,
            "error: runs/a: No space left on device. What was there before is unchanged.\n",
        ),
    ],
)
def test_each_error_has_its_line_and_exit_code(
    run: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, expected: str
) -> None:
    monkeypatch.setattr(check_verb, "look", raising(error))
    done = run("check")
    assert (done.code, done.err.lstrip("\n")) == (code, expected)


def test_an_unexpected_error_is_one_line_that_quotes_no_row(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_verb, "look", raising(KeyError("my chest hurts")))
    done = run("check")
    assert done.code == 1 and done.err.count("\n") == 1
    assert "internal error: KeyError in test_cli_main.py:" in done.err
    assert "--debug" in done.err and "chest" not in done.err


def test_what_mlx_says_of_memory_is_kept(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("[metal::malloc] Attempting to allocate 9 bytes")
    monkeypatch.setattr(check_verb, "look", raising(error))
    assert "Attempting to allocate 9 bytes" in run("check").err


def test_debug_lets_the_error_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_verb, "look", raising(KeyError("x")))
    with pytest.raises(KeyError):
        main(["--debug", "check"])


def test_errors_are_red_on_a_terminal_only(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_verb, "look", raising(mp.DataError("first\nsecond")))
    assert "\033" not in run("check").err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("check").err == "\033[31merror: first\033[0m\nsecond\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in run("check").err


def test_the_module_is_the_command() -> None:
    line = [sys.executable, "-m", "mlx_medphi", "no-such-verb"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no-such-verb" in done.stderr and "Traceback" not in done.stderr


INTERRUPTED_START = """
import runpy, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx_medphi.cli.main":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
runpy.run_module("mlx_medphi", run_name="__main__")
"""


def test_the_keyboard_stops_the_start_with_one_line() -> None:
    line = [sys.executable, "-c", INTERRUPTED_START]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "error: stopped from the keyboard\n")


def test_the_keyboard_stops_the_script_outside_a_verb_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(arguments: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, "main", stopped)
    with pytest.raises(SystemExit) as caught:
        main_module.run()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "error: stopped from the keyboard\n"


def in_shell(redirect: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "mlx_medphi", *map(str, arguments)]
    shell = ["sh", "-c", f'exec "$@" {redirect}', "sh", *line]
    return subprocess.run(shell, capture_output=True, text=True)


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
def test_closed_streams_change_no_exit_code(prepared: Path, tmp_path: Path) -> None:
    done = in_shell(">&-", "data", "stats", prepared)
    assert (done.returncode, done.stderr) == (0, "")
    assert in_shell(">&- 2>&-", "data", "stats", prepared).returncode == 0
    assert in_shell("2>&-", "data", "stats", tmp_path / "none").returncode == 2


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
def test_a_closed_pipe_is_wrong_usage(model: Path) -> None:
    done = in_shell("<&-", "generate", "--model", model, "--conversation", "-")
    assert done.returncode == 2 and "standard input is closed" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_that_leaves_early_is_no_error(prepared: Path) -> None:
    line = [sys.executable, "-m", "mlx_medphi", "data", "stats", str(prepared), "--json"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(line, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""
