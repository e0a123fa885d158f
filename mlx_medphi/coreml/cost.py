"""What an exported model costs: bytes on disk and in memory, work per token, and a bound on speed.

All of it follows from shapes, before any weight is read. Two things are no more than `ASSUMPTIONS`
say: the memory is a prediction without scratch space, and the speeds are ceilings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.slots import MODULES, slot_shapes
from mlx_medphi.coreml.weights import Weights
from mlx_medphi.model.adapter_formats import Adapter
from mlx_medphi.model.config import Phi3Config
from mlx_medphi.model.layout import linear_shapes

__all__ = ["ASSUMPTIONS", "BANDWIDTHS", "Ceiling", "CostRow", "CostSheet", "cost_sheet"]

BANDWIDTHS: Mapping[str, float] = {
    "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800,
    "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
    "M3": 100, "M3 Pro": 150, "M3 Max (14-core)": 300, "M3 Max (16-core)": 400, "M3 Ultra": 819,
    "M4": 120, "M4 Pro": 273, "M4 Max (14-core)": 410, "M4 Max (16-core)": 546,
    "M5": 153,
}  # fmt: skip
"""Memory bandwidth in GB/s as Apple publishes it: the newsroom's article on each chip, and the
technical specifications of the Macs that have it. Chips of which Apple gives no number, such as the
M1 and those of phones, are left out."""

ASSUMPTIONS = (
    "Resident memory is a prediction: weights, keys and values, and slots, without scratch space.",
    "Tokens/s are ceilings: published bandwidth over the bytes that one token must read, with the "
    "weights packed in memory and nothing else using it. A device is slower. Apple publishes no "
    "bandwidth for iPhones and iPads with chips of the A series.",
)
"""What the sheet's readers must be told beside its numbers."""

HALF = 2
"""Bytes of a float16."""

# What a package holds beside its numbers, for a size before it is written: a record and some
# alignment for each constant, and the text of a block in one function, measured on packages.
RECORD_BYTES, TEXT_BYTES = 96, 14_000
ADAPTED_BLOCK_BYTES, BLOCK_BYTES = 22_000, 14_000


class Ceiling(NamedTuple):
    """A chip, its bandwidth in GB/s, and the tokens per second that it bounds."""

    chip: str
    bandwidth: float
    tokens_per_second: float


class CostRow(NamedTuple):
    """One line of the sheet: what it belongs to, what it is, how much, and of what."""

    group: str
    name: str
    value: float
    unit: str


@dataclass(frozen=True)
class CostSheet:
    """What a package costs; all sizes in bytes.

    Attributes:
        package: by part: embedding, each projection, norms, head, rope, adapters (constants of
            functions mode), and program: the text of the functions and the file's own records.
        decode_read: what one decoded token must read: weights, keys_values, adapter.
        context: tokens the cache holds.
        kv_per_token: keys and values of one token.
        kv: keys and values of the whole cache.
        adapter: slots, or the largest adapter's constants; 0 without adapters.
        decode_multiply_adds: of one decoded token: projections, attention, head, adapter.
        prefill: tokens that one block of prefill reads.
        prefill_multiply_adds: of one block, by the same parts.
        resident: predicted memory while it runs, without scratch space.
        ceilings: chips and the decoding speeds that their bandwidth bounds.
    """

    package: Mapping[str, int]
    decode_read: Mapping[str, int]
    context: int
    kv_per_token: int
    kv: int
    adapter: int
    decode_multiply_adds: Mapping[str, int]
    prefill: int
    prefill_multiply_adds: Mapping[str, int]
    resident: int
    ceilings: tuple[Ceiling, ...]

    @property
    def package_bytes(self) -> int:
        """The whole package."""
        return sum(self.package.values())

    @property
    def decode_read_bytes(self) -> int:
        """All that one decoded token must read."""
        return sum(self.decode_read.values())

    def to_dict(self) -> dict[str, Any]:
        """The sheet as plain JSON values, with its sums and its assumptions."""
        plain = asdict(self)
        plain["ceilings"] = [ceiling._asdict() for ceiling in self.ceilings]
        plain["package_bytes"] = self.package_bytes
        plain["decode_read_bytes"] = self.decode_read_bytes
        plain["assumptions"] = list(ASSUMPTIONS)
        return plain

    def rows(self) -> list[CostRow]:
        """The sheet line by line, for whoever shows it."""

        def several(group: str, values: Mapping[str, int], unit: str) -> list[CostRow]:
            lines = [CostRow(group, name, value, unit) for name, value in values.items() if value]
            return [*lines, CostRow(group, "total", sum(values.values()), unit)]

        prefill = f"prefill, {self.prefill} tokens"
        return [
            *several("package", self.package, "bytes"),
            CostRow("memory", "keys and values per token", self.kv_per_token, "bytes"),
            CostRow("memory", f"keys and values of {self.context} tokens", self.kv, "bytes"),
            CostRow("memory", "adapter", self.adapter, "bytes"),
            CostRow("memory", "predicted, without scratch", self.resident, "bytes"),
            *several("read per token", self.decode_read, "bytes"),
            *several("decode, 1 token", self.decode_multiply_adds, "multiply-adds"),
            *several(prefill, self.prefill_multiply_adds, "multiply-adds"),
            *(CostRow("ceiling", c.chip, c.tokens_per_second, "tokens/s") for c in self.ceilings),
        ]


