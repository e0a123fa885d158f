"""Level `spec`: the weight file is whole, shared by all functions, and its numbers are finite."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lint_cases import Case, Program, check, copied, doctored, make_case, only

from mlx_medphi.coreml import lint_weights
from mlx_medphi.coreml.blobs import CODES, HEADER, MARK, RECORD
from mlx_medphi.coreml.lints import check_spec
from mlx_medphi.coreml.package import WEIGHT_FILE
from mlx_medphi.coreml.package_file import open_package

PLAIN: dict[str, Any] = {}
CODED = {"bits": 4}
STEPS = {"attention": "decomposed"}
ADAPTERS = {"adapters": ("soap", "plan")}

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


class WeightFile:
    """A weight file that is being doctored, and the place of its constants by their names."""

    def __init__(self, case: Case) -> None:
        self.path = case.path / WEIGHT_FILE
        self.data = bytearray(self.path.read_bytes())
        self.program = Program(case.path)

    def save(self) -> None:
        self.path.write_bytes(self.data)

    def offset(self, name: str, parameter: str = "") -> int:
        op = self.program.op(name)
        value = op.inputs[parameter].arguments[0].value if parameter else op.attributes["val"]
        return int(value.blobFileValue.offset)

    def put(self, offset: int, values: Any) -> None:
        """The first numbers of a constant."""
        half = np.array(values, np.float16).tobytes()
        start = offset + RECORD.size
        self.data[start : start + len(half)] = half

    def append(self, offset: int) -> int:
        """A second copy of a constant at the end."""
        mark, code, nbytes, start, unused = RECORD.unpack_from(self.data, offset)
        self.data += bytes(-len(self.data) % 64)
        new = len(self.data)
        self.data += RECORD.pack(mark, code, nbytes, new + RECORD.size, unused)
        self.data += self.data[start : start + nbytes]
        struct.pack_into("<I", self.data, 0, HEADER.unpack_from(self.data)[0] + 1)
        return new


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 65504, -60032])
def test_a_constant_that_is_not_finite_or_too_large_is_found(
    cases: Cases, tmp_path: Path, value: float
) -> None:
    case = copied(cases(PLAIN), tmp_path)
    weights = WeightFile(case)
    weights.put(weights.offset("rope_cos"), [1, value])
    weights.save()
    assert "the constant 'rope_cos' holds a number that is not finite or beyond" in only(case)


def test_whole_matrices_are_not_read(
    cases: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = copied(cases(PLAIN), tmp_path)
    weights = WeightFile(case)
    weights.put(weights.offset("lm_head_weight"), [np.inf])
    weights.save()
    assert not check(case).passed
    monkeypatch.setattr(lint_weights, "SCANNED_BYTES", 320 * 64 * 2 - 1)
    assert check(case).passed


def test_a_program_has_a_weight_file(cases: Cases) -> None:
    case = cases(PLAIN)
    report = check_spec(replace(open_package(case.path), blobs=None), case.expected)
    assert report.findings == ("weight file: the program names none; export again",)


def test_a_constant_at_the_limit_is_none_of_that(cases: Cases, tmp_path: Path) -> None:
    case = copied(cases(PLAIN), tmp_path)
    weights = WeightFile(case)
    weights.put(weights.offset("rope_cos"), [6e4, -6e4])
    weights.save()
    assert check(case).passed


def test_a_constant_in_the_program_is_finite_too(cases: Cases, tmp_path: Path) -> None:
    def edit(program: Program) -> None:
        scores = program.maker(program.op("softmax"), "x", "x", "x")
        program.value(program.maker(scores, "x"), "y").bytes.values = b"\0\x7c"

    assert "not finite" in only(doctored(cases(STEPS), tmp_path, edit))


def test_a_weight_does_not_stand_in_the_program_itself(cases: Cases, tmp_path: Path) -> None:
    def edit(program: Program) -> None:
        value = program.op("lm_head_weight").attributes["val"]
        value.immediateValue.tensor.bytes.values = bytes(320 * 64 * 2)

    findings = check(doctored(cases(PLAIN), tmp_path, edit)).findings
    assert any("'lm_head_weight' has 20480 numbers in the program" in line for line in findings), (
        findings
    )
    assert any("1 constants are not shared with prefill" in line for line in findings)
    assert any("the head has no weight in the weight file" in line for line in findings)


@pytest.mark.parametrize("value", [0, -1, -0.0])
def test_a_scale_is_above_zero(cases: Cases, tmp_path: Path, value: float) -> None:
    case = copied(cases(CODED), tmp_path)
    weights = WeightFile(case)
    weights.put(weights.offset("model_layers_1_mlp_down_proj", "scale"), [1, value])
    weights.save()
    finding = only(case)
    assert "'model_layers_1_mlp_down_proj.scale' holds a scale that is not above zero" in finding


def test_a_bias_is_zero(cases: Cases, tmp_path: Path) -> None:
    case = copied(cases(PLAIN), tmp_path)
    weights = WeightFile(case)
    weights.put(weights.offset("zeros_64"), [0, 1e-7])
    weights.save()
    assert "the constant 'zeros_64' is a bias, expected zeros alone" in only(case)


def test_a_weight_that_decode_has_for_itself_is_found(cases: Cases, tmp_path: Path) -> None:
    case = copied(cases(PLAIN), tmp_path)
    weights = WeightFile(case)
    head = weights.program.op("lm_head_weight")
    head.attributes["val"].blobFileValue.offset = weights.append(weights.offset("lm_head_weight"))
    weights.program.save()
    weights.save()
    grown = replace(case.expected, weight_bytes=len(weights.data))
    finding = only(replace(case, expected=grown))
    assert re.search("decode: 2 constants are not shared with prefill, .*'lm_head_weight'", finding)


def test_a_rotary_table_taken_for_the_other_is_found(cases: Cases, tmp_path: Path) -> None:
    def edit(program: Program) -> None:
        program.bind(program.op("rope_sin_rows"), "x", "rope_cos")

    findings = check(doctored(cases(PLAIN), tmp_path, edit)).findings
    assert any("rows of 1 rotary tables, expected cosines" in f for f in findings), findings


def test_an_adapter_that_has_a_base_weight_for_itself_is_found(
    cases: Cases, tmp_path: Path
) -> None:
    case = copied(cases(ADAPTERS), tmp_path)
    weights = WeightFile(case)
    copy = weights.append(weights.offset("lm_head_weight"))
    for name in ("prefill_plan", "decode_plan"):
        program = Program(case.path, name)
        program.op("lm_head_weight").attributes["val"].blobFileValue.offset = copy
        program.save()
    weights.save()
    grown = replace(case.expected, weight_bytes=len(weights.data))
    finding = only(replace(case, expected=grown))
    assert finding.startswith("prefill_plan: 1 constants are not shared with prefill")


def test_a_constant_that_nothing_uses_is_found(cases: Cases, tmp_path: Path) -> None:
    case = copied(cases(PLAIN), tmp_path)
    weights = WeightFile(case)
    new = weights.append(weights.offset("rope_sin"))
    weights.save()
    grown = replace(case.expected, weight_bytes=len(weights.data))
    finding = only(replace(case, expected=grown))
    assert f"1 constants that no function uses, the first at byte {new}" in finding


def test_a_weight_file_counts_its_constants(cases: Cases, tmp_path: Path) -> None:
    case = copied(cases(PLAIN), tmp_path)
    weights = WeightFile(case)
    count = HEADER.unpack_from(weights.data)[0]
    struct.pack_into("<I", weights.data, 0, count - 1)
    weights.save()
    assert f"its {count - 1} constants end at byte" in only(case)


@pytest.mark.parametrize(
    ("field", "value", "pattern"),
    [
        (1, CODES["uint8"], "of uint8 in the weight file, expected 1024 of float16"),
        (0, MARK + 1, "'rope_cos': .*no whole constant at byte"),
    ],
)
def test_a_record_is_what_the_program_says(
    cases: Cases, tmp_path: Path, field: int, value: int, pattern: str
) -> None:
    case = copied(cases(PLAIN), tmp_path)
    weights = WeightFile(case)
    offset = weights.offset("rope_cos")
    record = list(RECORD.unpack_from(weights.data, offset))
    record[field] = value
    RECORD.pack_into(weights.data, offset, *record)
    weights.save()
    findings = check(case).findings
    assert any(re.search(pattern, line) for line in findings), findings


def test_constants_lie_in_the_weight_file_of_the_package(cases: Cases, tmp_path: Path) -> None:
    def edit(program: Program) -> None:
        for function in program.model.mlProgram.functions.values():
            for op in function.block_specializations["CoreML8"].operations:
                if op.attributes["val"].WhichOneof("value") == "blobFileValue":
                    op.attributes["val"].blobFileValue.fileName = "@model_path/weights/other.bin"

    case = doctored(cases(PLAIN), tmp_path, edit)
    (case.path / WEIGHT_FILE).rename(case.path / WEIGHT_FILE.replace("weight.bin", "other.bin"))
    findings = check(case).findings
    assert all("expected @model_path/weights/weight.bin" in line for line in findings[:-1])
    assert findings
