"""Read a saved `.mlpackage`: its manifest, its program, and where its weight file lies.

Only the package's own files are read, and no path in them is followed out of the package. What the
model description says about a function and what the program says must agree.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlx_medphi.coreml.blobs import BlobFile
from mlx_medphi.coreml.library import coremltools
from mlx_medphi.errors import BundleError, capped

__all__ = ["Package", "Signature", "TensorType", "open_package", "program_type"]

MANIFEST_VERSION = "1.0.0"
MAX_MANIFEST_BYTES = 1_000_000
KNOWN_SPEC = 9  # iOS 18, macOS 15
WEIGHTS_PREFIX = "@model_path/weights/"
# Where a model without named functions has its only one.
MAIN = "main"
AGAIN = "export the model again"


@dataclass(frozen=True)
class TensorType:
    """The type of one value.

    Attributes:
        dtype: "float16", "float32", "int32", "bool", "uint4", "string", … as the program says.
        shape: extents; empty for a single number.
    """

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Signature:
    """What one function takes and gives, by name, in the order of the description."""

    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    states: Mapping[str, TensorType]


@dataclass(frozen=True)
class Package:
    """An opened package.

    Attributes:
        path: the `.mlpackage`.
        spec_version: of the model file.
        functions: name -> signature, sorted by name.
        default_function: the one that runs when none is named.
        program: the ML program as protobuf (`MIL.proto`, message Program).
        blobs: the weight file; None where the program names none.
        metadata: author, license, description and version where they are set, and every
            user-defined entry.
    """

    path: Path
    spec_version: int
    functions: Mapping[str, Signature]
    default_function: str
    program: Any
    blobs: BlobFile | None
    metadata: Mapping[str, str]


def open_package(path: Path) -> Package:
    """Read a package and check that it is whole; weights stay on disk.

    Raises:
        BundleError: a file is missing or damaged, the model is no ML program, it is newer than what
            is known here, or its description contradicts its program.
    """
    model_path = _model_path(path)
    model = _parse(model_path)
    version = int(model.specificationVersion)
    if not 1 <= version <= KNOWN_SPEC:
        raise BundleError(
            f"{model_path}: specification version {version}, known here are 1 to {KNOWN_SPEC} "
            "(iOS 18, macOS 15); a newer mlx_medphi may read it"
        )
    if model.WhichOneof("Type") != "mlProgram":
        raise BundleError(f"{model_path}: a {model.WhichOneof('Type')}, not an ML program; {AGAIN}")
    if not model.mlProgram.functions:
        raise BundleError(f"{model_path}: the program has no functions; {AGAIN}")
    functions, default = _functions(model, model_path)
    return Package(
        path=path,
        spec_version=version,
        functions=functions,
        default_function=default,
        program=model.mlProgram,
        blobs=_weight_file(model.mlProgram, model_path),
        metadata=_metadata(model.description.metadata),
    )


def program_type(value_type: Any, name: str) -> TensorType:
    """The type of a tensor, or of what a state holds, in the program's own words.

    Raises:
        BundleError: another kind of value, or an extent that is not fixed.
    """
    if value_type.WhichOneof("type") == "stateType":
        value_type = value_type.stateType.wrappedType
    if value_type.WhichOneof("type") != "tensorType":
        kind = value_type.WhichOneof("type")
        raise BundleError(f"value {name!r} is a {kind}, expected a tensor; {AGAIN}")
    tensor = value_type.tensorType
    if any(extent.WhichOneof("dimension") != "constant" for extent in tensor.dimensions):
        raise BundleError(f"value {name!r} has no fixed shape; {AGAIN} with fixed shapes")
    dtype = coremltools("proto.MIL_pb2").DataType.Name(tensor.dataType).lower()
    return TensorType(dtype, tuple(int(extent.constant.size) for extent in tensor.dimensions))


def _model_path(path: Path) -> Path:
    """The model file that the manifest names."""
    manifest = path / "Manifest.json"
    try:
        with manifest.open("rb") as handle:
            content = json.loads(handle.read(MAX_MANIFEST_BYTES))
    except (OSError, ValueError, RecursionError) as exc:
        raise BundleError(f"{manifest}: cannot be read ({exc}); {AGAIN}") from exc
    if not isinstance(content, dict) or content.get("fileFormatVersion") != MANIFEST_VERSION:
        raise BundleError(f"{manifest}: not a manifest of version {MANIFEST_VERSION}; {AGAIN}")
    entries, root = content.get("itemInfoEntries"), content.get("rootModelIdentifier")
    if not isinstance(entries, dict) or not isinstance(root, str) or root not in entries:
        raise BundleError(f"{manifest}: names no root model among its items; {AGAIN}")
    for entry in entries.values():
        place = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(place, str) or not _is_inside(place):
            raise BundleError(f"{manifest}: an item has the path {place!r}; {AGAIN}")
    return _file_inside(path, path / "Data" / entries[root]["path"])


def _is_inside(place: str) -> bool:
    parts = PurePosixPath(place).parts
    return bool(parts) and "\\" not in place and "\0" not in place and parts[0] != "/" and (
        ".." not in parts
    )  # fmt: skip


def _file_inside(package: Path, path: Path) -> Path:
    """`path`, if it is a file of the package and no link leads out of it."""
    if not path.is_file():
        raise BundleError(f"{path}: this file of the package is missing; {AGAIN}")
    if not path.resolve().is_relative_to(package.resolve()):
        raise BundleError(f"{path}: a link out of the package; {AGAIN}")
    return path


def _parse(path: Path) -> Any:
    # protobuf comes with coremltools and is imported when that is.
    decode_error = importlib.import_module("google.protobuf.message").DecodeError
    model = coremltools("proto.Model_pb2").Model()
    try:
        model.ParseFromString(path.read_bytes())
    except (OSError, decode_error) as exc:
        raise BundleError(f"{path}: cannot be read as a Core ML model ({exc}); {AGAIN}") from exc
    return model


def _functions(model: Any, path: Path) -> tuple[dict[str, Signature], str]:
    """Signatures of all functions, and the name of the default one."""
    description = model.description
    described = {item.name: item for item in description.functions} or {MAIN: description}
    in_program = dict(model.mlProgram.functions)
    if described.keys() != in_program.keys():
        raise BundleError(
            f"{path}: the description names the functions {capped(described)}, the program "
            f"{capped(in_program)}; {AGAIN}"
        )
    default = description.defaultFunctionName or next(iter(described))
    if default not in described:
        raise BundleError(f"{path}: there is no default function {default!r}; {AGAIN}")
    signatures = {}
    for name in sorted(described):
        try:
            signatures[name] = _signature(described[name], in_program[name])
        except BundleError as exc:
            raise BundleError(f"{path}: function {name!r}: {exc}") from exc
    return signatures, default


def _signature(described: Any, function: Any) -> Signature:
    states = [item for item in function.inputs if item.type.WhichOneof("type") == "stateType"]
    inputs = [item for item in function.inputs if item.type.WhichOneof("type") != "stateType"]
    if function.opset not in function.block_specializations:
        raise BundleError(f"has no operations of its opset {function.opset!r}; {AGAIN}")
    block = function.block_specializations[function.opset]
    made = {item.name: item for op in block.operations for item in op.outputs}
    made |= {item.name: item for item in inputs}
    absent = [name for name in block.outputs if name not in made]
    if absent:
        raise BundleError(f"nothing makes its output {capped(absent)}; {AGAIN}")
    outputs = [made[name] for name in block.outputs]
    return Signature(
        inputs=_agreed("input", described.input, inputs, _array_type),
        outputs=_agreed("output", described.output, outputs, _array_type),
        states=_agreed("state", described.state, states, _state_type),
    )


def _agreed(
    kind: str,
    described: Iterable[Any],
    in_program: Iterable[Any],
    read: Callable[[Any], TensorType],
) -> dict[str, TensorType]:
    """The types of a function's inputs, outputs or states, the same in both places."""
    found = {item.name: read(item) for item in described}
    program = {item.name: program_type(item.type, item.name) for item in in_program}
    if found == program:
        return found
    odd = sorted(name for name in found | program if found.get(name) != program.get(name))
    raise BundleError(
        f"{kind} {odd[0]!r} is {found.get(odd[0], 'absent')} in the description and "
        f"{program.get(odd[0], 'absent')} in the program; {AGAIN}"
    )


