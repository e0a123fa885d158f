"""The command line called in this process, on a tiny model and synthetic rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import mlx_medphi as mp
from mlx_medphi.cli.main import main
from mlx_medphi.data.synthetic import sample

MODEL = Path(__file__).resolve().parents[1] / "fixtures" / "phi3" / "mini-4k"


@dataclass(frozen=True)
class Done:
    """What a command line did."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Call `medphi` with some arguments and return its exit code and what it wrote."""

    def call(*arguments: object) -> Done:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        written = capfd.readouterr()
        return Done(code, written.out, written.err)

    return call


@pytest.fixture(scope="session")
def model() -> Path:
    """A Phi-3 of 110,912 random weights whose tokens are mostly letters."""
    return MODEL


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of ten synthetic conversations."""
    splits = mp.prepare(sample(10, seed=1), accept_identifiers=True)
    return mp.write_splits(splits, tmp_path_factory.mktemp("data") / "synthetic")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path, prepared: Path) -> Path:
    """The run directory of two updates, made by the verb itself."""
    out = tmp_path_factory.mktemp("runs") / "a"
    line = ["train", "--model", model, "--data", prepared, "--out", out, "--iters", 2, "--json"]
    small = ["--rank", 4, "--learning-rate", 0.01, "--batch-size", 1, "--max-length", 1024]
    assert main([str(word) for word in line + small]) == 0
    return out
