"""A plain checkpoint quantised by MLX into another one on disk, a few rows at a time.

Codes, scales and biases are those that loading the checkpoint quantised gives. The work is shared
by two threads; memory holds a few blocks of weights, never a model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.weight_blocks import NUMPY, all_finite, beyond_float16, read_rows
from mlx_medphi.coreml.weights import export_bits, plain_bits
from mlx_medphi.errors import ExportError, capped
from mlx_medphi.files import write_json
from mlx_medphi.model.config import GROUPS, Quantization
from mlx_medphi.model.layout import linear_shapes
from mlx_medphi.model.shards import (
    Piece,
    ShardSet,
    TensorSpec,
    array_bytes,
    header_bytes,
    row_blocks,
    write_pieces,
)
from mlx_medphi.model.weights import Checkpoint, StoredTensor, open_checkpoint

__all__ = ["check_groups", "quantise"]

THREADS = 2
# Blocks begun beyond those that the threads work on, so that writing never keeps them waiting.
AHEAD = 2
METADATA = {"format": "pt"}

Progress = Callable[[int, int], None]
Made = tuple[bytes, bytes, bytes]


@dataclass(frozen=True)
class _Job:
    """Some rows of one layer to be quantised."""

    layer: str
    start: int
    stop: int
    bits: int
    group: int


def check_groups(checkpoint: Checkpoint, config: ExportConfig) -> dict[str, tuple[int, int]]:
    """(bits, group size) of each layer of a plain checkpoint that is to be quantised.

    Raises:
        ExportError: a layer's width is no multiple of the group.
    """
    bits, group = export_bits(checkpoint, config), config.group_size
    shapes = linear_shapes(checkpoint.config)
    wanted = {layer: plain_bits(layer, bits, config) for layer in shapes}
    forms: dict[str, tuple[int, int]] = {
        layer: (own, group) for layer, own in wanted.items() if own != 16
    }
    odd = [f"{layer} (width {shapes[layer][1]})" for layer in forms if shapes[layer][1] % group]
    if not odd:
        return forms
    fitting = [g for g in GROUPS if not any(shapes[layer][1] % g for layer in forms)]
    way = (
        f"take a group size of {' or '.join(map(str, fitting))}"
        if fitting
        else "no other group size does either; take one scale for each row (scheme 'channel')"
    )
    raise ExportError(
        f"{checkpoint.path}: groups of {group} do not divide the width of {len(odd)} "
        f"layer{'s' if len(odd) > 1 else ''}: {capped(odd)}; {way}, or 16 bits"
    )


def quantise(
    checkpoint: Checkpoint,
    config: ExportConfig,
    directory: Path,
    progress: Progress | None = None,
    *,
    forms: Mapping[str, tuple[int, int]] | None = None,
) -> Checkpoint:
    """Write a plain checkpoint as MLX quantises it: config.json and model.safetensors.

    Args:
        checkpoint: weights in float32, float16 or bfloat16, which scales and biases keep.
        config: bits, group size, and the bits of embedding and head.
        directory: an empty directory; it gets no tokenizer.
        progress: called with the bytes written so far and in all.
        forms: (bits, group size) of each layer to quantise, where not `check_groups` decides.

    Returns:
        The checkpoint in `directory`.

    Raises:
        ExportError: a group does not divide a layer's width, or a weight is not finite.
        OSError: the disk is full or cannot be written.
    """
    assert checkpoint.config.quantization is None and config.scheme == "block"
    forms = check_groups(checkpoint, config) if forms is None else forms
    assert forms, "nothing is to be quantised"
    section = _section(checkpoint, forms, export_bits(checkpoint, config), config.group_size)
    raw = {**checkpoint.raw_config, "quantization": section, "quantization_config": section}
    write_json(directory / "config.json", raw)
    pool = ThreadPoolExecutor(THREADS)
    try:
        pieces = _pieces(checkpoint, forms, pool)
        header = header_bytes([spec for piece in pieces for spec in piece.tensors], METADATA)
        write_pieces(directory / "model.safetensors", header, _watched(pieces, progress))
    finally:
        # An error must not wait for blocks that nobody takes.
        pool.shutdown(cancel_futures=True)
    return open_checkpoint(directory)


def _pieces(
    checkpoint: Checkpoint, forms: Mapping[str, tuple[int, int]], pool: Executor
) -> list[Piece]:
    """The new file's tensors, those of a layer side by side; they must be made in this order."""
    # Each thread has a queue of its own, on the device on which a model is quantised on loading:
    # kernels of others may round the last bit otherwise.
    stream = mx.new_thread_local_stream(mx.default_device())

    def work(job: _Job) -> Made:
        with mx.stream(stream):
            return _quantised(checkpoint.tensors[f"{job.layer}.weight"], job)

    shards = ShardSet(checkpoint.files)
    layers = [name.removesuffix(".weight") for name in checkpoint.tensors]
    jobs = [
        job for layer in layers if layer in forms for job in _jobs(shards, layer, *forms[layer])
    ]
    made = _in_order(pool, work, jobs)
    return [
        _made_piece(shards, made, layer, *forms[layer])
        if layer in forms
        else _copied_piece(shards, f"{layer}.weight")
        for layer in layers
    ]