def _array_type(feature: Any) -> TensorType:
    if feature.type.WhichOneof("Type") != "multiArrayType":
        kind = feature.type.WhichOneof("Type")
        raise BundleError(f"{feature.name!r} is a {kind}, expected an array; {AGAIN}")
    return _described_type(feature.type.multiArrayType)


def _state_type(feature: Any) -> TensorType:
    return _described_type(feature.type.stateType.arrayType)


def _described_type(array: Any) -> TensorType:
    number = coremltools("proto.FeatureTypes_pb2").ArrayFeatureType.ArrayDataType.Name
    return TensorType(number(array.dataType).lower(), tuple(int(n) for n in array.shape))


def _weight_file(program: Any, model_path: Path) -> BlobFile | None:
    """The one weight file that the program's constants lie in."""
    names = sorted(set(_blob_names(program)))
    if not names:
        return None
    if len(names) > 1:
        raise BundleError(f"{model_path}: more than one weight file: {capped(names)}; {AGAIN}")
    name = names[0].removeprefix(WEIGHTS_PREFIX)
    if name == names[0] or not _is_inside(name) or PurePosixPath(name).name != name:
        raise BundleError(
            f"{model_path}: weights at {names[0]!r}, expected {WEIGHTS_PREFIX}NAME; {AGAIN}"
        )
    # The package is three folders above: NAME.mlpackage/Data/com.apple.CoreML/model.mlmodel.
    return BlobFile(_file_inside(model_path.parent, model_path.parent / "weights" / name))


def _blob_names(program: Any) -> Iterator[str]:
    for function in program.functions.values():
        for block in function.block_specializations.values():
            for op in block.operations:
                values = list(op.attributes.values())
                values += [
                    binding.value
                    for argument in op.inputs.values()
                    for binding in argument.arguments
                    if binding.WhichOneof("binding") == "value"
                ]
                for value in values:
                    if value.WhichOneof("value") == "blobFileValue":
                        yield value.blobFileValue.fileName


def _metadata(stored: Any) -> dict[str, str]:
    fields = {
        "author": stored.author,
        "license": stored.license,
        "description": stored.shortDescription,
        "version": stored.versionString,
    }
    return {**{k: v for k, v in fields.items() if v}, **dict(sorted(stored.userDefined.items()))}
