"""What the README says is there is there, and every command in it exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import mlx_medphi as mp
from mlx_medphi.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = ROOT / "tests" / "fixtures" / "phi3" / "mini-4k"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MADE_BY_TOOLS = {"__pycache__", ".venv", "runs", "models", "build", "dist"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def file_map() -> dict[str, str]:
    text = README.split("\n## Files\n", 1)[1]
    lines = re.findall(r"^```text\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)[0]
    return dict(line.split(None, 1) for line in lines.splitlines())


def commands() -> Iterator[str]:
    """Every `medphi …` and `make …` line of the README's shell blocks and its table of figures."""
    for block in blocks("sh"):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`((?:medphi|make) [^`]+)`", README.split("\n## Files\n")[0])


def python(*line: object) -> subprocess.CompletedProcess[str]:
    # The package is found without being installed.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *map(str, line)]
    return subprocess.run(words, capture_output=True, text=True, env=environment)


COMMANDS = sorted({line.split("#")[0].strip() for line in commands()})


def test_the_map_names_every_module_and_nothing_else() -> None:
    here = {
        path.relative_to(ROOT).as_posix()
        for folder in ("mlx_medphi", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if not MADE_BY_TOOLS & set(path.parts)
        and (path.name != "__init__.py" or path.parent.name == "mlx_medphi")
    }
    here |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*.py")}
    mapped = file_map()
    assert sorted(name for name in mapped if name.endswith(".py")) == sorted(here)
    assert [name for name in mapped if not (ROOT / name).exists()] == []
    folders = {f"{path.relative_to(ROOT).as_posix()}/" for path in (ROOT / "tests").glob("[a-z]*/")}
    assert folders <= mapped.keys()


def test_every_line_of_the_map_says_something() -> None:
    assert [name for name, comment in file_map().items() if len(comment.split()) < 2] == []


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("medphi")])
def test_every_verb_and_option_shown_exists(line: str) -> None:
    words = shlex.split(line)[1:]
    command: Any = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    if words == ["--help"]:
        return
    assert not getattr(command, "commands", {}), f"{line}: stops before a verb"
    known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("make")])
def test_every_make_target_shown_exists(line: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in shlex.split(line)[1:]:
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), target


def test_the_readme_opens_with_the_two_commands() -> None:
    first = blocks("sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


@pytest.mark.parametrize("code", [*blocks("python"), mp.__doc__ or ""])
def test_python_shown_uses_public_names_only(code: str) -> None:
    names = set(re.findall(r"\bmp\.(\w+)", code))
    assert names and names <= set(mp.__all__)


def test_nothing_is_left_to_fill_in() -> None:
    assert re.findall(r"\b[A-Z]+_OUTPUT\b|\bFIGURES\b|\bTODO\b", README) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_explains_itself(path: Path) -> None:
    done = python(path, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and (path.name in done.stdout or "make " in done.stdout)


@pytest.mark.slow
def test_the_example_on_mts_dialog_runs(tmp_path: Path) -> None:
    from mlx_medphi.data.synthetic import sample

    for seed, name in enumerate(("TrainingSet", "ValidationSet", "TestSet-1-MEDIQA-Chat-2023")):
        rows = [
            f'{at},GENHX,"{e.note.text}","{e.conversation.text()}"\n'
            for at, e in enumerate(sample(4, seed=seed))
        ]
        text = "ID,section_header,section_text,dialogue\n" + "".join(rows)
        (tmp_path / f"MTS-Dialog-{name}.csv").write_text(text, encoding="utf-8")
    line = ["--data", tmp_path, "--model", MODEL]
    line += ["--out", tmp_path / "run", "--iters", "1"]
    script = ROOT / "examples" / "train_on_mts_dialog.py"
    done = python(script, *line)
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout and "stored: " in done.stdout
    assert (tmp_path / "run" / "medical_changes.safetensors").is_file()
