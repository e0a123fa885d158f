"""The MIL program: `prefill` and `decode` over the same weights, for the base and for each adapter.

A function reads S tokens from slot `position` on and returns the logits of one row. All functions
declare the same states, so one set of key/value buffers serves them all. Masks, positions and the
row to return are inputs: windows, padding and the reuse of a prefix need no other program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml import graph
from mlx_medphi.coreml.blobs import BlobPlan, Part, plan_blobs
from mlx_medphi.coreml.graph import Adapted, Cache, Constants, Var, builder
from mlx_medphi.coreml.library import coremltools
from mlx_medphi.coreml.manifest import DECODE, PREFILL
from mlx_medphi.coreml.slots import MODULES, function_name, slot_shapes
from mlx_medphi.coreml.weights import EMBEDDING, HEAD, Weights
from mlx_medphi.model.config import Phi3Config
from mlx_medphi.model.rope import RotaryEmbedding

__all__ = ["Feature", "Plan", "build_program", "rope_tables"]

Half = npt.NDArray[np.float16]
Step = Callable[[int, int], None]
Feature = tuple[tuple[int, ...], str]
"""Shape and dtype of an input, a state or an output."""


@dataclass(frozen=True)
class Plan:
    """Everything a program is built from; no weight has been read.

    Attributes:
        config: the architecture.
        export: the settings.
        context: slots of the key/value cache.
        weights: the form of every weight.
        slot_rank: rank of the adapter slots; None without slots.
        factors: functions mode: adapter name -> layer -> its two factors, (r, in) and (out, r)
            float16.
    """

    config: Phi3Config
    export: ExportConfig
    context: int
    weights: Weights
    slot_rank: int | None = None
    factors: Mapping[str, Mapping[str, tuple[Half, Half]]] = field(default_factory=dict)

    @property
    def functions(self) -> dict[str, tuple[int, str | None]]:
        """Function name -> tokens it reads, and the adapter built into it."""
        widths = {DECODE: 1, PREFILL: self.export.prefill}
        found: dict[str, tuple[int, str | None]] = {name: (s, None) for name, s in widths.items()}
        for adapter in self.factors:
            found |= {function_name(name, adapter): (s, adapter) for name, s in widths.items()}
        return found

    @property
    def parts(self) -> list[Part]:
        """Every constant of the weight file, in its order."""
        return [*self.weights.parts(), *self.made_parts]

    @property
    def blobs(self) -> BlobPlan:
        """The layout of the weight file."""
        return plan_blobs(self.parts)

    @property
    def made_parts(self) -> list[Part]:
        """The constants that are no weights of the checkpoint: tables, biases of zeros, factors."""
        outputs = {w.shape[0] for w in self.weights.layers.values() if len(w.shape) == 2}
        pairs = [
            (self.factor_parts(adapter, layer), a.shape[0])
            for adapter, layers in self.factors.items()
            for layer, (a, _) in layers.items()
        ]
        zeros = [graph.zeros(width) for width in sorted(outputs | {rank for _, rank in pairs})]
        return [*self.rope_parts, *zeros, *(part for pair, _ in pairs for part in pair)]

    @property
    def rope_parts(self) -> tuple[Part, Part]:
        """The tables of cosines and sines, one or two sets of (ctx, rotary / 2)."""
        shape = (self.context * len(self.rope_sets), self.config.rotary_dim // 2)
        return Part("rope.cos", "float16", shape), Part("rope.sin", "float16", shape)

    def factor_parts(self, adapter: str, layer: str) -> tuple[Part, Part]:
        """The two factors of one layer's change as constants."""
        a, b = (
            Part(f"adapter.{adapter}.{layer}.{kind}", "float16", array.shape)
            for kind, array in zip("ab", self.factors[adapter][layer], strict=True)
        )
        return a, b

    def made_arrays(self) -> Iterator[tuple[Part, Half]]:
        """The numbers of `made_parts`."""
        tables = rope_tables(self.config, self.context, self.rope_sets)
        yield from zip(self.rope_parts, tables, strict=True)
        for part in self.made_parts:
            if part.id.startswith("zeros."):
                yield part, np.zeros(part.shape, np.float16)
        for adapter, layers in self.factors.items():
            for layer, pair in layers.items():
                yield from zip(self.factor_parts(adapter, layer), pair, strict=True)

    @property
    def rope_sets(self) -> tuple[bool, ...]:
        """Whether each set of the tables has LongRoPE's long factors."""
        return (False, True) if self.config.uses_long_factors(self.context) else (False,)

    def inputs(self, width: int) -> dict[str, Feature]:
        """The inputs of a function that reads `width` tokens."""
        inputs: dict[str, Feature] = {
            "inputIds": ((1, width), "int32"),
            "position": ((1,), "int32"),
            "causalMask": ((1, 1, width, self.context), "float16"),
            "lastIndex": ((1,), "int32"),
        }
        if len(self.rope_sets) > 1:
            inputs["ropeRow"] = ((1,), "int32")
        return inputs | (self._slots if self.export.slot_kind == "input" else {})

    @property
    def states(self) -> dict[str, Feature]:
        """The states that all functions declare."""
        cache: dict[str, Feature] = {
            name: (self.cache_shape, "float16") for name in ("keyCache", "valueCache")
        }
        return cache | (self._slots if self.export.slot_kind == "state" else {})

    @property
    def outputs(self) -> dict[str, Feature]:
        """The one output of every function."""
        return {"logits": ((1, 1, self.config.vocab_size), "float16")}

    @property
    def _slots(self) -> dict[str, Feature]:
        if self.slot_rank is None:
            return {}
        shapes = slot_shapes(self.config, self.slot_rank)
        return {name: (shape, "float16") for name, shape in shapes.items()}

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """(layers, KV, ctx, D) of each of the two caches."""
        config = self.config
        return (
            config.num_hidden_layers,
            config.num_key_value_heads,
            self.context,
            config.head_dim,
        )


