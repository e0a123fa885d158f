"""Small packages with made-up weights, what they must be, and a way to doctor them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_cases import make_facts, read_config

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.blobs import Part, plan_blobs
from mlx_medphi.coreml.build import write_package
from mlx_medphi.coreml.library import coremltools
from mlx_medphi.coreml.lint_report import Expected
from mlx_medphi.coreml.lints import SpecReport, check_spec
from mlx_medphi.coreml.manifest import AdapterEntry
from mlx_medphi.coreml.manifest_build import build_manifest
from mlx_medphi.coreml.manifest_program import Memory, Quantization, Stored
from mlx_medphi.coreml.package import MODEL_FILE, PackageText
from mlx_medphi.coreml.package_file import open_package
from mlx_medphi.coreml.program import Plan
from mlx_medphi.coreml.weights import EMBEDDING, HEAD, Weight, Weights
from mlx_medphi.model.config import Phi3Config
from mlx_medphi.model.layout import linear_shapes

CHECKPOINTS = Path(__file__).resolve().parents[1] / "fixtures" / "phi3"
CONTEXT, PREFILL, GROUP, RANK = 64, 8, 32, 8


@dataclass(frozen=True)
class Case:
    """A package on disk and what it must be."""

    path: Path
    expected: Expected


def made_weights(config: Phi3Config, bits: int) -> Weights:
    """Weights of all forms and no meaning: every float is 0.5, every code 0."""
    shapes = linear_shapes(config)
    names = [EMBEDDING]
    for i in range(config.num_hidden_layers):
        for key in ("input_layernorm", "self_attn.qkv_proj", "self_attn.o_proj"):
            names.append(f"model.layers.{i}.{key}")
        for key in ("post_attention_layernorm", "mlp.gate_up_proj", "mlp.down_proj"):
            names.append(f"model.layers.{i}.{key}")
    names += ["model.norm", *([HEAD] if HEAD in shapes else [])]
    return Weights({n: made_weight(n, shapes.get(n, (config.hidden_size,)), bits) for n in names})


def made_weight(name: str, shape: tuple[int, ...], bits: int) -> Weight:
    kinds = {"weight": ("float16", shape)}
    if bits < 16 and len(shape) == 2:
        small = (shape[0], shape[1] // GROUP)
        kinds = {"data": ("int8", shape), "scale": ("float16", small)}
        if name != EMBEDDING:
            kinds = {**kinds, "data": ("uint4", shape), "offset": ("uint4", small)}
    parts = {key: Part(f"{name}.{key}", dtype, extents) for key, (dtype, extents) in kinds.items()}

    def blocks() -> Iterator[tuple[bytes, ...]]:
        half = np.float16(0.5).tobytes()
        yield tuple(
            half * (part.nbytes // 2) if part.dtype == "float16" else bytes(part.nbytes)
            for part in parts.values()
        )

    coded = len(parts) > 1
    return Weight(
        layer=name,
        shape=shape,
        bits=bits if coded else 16,
        group=GROUP if coded else None,
        form="integer offset" if coded else "float16",
        parts=parts,
        error=None,
        subnormal=0,
        blocks=blocks,
    )


def make_case(
    directory: Path,
    checkpoint: str = "mini-4k",
    bits: int = 16,
    rank: int | None = None,
    adapters: tuple[str, ...] = (),
    **settings: Any,
) -> Case:
    """Write a package as an export does; what it must be comes from its manifest."""
    config = read_config(CHECKPOINTS / checkpoint)
    mode = "slots" if rank else "functions" if adapters else "none"
    export = ExportConfig(prefill=PREFILL, adapters=mode, **settings)
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(config.num_hidden_layers)]
    a = np.ones((4, config.intermediate_size), np.float16)
    b = np.ones((config.hidden_size, 4), np.float16)
    factors = {name: {layer: (a, b) for layer in down} for name in adapters}
    plan = Plan(config, export, CONTEXT, made_weights(config, bits), rank, factors)
    path = directory / "Phi3.mlpackage"
    write_package(plan, PackageText("A model.", "", "", "1", {"made by": "a test"}), path)
    functions = {
        name: {
            kind: [{"name": n, "shape": t.shape, "dtype": t.dtype} for n, t in items.items()]
            for kind, items in vars(signature).items()
        }
        for name, signature in open_package(path).functions.items()
    }
    nbytes = plan_blobs(plan.parts).nbytes
    stored = Stored(8, GROUP) if bits < 16 else Stored(16, None)
    group = GROUP if bits < 16 else None
    offset = "integer" if bits < 16 else "none"
    pairs = {n: {"prefill": f"prefill_{n}", "decode": f"decode_{n}"} for n in adapters}
    manifest = build_manifest(
        make_facts(
            config=config,
            export=export,
            context=CONTEXT,
            functions=functions,
            quantization=Quantization(
                "exported" if bits < 16 else "none",
                "block", bits, group, offset, stored, stored, {}, None, 0,
            ),
            memory=Memory(nbytes, 1, 1, 1, 1),
            slot_rank=rank,
            adapters=tuple(AdapterEntry(n, None, None, 4, pairs[n], {}) for n in adapters),
        )
    )  # fmt: skip
    return Case(path, Expected.from_manifest(manifest))


def copied(case: Case, directory: Path) -> Case:
    """A copy that may be doctored."""
    path = directory / case.path.name
    shutil.copytree(case.path, path)
    return Case(path, case.expected)


def check(case: Case) -> SpecReport:
    """Open a package and check it."""
    return check_spec(open_package(case.path), case.expected)


class Program:
    """A saved model that is being doctored: the operations of one function."""

    def __init__(self, path: Path, function: str = "decode") -> None:
        self.path = path / MODEL_FILE
        self.model = coremltools("proto.Model_pb2").Model()
        self.model.ParseFromString(self.path.read_bytes())
        self.function = self.model.mlProgram.functions[function]
        self.operations = self.function.block_specializations["CoreML8"].operations

    def save(self) -> None:
        self.path.write_bytes(self.model.SerializeToString())

    def op(self, wanted: str) -> Any:
        """The operation that makes that value, or the first of that type."""
        makers = [op for op in self.operations if wanted in (out.name for out in op.outputs)]
        return (makers or self.of(wanted))[0]

    def of(self, kind: str) -> list[Any]:
        return [op for op in self.operations if op.type == kind]

    def writes(self, state: str) -> list[Any]:
        return [op for op in self.of("write_state") if self.name(op, "input") == state]

    def gathers(self, indices: str) -> Any:
        return next(op for op in self.of("gather") if self.name(op, "indices") == indices)

    def name(self, op: Any, parameter: str) -> str:
        return str(op.inputs[parameter].arguments[0].name)

    def maker(self, op: Any, *parameters: str) -> Any:
        """What makes an argument of what makes an argument … of an operation."""
        for parameter in parameters:
            op = self.op(self.name(op, parameter))
        return op

    def value(self, op: Any, parameter: str) -> Any:
        """The numbers of a constant argument."""
        return self.maker(op, parameter).attributes["val"].immediateValue.tensor

    def bind(self, op: Any, parameter: str, name: str) -> None:
        """Make an argument another value."""
        del op.inputs[parameter].arguments[:]
        op.inputs[parameter].arguments.add().name = name

    def retype(self, op: Any, dtype: int) -> None:
        op.outputs[0].type.tensorType.dataType = dtype

    def add(self, before: Any, like: Any, name: str) -> Any:
        """A copy of an operation before another one, or at the end, that makes `name`."""
        new = type(like)()
        new.CopyFrom(like)
        if new.outputs:
            new.outputs[0].name = name
        at = len(self.operations) if before is None else self._index(before)
        self.operations.insert(at, new)
        return self.operations[at]

    def drop(self, op: Any) -> None:
        del self.operations[self._index(op)]

    def _index(self, op: Any) -> int:
        # Messages are equal by what they hold, and no two operations hold the same.
        return list(self.operations).index(op)


def doctored(case: Case, directory: Path, edit: Callable[[Program], None]) -> Case:
    """A copy whose model was changed."""
    copy = copied(case, directory)
    program = Program(copy.path)
    edit(program)
    program.save()
    return copy


def only(case: Case) -> str:
    """The one finding of a package."""
    findings = check(case).findings
    assert len(findings) == 1, findings
    return findings[0]


Edit = Callable[[Program], None]


class Edits(list[Any]):
    """Ways to be wrong, as parameters of a test: settings, edit, pattern."""

    def finds(self, pattern: str, **settings: Any) -> Callable[[Edit], Edit]:
        """Register an edit of `decode` and the one finding that it must lead to."""

        def register(edit: Edit) -> Edit:
            self.append(pytest.param(settings, edit, pattern, id=edit.__name__))
            return edit

        return register


def expect(case: Case, directory: Path, edit: Edit, pattern: str) -> None:
    """Change `decode`: there is one finding, and it is the expected one."""
    finding = only(doctored(case, directory, edit))
    assert re.search(pattern, finding), finding
    assert finding.startswith("decode: ") and finding.endswith("; export again")
