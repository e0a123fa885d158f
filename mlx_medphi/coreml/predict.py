"""Core ML itself as a predictor, for level `predict`; no Mac has run it in this project yet."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_medphi.coreml.library import coremltools
from mlx_medphi.errors import UsageError

__all__ = ["CoreMLPredictor", "compute_plan", "need_mac"]

Array = npt.NDArray[Any]


def compute_plan(package: Path, compute_units: str) -> dict[str, dict[str, int]]:
    """Where Core ML would run each function's operations: function -> device -> how many.

    Raises:
        UsageError: this is no Mac.
    """
    need_mac("the compute plan")
    units = _units(compute_units)
    compiled = coremltools("models.utils").compile_model(str(package))
    plan = coremltools("models.compute_plan").MLComputePlan.load_from_path(
        path=str(compiled), compute_units=units
    )
    found: dict[str, dict[str, int]] = {}
    for name, function in plan.model_structure.program.functions.items():
        devices = found.setdefault(name, {})
        for operation in function.block.operations:
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            if usage is not None:
                device = type(usage.preferred_compute_device).__name__
                devices[device] = devices.get(device, 0) + 1
    return found


def need_mac(what: str) -> None:
    """Refuse on other machines what Core ML has to run.

    Raises:
        UsageError: this is no Mac.
    """
    if platform.system() != "Darwin":
        raise UsageError(
            f"{what} runs Core ML, which needs a Mac with macOS 15 or later; here the levels spec "
            "and graph can be reached"
        )


def _units(name: str) -> Any:
    names = {"cpu_and_neural_engine": "CPU_AND_NE"}
    return getattr(coremltools().ComputeUnit, names.get(name, name.upper()))


class CoreMLPredictor:
    """Runs a package's functions with Core ML, all on one set of states."""

    def __init__(self, package: Path, compute_units: str) -> None:
        """Remember the package; a function is compiled and loaded when it is first called.

        Raises:
            UsageError: this is no Mac, or coremltools cannot reach Core ML.
        """
        need_mac("level predict")
        self.package = package
        self._units = _units(compute_units)
        self._models: dict[str, Any] = {}

    def _model(self, function: str) -> Any:
        if function not in self._models:
            self._models[function] = coremltools().models.MLModel(
                str(self.package), compute_units=self._units, function_name=function
            )
        return self._models[function]

    def new_state(self, function: str) -> _State:
        """Fresh states of Core ML, zeroed."""
        return _State(self._model(function))

    def run(
        self,
        function: str,
        inputs: Mapping[str, Array],
        state: MutableMapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """The outputs of one prediction."""
        handle = state.handle if isinstance(state, _State) else None
        found = self._model(function).predict(dict(inputs), state=handle)
        return {name: np.asarray(value) for name, value in found.items()}


class _State(MutableMapping[str, Array]):
    """Core ML's states behind the names of a mapping."""

    def __init__(self, model: Any) -> None:
        self.handle = model.make_state()
        spec = model.get_spec().description
        self._names = [feature.name for function in spec.functions for feature in function.state]

    def __getitem__(self, name: str) -> Array:
        return np.asarray(self.handle.read_state(name))

    def __setitem__(self, name: str, value: Array) -> None:
        self.handle.write_state(name, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"state {name!r} cannot be removed")

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(self._names))

    def __len__(self) -> int:
        return len(set(self._names))