def rope_tables(
    config: Phi3Config, context: int, sets: Sequence[bool]
) -> tuple[npt.NDArray[np.float16], ...]:
    """Cosines and sines of all positions, (sets · ctx, rotary / 2), computed in float64.

    LongRoPE rotates a whole sequence with one of two sets of factors, by its length, as
    transformers does; a context beyond the switch needs both, one below the other.
    """
    rope = RotaryEmbedding(config)
    angles = []
    for long_factors in sets:
        wavelengths = (rope.long if long_factors else rope.short).astype(mx.float32)
        angles.append(np.arange(context)[:, None] / np.array(wavelengths, np.float64))
    stacked, scale = np.concatenate(angles), rope.attention_factor
    return (
        (np.cos(stacked) * scale).astype(np.float16),
        (np.sin(stacked) * scale).astype(np.float16),
    )


def build_program(plan: Plan, step: Step | None = None) -> Any:
    """Build all functions; constants are virtual, see `graph.virtual`.

    Args:
        plan: what to build.
        step: called with (blocks built, blocks in all).

    Returns:
        A MIL Program.
    """
    mil = coremltools("converters.mil.mil")
    # coremltools numbers what has no name through the whole process; the bytes must not.
    builder().name_count.clear()
    program = mil.Program()
    functions = plan.functions
    total = len(functions) * plan.config.num_hidden_layers
    for index, (name, (width, adapter)) in enumerate(functions.items()):
        done = index * plan.config.num_hidden_layers

        def count(layers: int, done: int = done) -> None:
            if step is not None:
                step(done + layers, total)

        program.add_function(name, _function(plan, width, adapter, count))
    program.default_function_name = DECODE
    program.export_as_multifunction = True
    # The graph is typed and final; no pass may merge or recast what looks alike.
    program.skip_all_passes = True
    return program


def _function(plan: Plan, width: int, adapter: str | None, count: Callable[[int], None]) -> Any:
    mil, target = coremltools("converters.mil.mil"), coremltools().target.iOS18
    with mil.Function(_inputs(plan, width), opset_version=target) as function:
        logits = _body(plan, dict(function.inputs), adapter, count)
        function.set_outputs([logits])
    return function


