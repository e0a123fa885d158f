"""A package is read strictly: what is absent, damaged, new or contradictory is named in a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mil_programs import builder, change, function, model_file, operations, save

from mlx_medphi.coreml.package_file import Signature, TensorType, open_package
from mlx_medphi.errors import BundleError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two functions with a state, and a constant in the weight file."""
    mb = builder()

    def body(x: Any, memory: Any) -> dict[str, Any]:
        weight = mb.const(val=np.arange(64, dtype=np.float16).reshape(4, 16))
        total = mb.add(x=mb.read_state(input=memory), y=mb.linear(x=x, weight=weight))
        return {"y": mb.coreml_update_state(state=memory, value=total), "same": x}

    states = {"memory": ("float16", (2, 4))}
    return save(
        tmp_path_factory.mktemp("package") / "two.mlpackage",
        step=function(body, {"x": ("float16", (2, 16))}, states),
        other=function(body, {"x": ("float16", (2, 16))}, states),
    )


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "two.mlpackage"))


def refused(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        open_package(path)
    message = str(caught.value)
    assert "\n" not in message and "two.mlpackage" in message
    return message


def test_a_package_tells_its_functions(copied: Path) -> None:
    def edit(model: Any) -> None:
        model.description.metadata.author = "A. Author"
        model.description.metadata.userDefined["zone"] = "1"

    package = open_package(change(copied, edit))
    expected = Signature(
        inputs={"x": TensorType("float16", (2, 16))},
        outputs={"y": TensorType("float16", (2, 4)), "same": TensorType("float16", (2, 16))},
        states={"memory": TensorType("float16", (2, 4))},
    )
    assert package.functions == {"other": expected, "step": expected}
    assert list(package.functions) == ["other", "step"]
    assert package.default_function == "step"
    assert package.spec_version == 9
    assert package.metadata["author"] == "A. Author" and package.metadata["zone"] == "1"
    assert "license" not in package.metadata
    assert package.blobs is not None
    assert package.blobs.path == copied / "Data/com.apple.CoreML/weights/weight.bin"
    assert str(expected.inputs["x"]) == "float16 [2, 16]"


def test_a_package_with_one_unnamed_function(tmp_path: Path) -> None:
    made = function(lambda x: {"y": builder().add(x=x, y=x)}, {"x": ("int32", (3,))})
    package = open_package(save(tmp_path / "one.mlpackage", main=made))
    assert package.default_function == "main"
    assert package.functions["main"] == Signature(
        {"x": TensorType("int32", (3,))}, {"y": TensorType("int32", (3,))}, {}
    )
    assert package.blobs is None


def test_absent_files_are_named(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"absent\.mlpackage/Manifest\.json: cannot be read"):
        open_package(tmp_path / "absent.mlpackage")
    (copied / "Data/com.apple.CoreML/weights/weight.bin").unlink()
    assert "weights/weight.bin: this file of the package is missing" in refused(copied)
    model_file(copied).unlink()
    assert "model.mlmodel: this file of the package is missing" in refused(copied)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a": 1}'])
def test_a_manifest_that_is_none_is_refused(copied: Path, content: bytes) -> None:
    (copied / "Manifest.json").write_bytes(content)
    assert "Manifest.json" in refused(copied)


def manifest(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((path / "Manifest.json").read_text())
    edit(content)
    (path / "Manifest.json").write_text(json.dumps(content))


def test_a_manifest_without_a_root_is_refused(copied: Path) -> None:
    manifest(copied, lambda content: content.update(rootModelIdentifier="other"))
    assert "names no root model" in refused(copied)
    manifest(copied, lambda content: content.pop("itemInfoEntries"))
    assert "names no root model" in refused(copied)
    manifest(copied, lambda content: content.update(fileFormatVersion="2.0.0"))
    assert "not a manifest of version 1.0.0" in refused(copied)


@pytest.mark.parametrize(
    "place", ["../model.mlmodel", "/etc/hostname", "a/../../b", "a\\b", "", "a\0b", None, 3]
)
def test_paths_out_of_the_package_are_refused(copied: Path, place: object) -> None:
    def edit(content: dict[str, Any]) -> None:
        for entry in content["itemInfoEntries"].values():
            entry["path"] = place

    (copied / "model.mlmodel").write_bytes(model_file(copied).read_bytes())
    manifest(copied, edit)
    assert f"an item has the path {place!r}" in refused(copied)


@pytest.mark.parametrize("name", ["model.mlmodel", "weights/weight.bin"])
def test_links_out_of_the_package_are_refused(copied: Path, tmp_path: Path, name: str) -> None:
    inside = model_file(copied).parent / name
    inside.rename(tmp_path / "elsewhere")
    inside.symlink_to(tmp_path / "elsewhere")
    assert f"{name}: a link out of the package" in refused(copied)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "@model_path/weights/../../../x",
        "@model_path/weights/..",
        "@model_path/weights/",
        "@model_path/weights/a/b",
        "@model_path/weight.bin",
        "weight.bin",
    ],
)
def test_weights_elsewhere_are_refused(copied: Path, name: str) -> None:
    def edit(model: Any) -> None:
        for function_name in ("step", "other"):
            for op in operations(model, function_name):
                for value in op.attributes.values():
                    if value.WhichOneof("value") == "blobFileValue":
                        value.blobFileValue.fileName = name

    assert f"weights at {name!r}" in refused(change(copied, edit))


