"""Level `spec`: whole packages pass; what they say of themselves and their weights is checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundle_cases import make_facts
from lint_cases import CONTEXT, PREFILL, Case, Program, check, doctored, make_case, only

from mlx_medphi.coreml.lint_report import Expected
from mlx_medphi.coreml.lints import MAX_FINDINGS
from mlx_medphi.coreml.manifest import PACKAGE, AdapterEntry, FileEntry
from mlx_medphi.coreml.manifest_build import build_manifest
from mlx_medphi.coreml.package import WEIGHT_FILE
from mlx_medphi.errors import BundleError

PLAIN: dict[str, Any] = {}
CODED = {"bits": 4}
TIED = {"checkpoint": "partial-rotary-tied", "bits": 4}
STEPS = {"attention": "decomposed"}
WIDE = {"residual": "float32"}
SLOTS = {"rank": 8}
SLOT_INPUTS = {"rank": 8, "slot_kind": "input", "bits": 4}
ADAPTERS = {"adapters": ("soap", "plan")}
GQA = {"checkpoint": "gqa", "bits": 4, **STEPS, **WIDE}
TWO_ROPES = {"checkpoint": "longrope-long"}

Cases = Callable[[dict[str, Any]], Case]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Packages by their settings, each made once."""
    made: dict[str, Case] = {}

    def get(settings: dict[str, Any]) -> Case:
        key = repr(settings)
        if key not in made:
            made[key] = make_case(tmp_path_factory.mktemp("case"), **settings)
        return made[key]

    return get


@pytest.mark.parametrize(
    "settings",
    [PLAIN, CODED, TIED, STEPS, WIDE, SLOTS, SLOT_INPUTS, ADAPTERS, GQA, TWO_ROPES],
    ids=str,
)
def test_what_an_export_writes_passes(cases: Cases, settings: Any) -> None:
    report = check(cases(settings))
    assert report.findings == ()
    assert report.passed
    assert {counts.norms for counts in report.functions.values()} == {5}
    softmaxes = 2 if settings.get("attention") == "decomposed" else 0
    assert {counts.softmaxes for counts in report.functions.values()} == {softmaxes}
    assert report.shared == report.constants


def test_a_report_counts_what_is_there(cases: Cases) -> None:
    report = check(cases(CODED))
    # Ten matrices, one without offsets, five norms, two rotary tables, biases of three widths.
    assert (report.quantized, report.constants) == (10, 29 + 5 + 2 + 3)
    assert report.functions["decode"].operations["linear"] == 9
    assert report.functions["prefill"].operations["write_state"] == 4
    assert report.weight_bytes == report.to_dict()["weight_bytes"]
    assert report.to_dict()["passed"] is True


def test_adapters_in_functions_of_their_own_share_the_base(cases: Cases) -> None:
    report = check(cases(ADAPTERS))
    assert sorted(report.functions) == [
        *("decode", "decode_plan", "decode_soap"),
        *("prefill", "prefill_plan", "prefill_soap"),
    ]
    linears = [counts.operations["linear"] for counts in report.functions.values()]
    assert linears == [9, 13, 13, 9, 13, 13]


# What a package says of itself.


@pytest.mark.parametrize(
    ("path", "value", "pattern"),
    [
        ("specificationVersion", 8, "model: specification version 8, expected 9"),
        ("description.defaultFunctionName", "prefill", "default function is 'prefill', expected"),
        ("description.metadata.shortDescription", "", "model: no description or no user-defined"),
    ],
)
def test_facts_of_the_model_are_checked(
    cases: Cases, tmp_path: Path, path: str, value: Any, pattern: str
) -> None:
    def edit(program: Program) -> None:
        *parents, name = path.split(".")
        message = program.model
        for parent in parents:
            message = getattr(message, parent)
        setattr(message, name, value)

    assert re.search(pattern, only(doctored(cases(PLAIN), tmp_path, edit)))


def test_user_defined_metadata_must_be_there(cases: Cases, tmp_path: Path) -> None:
    case = doctored(
        cases(PLAIN), tmp_path, lambda p: p.model.description.metadata.userDefined.clear()
    )
    assert "no user-defined metadata" in only(case)


@pytest.mark.parametrize(("kind", "name"), [("input", "position"), ("state", "valueCache")])
def test_every_input_output_and_state_is_described(
    cases: Cases, tmp_path: Path, kind: str, name: str
) -> None:
    def edit(program: Program) -> None:
        described = program.model.description.functions[1]
        next(f for f in getattr(described, kind) if f.name == name).shortDescription = " "

    finding = only(doctored(cases(PLAIN), tmp_path, edit))
    assert finding == f"prefill: {name!r} has no description; export again"