def _inputs(plan: Plan, width: int) -> dict[str, Any]:
    mb, types = builder(), coremltools("converters.mil.mil.types")
    dtypes = {"int32": types.int32, "float16": types.fp16}
    inputs, states = plan.inputs(width), plan.states
    return {
        **{name: mb.placeholder(shape, dtypes[kind]) for name, (shape, kind) in inputs.items()},
        **{
            name: mb.state_tensor_placeholder(shape, dtypes[kind])
            for name, (shape, kind) in states.items()
        },
    }


def _body(
    plan: Plan, inputs: Mapping[str, Var], adapter: str | None, count: Callable[[int], None]
) -> Var:
    mb, config, constants = builder(), plan.config, Constants(plan.weights.layers)
    rope = _rope(plan, inputs, constants)
    mask = inputs["causalMask"]
    group = config.num_attention_heads // config.num_key_value_heads
    if group > 1:
        mask = mb.tile(x=mask, reps=[1, 1, group, 1])
    factors = _factors(plan, inputs, adapter, constants)

    def normed(x: Var, layer: str, name: str) -> Var:
        return graph.rms_norm(x, constants.weight(layer), config.rms_norm_eps, name)

    wide = plan.export.residual == "float32"

    def added(h: Var, change: Var, name: str | None = None) -> Var:
        named = {} if name is None else {"name": name}
        return mb.add(x=h, y=mb.cast(x=change, dtype="fp32") if wide else change, **named)

    h = graph.embedding(constants.weight(EMBEDDING), inputs["inputIds"])
    h = mb.cast(x=h, dtype="fp32") if wide else h
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}"
        qkv, out, gate_up, down = (
            Adapted(constants, f"{prefix}.{key}", *factors(i, module))
            for module, key in MODULES.items()
        )
        cache = Cache(inputs["keyCache"], inputs["valueCache"], i, inputs["position"])
        x = normed(h, f"{prefix}.input_layernorm", f"layer_{i}_input_norm")
        fused = plan.export.attention == "fused"
        h = added(h, graph.attention(x, qkv, out, cache, rope, mask, config, fused))
        x = normed(h, f"{prefix}.post_attention_layernorm", f"layer_{i}_mlp_norm")
        h = added(h, graph.mlp(x, gate_up, down, i), f"layer_{i}")
        count(i + 1)
    row = mb.gather(x=h, indices=inputs["lastIndex"], axis=1, validate_indices=False)
    final = normed(row, "model.norm", "final_norm")
    head = HEAD if HEAD in plan.weights.layers else EMBEDDING
    return constants.linear(final, constants.weight(head), "logits")


def _rope(plan: Plan, inputs: Mapping[str, Var], constants: Constants) -> tuple[Var, Var]:
    """This block's rows of the two tables, (S, rotary / 2)."""
    mb, width = builder(), inputs["inputIds"].shape[1]
    row = inputs.get("ropeRow", inputs["position"])
    begin = mb.concat(values=[row, graph.ZERO], axis=0)
    cos, sin = (
        mb.slice_by_size(
            x=constants.part(part),
            begin=begin,
            size=[width, part.shape[1]],
            name=part.id.replace(".", "_") + "_rows",
        )
        for part in plan.rope_parts
    )
    return cos, sin


def _factors(
    plan: Plan, inputs: Mapping[str, Var], adapter: str | None, constants: Constants
) -> Callable[[int, str], tuple[Var | None, Var | None]]:
    """(block, module) -> the factors of the change there, or None twice."""
    mb = builder()
    if plan.slot_rank is not None:
        states = plan.export.slot_kind == "state"
        slots = {
            name: mb.read_state(input=inputs[name]) if states else inputs[name]
            for name in slot_shapes(plan.config, plan.slot_rank)
        }

        def from_slots(layer: int, module: str) -> tuple[Var, Var]:
            pair = (slots[f"lora{kind}_{module}"] for kind in "AB")
            a, b = (
                mb.slice_by_index(x=slot, begin=[layer, 0, 0], end=[layer + 1, *slot.shape[1:]])
                for slot in pair
            )
            return a, b

        return from_slots

    def from_constants(layer: int, module: str) -> tuple[Var | None, Var | None]:
        name = f"model.layers.{layer}.{MODULES[module]}"
        if adapter is None or name not in plan.factors[adapter]:
            return None, None
        a, b = (constants.part(part) for part in plan.factor_parts(adapter, name))
        return a, b

    return from_constants
