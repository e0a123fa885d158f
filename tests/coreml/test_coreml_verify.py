"""A bundle is verified from its files alone; whatever is wrong with it is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_cases import contents, flip, make_adapter, one_block, settings
from safetensors.numpy import load_file, save_file

from mlx_medphi.coreml.bundle import Bundle, open_bundle
from mlx_medphi.coreml.certificate import GOLDEN_FILE, PARITY_FILE, read_golden
from mlx_medphi.coreml.export import export
from mlx_medphi.coreml.manifest import CARD, METADATA, SUMS
from mlx_medphi.coreml.parity import Variant
from mlx_medphi.coreml.sums import bundle_files, read_sums, write_sums
from mlx_medphi.coreml.verify import ParityReport, check_bundle, variants, verify
from mlx_medphi.errors import BundleError, MedPhiError, ParityError, UsageError
from mlx_medphi.files import sha256_file

WEIGHTS = "model/Phi3.mlpackage/Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_block(tmp_path_factory.mktemp("base") / "small")


@pytest.fixture(scope="module")
def soap(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "soap.safetensors", base)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path, soap: Path) -> Bundle:
    """8 bits with one adapter in slots."""
    out = tmp_path_factory.mktemp("bundle") / "notes.medphi"
    return export(base, out, adapters=[soap], config=settings(bits=8))


@pytest.fixture
def bundle(whole: Bundle, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole.path, tmp_path / "notes.medphi"))


def refused(path: Path, level: Any = None) -> str:
    with pytest.raises(BundleError) as caught:
        verify(path, level)
    assert not isinstance(caught.value, ParityError)
    return str(caught.value)


def reseal(bundle: Path, *names: str) -> None:
    """Write the hashes of some files again, as somebody would who changed them on purpose."""
    path = bundle / METADATA
    manifest = json.loads(path.read_text())
    for entry in manifest["medphi"]["files"]:
        if entry["path"] in names:
            place = bundle / entry["path"]
            entry["bytes"], entry["sha256"] = place.stat().st_size, sha256_file(place)
    path.write_text(json.dumps(manifest, indent=2, sort_keys=True))
    write_sums(bundle)


def rewritten(bundle: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """Change the golden logits and every hash of them."""
    tensors = load_file(bundle / GOLDEN_FILE)
    change(tensors)
    save_file(tensors, bundle / GOLDEN_FILE)
    reseal(bundle, GOLDEN_FILE)
    return bundle


def test_a_whole_bundle_passes_and_stays_as_it_is(bundle: Path) -> None:
    before = contents(bundle)
    report = verify(bundle)
    assert report.passed and report.findings == () and report.level == "graph"
    assert report.bundle == bundle and report.predict is None and report.seconds > 0
    assert contents(bundle) == before
    # By its path, its text, and as it was opened.
    assert verify(str(bundle), "spec").level == "spec"
    assert verify(open_bundle(bundle), "spec").graph is None


def test_the_report_is_that_of_another_machine(whole: Bundle, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(whole.path, tmp_path / "elsewhere" / "other-name.medphi"))
    here, there = (verify(path).to_dict() for path in (whole.path, moved))
    assert (here.pop("bundle"), there.pop("bundle")) == ("notes.medphi", "other-name.medphi")
    assert here.pop("seconds") >= 0 and there.pop("seconds") >= 0
    assert here == there
    assert here["passed"] is True
    assert json.loads(json.dumps(here, allow_nan=False)) == here


def test_one_flipped_byte_in_any_file_names_the_file(bundle: Path) -> None:
    names = [name for name in bundle_files(bundle)]
    assert WEIGHTS in names and len(names) >= 15
    for name in names:
        before = (bundle / name).read_bytes()
        flip(bundle / name)
        text = refused(bundle)
        assert f"1 file not as SHA256SUMS says: {name} is altered" in text, name
        assert text.startswith(f"{bundle}: ") and "\n" not in text
        (bundle / name).write_bytes(before)
    verify(bundle, "spec")


def test_a_byte_flipped_in_the_sums_is_told(bundle: Path) -> None:
    size = (bundle / SUMS).stat().st_size
    before = (bundle / SUMS).read_bytes()
    for at in (0, 70, size // 2, size - 1):
        flip(bundle / SUMS, at)
        assert SUMS in refused(bundle)
        (bundle / SUMS).write_bytes(before)


def test_missing_and_further_files_are_named(bundle: Path) -> None:
    (bundle / "adapters" / "soap.safetensors").unlink()
    (bundle / "model" / "extra.bin").write_bytes(b"1")
    text = refused(bundle)
    assert "adapters/soap.safetensors is missing, model/extra.bin is not listed" in text


def test_a_missing_package_is_named(bundle: Path) -> None:
    shutil.rmtree(bundle / "model")
    assert "3 files not as SHA256SUMS says: model/Phi3.mlpackage" in refused(bundle)


def test_a_newer_schema_asks_for_an_update(bundle: Path) -> None:
    path = bundle / METADATA
    manifest = json.loads(path.read_text())
    manifest["medphi"]["schema"] += 1
    path.write_text(json.dumps(manifest))
    write_sums(bundle)
    text = refused(bundle)
    assert "made by a newer mlx_medphi (schema 2, this one reads 1): update" in text
    assert "\n" not in text


@pytest.mark.parametrize("name", ["nothing.medphi", "file.medphi", "empty.medphi"])
def test_what_is_no_bundle_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.medphi").write_text("text")
    (tmp_path / "empty.medphi").mkdir()
    text = refused(tmp_path / name)
    assert text.startswith(str(tmp_path / name)) and "\n" not in text


def doctor(tensors: dict[str, np.ndarray]) -> None:
    tensors["note-soap"][3] = tensors["note-soap"][3, ::-1]


def test_doctored_logits_are_a_finding_with_its_figures(bundle: Path) -> None:
    rewritten(bundle, doctor)
    with pytest.raises(ParityError) as caught:
        verify(bundle)
    text, report = str(caught.value), caught.value.report
    first, *rest = text.splitlines()
    assert re.match(
        rf"{re.escape(str(bundle))}: note-soap: a logit is off by \d+\.\d\d% of the largest "
        r"\(at most 2%\) \(and \d more\)$",
        first,
    )
    assert any("note-soap: KL " in line for line in rest)
    assert caught.value.exit_code == 1
    assert isinstance(report, ParityReport) and not report.passed and report.level == "graph"
    cases = {case.name: case for case in report.graph.cases} if report.graph else {}
    assert cases["note-soap"].error > 0.1 and not cases["note-soap"].findings() == []
    assert cases["note-base"].error < 0.02 and cases["note-base"].findings() == []
    assert report.to_dict()["passed"] is False
    # Files and program are as they should be.
    assert verify(bundle, "spec").passed


def test_a_doctored_weight_is_a_finding(bundle: Path) -> None:
    """A stretch of codes is turned round, and all hashes are written again."""
    path = bundle / WEIGHTS
    data = bytearray(path.read_bytes())
    middle = len(data) // 3
    data[middle : middle + 2000] = data[middle : middle + 2000][::-1]
    path.write_bytes(bytes(data))
    reseal(bundle, WEIGHTS)
    assert verify(bundle, "spec").passed
    with pytest.raises(ParityError, match="a logit is off by"):
        verify(bundle)


def test_a_program_that_is_not_as_the_manifest_says_is_not_run(bundle: Path) -> None:
    path = bundle / METADATA
    manifest = json.loads(path.read_text())
    manifest["medphi"]["export"]["attention"] = "decomposed"
    path.write_text(json.dumps(manifest))
    write_sums(bundle)
    with pytest.raises(ParityError) as caught:
        verify(bundle)
    report = caught.value.report
    assert isinstance(report, ParityReport)
    assert report.graph is None and report.level == "spec" and report.findings


def test_logits_that_leave_an_adapter_out_are_no_certificate(bundle: Path) -> None:
    document = json.loads((bundle / PARITY_FILE).read_text())
    document["cases"] = [case for case in document["cases"] if case["adapter"] is None]
    (bundle / PARITY_FILE).write_text(json.dumps(document))
    reseal(bundle, PARITY_FILE)
    assert "does not fit the bundle: there are no logits of soap" in refused(bundle)
    document["cases"] = []
    (bundle / PARITY_FILE).write_text(json.dumps(document))
    reseal(bundle, PARITY_FILE)
    assert "there are no logits of" in refused(bundle)


@pytest.fixture
def extended(bundle: Path, base: Path, tmp_path: Path) -> Path:
    """The bundle with the adapter letter in it, as an app adds one."""
    letter = make_adapter(tmp_path / "letter.safetensors", base, seed=2)
    other = export(
        base, tmp_path / "o.medphi", adapters=[letter], config=settings(bits=8), level="spec"
    ).path
    return add(bundle, other, "letter")


def add(bundle: Path, other: Path, name: str) -> Path:
    """Take over an adapter: pack, manifest and sums; the certificate stays as it is."""
    path = f"adapters/{name}.safetensors"
    shutil.copyfile(other / path, bundle / path)
    theirs = json.loads((other / METADATA).read_text())["medphi"]
    manifest = json.loads((bundle / METADATA).read_text())
    ours = manifest["medphi"]
    ours["adapters"]["list"] += [e for e in theirs["adapters"]["list"] if e["name"] == name]
    ours["adapters"]["list"].sort(key=lambda entry: str(entry["name"]))
    ours["files"] += [entry for entry in theirs["files"] if entry["path"] == path]
    ours["files"].sort(key=lambda entry: str(entry["path"]))
    (bundle / METADATA).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    write_sums(bundle)
    return bundle


@pytest.mark.parametrize("level", ["spec", "graph"])
def test_an_adapter_added_later_is_named_and_the_rest_is_verified(
    extended: Path, level: Any
) -> None:
    report = verify(extended, level)
    assert report.passed and report.level == level
    assert report.not_compared == ("letter",)
    assert report.notes == ("not compared: letter (added after the export)",)
    told = report.to_dict()
    assert told["not_compared"] == {"letter": "added after the export"}
    assert "not compared: letter (added after the export)" in report._repr_html_()
    cases = [case.name for case in report.graph.cases] if report.graph else []
    assert cases == (["note-base", "note-soap"] if level == "graph" else [])


def test_a_bundle_as_it_was_exported_has_nothing_left_out(whole: Bundle) -> None:
    report = verify(whole, "spec")
    assert report.not_compared == report.notes == ()
    assert report.to_dict()["not_compared"] == {}
    assert "not compared" not in report._repr_html_()


def test_the_logits_of_exported_adapters_are_due_when_others_came_later(extended: Path) -> None:
    document = json.loads((extended / PARITY_FILE).read_text())
    document["cases"] = [case for case in document["cases"] if case["adapter"] is None]
    (extended / PARITY_FILE).write_text(json.dumps(document))
    reseal(extended, PARITY_FILE)
    for level in ("spec", "graph"):
        text = refused(extended, level)
        assert "does not fit the bundle: there are no logits of soap; export again" in text


def test_a_wrong_program_is_found_beside_an_adapter_added_later(extended: Path) -> None:
    rewritten(extended, doctor)
    with pytest.raises(ParityError, match="note-soap: a logit is off by") as caught:
        verify(extended)
    assert isinstance(caught.value.report, ParityReport)
    assert caught.value.report.not_compared == ("letter",)


def test_logits_of_another_vocabulary_are_no_certificate(bundle: Path) -> None:
    rewritten(
        bundle, lambda tensors: tensors.update({n: t[:, :-1].copy() for n, t in tensors.items()})
    )
    assert "is of another model" in refused(bundle)


def test_a_tokenizer_that_does_something_else_is_caught(bundle: Path) -> None:
    path = bundle / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    pair = [token for token in vocabulary if len(token) == 1 and token.isascii()][:2]
    vocabulary[pair[0]], vocabulary[pair[1]] = vocabulary[pair[1]], vocabulary[pair[0]]
    path.write_text(json.dumps(tokenizer))
    text = path.read_bytes()
    manifest = json.loads((bundle / METADATA).read_text())
    manifest["medphi"]["tokenizer"]["sha256"] = sha256_file(path)
    (bundle / METADATA).write_text(json.dumps(manifest))
    reseal(bundle, "tokenizer/tokenizer.json")
    assert path.read_bytes() == text
    with pytest.raises(MedPhiError, match="vectors"):
        verify(bundle)


@pytest.mark.parametrize("level", ["all", "", "Graph", 3])
def test_a_level_is_one_of_three(whole: Bundle, level: Any) -> None:
    told: list[Any] = []
    with pytest.raises(UsageError) as caught:
        verify(whole, level, progress=lambda *step: told.append(step))
    assert str(caught.value) == f"level is {level!r}, expected one of spec, graph, predict"
    assert caught.value.exit_code == 2 and told == []


def test_level_predict_needs_a_mac_and_says_so_at_once(
    whole: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    told: list[Any] = []
    with pytest.raises(UsageError, match="level predict .* needs a Mac with macOS 15") as caught:
        verify(whole, "predict", progress=lambda *step: told.append(step))
    assert caught.value.exit_code == 2 and told == []


@pytest.mark.parametrize("changes", [{"residual": "float32"}, {"attention": "decomposed"}])
def test_the_largest_number_after_each_block_is_told_when_asked(
    base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    bundle = export(
        base, tmp_path / "a.medphi", config=settings(bits=16, adapters="none", **changes)
    )
    report = verify(bundle, layers=True)
    assert report.graph is not None and len(report.graph.hidden) == 1
    assert 0 < report.graph.hidden[0] < 65504
    assert verify(bundle).to_dict()["graph"]["hidden"] == []


def test_every_adapter_is_run_in_its_own_way(
    whole: Bundle, base: Path, soap: Path, tmp_path: Path
) -> None:
    state = variants(whole)
    assert set(state) == {None, "soap"}
    assert state[None].slots is None and state[None].shape.slot_kind == "state"
    assert state["soap"].slots is not None and len(state["soap"].slots) == 8

    def made(name: str, **changes: Any) -> dict[str | None, Variant]:
        out = tmp_path / f"{name}.medphi"
        config = settings(bits=16, **changes)
        given = {"soap-notes": soap}
        return variants(export(base, out, adapters=given, config=config, level="spec"))

    inputs = made("inputs", slot_kind="input")
    assert inputs[None].slots is not None and len(inputs[None].slots) == 8
    assert not any(array.any() for array in inputs[None].slots.values())
    functions = made("functions", adapters="functions")
    assert functions[None].shape.functions == ("prefill", "decode")
    assert functions["soap-notes"].shape.functions == ("prefill_soap_notes", "decode_soap_notes")
    assert functions["soap-notes"].slots is None
    assert set(made("fused", adapters="fused")) == {None}


def broken(report: ParityReport, **changes: Any) -> ParityReport:
    """A report whose first case has other figures."""
    assert report.graph is not None
    first, *others = report.graph.cases
    case = replace(first, **changes)
    return replace(report, graph=replace(report.graph, cases=(case, *others)))


def test_a_report_in_a_notebook_shows_no_markup_of_others(whole: Bundle) -> None:
    report = verify(whole)
    graph = replace(report.graph, findings=("<script>alert(1)</script>",)) if report.graph else None
    hostile = replace(report, bundle=Path("/x/<b>a&b.medphi"), graph=graph)
    html = broken(hostile, name="<img src=x>")._repr_html_()
    assert "<script>" not in html and "<img" not in html and "<b>a&b" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "&lt;img src=x&gt;" in html
    assert "a&amp;b" in html
    for tag in ("p", "table", "tr", "th", "td"):
        assert html.count(f"<{tag}>") == html.count(f"</{tag}>") > 0
    assert "passed" in report._repr_html_()


def test_a_bundle_in_a_notebook_shows_no_markup_of_others(whole: Bundle) -> None:
    source = replace(whole.manifest.source, model_id="<script>x</script>", licence="a&b")
    hostile = Bundle(whole.path, replace(whole.manifest, source=source))
    html = hostile._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;x&lt;/script&gt;" in html
    assert "a&amp;b" in html


def test_figures_that_are_no_numbers_are_findings_and_json(whole: Bundle) -> None:
    case = broken(verify(whole), error=float("nan"), kl=float("inf")).graph
    assert case is not None
    assert len(case.cases[0].findings()) == 2
    report = broken(verify(whole), error=float("nan"), kl=float("inf"), max_abs=float("-inf"))
    text = json.dumps(report.to_dict(), allow_nan=False)
    first = json.loads(text)["graph"]["cases"][0]
    assert (first["error"], first["kl"], first["max_abs"]) == (None, None, None)


def test_a_row_of_the_report_is_a_case(whole: Bundle) -> None:
    rows = list(verify(whole).rows())
    assert [row[0] for row in rows] == ["graph note-base", "graph note-soap"]
    assert all(len(row) == 6 and row[4] == "100.0%" and row[5] == "yes" for row in rows)


def test_logits_that_are_no_numbers_never_pass(whole: Bundle) -> None:
    golden = read_golden(whole.path)
    first, *others = golden.cases
    logits = first.logits.copy()
    logits[0, 0] = np.nan
    report = check_bundle(
        whole, replace(golden, cases=(replace(first, logits=logits), *others)), "graph"
    )
    assert not report.passed and "note-base: a logit is off by nan%" in report.findings[0]


def test_sums_list_every_file_but_themselves(whole: Bundle) -> None:
    assert set(read_sums(whole.path)) == set(contents(whole.path)) - {SUMS}
    assert {METADATA, CARD, PARITY_FILE, GOLDEN_FILE} <= set(read_sums(whole.path))