def _section(
    checkpoint: Checkpoint, forms: Mapping[str, tuple[int, int]], bits: int, group: int
) -> dict[str, Any]:
    """What config.json says about the quantised layers."""
    found = {layer: forms.get(layer) for layer in linear_shapes(checkpoint.config)}
    others = {layer: form for layer, form in found.items() if form != (bits, group)}
    return Quantization(bits, group, others).to_mlx()


def _jobs(shards: ShardSet, layer: str, bits: int, group: int) -> Iterator[_Job]:
    for start, stop in row_blocks(shards.info(f"{layer}.weight").shape):
        yield _Job(layer, start, stop, bits, group)


def _quantised(tensor: StoredTensor, job: _Job) -> Made:
    raw = np.frombuffer(read_rows(tensor, job.start, job.stop), NUMPY[tensor.info.dtype])
    stored = mx.array(raw.reshape(job.stop - job.start, -1))
    weight = stored.view(mx.bfloat16) if tensor.info.dtype == "BF16" else stored
    # MLX's quantiser passes over what is no number.
    if not all_finite(raw):
        raise beyond_float16(job.layer, float(np.array(mx.abs(weight).max().astype(mx.float32))))
    codes, scales, biases = map(array_bytes, mx.quantize(weight, job.group, job.bits))
    return codes, scales, biases


def _in_order(pool: Executor, work: Callable[[_Job], Made], jobs: Iterable[_Job]) -> Iterator[Made]:
    """The results of all jobs in their order, a few of them begun ahead."""
    begun: deque[Future[Made]] = deque()
    for job in jobs:
        begun.append(pool.submit(work, job))
        if len(begun) > THREADS + AHEAD:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _made_piece(shards: ShardSet, made: Iterator[Made], layer: str, bits: int, group: int) -> Piece:
    """Codes, scales and biases of a layer, whose blocks come next in `made`."""
    info = shards.info(f"{layer}.weight")
    outputs, inputs = info.shape
    specs = (
        TensorSpec(f"{layer}.weight", "U32", (outputs, inputs * bits // 32)),
        TensorSpec(f"{layer}.scales", info.dtype, (outputs, inputs // group)),
        TensorSpec(f"{layer}.biases", info.dtype, (outputs, inputs // group)),
    )

    def chunks() -> Iterator[bytes]:
        scales, biases = [], []
        for _ in row_blocks(info.shape):
            codes, scale, bias = next(made)
            scales.append(scale)
            biases.append(bias)
            yield codes
        yield from scales
        yield from biases

    return Piece(specs, chunks)


def _copied_piece(shards: ShardSet, name: str) -> Piece:
    info = shards.info(name)
    return Piece((TensorSpec(name, info.dtype, info.shape),), lambda: shards.raw(name))


def _watched(pieces: Sequence[Piece], progress: Progress | None) -> Iterator[Piece]:
    """The same pieces, their bytes reported as they are written."""
    total, done = sum(piece.nbytes for piece in pieces), 0

    def counted(piece: Piece) -> Iterator[bytes]:
        nonlocal done
        for chunk in piece.chunks():
            yield chunk
            done += len(chunk)
            if progress is not None:
                progress(done, total)

    for piece in pieces:
        yield Piece(piece.tensors, partial(counted, piece))