def test_functions_are_those_of_the_manifest(cases: Cases, tmp_path: Path) -> None:
    def edit(program: Program) -> None:
        del program.model.mlProgram.functions["prefill"]
        del program.model.description.functions[1]

    finding = only(doctored(cases(PLAIN), tmp_path, edit))
    assert finding.startswith("prefill: is in the manifest alone")


def test_signatures_are_those_of_the_manifest(cases: Cases) -> None:
    case = cases(PLAIN)
    said = case.expected.coreml
    wrong = replace(said.functions["decode"], outputs=())
    coreml = replace(said, functions={**said.functions, "decode": wrong})
    finding = only(replace(case, expected=replace(case.expected, coreml=coreml)))
    assert "decode: the output 'logits' is float16 [1, 1, 320], expected none" in finding


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"kv_heads": 1}, r"the state 'keyCache' is .*, expected float16 \[2, 1, 64, 16\] by the"),
        ({"vocab_size": 319}, r"the output 'logits' is .*, expected float16 \[1, 1, 319\] by the"),
        ({"intermediate_size": 95}, r"2 linear layers of \[64, 96\], expected 0"),
        ({"layers": 3}, "2 attentions, expected 3"),
        ({"eps": 1e-6}, "an epsilon of .*, expected .*e-0[67]"),
        ({"tied_embeddings": True}, r"the head has weights at \d+, expected the embedding's"),
    ],
)
def test_a_package_has_the_extents_of_its_model(
    cases: Cases, change: dict[str, Any], pattern: str
) -> None:
    case = cases(PLAIN)
    model = replace(case.expected.model, **change)
    findings = check(replace(case, expected=replace(case.expected, model=model))).findings
    assert any(re.search(pattern, line) for line in findings), findings


def test_a_head_of_its_own_is_not_the_embedding(cases: Cases) -> None:
    case = cases(TIED)
    model = replace(case.expected.model, tied_embeddings=False)
    findings = check(replace(case, expected=replace(case.expected, model=model))).findings
    assert len(findings) == 2  # both functions
    assert all("the head has the embedding's weights" in line for line in findings)


