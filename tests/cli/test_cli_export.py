"""`medphi export`: what it says, what it refuses in one line, and that nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_medphi as mp
from mlx_medphi.cli.export import adapter_paths, bundle_text
from mlx_medphi.config import ExportConfig
from mlx_medphi.errors import ParityError, UsageError

Usage = namedtuple("Usage", "total used free")
# Groups of 32 divide all widths of mini-4k.
SMALL = ["--context", 64, "--prefill", 16, "--group-size", 32]
STEPS = [
    "quantising …",
    "building the program, layer by layer …",
    "writing the weights …",
    "asking MLX …",
    "running the saved package …",
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """An adapter of rank 4 that changes the model."""
    path = tmp_path_factory.mktemp("adapters") / "soap.safetensors"
    base, _ = mp.load(model)
    from mlx_medphi.model.lora import adapted_layers, apply_lora

    apply_lora(base, mp.LoRAConfig(rank=4, dropout=0.0), seed=1)
    for _, layer in adapted_layers(base):
        layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    mp.save_adapter(base, path)
    return path


def line(model: Path, out: Path, *more: object) -> list[object]:
    return ["export", "--model", model, "--out", out, *SMALL, *more]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_export_says_what_it_wrote_and_how_far_it_is_proved(
    run: Any, model: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "notes.medphi"
    done = run(*line(model, out, "--adapter", f"soap={adapter}"))
    assert done.code == 0, done.err
    bundle = mp.open_bundle(out)
    told = done.out.splitlines()
    assert told[0] == f"{out}: {bundle.size}" and told[1] == "base: mini-4k"
    assert told[2].startswith("weights: 4-bit per-block g32, integer offset; embedding 8-bit g32")
    assert told[3] == f"context 64 tokens, {len(contents(out))} files"
    assert told[4] == "adapters in slots: soap (rank 4)"
    assert re.fullmatch(
        r"verified: graph, the saved program against MLX: off by \d\.\d\d% of the largest logit"
        r".*, KL \d\.\de-\d\d nats at most",
        told[5],
    )
    assert re.match(
        r"against the weights before export, note-soap: KL \S+ nats, same first token \d+%", told[7]
    )
    notes = [text for text in told if text.startswith("note: ")]
    assert notes[0] == (
        "note: soap: was trained on the plain weights, here they have 4 bits in groups of 32"
    )
    assert "16 keeps it" in notes[1]
    assert told[-1] == f"look closer with: medphi verify {out}"
    assert done.err.splitlines() == STEPS
    assert left_in(tmp_path) == ["notes.medphi"]


def test_export_as_json_is_one_document(
    run: Any, model: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "notes.medphi"
    done = run(*line(model, out, "--adapter", adapter, "--bits", 16, "--json"))
    assert done.code == 0 and done.err == ""
    told = json.loads(done.out)
    assert told["path"] == str(out) and told["bytes"] == mp.open_bundle(out).nbytes
    assert told["manifest"] == json.loads((out / "metadata.json").read_text())
    assert [entry["name"] for entry in told["manifest"]["medphi"]["adapters"]["list"]] == ["soap"]


def test_a_dry_run_tells_the_cost_and_writes_nothing(
    run: Any, model: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "notes.medphi"
    done = run(*line(model, out, "--adapter", adapter, "--dry-run"))
    assert done.code == 0 and done.err == "" and left_in(tmp_path) == []
    told = done.out.splitlines()
    assert told[0] == "mini-4k: 4 bits, context 64 tokens, prefill 16"
    assert told[1] == "adapters: soap (slots, slots of rank 8)"
    assert told[-1] == "Nothing was written."
    for part in ("embedding", "keys and values per token", "multiply-adds", "M4 Max (16-core)"):
        assert part in done.out
    assert "ceilings, not speeds" in done.out and "A device is slower." in done.out


def test_a_dry_run_as_json_has_the_settings_and_the_sheet(
    run: Any, model: Path, tmp_path: Path
) -> None:
    done = run(*line(model, tmp_path / "notes.medphi", "--dry-run", "--json"))
    told = json.loads(done.out)
    assert told["base"] == "mini-4k" and told["config"]["bits"] == 4
    assert told["slot_rank"] == 16 and told["adapters"] == []
    assert len(told["notes"]) == 1
    assert told["cost"]["package_bytes"] == sum(told["cost"]["package"].values())
    assert told["needed_bytes"] >= told["cost"]["package_bytes"]
    assert left_in(tmp_path) == []


@pytest.mark.slow
def test_another_process_writes_the_same_bytes_and_says_nothing_of_its_own(
    run: Any, model: Path, adapter: Path, tmp_path: Path
) -> None:
    """Texts are hashed with another seed there, and coremltools is loaded for the first time."""
    here = tmp_path / "notes.medphi"
    assert run(*line(model, here, "--adapter", adapter)).code == 0
    there = tmp_path / "there" / "notes.medphi"
    done = subprocess.run(
        [sys.executable, "-m", "mlx_medphi"]
        + [str(word) for word in line(model, there, "--adapter", adapter)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": "77", "PYTHONWARNINGS": "default"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == STEPS
    assert done.stdout.splitlines()[0].startswith(f"{there}: ")
    first, second = contents(here), contents(there)
    assert [name for name in first | second if first.get(name) != second.get(name)] == []


@pytest.mark.parametrize(
    ("more", "code", "expected"),
    [
        (["--context", 100], 2, "context is 100, expected a multiple of 64"),
        (["--context", 4160], 1, "rotary positions end at 4096; choose 4096 or less"),
        (["--group-size", 48], 2, "group_size is 48, expected one of 32, 64, 128"),
        (["--group-size", 64], 1, "(width 96); take a group size of 32, or 16 bits"),
        (["--bits", 5], 2, "bits is 5, expected one of 4, 8, 16 or null"),
        (["--bits", "four"], 2, "--bits"),
        (["--adapters", "both"], 2, "adapters is 'both', expected one of 'slots'"),
        (["--adapters", "functions"], 2, "functions are made for adapters and none is given"),
        (["--adapters", "fused"], 2, "fused takes one adapter, 0 are given"),
        (["--verify", "all"], 2, "level is 'all', expected one of spec, graph, predict"),
        (["--slot-rank", 0], 2, "slot_rank is 0, expected between 1 and 1024"),
        (["--adapter", "soap=nowhere"], 1, "nowhere"),
        (["--adapter", "soap="], 2, "--adapter soap= names no path"),
        (["--adapter", "=nowhere"], 2, "'' is no adapter name"),
        (["--adapter", "decode=nowhere"], 2, "'decode' is taken by the model itself"),
        (["--adapter", "a=x", "--adapter", "a=y"], 2, "two adapters are called 'a'"),
        (["--adapter", "a-b=x", "--adapter", "A_b=y"], 2, "'A_b' is the same as 'a-b'"),
        (["--adapter", "a=x", "--adapter", "y"], 2, "give every --adapter a name"),
        (["--model", "no/such/model"], 1, "no/such/model"),
        (["--out", "notes"], 2, "a bundle's name ends in .medphi"),
        (["--revision", "v1"], 1, "a revision belongs to a hub id, this is a local path"),
    ],
)
def test_a_wrong_export_is_one_line_and_leaves_nothing(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    more: list[object], code: int, expected: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    done = run(*line(model, Path("notes.medphi"), "--offline", *more))
    assert done.code == code, done.err
    assert done.out == "" and done.err.count("\n") == 1 and done.err.startswith("error: ")
    assert expected in done.err and "internal error" not in done.err
    assert left_in(tmp_path) == []


def test_an_adapter_that_does_not_fit_is_told_with_its_reasons(
    run: Any, model: Path, adapter: Path, tmp_path: Path
) -> None:
    done = run(*line(model, tmp_path / "a.medphi", "--adapter", adapter, "--slot-rank", 2))
    assert done.code == 1 and done.out == ""
    first, *reasons = done.err.splitlines()
    assert first == "error: This package cannot hold its adapters (1 difference):"
    assert reasons[0] == "  soap: rank is 4, the slots have 2: export with slot_rank=4"
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["export", "dry run"])
def test_what_is_at_the_place_stays(
    run: Any, model: Path, tmp_path: Path, more: list[object]
) -> None:
    out = tmp_path / "notes.medphi"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    done = run(*line(model, out, *more))
    assert done.code == 1 and "exists already" in done.err and "--replace" in done.err
    done = run(*line(model, out, "--replace", *more))
    assert done.code == 1 and "is not a bundle; only bundles are replaced" in done.err
    assert (out / "mine.txt").read_text() == "mine" and left_in(tmp_path) == ["notes.medphi"]


@pytest.mark.slow
def test_an_older_bundle_is_replaced_when_told(run: Any, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "notes.medphi"
    assert run(*line(model, out, "--bits", 16, "--verify", "spec")).code == 0
    assert "verified: spec; the program was not run" in bundle_text(mp.open_bundle(out))
    before = contents(out)
    done = run(*line(model, out))
    assert done.code == 1 and done.err.count("\n") == 1 and contents(out) == before
    done = run(*line(model, out, "--replace"))
    assert done.code == 0, done.err
    assert mp.open_bundle(out).manifest.medphi.quantization.bits == 4


def test_a_bundle_inside_its_base_is_refused(
    run: Any, model: Path, adapter: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(model, tmp_path / "base"))
    before = contents(base)
    done = run(*line(base, base / "notes.medphi"))
    assert done.code == 1 and "which is read; choose another place" in done.err
    assert contents(base) == before


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["export", "dry run"])
def test_a_disk_without_room_is_told_before_the_start(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[object]
) -> None:
    free = Usage(10**10, 10**10 - 5 * 10**7, 5 * 10**7)
    monkeypatch.setattr("mlx_medphi.coreml.request.shutil.disk_usage", lambda place: free)
    done = run(*line(model, tmp_path / "notes.medphi", *more))
    assert done.code == 1 and done.out == "" and done.err.count("\n") == 1
    assert "needs 0.06 GB while it is made" in done.err and "has 0.05 GB free" in done.err
    assert left_in(tmp_path) == []


def test_a_disk_that_becomes_full_is_one_line(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mlx_medphi.coreml.build.BlobWriter.append", full)
    done = run(*line(model, tmp_path / "notes.medphi"))
    assert done.code == 1 and done.err.splitlines()[-1] == (
        f"error: {tmp_path / 'notes.medphi'}: cannot be written (No space left on device); what "
        "was there is unchanged"
    )
    assert left_in(tmp_path) == []


def test_ctrl_c_leaves_nothing(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_medphi.coreml.export.make_golden", stop)
    done = run(*line(model, tmp_path / "notes.medphi"))
    assert done.code == 130 and done.err.splitlines()[-1] == "error: stopped from the keyboard"
    assert left_in(tmp_path) == []


def test_a_package_that_is_not_the_model_is_exit_code_1(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*given: Any, **more: Any) -> Any:
        raise ParityError("notes.medphi: note-base: KL 3 nats; nothing was written")

    monkeypatch.setattr("mlx_medphi.coreml.export.check_bundle", check)
    done = run(*line(model, tmp_path / "notes.medphi"))
    assert done.code == 1 and done.out == ""
    assert done.err.splitlines()[-1] == (
        "error: notes.medphi: note-base: KL 3 nats; nothing was written"
    )
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("more", [["--verify", "predict"], ["--compute-plan"]])
def test_what_needs_a_mac_says_so_before_any_work(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[object]
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    done = run(*line(model, tmp_path / "notes.medphi", *more))
    assert done.code == 2 and done.err.count("\n") == 1
    assert "needs a Mac with macOS 15 or later" in done.err
    assert left_in(tmp_path) == []


def test_a_compute_plan_is_told_and_part_of_the_document(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def compute_plan(package: Path, units: str) -> dict[str, dict[str, int]]:
        asked.append((package.is_dir(), units))
        return {"decode": {"MLGPUComputeDevice": 1200, "MLCPUComputeDevice": 3}}

    monkeypatch.setattr("mlx_medphi.coreml.predict.need_mac", lambda what: None)
    monkeypatch.setattr("mlx_medphi.coreml.predict.compute_plan", compute_plan)
    quick = ["--adapters", "none", "--verify", "spec", "--compute-plan"]
    done = run(*line(model, tmp_path / "a.medphi", *quick, "--compute-units", "all"))
    last = done.out.splitlines()[-1]
    assert last == "decode: 1,200 on MLGPUComputeDevice, 3 on MLCPUComputeDevice"
    told = json.loads(run(*line(model, tmp_path / "b.medphi", *quick, "--json")).out)
    assert told["compute_plan"]["decode"]["MLGPUComputeDevice"] == 1200
    assert asked == [(True, "all"), (True, "cpu_and_gpu")]


def test_every_setting_is_an_option(run: Any) -> None:
    from dataclasses import fields

    shown = run("export", "--help").out
    for field in fields(ExportConfig):
        assert f"--{field.name.replace('_', '-')} " in shown, field.name
    for part in ("[default: ]", "--verify with", "function --prefill"):
        assert part not in " ".join(shown.split())


def test_help_waits_for_no_library() -> None:
    code = (
        "import sys\n"
        "from mlx_medphi.cli.main import main\n"
        "for verb in ('export', 'verify'):\n"
        "    assert main([verb, '--help']) == 0\n"
        "heavy = ('mlx', 'mlx.core', 'coremltools', 'numpy', 'tokenizers', 'safetensors')\n"
        "print(sorted(set(heavy) & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert done.stdout.count("Examples:") == 2


def test_adapters_come_with_names_or_without(tmp_path: Path) -> None:
    odd = tmp_path / "rank=8"
    odd.mkdir()
    assert adapter_paths([]) == []
    assert adapter_paths(["runs/a", "runs/b"]) == ["runs/a", "runs/b"]
    assert adapter_paths(["soap=runs/a", "letter=x=y"]) == {"soap": "runs/a", "letter": "x=y"}
    # A path that is there is a path, whatever it is called.
    assert adapter_paths([str(odd)]) == [str(odd)]
    assert adapter_paths([f"soap={odd}"]) == {"soap": str(odd)}
    with pytest.raises(UsageError, match="give every --adapter a name"):
        adapter_paths(["soap=runs/a", str(odd)])
