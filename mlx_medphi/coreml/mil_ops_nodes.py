"""A saved function as a list of steps, each with its arguments found and its lifetime known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_medphi.coreml.blobs import BlobFile
from mlx_medphi.coreml.mil_ops import CONSTANTS, OPERATIONS, STATES, VARIADIC, check_arguments
from mlx_medphi.coreml.mil_ops_half import Array
from mlx_medphi.coreml.mil_ops_weights import (
    Constant,
    FloatCache,
    Quantised,
    Stored,
    numpy_dtype,
)
from mlx_medphi.coreml.package_file import TensorType, program_type
from mlx_medphi.errors import BundleError

__all__ = ["Argument", "Routine", "Step", "Value", "read_routine", "unknown_operations"]

Value = Array | Constant | str
AGAIN = "export the model again"
# Where a plain tensor keeps its numbers, by kind, and what they are.
FIELDS = {
    "floats": np.float32, "ints": np.int32, "bools": np.bool_, "doubles": np.float64,
    "longInts": np.int64,
}  # fmt: skip


@dataclass(frozen=True)
class Argument:
    """What one argument of a step is: names of earlier values, or values of its own.

    Attributes:
        items: each a name, or a value that is written in place.
        is_list: whether the operation takes a list.
    """

    items: tuple[str | tuple[Value], ...]
    is_list: bool

    def names(self) -> Iterator[str]:
        """The earlier values it needs."""
        return (item for item in self.items if isinstance(item, str))


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        op_type: as in the program.
        name: of its first output; of what it writes to, where it has none.
        arguments: by the name of the parameter; a state is an argument like any other.
        outputs: names and types.
        frees: values that no later step needs.
        overwrites: the state that is written with this step's output before anything else reads or
            writes it, so that the step may work in the state's own array.
    """

    op_type: str
    name: str
    arguments: Mapping[str, Argument]
    outputs: tuple[tuple[str, TensorType], ...]
    frees: tuple[str, ...] = ()
    overwrites: str | None = None


@dataclass(frozen=True)
class Routine:
    """One function, ready to run: its constants by name, its steps in order."""

    constants: Mapping[str, Value]
    steps: tuple[Step, ...]


def unknown_operations(program: Any) -> set[str]:
    """Operations of any function that cannot be computed here."""
    known = OPERATIONS.keys() | CONSTANTS | STATES.keys()
    return {
        op.type
        for function in program.functions.values()
        for op in function.block_specializations[function.opset].operations
    } - known


def read_routine(function: Any, blobs: BlobFile | None, cache: FloatCache) -> Routine:
    """Turn a function of the program into steps.

    Raises:
        BundleError: an operation has wrong arguments, or uses what nothing before it makes.
    """
    block = function.block_specializations[function.opset]
    defined = {item.name for item in function.inputs}
    constants: dict[str, Value] = {}
    steps: list[Step] = []
    for op in block.operations:
        name = op.outputs[0].name if op.outputs else op.type
        try:
            reader = _Reader(blobs, cache, constants)
            if op.type in CONSTANTS:
                if len(op.outputs) != 1:
                    raise BundleError(f"has {len(op.outputs)} outputs; {AGAIN}")
                constants[name] = reader.constant(op)
            else:
                steps.append(reader.step(op, defined | constants.keys()))
            again = [item.name for item in op.outputs if item.name in defined]
            if again:
                raise BundleError(f"makes {again[0]!r}, which is there already; {AGAIN}")
        except BundleError as exc:
            raise BundleError(f"{op.type} {name!r}: {exc}") from exc
        defined |= {item.name for item in op.outputs}
    return Routine(constants, tuple(_lifetimes(steps, set(block.outputs))))


