"""A plain checkpoint seen as it is when its weights are quantised on loading.

An adapter trained on such a model belongs to the quantised numbers, so these are what a fuse must
start from. They are made again from the plain weights, a few rows at a time, as MLX makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx

from mlx_medphi.errors import CheckpointError
from mlx_medphi.files import SafetensorsHeader, TensorInfo
from mlx_medphi.model.config import Quantization
from mlx_medphi.model.layout import linear_shapes
from mlx_medphi.model.quantize import check_format
from mlx_medphi.model.shards import ShardSet, TensorSpec, array_bytes, row_blocks
from mlx_medphi.model.weights import Checkpoint, StoredTensor

__all__ = ["QuantizedShards", "quantized_on_load"]

PARTS = ("weight", "scales", "biases")


class QuantizedShards(ShardSet):
    """The weight files of a plain checkpoint, with codes, scales and biases for its weights."""

    def __init__(self, checkpoint: Checkpoint, quantize: tuple[int, int]) -> None:
        super().__init__(checkpoint.files)
        self._stored = ShardSet(checkpoint.files)
        self._bits, self._group = quantize
        self._layers = set(_layers(checkpoint, quantize))
        self.files = {path: self._quantized(header) for path, header in self.files.items()}
        self._home = {name: path for path, header in self.files.items() for name in header.tensors}
        # One block, because codes, scales and biases are asked for one after the other.
        self._last: tuple[tuple[str, int, int], tuple[mx.array, ...]] | None = None
        # On the device on which the model was quantised for training, also when a fuse adds on
        # another: kernels may round the last bit otherwise.
        self._device = mx.default_device()

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> mx.array:
        layer, _, part = name.rpartition(".")
        if layer not in self._layers:
            return self._stored.rows(name, start, stop)
        stop = self.info(name).shape[0] if stop is None else stop
        key = (layer, start, stop)
        if self._last is None or self._last[0] != key:
            weight = self._stored.rows(f"{layer}.weight", start, stop)
            made = mx.quantize(weight, self._group, self._bits, stream=self._device)
            mx.eval(made)
            self._last = key, tuple(made)
        return self._last[1][PARTS.index(part)]

    def raw(self, name: str) -> Iterator[bytes]:
        layer = name.rpartition(".")[0]
        if layer not in self._layers:
            yield from self._stored.raw(name)
            return
        for start, stop in row_blocks(self._stored.info(f"{layer}.weight").shape):
            yield array_bytes(self.rows(name, start, stop))

    def _quantized(self, header: SafetensorsHeader) -> SafetensorsHeader:
        tensors: dict[str, TensorInfo] = {}
        end = 0
        for name, info in sorted(header.tensors.items(), key=lambda item: item[1].begin):
            for spec in self._forms(name, info):
                tensors[spec.name] = TensorInfo(spec.dtype, spec.shape, end, end + spec.nbytes)
                end += spec.nbytes
        return replace(header, tensors=tensors)

    def _forms(self, name: str, info: TensorInfo) -> list[TensorSpec]:
        layer, _, part = name.rpartition(".")
        if layer not in self._layers or part != "weight":
            return [TensorSpec(name, info.dtype, info.shape)]
        outputs, inputs = info.shape
        small = (outputs, inputs // self._group)
        return [
            TensorSpec(name, "U32", (outputs, inputs * self._bits // 32)),
            TensorSpec(f"{layer}.scales", info.dtype, small),
            TensorSpec(f"{layer}.biases", info.dtype, small),
        ]


def quantized_on_load(
    checkpoint: Checkpoint, quantize: tuple[int, int]
) -> tuple[Checkpoint, QuantizedShards]:
    """A plain checkpoint as a quantised one, and its files seen so.

    Raises:
        CheckpointError: it is quantised already, or not a format of MLX.
    """
    check_format(quantize)
    if checkpoint.config.quantization is not None:
        raise CheckpointError(f"{checkpoint.path}: is already quantised, on loading it cannot be")
    shards = QuantizedShards(checkpoint, quantize)
    quantized = _layers(checkpoint, quantize)
    plain = {name: None for name in linear_shapes(checkpoint.config) if name not in quantized}
    section = Quantization(*quantize, plain)
    tensors = {
        name: StoredTensor(path, info, header.data_start + info.begin)
        for path, header in shards.files.items()
        for name, info in header.tensors.items()
        if _is_used(name, checkpoint)
    }
    raw = {**checkpoint.raw_config}
    raw["quantization"] = raw["quantization_config"] = section.to_mlx()
    config = replace(checkpoint.config, quantization=section)
    return Checkpoint(checkpoint.path, config, raw, dict(sorted(tensors.items()))), shards


def _is_used(name: str, checkpoint: Checkpoint) -> bool:
    layer, _, part = name.rpartition(".")
    made = part in PARTS and f"{layer}.weight" in checkpoint.tensors
    return name in checkpoint.tensors or made


def _layers(checkpoint: Checkpoint, quantize: tuple[int, int]) -> list[str]:
    """The layers that `quantize_model` quantises."""
    shapes = linear_shapes(checkpoint.config)
    return [name for name, (_, inputs) in shapes.items() if inputs % quantize[1] == 0]
