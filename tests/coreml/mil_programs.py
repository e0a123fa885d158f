"""Small ML programs, built with coremltools and saved, for the tests of what reads them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_medphi.coreml.library import coremltools
from mlx_medphi.coreml.package_file import Package, open_package

Types = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (type, shape)."""


def builder() -> Any:
    return coremltools("converters.mil").Builder


def mil_type(name: str) -> Any:
    types = coremltools("converters.mil.mil").types
    return {"float16": types.fp16, "float32": types.fp32, "int32": types.int32}[name]


def four_bit(values: Any, name: str = "uint4") -> Any:
    """Codes as coremltools wants them, so that it packs two in a byte."""
    types = coremltools("converters.mil.mil").types
    return np.asarray(values).astype(types.nptype_from_builtin(getattr(types, name)))


def function(body: Callable[..., Any], inputs: Types, states: Types | None = None) -> Any:
    """A function whose outputs are what `body` gives for its inputs and states, name -> value."""
    mil, mb = coremltools("converters.mil.mil"), builder()
    places = {name: mb.placeholder(shape, mil_type(kind)) for name, (kind, shape) in inputs.items()}
    for name, (kind, shape) in (states or {}).items():
        places[name] = mb.state_tensor_placeholder(shape, mil_type(kind))
    target = coremltools().target.iOS18
    with mil.Function(places, opset_version=target) as made:
        outputs = body(**made.inputs)
        made.set_outputs(
            [
                value if value.name == name else mb.identity(x=value, name=name)
                for name, value in outputs.items()
            ]
        )
    return made


def save(path: Path, **functions: Any) -> Path:
    """Convert and save a program with these functions; the first is the default one."""
    ct = coremltools()
    program = coremltools("converters.mil.mil").Program()
    for name, made in functions.items():
        program.add_function(name, made)
    if set(functions) != {"main"}:
        program.default_function_name = next(iter(functions))
        program.export_as_multifunction = True
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("TQDM_DISABLE", "1")
        # No passes: the saved operations are the ones that were asked for.
        model = ct.convert(
            program,
            compute_precision=ct.precision.FLOAT32,
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
            pass_pipeline=ct.PassPipeline.EMPTY,
        )
        model.save(str(path))
    return path


def package(path: Path, **functions: Any) -> Package:
    return open_package(save(path, **functions))


def model_file(path: Path) -> Path:
    return path / "Data" / "com.apple.CoreML" / "model.mlmodel"


def change(path: Path, edit: Callable[[Any], None]) -> Path:
    """Change the model file of a saved package."""
    model = coremltools("proto.Model_pb2").Model()
    model.ParseFromString(model_file(path).read_bytes())
    edit(model)
    model_file(path).write_bytes(model.SerializeToString())
    return path


def operations(model: Any, name: str = "main") -> Any:
    made = model.mlProgram.functions[name]
    return made.block_specializations[made.opset].operations
