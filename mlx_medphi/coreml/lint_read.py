"""The protobuf of a function as a `View`, nothing of it trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_medphi.coreml.library import coremltools
from mlx_medphi.coreml.lint_view import Constant, Op, View
from mlx_medphi.coreml.package_file import TensorType

__all__ = ["view_function"]

ARRAYS = {"floats": np.float32, "ints": np.int32, "bools": np.bool_}
# Numbers that MIL keeps as bytes.
PACKED = {"float16": np.float16, "int8": np.int8, "uint8": np.uint8}


def view_function(name: str, function: Any) -> View:
    """Index a function; what is not understood becomes None and is a finding of the lints."""
    block = function.block_specializations[function.opset]
    states: dict[str, TensorType | None] = {}
    inputs: dict[str, TensorType | None] = {}
    for item in function.inputs:
        kind = states if item.type.WhichOneof("type") == "stateType" else inputs
        kind[item.name] = _type(item.type)
    return View(
        name=name,
        inputs=inputs,
        states=states,
        ops=tuple(_op(index, op) for index, op in enumerate(block.operations)),
        outputs=tuple(block.outputs),
        opset=function.opset,
        bodies=tuple(sorted(function.block_specializations)),
    )


def _op(index: int, op: Any) -> Op:
    outputs = [(item.name, _type(item.type)) for item in op.outputs]
    attributes = op.attributes
    # Asking a protobuf map for what it has not puts it there.
    stored = [attributes[key] if key in attributes else None for key in ("name", "val")]
    named = stored[0].immediateValue.tensor.strings.values if stored[0] is not None else ()
    return Op(
        index=index,
        type=op.type,
        name=outputs[0][0] if outputs else "".join(named),
        inputs={key: tuple(_bindings(value.arguments)) for key, value in op.inputs.items()},
        outputs=dict(outputs),
        names=tuple(name for name, _ in outputs),
        value=_constant(stored[1]) if stored[1] is not None else None,
        nested=len(op.blocks) > 0,
    )


def _bindings(arguments: Iterable[Any]) -> Iterator[str | Constant]:
    for binding in arguments:
        yield binding.name if binding.WhichOneof("binding") == "name" else _constant(binding.value)


def _constant(value: Any) -> Constant:
    declared = _type(value.type)
    if value.WhichOneof("value") == "blobFileValue":
        return Constant(declared, int(value.blobFileValue.offset), value.blobFileValue.fileName)
    return Constant(declared, values=_values(value.immediateValue.tensor, declared))


def _values(tensor: Any, declared: TensorType | None) -> npt.NDArray[Any] | str | None:
    kind = tensor.WhichOneof("value")
    if kind == "strings" and len(tensor.strings.values) == 1:
        return str(tensor.strings.values[0])
    if declared is None:
        return None
    if kind in ARRAYS:
        flat: npt.NDArray[Any] = np.array(getattr(tensor, kind).values, ARRAYS[kind])
    elif kind == "bytes" and declared.dtype in PACKED:
        data, size = tensor.bytes.values, np.dtype(PACKED[declared.dtype]).itemsize
        flat = np.frombuffer(data[: len(data) // size * size], PACKED[declared.dtype])
    else:
        return None
    fits = flat.dtype.name == declared.dtype and flat.size == math.prod(declared.shape)
    return flat.reshape(declared.shape) if fits else None


def _type(value_type: Any) -> TensorType | None:
    if value_type.WhichOneof("type") == "stateType":
        value_type = value_type.stateType.wrappedType
    if value_type.WhichOneof("type") != "tensorType":
        return None
    tensor = value_type.tensorType
    shape = tuple(int(extent.constant.size) for extent in tensor.dimensions)
    # An extent that is not fixed reads as 0, and no tensor of a program has that.
    if tensor.rank != len(shape) or not all(shape):
        return None
    return TensorType(_names().get(tensor.dataType, "unknown"), shape)


@lru_cache(maxsize=1)
def _names() -> Mapping[int, str]:
    """MIL's numbers of types -> our names."""
    items = coremltools("proto.MIL_pb2").DataType.items()
    return {number: name.lower() for name, number in items}