def cost_sheet(
    config: Phi3Config,
    weights: Weights,
    export: ExportConfig,
    *,
    context: int,
    slot_rank: int | None = None,
    factors: Mapping[str, Adapter] | None = None,
    package_bytes: int | None = None,
) -> CostSheet:
    """What an export will cost, or has cost.

    Args:
        config: the architecture.
        weights: the form of every weight; none is read.
        export: the settings.
        context: tokens that the cache holds.
        slot_rank: rank of the slots; None without slots.
        factors: the adapters of functions mode, by name.
        package_bytes: size of the package's files where they are written; None: estimated.
    """
    of_parts = _weight_bytes(weights)
    sizes = [_numbers(adapter) for adapter in (factors or {}).values()]
    slots = 0
    if slot_rank is not None:
        shapes = slot_shapes(config, slot_rank).values()
        slots = sum(layers * rows * columns for layers, rows, columns in shapes)
    adapter = slots or max(sizes, default=0)  # numbers that every token meets
    # Two tables of float16, half as wide as what is rotated; LongRoPE may need both sets.
    rows = context * (2 if config.uses_long_factors(context) else 1)
    of_parts["rope"] = 2 * rows * (config.rotary_dim // 2) * HALF
    of_parts["adapters"] = sum(sizes) * HALF
    stored = sum(of_parts.values())
    if package_bytes is None:
        of_parts["program"] = _overhead(config, weights, slot_rank is not None, len(sizes))
    else:
        assert package_bytes >= stored, (package_bytes, stored)
        of_parts["program"] = package_bytes - stored
    kv_per_token = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * HALF
    )
    kv = kv_per_token * context
    read = {
        "weights": _decode_weights(config, of_parts, context),
        # Shapes are static: attention reads the whole cache, however short the text is.
        "keys_values": kv,
        "adapter": adapter * HALF,
    }
    total = sum(read.values())
    return CostSheet(
        package=of_parts,
        decode_read=read,
        context=context,
        kv_per_token=kv_per_token,
        kv=kv,
        adapter=adapter * HALF,
        decode_multiply_adds=_multiply_adds(config, 1, context, adapter),
        prefill=export.prefill,
        prefill_multiply_adds=_multiply_adds(config, export.prefill, context, adapter),
        resident=stored + kv + slots * HALF,
        ceilings=tuple(Ceiling(c, gb, gb * 1e9 / total) for c, gb in BANDWIDTHS.items()),
    )


def _weight_bytes(weights: Weights) -> dict[str, int]:
    names = {key: module for module, key in MODULES.items()}
    found = dict.fromkeys(("embedding", *MODULES, "norms", "head"), 0)
    for layer, weight in weights.layers.items():
        key = layer.split(".", 3)[-1]  # behind model.layers.3
        if len(weight.shape) == 1:
            part = "norms"
        elif key in names:
            part = names[key]
        else:
            part = "head" if layer == "lm_head" else "embedding"
        found[part] += weight.nbytes
    return found


def _decode_weights(config: Phi3Config, package: Mapping[str, int], context: int) -> int:
    """Bytes of weights that one token reads: all but the rows of other tokens and positions."""
    row = package["embedding"] // config.vocab_size + package["rope"] // context
    head = package["embedding" if config.tie_word_embeddings else "head"]
    return row + head + package["norms"] + sum(package[module] for module in MODULES)


def _multiply_adds(config: Phi3Config, width: int, context: int, adapter: int) -> dict[str, int]:
    """Of one call that reads `width` tokens and returns one row; `adapter` in numbers."""
    matrices = {name: outputs * inputs for name, (outputs, inputs) in linear_shapes(config).items()}
    projections = sum(n for name, n in matrices.items() if name.startswith("model.layers."))
    # Each query meets all keys and all values of the cache.
    queries = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return {
        "projections": width * projections,
        "attention": width * 2 * queries * context,
        "head": matrices["model.embed_tokens"],
        "adapter": width * adapter,
    }


def _numbers(adapter: Adapter) -> int:
    return sum(change.a.size + change.b.size for change in adapter.layers.values())


def _overhead(config: Phi3Config, weights: Weights, slots: bool, adapters: int) -> int:
    """An estimate: some megabytes beside the gigabytes that are known exactly."""
    block = (ADAPTED_BLOCK_BYTES if slots else BLOCK_BYTES) + adapters * ADAPTED_BLOCK_BYTES
    text = TEXT_BYTES + 2 * config.num_hidden_layers * block
    return text + len(weights.parts()) * RECORD_BYTES
