"""Level `predict` without a Mac: coremltools is a stand-in here that runs the interpreter.

These tests prove which calls are made: which functions are loaded, on which units, with which
inputs and which states. That Core ML answers them as expected is proved on a Mac alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from export_cases import make_adapter, one_block, settings

from mlx_medphi.coreml.bundle import Bundle, open_bundle
from mlx_medphi.coreml.export import export
from mlx_medphi.coreml.interpreter import Interpreter
from mlx_medphi.coreml.library import coremltools
from mlx_medphi.coreml.package_file import open_package
from mlx_medphi.coreml.predict import CoreMLPredictor, compute_plan
from mlx_medphi.coreml.verify import verify
from mlx_medphi.errors import ParityError, UsageError

UNITS = SimpleNamespace(
    CPU_AND_GPU="gpu", CPU_AND_NE="neural engine", CPU_ONLY="cpu", ALL="everything"
)


class FakeState:
    """coremltools' MLState: read and written by name."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.written: list[str] = []

    def read_state(self, name: str) -> Any:
        return self.values[name]

    def write_state(self, name: str, value: Any) -> None:
        assert value.shape == self.values[name].shape and value.dtype == np.float16
        self.written.append(name)
        self.values[name] = value


class FakeModel:
    """coremltools' MLModel of one function; all calls are kept."""

    def __init__(self, tools: FakeTools, path: str, compute_units: str, function: str) -> None:
        self.tools, self.function = tools, function
        self.path, self.compute_units = path, compute_units
        self.states: list[FakeState] = []
        self.calls: list[FakeState | None] = []
        tools.models_made.append(self)

    def make_state(self) -> FakeState:
        self.states.append(FakeState(dict(self.tools.interpreter.new_state(self.function))))
        return self.states[-1]

    def get_spec(self) -> Any:
        model = coremltools("proto.Model_pb2").Model()
        model.ParseFromString(
            (Path(self.path) / "Data/com.apple.CoreML/model.mlmodel").read_bytes()
        )
        return model

    def predict(self, inputs: dict[str, Any], state: FakeState | None = None) -> dict[str, Any]:
        self.calls.append(state)
        values = None if state is None else state.values
        found = self.tools.interpreter.run(self.function, inputs, values)
        # Core ML hands out float32 where a caller of Python asks.
        return {name: self.tools.change(array.astype(np.float32)) for name, array in found.items()}


class FakeTools:
    """What `coremltools()` returns on a Mac, as far as it is used."""

    ComputeUnit = UNITS

    def __init__(self, package: Path) -> None:
        self.interpreter = Interpreter(open_package(package))
        self.models_made: list[FakeModel] = []
        self.change: Callable[[Any], Any] = lambda array: array
        self.models = SimpleNamespace(MLModel=self.load)

    def load(self, path: str, *, compute_units: str, function_name: str) -> FakeModel:
        return FakeModel(self, path, compute_units, function_name)

    def of(self, function: str) -> FakeModel:
        (model,) = (model for model in self.models_made if model.function == function)
        return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_block(tmp_path_factory.mktemp("base") / "small")