def test_rotary_tables_have_the_extents_of_the_model(cases: Cases) -> None:
    case = cases(PLAIN)
    model = case.expected.model
    half = replace(model, rope=replace(model.rope, rotary_dim=model.rope.rotary_dim // 2))
    findings = check(replace(case, expected=replace(case.expected, model=half))).findings
    assert len(findings) == 2  # both functions
    assert all("is of a table float16 [64, 8], expected [64, 4]" in line for line in findings)


def test_a_function_with_an_adapter_has_the_base_too(cases: Cases) -> None:
    case = cases(ADAPTERS)
    model = replace(case.expected.model, intermediate_size=95)
    findings = check(replace(case, expected=replace(case.expected, model=model))).findings
    assert any(re.match(r"decode_plan: 0 linear .* \[64, 95\], expected 2", f) for f in findings)


@pytest.mark.parametrize(
    ("settings", "change", "pattern"),
    [
        (PLAIN, {"attention": "decomposed"}, "0 softmaxes, expected 2"),
        (STEPS, {"attention": "fused"}, "2 softmaxes, expected 0"),
        (PLAIN, {"residual": "float32"}, "the residual is float32 in 0 places, expected 5"),
        (WIDE, {"residual": "float16"}, "add 'layer_0' computes in float32 outside"),
        (PLAIN, {"slot_rank": 8, "slot_kind": "state"}, "the slot 'loraA_qkv' is not read"),
        (SLOTS, {"slot_rank": 16}, r"expected float16 \[2, 16, 64\] by the extents"),
        (SLOTS, {"slot_rank": None}, "12 matmuls|16 matmuls, expected 0"),
        (SLOTS, {"slot_kind": "input"}, "the input 'loraA_qkv' is absent, expected"),
        (PLAIN, {"quantized": (1, 9)}, "0 weights stored as codes, expected 1 to 9"),
        (CODED, {"quantized": (0, 0)}, "10 weights stored as codes, expected 0"),
        (PLAIN, {"weight_bytes": 99, "exact": True}, r"\d+ bytes, expected 99"),
    ],
)
def test_a_package_is_what_the_settings_say(
    cases: Cases, settings: Any, change: dict[str, Any], pattern: str
) -> None:
    case = cases(settings)
    findings = check(replace(case, expected=replace(case.expected, **change))).findings
    assert any(re.search(pattern, line) for line in findings), findings


def test_a_plan_may_be_two_percent_off_the_weight_file(cases: Cases) -> None:
    case = cases(PLAIN)
    nbytes = check(case).weight_bytes
    for share, passed in ((0.985, True), (0.97, False), (1.03, False)):
        planned = replace(case.expected, weight_bytes=int(nbytes * share), exact=False)
        assert check(replace(case, expected=planned)).passed is passed


def test_a_function_with_an_adapter_has_one(cases: Cases) -> None:
    case = cases(PLAIN)
    pairs = (*case.expected.pairs, ("prefill", "decode"))
    findings = check(replace(case, expected=replace(case.expected, pairs=pairs))).findings
    assert len(findings) == 2
    assert all("0 linear layers beside the base's" in line for line in findings)


def test_prefill_and_decode_consist_of_the_same_operations(cases: Cases, tmp_path: Path) -> None:
    def edit(program: Program) -> None:
        program.add(None, program.op("silu"), "more")

    finding = only(doctored(cases(PLAIN), tmp_path, edit))
    assert "decode: 3 operations 'silu', prefill has 2; expected the same in both" in finding


def test_a_softmax_that_is_read_twice_is_in_no_attention(cases: Cases, tmp_path: Path) -> None:
    def edit(program: Program) -> None:
        shares = program.op("softmax")
        narrow = next(o for o in program.of("cast") if program.maker(o, "x") == shares)
        program.add(narrow, narrow, "more")

    findings = check(doctored(cases(STEPS), tmp_path, edit)).findings
    assert len(findings) == 2
    assert "is not between casts to float32 and back" in findings[0]
    assert "is in no attention" in findings[1]


def test_no_more_findings_are_listed_than_one_reads(cases: Cases, tmp_path: Path) -> None:
    def edit(program: Program) -> None:
        for _ in range(MAX_FINDINGS + 7):
            program.add(None, program.op("rope_cos"), "rope_cos")

    findings = check(doctored(cases(PLAIN), tmp_path, edit)).findings
    assert len(findings) == MAX_FINDINGS + 1
    assert findings[-1] == "and 7 more"


def test_the_manifest_says_what_is_expected(cases: Cases) -> None:
    expected = cases({**SLOT_INPUTS}).expected
    assert (expected.slot_rank, expected.slot_kind) == (8, "input")
    assert (expected.attention, expected.residual) == ("fused", "float16")
    assert expected.quantized == (1, 10)
    assert expected.pairs == (("prefill", "decode"),)
    assert (expected.coreml.context_length, expected.coreml.prefill_width) == (CONTEXT, PREFILL)
    assert not expected.exact
    assert cases(ADAPTERS).expected.pairs[1:] == (
        ("prefill_plan", "decode_plan"),
        ("prefill_soap", "decode_soap"),
    )


@pytest.mark.parametrize("key", ["attention", "residual"])
def test_a_manifest_that_leaves_a_setting_out_is_refused(key: str) -> None:
    manifest = build_manifest(make_facts())
    settings = {name: v for name, v in manifest.medphi.export.items() if name != key}
    bare = replace(manifest, medphi=replace(manifest.medphi, export=settings))
    with pytest.raises(BundleError, match=f"medphi.export.{key} is 'None', expected"):
        Expected.from_manifest(bare)


def test_a_manifest_with_its_files_says_the_bytes_of_the_weights() -> None:
    entry = FileEntry(f"{PACKAGE}/{WEIGHT_FILE}", 1234, "0" * 64)
    manifest = build_manifest(make_facts())
    listed = replace(manifest, medphi=replace(manifest.medphi, files=(entry,)))
    expected = Expected.from_manifest(listed)
    assert (expected.weight_bytes, expected.exact) == (1234, True)


def test_an_adapter_without_both_functions_is_refused() -> None:
    manifest = build_manifest(make_facts())
    entry = AdapterEntry("soap", None, None, 4, {"decode": "decode_soap"}, {})
    adapters = replace(manifest.medphi.adapters, list=(entry,))
    wrong = replace(manifest, medphi=replace(manifest.medphi, adapters=adapters))
    with pytest.raises(BundleError, match="other functions than prefill and decode"):
        Expected.from_manifest(wrong)