@dataclass(frozen=True)
class _Reader:
    """Reads the operations of one function."""

    blobs: BlobFile | None
    cache: FloatCache
    constants: Mapping[str, Value]

    def step(self, op: Any, defined: set[str]) -> Step:
        if op.blocks:
            raise BundleError("nested operations are not implemented")
        given = {key: value for key, value in op.attributes.items() if key != "name"}
        if both := given.keys() & op.inputs.keys():
            raise BundleError(f"has {min(both)!r} twice; {AGAIN}")
        arguments = {key: self._argument(key, value.arguments) for key, value in op.inputs.items()}
        arguments |= {key: Argument(((self._value(v),),), False) for key, v in given.items()}
        check_arguments(op.type, arguments)
        for key, argument in arguments.items():
            for name in argument.names():
                if name not in defined:
                    raise BundleError(f"argument {key!r} is {name!r}, which is not made; {AGAIN}")
        outputs = tuple((item.name, program_type(item.type, item.name)) for item in op.outputs)
        first = outputs[0][0] if outputs else next(arguments["input"].names(), "")
        return Step(op.type, first, arguments, outputs)

    def constant(self, op: Any) -> Value:
        declared = program_type(op.outputs[0].type, op.outputs[0].name)
        if op.type == "const":
            if "val" not in op.attributes:
                raise BundleError(f"has no value; {AGAIN}")
            value = self._value(op.attributes["val"])
        else:
            parts = {key: self._part(key, arg.arguments) for key, arg in op.inputs.items()}
            if not {"data", "scale"} <= parts.keys() <= {"data", "scale", "offset"}:
                raise BundleError(f"has the arguments {sorted(parts)}; {AGAIN}")
            source = Quantised(parts["data"], parts["scale"], parts.get("offset"))
            value = Constant(source, self.cache)
        found = ("string", ()) if isinstance(value, str) else (value.dtype, value.shape)
        wanted = declared.dtype if declared.dtype == "string" else numpy_dtype(declared.dtype)
        if found != (wanted, declared.shape):
            raise BundleError(f"is {found[0]} {list(found[1])}, declared {declared}; {AGAIN}")
        return value

    def _argument(self, key: str, bindings: Any) -> Argument:
        items = tuple(
            binding.name
            if binding.WhichOneof("binding") == "name"
            else (self._value(binding.value),)
            for binding in bindings
        )
        if key not in VARIADIC and len(items) != 1:
            raise BundleError(f"argument {key!r} has {len(items)} values, expected one; {AGAIN}")
        return Argument(items, key in VARIADIC)

    def _part(self, key: str, bindings: Any) -> Stored:
        """Data, scale or offset of a quantised constant."""
        item = self._argument(key, bindings).items[0]
        found = self.constants.get(item) if isinstance(item, str) else item[0]
        if isinstance(found, Constant) and isinstance(found.source, Stored):
            return found.source
        if isinstance(found, np.ndarray):
            return Stored(found.dtype.name, found.shape, memoryview(found.tobytes()))
        raise BundleError(f"its {key} is no plain constant, which is not implemented")

    def _value(self, value: Any) -> Value:
        declared = program_type(value.type, "")
        if value.WhichOneof("value") == "blobFileValue":
            offset = int(value.blobFileValue.offset)
            stored = Stored.in_file(self.blobs, offset, declared.dtype, declared.shape)
            return Constant(stored, self.cache)
        if value.immediateValue.WhichOneof("value") != "tensor":
            kind = value.immediateValue.WhichOneof("value")
            raise BundleError(f"a value of kind {kind} is not implemented")
        if declared.dtype == "string":
            strings = value.immediateValue.tensor.strings.values
            if declared.shape or len(strings) != 1:
                raise BundleError("lists of words are not implemented")
            return str(strings[0])
        data = memoryview(_bytes(value.immediateValue, declared))
        return Stored(declared.dtype, declared.shape, data).array()


def _bytes(immediate: Any, declared: TensorType) -> bytes:
    """The numbers that stand in the program itself, as they would lie in a weight file."""
    tensor = immediate.tensor
    kind = tensor.WhichOneof("value")
    if kind is None and 0 in declared.shape:
        return b""
    if kind == "bytes":
        return bytes(tensor.bytes.values)
    if kind not in FIELDS:
        raise BundleError(f"numbers of kind {kind} are not implemented")
    dtype = numpy_dtype(declared.dtype)
    # Short integers are stored as 32-bit ones.
    numbers: Array = np.array(getattr(tensor, kind).values, FIELDS[kind])
    if numbers.dtype != dtype and (dtype.kind not in "iu" or kind != "ints"):
        raise BundleError(f"numbers of kind {kind} for {declared}; {AGAIN}")
    if len(numbers) != math.prod(declared.shape):
        raise BundleError(f"{len(numbers)} numbers for {declared}; {AGAIN}")
    return numbers.astype(dtype).tobytes()


def _lifetimes(steps: list[Step], outputs: set[str]) -> Iterator[Step]:
    """The steps with what each one frees, and which slice updates may work in a state's array."""
    last: dict[str, int] = {}
    for at, step in enumerate(steps):
        for name, _ in step.outputs:
            last[name] = at
        for argument in step.arguments.values():
            for name in argument.names():
                last[name] = at
    ending: dict[int, list[str]] = {}
    for name, at in last.items():
        if name not in outputs:
            ending.setdefault(at, []).append(name)
    # From the back: state -> the value written to it next, or None where it is read before that.
    upcoming: dict[str, str | None] = {}
    overwrites: dict[int, str] = {}
    for at in reversed(range(len(steps))):
        step = steps[at]
        if step.op_type in STATES:
            state = next(step.arguments["input"].names(), "")
            written = step.arguments["data"] if step.op_type == "write_state" else None
            upcoming[state] = None if written is None else next(written.names(), None)
        elif step.op_type == "slice_update":
            for state, value in upcoming.items():
                if value == step.outputs[0][0]:
                    overwrites[at] = state
    for at, step in enumerate(steps):
        yield replace(step, frees=tuple(ending.get(at, ())), overwrites=overwrites.get(at))