Make = Callable[..., Bundle]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Make:
    """A verified bundle with one adapter in one of the forms."""
    made: dict[str, Bundle] = {}
    soap = make_adapter(tmp_path_factory.mktemp("adapter") / "soap.safetensors", base)

    def bundle(**changes: Any) -> Bundle:
        key = repr(sorted(changes.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("bundle") / "notes.medphi"
            given = {} if changes.get("adapters") == "none" else {"soap": soap}
            made[key] = export(base, out, adapters=given, config=settings(bits=16, **changes))
        return made[key]

    return bundle


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Callable[[Bundle], FakeTools]:
    """A Mac for one bundle."""

    def tools_for(bundle: Bundle) -> FakeTools:
        tools = FakeTools(bundle.package)
        monkeypatch.setattr("mlx_medphi.coreml.predict.platform.system", lambda: "Darwin")
        monkeypatch.setattr("mlx_medphi.coreml.predict.coremltools", lambda: tools)
        return tools

    return tools_for


@pytest.mark.parametrize("kind", ["state", "input"])
def test_core_ml_is_asked_for_both_functions_on_the_same_states(
    make: Make, mac: Callable[[Bundle], FakeTools], kind: str
) -> None:
    bundle = make(slot_kind=kind)
    tools = mac(bundle)
    report = verify(bundle, "predict")
    assert report.level == "predict" and report.passed
    assert report.graph is not None and report.predict is not None
    names = [case.name for case in report.predict.cases]
    assert names == [case.name for case in report.graph.cases] == ["note-base", "note-soap"]
    assert report.predict.swaps is True
    # Each function is loaded once, on the units that the manifest recommends.
    assert sorted(model.function for model in tools.models_made) == ["decode", "prefill"]
    for model in tools.models_made:
        assert model.path == str(bundle.package) and model.compute_units == "gpu"
    # One function's state is handed to both, and never none.
    prefill, decode = tools.of("prefill"), tools.of("decode")
    assert decode.states == [] and prefill.states
    used = [*prefill.calls, *decode.calls]
    assert used and all(any(state is made for made in prefill.states) for state in used)
    assert any(state in prefill.calls for state in decode.calls)
    # Slots that are states are written; inputs come with every call.
    written = {name for state in prefill.states for name in state.written}
    slots = {f"lora{part}_{m}" for part in "AB" for m in ("qkv", "o", "gate_up", "down")}
    assert written == (slots if kind == "state" else set())


def test_an_adapter_of_its_own_functions_runs_in_them(
    make: Make, mac: Callable[[Bundle], FakeTools]
) -> None:
    bundle = make(adapters="functions")
    tools = mac(bundle)
    report = verify(bundle, "predict")
    assert report.passed and report.predict is not None and report.predict.swaps is None
    loaded = {model.function for model in tools.models_made}
    assert {"prefill", "decode", "prefill_soap"} <= loaded
    assert [case.name for case in report.predict.cases] == ["note-base", "note-soap"]


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ("cpu_and_gpu", "gpu"),
        ("cpu_and_neural_engine", "neural engine"),
        ("cpu_only", "cpu"),
        ("all", "everything"),
    ],
)
def test_units_are_named_as_coremltools_names_them(
    make: Make, mac: Callable[[Bundle], FakeTools], units: str, expected: str
) -> None:
    bundle = make(adapters="none")
    tools = mac(bundle)
    predictor = CoreMLPredictor(bundle.package, units)
    # Loading takes minutes on a device: not before it is needed.
    assert tools.models_made == []
    predictor.new_state("decode")
    predictor.new_state("decode")
    (model,) = tools.models_made
    assert model.compute_units == expected and model.function == "decode"
    # The real one has all of these.
    assert hasattr(
        coremltools().ComputeUnit, next(n for n, v in vars(UNITS).items() if v == expected)
    )


def test_states_are_a_mapping_by_their_names(
    make: Make, mac: Callable[[Bundle], FakeTools]
) -> None:
    bundle = make(slot_kind="state")
    tools = mac(bundle)
    state = CoreMLPredictor(bundle.package, "all").new_state("prefill")
    assert set(state) == {"keyCache", "valueCache", *state} and len(state) == 10
    assert list(state) == list(dict.fromkeys(state))
    assert not state["keyCache"].any() and state["keyCache"].dtype == np.float16
    values = np.ones_like(state["loraA_o"])
    state["loraA_o"] = values
    assert np.array_equal(tools.of("prefill").states[0].values["loraA_o"], values)
    with pytest.raises(TypeError, match="state 'loraA_o' cannot be removed"):
        del state["loraA_o"]


def test_what_core_ml_answers_is_what_is_reported(
    make: Make, mac: Callable[[Bundle], FakeTools]
) -> None:
    bundle = make(slot_kind="state")
    tools = mac(bundle)
    tools.change = lambda logits: logits[..., ::-1]
    with pytest.raises(ParityError) as caught:
        verify(bundle, "predict")
    report: Any = caught.value.report
    assert report.level == "predict"
    assert report.graph.findings == () and report.predict.findings
    assert report.findings == report.predict.findings


