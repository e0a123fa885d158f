"""Run a saved Core ML package with numpy, operation by operation, states included.

Values have the types the program gives them: a float16 operation is computed in float32 and
rounded once. Every output is compared with the type the program declares, so that running a
package also checks it. This is no emulation of one device: a GPU may add in another order.

    package = open_package(Path("NAME.mlpackage"))
    interpreter = Interpreter(package)
    state = interpreter.new_state("decode")
    logits = interpreter.run("decode", inputs, state)["logits"]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np

from mlx_medphi.coreml.mil_ops import OPERATIONS, STATES, TAKE_CONSTANTS
from mlx_medphi.coreml.mil_ops_half import Array
from mlx_medphi.coreml.mil_ops_layout import write_slice
from mlx_medphi.coreml.mil_ops_nodes import (
    Argument,
    Routine,
    Step,
    Value,
    read_routine,
    unknown_operations,
)
from mlx_medphi.coreml.mil_ops_states import State, check_array, check_names
from mlx_medphi.coreml.mil_ops_weights import Constant, FloatCache, numpy_dtype
from mlx_medphi.coreml.package_file import Package
from mlx_medphi.errors import BundleError, capped

__all__ = ["CACHE_BYTES", "Interpreter", "State", "Watch"]

CACHE_BYTES = 1_500_000_000
"""Default limit of weights kept as float32: two layers and the head of Phi-3-mini."""

Watch = Callable[[str, str, Array], None]
"""Called with operation, name of the output and value."""


class Interpreter:
    """Runs the functions of one package."""

    def __init__(self, package: Package, *, cache_bytes: int = CACHE_BYTES) -> None:
        """Read the program; no weight is read yet.

        Args:
            package: an opened package.
            cache_bytes: most memory for weights as float32, which all functions share; what does
                not fit is dequantised in blocks at each use.

        Raises:
            BundleError: an operation is not implemented, or the program is not sound.
        """
        self.package = package
        self.cache = FloatCache(cache_bytes)
        if unknown := unknown_operations(package.program):
            raise BundleError(
                f"{package.path}: operations that are not implemented: {capped(unknown)}"
            )
        self.routines: dict[str, Routine] = {}
        for name in package.functions:
            function = package.program.functions[name]
            try:
                self.routines[name] = read_routine(function, package.blobs, self.cache)
            except BundleError as exc:
                raise BundleError(f"{package.path}: function {name!r}: {exc}") from exc

    def new_state(self, function: str) -> State:
        """States of a function, all zeros; for every function that declares the same ones.

        Raises:
            BundleError: no such function.
        """
        self._known(function)
        return State(self.package.functions[function].states)

    def run(
        self,
        function: str,
        inputs: Mapping[str, Array],
        state: MutableMapping[str, Array] | None = None,
        watch: Watch | None = None,
    ) -> dict[str, Array]:
        """Run one function.

        Args:
            function: its name.
            inputs: arrays by name, each with exactly the declared shape and type.
            state: what the function reads and writes, from `new_state` or any mapping of arrays;
                changed by the run, even by one that fails.
            watch: called after each operation with the operation's type, the output's name and
                its value, read-only and valid only during the call.

        Returns:
            The outputs by name.

        Raises:
            BundleError: no such function, inputs or state of another kind, or an operation that
                fails or whose output is not what the program declares.
        """
        self._known(function)
        signature = self.package.functions[function]
        check_names("input", inputs, signature.inputs)
        for name, kind in signature.inputs.items():
            check_array("input", name, inputs[name], kind)
        if signature.states and state is None:
            raise BundleError(f"function {function!r} needs a state; make one with new_state")
        if state is not None and signature.states:
            check_names("state", state, signature.states)
            for name, kind in signature.states.items():
                check_array("state", name, state[name], kind)
        frame = _Frame(dict(inputs), self.routines[function].constants, state)
        # Overflow to infinity and what follows from it are values like others here.
        with np.errstate(all="ignore"):
            for step in self.routines[function].steps:
                try:
                    frame.execute(step)
                except (AttributeError, TypeError, ValueError, LookupError, BundleError) as exc:
                    raise BundleError(
                        f"{self.package.path}: function {function!r}: {step.op_type} "
                        f"{step.name!r}: {exc}"
                    ) from exc
                if watch is not None:
                    frame.show(step, watch)
                frame.free(step)
        return {name: np.array(frame.value(name)) for name in signature.outputs}

    def _known(self, function: str) -> None:
        if function not in self.routines:
            raise BundleError(
                f"{self.package.path}: no function {function!r}, only {capped(self.routines)}"
            )


class _Frame:
    """The values of one run."""

    def __init__(
        self,
        inputs: dict[str, Array],
        constants: Mapping[str, Value],
        state: MutableMapping[str, Array] | None,
    ) -> None:
        self.values = inputs
        self.constants = constants
        # The arrays themselves: setting an item of a State would copy.
        self.arrays = state.arrays if isinstance(state, State) else state or {}

    def execute(self, step: Step) -> None:
        """Compute a step's outputs and see that they are what the program declares."""
        if step.op_type in STATES:
            results = self._state_step(step)
        else:
            arguments = {
                name: self._argument(argument, TAKE_CONSTANTS.get(step.op_type) == name)
                for name, argument in step.arguments.items()
            }
            in_place = step.op_type == "slice_update" and self._is_free(step, arguments["x"])
            kernel = write_slice if in_place else OPERATIONS[step.op_type]
            made = kernel(**arguments)
            results = made if isinstance(made, tuple) else (made,)
        if len(results) != len(step.outputs):
            raise ValueError(f"{len(results)} outputs, the program declares {len(step.outputs)}")
        for (name, kind), result in zip(step.outputs, results, strict=True):
            if result.dtype != numpy_dtype(kind.dtype) or result.shape != kind.shape:
                raise ValueError(
                    f"output {name!r} is {result.dtype} {list(result.shape)}, the program "
                    f"declares {kind}"
                )
            self.values[name] = result

    def show(self, step: Step, watch: Watch) -> None:
        """Tell what a step made."""
        for name, _ in step.outputs:
            shown = self.values[name].view()
            shown.flags.writeable = False
            watch(step.op_type, name, shown)

    def free(self, step: Step) -> None:
        """Forget what no later step needs."""
        for name in step.frees:
            self.values.pop(name, None)

    def value(self, name: str) -> Any:
        """An input, a result, or a constant as a whole."""
        if name in self.values:
            return self.values[name]
        value = self.constants[name]
        return value.array() if isinstance(value, Constant) else value

    def _argument(self, argument: Argument, as_constant: bool) -> Any:
        found = []
        for item in argument.items:
            value: Any = item[0] if isinstance(item, tuple) else self.constants.get(item)
            if value is None:
                value = self.values[str(item)]
            elif isinstance(value, Constant) and not as_constant:
                value = value.array()
            found.append(value)
        return found if argument.is_list else found[0]

    def _state_step(self, step: Step) -> tuple[Array, ...]:
        name = next(step.arguments["input"].names(), "")
        held = self.arrays[name]
        if step.op_type == "read_state":
            # The array itself: it is only written to where nobody can see it (_is_free).
            return (held,)
        value = self._argument(step.arguments["data"], False)
        if value.dtype != held.dtype or value.shape != held.shape:
            raise ValueError(
                f"{value.dtype} {list(value.shape)} into a state {held.dtype} {list(held.shape)}"
            )
        if value is not held:
            self.arrays[name] = np.array(value, order="C")
        return ()

    def _is_free(self, step: Step, target: Array) -> bool:
        """Whether a slice update may write into its argument.

        It may if that is the array of the state that takes the result next, and no value that is
        still needed, and no other state, shares memory with it.
        """
        if step.overwrites is None or target is not self.arrays.get(step.overwrites):
            return False
        ending = set(step.arguments["x"].names()) & set(step.frees)
        others = [value for name, value in self.values.items() if name not in ending]
        others += [array for name, array in self.arrays.items() if name != step.overwrites]
        return not any(np.may_share_memory(target, other) for other in others)
