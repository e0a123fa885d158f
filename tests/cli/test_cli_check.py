"""`medphi check` finds what is there, and fails only for what is missing."""

from __future__ import annotations

import builtins
import json
import sys
from collections import namedtuple
from typing import Any

import pytest

from mlx_medphi import machine
from mlx_medphi.cli import check as check_verb
from mlx_medphi.machine import Finding


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    # The size of the product that is timed changes nothing of what is tested.
    monkeypatch.setattr(machine, "WIDTH", 64)
    # Loading coremltools takes seconds; one test below does it.
    monkeypatch.setattr(machine, "LOAD_CORE_ML", "pass")


def finding(name: str) -> Finding:
    return {found.name: found for found in machine.look()}[name]


def test_check_passes_on_this_machine_and_tells_of_everything(run: Any) -> None:
    done = run("check")
    assert done.code == 0, done.out
    for name in ("python", "mlx", "blas", "matrix product", "memory", "disk", "coremltools", "mac"):
        assert f" {name} " in done.out
    assert "GFLOP/s" in done.out


def test_check_as_json_has_the_same_findings(run: Any) -> None:
    told = json.loads(run("check", "--json").out)["findings"]
    assert {entry["name"] for entry in told} == {found.name for found in machine.look()}
    assert {entry["state"] for entry in told} <= {"ok", "note", "missing"}


@pytest.mark.slow
def test_core_ml_tools_are_really_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert machine._core_ml().state == "ok"
    monkeypatch.setattr(machine, "LOAD_CORE_ML", "import no_such_module")
    assert machine._core_ml().state == "missing"


def test_something_missing_fails_the_check(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_verb, "look", lambda: [Finding("mlx", "missing", "not installed")])
    done = run("check")
    assert done.code == 1 and "MISSING mlx" in done.out


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise machine.PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", version)
    found = {entry.name: entry for entry in machine.look()}
    assert {n for n, e in found.items() if e.state == "missing"} == {"mlx", "mlx-lm", "coremltools"}
    assert "matrix product" not in found


def test_an_mlx_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("mlx.core"):
            raise ImportError("libmlx.so: cannot open shared object file")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    found = machine._mlx()
    assert found.state == "missing" and "mlx[cpu]" in found.text


def test_a_small_machine_gets_notes_not_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "total available")(4_000_000_000, 1_000_000_000)
    usage = namedtuple("usage", "free")(1_000_000_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    for name in ("memory", "disk"):
        assert finding(name).state == "note"
    assert finding("memory").text.startswith("4.0 GB, 1.0 GB of it free")


def test_without_a_fast_blas_linux_says_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine, "loaded_blas", lambda: None)
    found = machine._blas()
    assert found.state == "note" and "libopenblas0-pthread" in found.text


def test_a_mac_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("platform.mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    assert machine._system().text.startswith("macOS 15.1")
    assert machine._blas().state == "ok"
