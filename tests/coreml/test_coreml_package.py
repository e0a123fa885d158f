"""A package has the same bytes every time, opens with coremltools, and says what everything is."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_cases import (
    ADAPTERS,
    MINI,
    PHI3,
    AnyFeature,
    Export,
    checkpoint_of,
    make_plan,
    settings,
    write_bundle,
)

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.blobs import BlobFile
from mlx_medphi.coreml.build import write_package
from mlx_medphi.coreml.export import export
from mlx_medphi.coreml.library import coremltools
from mlx_medphi.coreml.package import (
    MODEL_FILE,
    SPEC_VERSION,
    WEIGHT_FILE,
    PackageText,
    describe,
    write_program,
)
from mlx_medphi.coreml.package_file import open_package
from mlx_medphi.coreml.program import build_program

MANIFEST = "Manifest.json"
FILES = {MODEL_FILE, WEIGHT_FILE, MANIFEST}


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder and the hash of its bytes."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


# --- the same bytes -------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "slots": {"bits": 4, "group_size": 32, "adapters": "slots"},
    "functions": {"adapters": "functions"},
}


@pytest.mark.parametrize("form", FORMS)
def test_two_exports_give_the_same_bytes_of_every_file(form: str, tmp_path: Path) -> None:
    found = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        bundle = tmp_path / place / "notes.medphi"
        write_bundle(MINI, bundle, settings(**FORMS[form]), ADAPTERS)
        found.append(digests(bundle))
        # Another program between them takes names and numbers of coremltools'.
        build_program(make_plan(checkpoint_of("gqa"), settings()))
    assert found[0] == found[1]
    assert {f"model/Phi3.mlpackage/{name}" for name in FILES} < found[0].keys()


SCRIPT = """
import sys
from pathlib import Path
from mlx_medphi.blas import load_blas
load_blas()
from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.export import export
base, out, lora, rslora = map(Path, sys.argv[1:])
config = ExportConfig(bits=4, group_size=32, context=64, prefill=16, adapters="slots")
export(base, out, adapters={"lora": lora, "rslora": rslora}, config=config, level="graph")
"""


# Two fresh processes import all libraries again, and each export is verified in full.
@pytest.mark.slow
def test_a_fresh_process_gives_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        bundle = tmp_path / seed / "notes.medphi"
        arguments = [str(MINI), str(bundle), *map(str, ADAPTERS.values())]
        # The order of sets and the place of objects differ from process to process.
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"}
        subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments], check=True, env=env, cwd=tmp_path
        )
        found.append(digests(bundle))
    own = tmp_path / "own" / "notes.medphi"
    own.parent.mkdir()
    config = ExportConfig(bits=4, group_size=32, context=64, prefill=16, adapters="slots")
    export(MINI, own, adapters=ADAPTERS, config=config, level="graph")
    assert found[0] == found[1] == digests(own)


def test_ids_of_the_manifest_come_from_the_contents(tmp_path: Path) -> None:
    plan = make_plan(checkpoint_of("gqa"), settings())
    seen = []
    for text in ("one", "one", "two"):
        package = tmp_path / str(len(seen)) / "Phi3.mlpackage"
        model = describe(build_program(plan), plan.blobs, PackageText(text), AnyFeature())
        write_program(model, package)
        seen.append(json.loads((package / MANIFEST).read_text()))
    assert seen[0] == seen[1]
    assert not seen[0]["itemInfoEntries"].keys() & seen[2]["itemInfoEntries"].keys()


def test_the_manifest_names_both_items(exported: Export) -> None:
    package = exported("gqa").package
    manifest = json.loads((package / MANIFEST).read_text())
    entries = manifest["itemInfoEntries"]
    root = entries.pop(manifest["rootModelIdentifier"])
    (weights,) = entries.values()
    assert root["path"] == "com.apple.CoreML/model.mlmodel"
    assert weights["path"] == "com.apple.CoreML/weights"
    assert {f"Data/{root['path']}", f"Data/{weights['path']}/weight.bin", MANIFEST} == FILES
    assert set(digests(package)) == FILES


# --- other readers --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["slots", "functions"])
def test_coremltools_opens_the_package(form: str, adapted: Export) -> None:
    ct = coremltools()
    package = adapted(form)
    model = ct.models.MLModel(str(package.package), skip_model_load=True)
    spec = model.get_spec()
    assert spec.specificationVersion == SPEC_VERSION == 9
    assert spec.description.defaultFunctionName == "decode"
    names = {function.name for function in spec.description.functions}
    assert names == set(open_package(package.package).functions)
    assert model.short_description.startswith("Phi-3 (mini-4k), 16 bits")


@pytest.mark.parametrize("bits", [4, 16])
def test_coremltools_reads_the_program_with_our_weights(bits: int, tmp_path: Path) -> None:
    checkpoint = checkpoint_of("partial-rotary-tied")
    scheme = "channel" if bits == 4 else "block"
    plan = make_plan(checkpoint, settings(bits=bits, scheme=scheme))
    path = tmp_path / "Phi3.mlpackage"
    write_package(plan, PackageText("x"), path)
    model = coremltools("proto.Model_pb2").Model()
    model.ParseFromString((path / MODEL_FILE).read_bytes())
    load = coremltools("converters.mil.frontend.milproto.load").load
    program = load(model, SPEC_VERSION, str((path / WEIGHT_FILE).parent))
    built = build_program(plan)
    blobs = BlobFile(path / WEIGHT_FILE)
    assert program.functions.keys() == built.functions.keys()
    for name, function in program.functions.items():
        found = Counter(op.op_type for op in function.operations)
        wanted = Counter(op.op_type for op in built.functions[name].operations)
        assert found - Counter(const=found["const"]) == wanted - Counter(const=wanted["const"])
        values = {}
        for op in function.operations:
            name_of = op.outputs[0].name
            if op.op_type == "const":
                values[name_of] = op.val.val
            elif op.op_type == "constexpr_blockwise_shift_scale":
                values |= {f"{name_of}_{k}": v.val for k, v in op.inputs.items() if v is not None}
        for part in plan.parts:
            ours = blobs.array(plan.blobs.offsets[part.id], part.shape)
            np.testing.assert_array_equal(values[part.id.replace(".", "_")], ours)


def test_coremltools_reads_the_weight_file(adapted: Export) -> None:
    reader = coremltools("libmilstoragepython")._BlobStorageReader
    package = adapted("functions")
    opened = open_package(package.package)
    stored = reader(str(package.package / WEIGHT_FILE))
    count = 0
    for offset, shape in set(places(opened)):
        ours = opened.blobs.array(offset, shape)
        theirs = np.asarray(stored.read_fp16_data(offset)).view(np.float16)
        np.testing.assert_array_equal(theirs, ours.reshape(-1))
        count += 1
    assert count == opened.blobs.count


def places(package: Any) -> Iterator[tuple[int, tuple[int, ...]]]:
    for function in package.program.functions.values():
        for op in function.block_specializations[function.opset].operations:
            if op.type == "const" and op.attributes["val"].WhichOneof("value") == "blobFileValue":
                shape = op.attributes["val"].type.tensorType.dimensions
                yield (
                    op.attributes["val"].blobFileValue.offset,
                    tuple(extent.constant.size for extent in shape),
                )


# --- what it says about itself --------------------------------------------------------------------


def features(function: Any) -> list[Any]:
    return [*function.input, *function.output, *function.state]


@pytest.mark.parametrize(
    ("form", "changes"),
    [("slots", {}), ("slots", {"slot_kind": "input"}), ("functions", {})],
    ids=["state", "input", "functions"],
)
def test_every_input_output_and_state_is_described(
    form: str, changes: dict[str, Any], adapted: Export
) -> None:
    model = coremltools("proto.Model_pb2").Model()
    model.ParseFromString((adapted(form, **changes).package / MODEL_FILE).read_bytes())
    assert len(model.description.functions) == (6 if form == "functions" else 2)
    for function in model.description.functions:
        assert len(features(function)) == (15 if form == "slots" else 7)
        for feature in features(function):
            assert len(feature.shortDescription) > 20 and feature.shortDescription.endswith(".")


@pytest.mark.parametrize(
    ("name", "feature", "words"),
    [
        ("sliding-window", "causalMask", "the 20 last keys"),
        ("longrope-long", "ropeRow", "plus 64 once the sequence is longer than 32 tokens"),
        ("gqa", "position", "must not exceed 64"),
    ],
)
def test_descriptions_have_the_numbers_of_the_model(
    name: str, feature: str, words: str, exported: Export
) -> None:
    model = coremltools("proto.Model_pb2").Model()
    model.ParseFromString((exported(name).package / MODEL_FILE).read_bytes())
    for function in model.description.functions:
        (found,) = [f for f in features(function) if f.name == feature]
        assert words in found.shortDescription


def test_author_licence_version_and_facts_are_read_back(tmp_path: Path) -> None:
    plan = make_plan(checkpoint_of("gqa"), settings())
    text = PackageText("A note.", "Someone", "mit", "1.2", {"z.key": "1", "a.key": "2"})
    path = tmp_path / "Phi3.mlpackage"
    write_package(plan, text, path)
    metadata = dict(open_package(path).metadata)
    assert metadata.pop("com.github.apple.coremltools.version")
    assert metadata == {
        "description": "A note.", "author": "Someone", "license": "mit", "version": "1.2",
        "a.key": "2", "z.key": "1",
    }  # fmt: skip


def test_progress_is_told_for_the_graph_and_for_every_byte(tmp_path: Path) -> None:
    plan = make_plan(checkpoint_of("gqa"), settings())
    steps: list[tuple[str, int, int]] = []
    path = tmp_path / "Phi3.mlpackage"
    write_package(plan, PackageText("x"), path, lambda *step: steps.append(step))
    graph = [step for step in steps if step[0] == "graph"]
    assert graph == [("graph", i + 1, 4) for i in range(4)] == steps[:4]
    weights = [done for stage, done, total in steps[4:]]
    assert weights == sorted(weights) and weights[-1] == plan.blobs.nbytes
    assert {(stage, total) for stage, _, total in steps[4:]} == {("weights", plan.blobs.nbytes)}
    assert weights[-1] == (path / WEIGHT_FILE).stat().st_size


@pytest.mark.parametrize("name", ["longrope-long", "sliding-window"])
def test_a_bundle_holds_the_package_its_parts_make_and_says_how_it_is_run(
    name: str, exported: Export, tmp_path: Path
) -> None:
    bundle, alone = write_bundle(PHI3 / name, tmp_path / "notes.medphi", settings()), exported(name)
    assert bundle.shape == alone.shape
    assert (bundle.shape.switch, bundle.shape.window) in ((32, None), (None, 20))
    model, other = (coremltools("proto.Model_pb2").Model() for _ in range(2))
    model.ParseFromString((bundle.package / MODEL_FILE).read_bytes())
    other.ParseFromString((alone.package / MODEL_FILE).read_bytes())
    assert model.mlProgram == other.mlProgram
    weights = (bundle.package / WEIGHT_FILE).read_bytes()
    assert weights == (alone.package / WEIGHT_FILE).read_bytes()
