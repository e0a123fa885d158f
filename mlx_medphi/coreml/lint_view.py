"""A function of a program, indexed: what makes a value, what a constant holds, what reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_medphi.coreml.package_file import TensorType

__all__ = ["Constant", "Op", "View"]


@dataclass(frozen=True)
class Constant:
    """A constant value.

    Attributes:
        type: what is said of it; None where that is no tensor of fixed shape.
        offset: where its record lies in the weight file; None: it stands in the program.
        file: the weight file as the program names it; "" without one.
        values: what stands in the program: numbers, or a text; None where they do not fit the type.
    """

    type: TensorType | None
    offset: int | None = None
    file: str = ""
    values: npt.NDArray[Any] | str | None = None

    @property
    def ints(self) -> tuple[int, ...] | None:
        """The whole numbers of a small constant; None where it holds something else."""
        if isinstance(self.values, np.ndarray) and self.values.dtype == np.int32:
            return tuple(self.values.reshape(-1).tolist())
        return None


@dataclass(frozen=True)
class Op:
    """An operation.

    Attributes:
        index: its place in the function.
        type: e.g. "linear".
        name: that of its first output, or its own.
        inputs: parameter -> the names of values, or constants given in place.
        outputs: name -> type, None where it is no tensor of fixed shape.
        names: the outputs as they are written, also where one name stands twice.
        value: what a `const` holds.
        nested: whether it has blocks of its own.
    """

    index: int
    type: str
    name: str
    inputs: Mapping[str, tuple[str | Constant, ...]]
    outputs: Mapping[str, TensorType | None]
    names: tuple[str, ...]
    value: Constant | None
    nested: bool

    def __str__(self) -> str:
        return f"{self.type} {self.name!r}"

    def argument(self, parameter: str) -> str | None:
        """The name of the one value that a parameter takes; None: there is not exactly one."""
        given = self.inputs.get(parameter, ())
        return given[0] if len(given) == 1 and isinstance(given[0], str) else None


@dataclass(frozen=True)
class View:
    """One function.

    Attributes:
        name: the function's.
        inputs: name -> type, without the states.
        states: name -> type of what a state holds.
        ops: all operations, in order.
        outputs: the names it returns.
        opset: e.g. "CoreML8".
        bodies: the opsets it has operations for.
    """

    name: str
    inputs: Mapping[str, TensorType | None]
    states: Mapping[str, TensorType | None]
    ops: tuple[Op, ...]
    outputs: tuple[str, ...]
    opset: str
    bodies: tuple[str, ...]

    @cached_property
    def made(self) -> Mapping[str, Op]:
        """Value name -> the operation that makes it."""
        return {name: op for op in self.ops for name in op.names}

    @cached_property
    def by_type(self) -> Mapping[str, tuple[Op, ...]]:
        """Operation type -> all of that type, in order."""
        found: dict[str, list[Op]] = {}
        for op in self.ops:
            found.setdefault(op.type, []).append(op)
        return {kind: tuple(ops) for kind, ops in found.items()}

    @cached_property
    def readers(self) -> Mapping[str, tuple[Op, ...]]:
        """Value name -> the operations that take it."""
        found: dict[str, list[Op]] = {}
        for op in self.ops:
            for given in op.inputs.values():
                for argument in given:
                    if isinstance(argument, str):
                        found.setdefault(argument, []).append(op)
        return {name: tuple(ops) for name, ops in found.items()}

    def of(self, *kinds: str) -> list[Op]:
        """All operations of some types, in order."""
        return sorted(
            (op for k in kinds for op in self.by_type.get(k, ())), key=lambda op: op.index
        )

    def type_of(self, name: str) -> TensorType | None:
        """The type of a value, an input or what a state holds."""
        op = self.made.get(name)
        if op is not None:
            return op.outputs[name]
        return self.inputs.get(name) or self.states.get(name)

    def source(self, op: Op | None, parameter: str, kind: str | None = None) -> Op | None:
        """The operation that makes an argument; None where there is none, or of another type."""
        name = op.argument(parameter) if op is not None else None
        found = self.made.get(name) if name is not None else None
        return found if found is not None and kind in (None, found.type) else None

    def constant(self, op: Op | None, parameter: str) -> Constant | None:
        """The constant that a parameter takes, in place or by name; None where it takes none."""
        given = op.inputs.get(parameter, ()) if op is not None else ()
        if len(given) != 1:
            return None
        if isinstance(given[0], Constant):
            return given[0]
        made = self.made.get(given[0])
        return made.value if made is not None else None

    def ints(self, argument: str | Constant | None) -> tuple[int, ...] | None:
        """The whole numbers of a constant argument; None where it is none of them."""
        if isinstance(argument, str):
            made = self.made.get(argument)
            argument = made.value if made is not None else None
        return argument.ints if argument is not None else None

    def constants(self) -> Iterator[tuple[str, Constant]]:
        """Every constant, with what it is called: its own name, or operation and parameter."""
        for op in self.ops:
            if op.value is not None:
                yield op.name, op.value
            for parameter, given in op.inputs.items():
                for argument in given:
                    if isinstance(argument, Constant):
                        yield f"{op.name}.{parameter}", argument