def test_core_ml_is_not_asked_about_a_program_that_is_wrong(
    make: Make, mac: Callable[[Bundle], FakeTools], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make(slot_kind="state")
    tools = mac(bundle)
    run = Interpreter.run
    monkeypatch.setattr(
        Interpreter, "run",
        lambda *given: {name: array[..., ::-1] for name, array in run(*given).items()},
    )  # fmt: skip
    with pytest.raises(ParityError) as caught:
        verify(bundle, "predict")
    report: Any = caught.value.report
    assert report.level == "graph" and report.predict is None and tools.models_made == []


def test_an_export_on_a_mac_says_that_core_ml_ran_it(
    base: Path, make: Make, mac: Callable[[Bundle], FakeTools], tmp_path: Path
) -> None:
    # The stand-in runs another export of the same weights.
    mac(make(adapters="none"))
    told: list[str] = []
    bundle = export(
        base, tmp_path / "a.medphi", level="predict",
        config=settings(bits=16, adapters="none"),
        progress=lambda stage, done, total: told.append(stage),
    )  # fmt: skip
    assert list(dict.fromkeys(told)) == ["graph", "weights", "golden", "run", "predict"]
    verification = open_bundle(bundle.path).manifest.medphi.verification
    assert bundle.level == verification.level == "predict"
    assert verification.predict is not None
    assert [case["name"] for case in verification.predict["cases"]] == ["note-base"]


@pytest.mark.parametrize("system", ["Linux", "Windows"])
def test_other_machines_are_told_what_they_can_reach(
    make: Make, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    package = make(adapters="none").package
    monkeypatch.setattr("mlx_medphi.coreml.predict.platform.system", lambda: system)
    for call in (
        lambda: CoreMLPredictor(package, "all"),
        lambda: compute_plan(package, "all"),
    ):
        with pytest.raises(UsageError, match="needs a Mac with macOS 15 or later; here the levels"):
            call()


def test_a_compute_plan_counts_operations_by_device(
    make: Make, mac: Callable[[Bundle], FakeTools], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make(adapters="none")
    tools = mac(bundle)
    calls: list[Any] = []

    class MLGPUComputeDevice: ...

    class MLCPUComputeDevice: ...

    usages: dict[str, Any] = {
        "linear": SimpleNamespace(preferred_compute_device=MLGPUComputeDevice()),
        "gather": SimpleNamespace(preferred_compute_device=MLCPUComputeDevice()),
        "const": None,
    }
    functions = {
        "decode": ["const", "linear", "linear", "gather"],
        "prefill": ["linear", "const"],
    }
    plan = SimpleNamespace(
        model_structure=SimpleNamespace(
            program=SimpleNamespace(
                functions={
                    name: SimpleNamespace(block=SimpleNamespace(operations=operations))
                    for name, operations in functions.items()
                }
            )
        ),
        get_compute_device_usage_for_mlprogram_operation=usages.get,
    )

    def load_from_path(**given: Any) -> Any:
        calls.append(given)
        return plan

    parts = {
        "": tools,
        "models.utils": SimpleNamespace(compile_model=lambda path: f"{path}c"),
        "models.compute_plan": SimpleNamespace(
            MLComputePlan=SimpleNamespace(load_from_path=load_from_path)
        ),
    }
    monkeypatch.setattr("mlx_medphi.coreml.predict.coremltools", lambda name="": parts[name])
    assert compute_plan(bundle.package, "cpu_and_neural_engine") == {
        "decode": {"MLGPUComputeDevice": 2, "MLCPUComputeDevice": 1},
        "prefill": {"MLGPUComputeDevice": 1},
    }
    assert calls == [{"path": f"{bundle.package}c", "compute_units": "neural engine"}]
    # The real library has what is called.
    real = coremltools("models.compute_plan").MLComputePlan
    assert hasattr(real, "load_from_path")
    assert hasattr(real, "get_compute_device_usage_for_mlprogram_operation")
    assert hasattr(coremltools("models.utils"), "compile_model")


def test_the_real_library_has_what_the_stand_in_has() -> None:
    model = coremltools("models.model")
    assert {"compute_units", "function_name"} <= set(
        inspect.signature(model.MLModel.__init__).parameters
    )
    assert "state" in inspect.signature(model.MLModel.predict).parameters
    for kind, names in (
        (model.MLModel, ["make_state", "get_spec"]),
        (model.MLState, ["read_state", "write_state"]),
    ):
        assert all(hasattr(kind, name) for name in names)
