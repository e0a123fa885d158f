"""`medphi verify`: a table of what was compared, one line for each finding, and the exit code."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mlx_medphi as mp
from mlx_medphi.cli.verify import report_text
from mlx_medphi.coreml.sums import write_sums
from mlx_medphi.files import sha256_file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "notes.medphi"
    config = mp.ExportConfig(context=64, prefill=16, bits=16)
    return mp.export(model, out, config=config).path


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "notes.medphi"))


@pytest.fixture
def doctored(bundle: Path) -> Path:
    """A bundle whose golden logits are another model's; every hash is right."""
    path, metadata = bundle / "parity.safetensors", bundle / "metadata.json"
    tensors = {name: np.ascontiguousarray(t[:, ::-1]) for name, t in load_file(path).items()}
    save_file(tensors, path)
    manifest = json.loads(metadata.read_text())
    for entry in manifest["medphi"]["files"]:
        if entry["path"] == path.name:
            entry["bytes"], entry["sha256"] = path.stat().st_size, sha256_file(path)
    metadata.write_text(json.dumps(manifest))
    write_sums(bundle)
    return bundle


def test_a_whole_bundle_passes_with_a_table(run: Any, whole: Path) -> None:
    done = run("verify", whole)
    assert done.code == 0, done.err
    told = done.out.splitlines()
    assert re.fullmatch(rf"{re.escape(str(whole))}: level graph passed, in \d+ s", told[0])
    assert re.fullmatch(
        r"spec: 2 functions, \d+ operations, \d+ constants of which \d+ are shared, 0 quantised "
        r"weights",
        told[1],
    )
    assert re.match(r"graph: blocks against single tokens differ by \d\.\d\d% of the", told[2])
    assert re.fullmatch(r"case +rows +largest error +KL, nats +same first token +greedy", told[3])
    assert re.fullmatch(r"graph note-base +\d+ +0\.\d{4} +\de?\S* +100\.0% +yes", told[4])
    assert len(told) == 5
    assert done.err.splitlines() == ["reading the files …", "running the saved package …"]


def test_layers_are_told_against_float16s_end(run: Any, whole: Path) -> None:
    told = run("verify", whole, "--layers").out.splitlines()
    # One for each block of mini-4k.
    assert re.fullmatch(r"largest number after each block: \d+, \d+", told[-2])
    found = re.fullmatch(
        r"largest of all: \d+ in \w+; float16 ends at 65,504, ([\d,]+) times that", told[-1]
    )
    assert found is not None and int(found[1].replace(",", "")) > 1000


def test_level_spec_runs_nothing(run: Any, whole: Path) -> None:
    done = run("verify", whole, "--level", "spec")
    assert done.code == 0 and "level spec passed" in done.out and "graph" not in done.out
    assert done.err.splitlines() == ["reading the files …"]


def test_verify_as_json_is_one_document(run: Any, whole: Path) -> None:
    done = run("verify", whole, "--json", "--layers")
    assert done.code == 0 and done.err == ""
    told = json.loads(done.out)
    assert told["bundle"] == "notes.medphi" and told["passed"] is True
    assert told["level"] == "graph" and told["predict"] is None
    assert [case["name"] for case in told["graph"]["cases"]] == ["note-base"]
    assert len(told["graph"]["hidden"]) == 2


def test_what_is_beyond_its_limit_is_told_after_the_table(run: Any, doctored: Path) -> None:
    done = run("verify", doctored)
    assert done.code == 1
    assert "level graph NOT passed" in done.out and "graph note-base" in done.out
    lines = [text for text in done.err.splitlines() if not text.endswith("…")]
    assert lines[0].startswith(f"error: {doctored}: note-base: a logit is off by ")
    assert re.search(r"off by \d+\.\d\d% of the largest \(at most 2%\) \(and \d more\)$", lines[0])
    assert any(re.match(r"  note-base: KL \S+ nats \(at most 0\.\d+\)", text) for text in lines)
    assert "Traceback" not in done.err


def test_a_failure_as_json_has_its_figures_and_its_code(run: Any, doctored: Path) -> None:
    done = run("verify", doctored, "--json")
    assert done.code == 1
    told = json.loads(done.out)
    assert told["passed"] is False and told["graph"]["cases"][0]["error"] > 0.02
    assert told["graph"]["findings"] and done.err.startswith("error: ")


def test_an_altered_file_is_named(run: Any, bundle: Path) -> None:
    path = bundle / "tokenizer" / "vectors.json"
    path.write_bytes(path.read_bytes() + b" ")
    done = run("verify", bundle)
    assert done.code == 1 and done.out == ""
    assert done.err.splitlines()[-1] == (
        f"error: {bundle}: 1 file not as SHA256SUMS says: tokenizer/vectors.json is altered; fetch "
        "or export the bundle again"
    )


@pytest.mark.parametrize(
    ("more", "code", "expected"),
    [
        (["--level", "all"], 2, "level is 'all', expected one of spec, graph, predict"),
        (["--level"], 2, "--level"),
        (["--level", "predict"], 2, "needs a Mac with macOS 15 or later"),
        (["--leyers"], 2, "--leyers"),
    ],
)
def test_wrong_usage_is_one_line(
    run: Any, whole: Path, monkeypatch: pytest.MonkeyPatch,
    more: list[str], code: int, expected: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("platform.system", lambda: "Linux")
    done = run("verify", whole, *more)
    assert done.code == code and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and expected in done.err


@pytest.mark.parametrize("name", ["nothing.medphi", "file.medphi", "folder.medphi"])
def test_what_is_no_bundle_is_one_line(run: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "file.medphi").write_text("text")
    (tmp_path / "folder.medphi").mkdir()
    done = run("verify", tmp_path / name)
    assert done.code == 1 and done.out == "" and done.err.count("\n") == 1
    assert done.err.startswith(f"error: {tmp_path / name}: ")


def test_a_bundle_without_golden_logits_says_what_it_can_reach(
    run: Any, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "spec.medphi"
    config = mp.ExportConfig(context=64, prefill=16, bits=16, adapters="none")
    mp.export(model, out, config=config, level="spec")
    assert "level spec passed" in run("verify", out).out
    done = run("verify", out, "--level", "graph")
    assert done.code == 2 and done.err.count("error: ") == 1
    assert "export it with --verify graph" in done.err
    done = run("verify", out, "--layers")
    assert done.code == 2 and "export it with --verify graph" in done.err


def test_what_was_not_compared_is_told_before_the_figures(whole: Path) -> None:
    added = "not compared: letter (added after the export)"
    for level in ("spec", "graph"):
        report = replace(mp.verify(whole, level), not_compared=("letter",))
        told = report_text(report).splitlines()
        assert told[1] == added
        # The program was run: why not with this one?
        assert ("nothing to make them from" in told[2]) == (level == "graph")
    assert "not compared" not in report_text(replace(report, not_compared=()))


def test_the_report_counts_what_the_program_has(whole: Path) -> None:
    report = mp.verify(whole, "spec")
    text = report_text(report)
    operations = sum(sum(f.operations.values()) for f in report.spec.functions.values())
    assert f"2 functions, {operations:,} operations, {report.spec.constants} constants" in text