def test_two_weight_files_are_refused(copied: Path) -> None:
    def edit(model: Any) -> None:
        for op in operations(model, "step"):
            for value in op.attributes.values():
                if value.WhichOneof("value") == "blobFileValue":
                    value.blobFileValue.fileName = "@model_path/weights/two.bin"

    assert "more than one weight file" in refused(change(copied, edit))


def test_a_truncated_model_is_refused(copied: Path) -> None:
    whole = model_file(copied).read_bytes()
    for keep in (len(whole) - 1, len(whole) // 2, 100, 1, 0):
        model_file(copied).write_bytes(whole[:keep])
        refused(copied)


def newer(model: Any) -> None:
    model.specificationVersion = 10


def no_version(model: Any) -> None:
    model.specificationVersion = 0


def a_network(model: Any) -> None:
    model.neuralNetwork.SetInParent()


def no_functions(model: Any) -> None:
    model.mlProgram.functions.clear()


def one_function_less(model: Any) -> None:
    del model.mlProgram.functions["other"]


def other_default(model: Any) -> None:
    model.description.defaultFunctionName = "third"


def other_opset(model: Any) -> None:
    model.mlProgram.functions["step"].opset = "CoreML1"


def other_input_shape(model: Any) -> None:
    model.mlProgram.functions["step"].inputs[0].type.tensorType.dimensions[0].constant.size = 3


def other_input_dtype(model: Any) -> None:
    model.description.functions[0].input[0].type.multiArrayType.dataType = 65568


def other_state(model: Any) -> None:
    model.description.functions[0].state[0].name = "notes"


def other_output(model: Any) -> None:
    step = model.mlProgram.functions["step"]
    step.block_specializations[step.opset].outputs[0] = "nothing"


def flexible(model: Any) -> None:
    tensor = model.mlProgram.functions["step"].inputs[0].type.tensorType
    tensor.dimensions[0].unknown.variadic = False


def an_image(model: Any) -> None:
    model.description.functions[0].input[0].type.imageType.SetInParent()


def a_list(model: Any) -> None:
    model.mlProgram.functions["step"].inputs[0].type.listType.SetInParent()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (newer, "specification version 10, known here are 1 to 9"),
        (no_version, "specification version 0, known here are 1 to 9"),
        (a_network, "a neuralNetwork, not an ML program"),
        (no_functions, "the program has no functions"),
        (one_function_less, "names the functions other, step, the program step"),
        (other_default, "there is no default function 'third'"),
        (other_opset, "function 'step': has no operations of its opset 'CoreML1'"),
        (
            other_input_shape,
            "function 'step': input 'x' is float16 [2, 16] in the description and "
            "float16 [3, 16] in the program",
        ),
        (other_input_dtype, "input 'x' is float32 [2, 16] in the description"),
        (other_state, "state 'memory' is absent in the description"),
        (other_output, "nothing makes its output nothing"),
        (flexible, "value 'x' has no fixed shape"),
        (an_image, "'x' is a imageType, expected an array"),
        (a_list, "value 'x' is a listType, expected a tensor"),
    ],
)
def test_a_model_that_contradicts_itself_is_refused(
    copied: Path, edit: Callable[[Any], None], message: str
) -> None:
    assert message in refused(change(copied, edit))
