"""Which base model this is: a short string that an adapter carries to its base.

The fingerprint is the SHA-256 of, in this order:

1. the text `medphi-base-1` and a line feed;
2. the architecture as canonical JSON (sorted keys, no spaces) with a line feed: every field of
   `Phi3Config`, floats written with nine digits so that all machines agree;
3. for each tensor the model uses, sorted by name: the line `name dtype shape` (safetensors' dtype
   name, extents joined by `x`), then bytes: all of them up to 64 KiB, else 16 samples of 4 KiB
   whose starts are `k · (bytes − 4096) // 15` for k = 0 … 15.

It does not depend on file names, on the sharding, on the form of config.json, or on the dtype a
model is computed in. Sampling tells trained models apart and takes less than a second for 8 GB; it
is not a proof that every byte is the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from mlx_medphi.errors import CheckpointError
from mlx_medphi.model.weights import Checkpoint, StoredTensor, open_checkpoint

__all__ = ["fingerprint", "quantized_as", "short_fingerprint"]

# What a quantisation on loading adds.
_SUFFIX = re.compile(r"-q(\d{1,2})g(\d{1,4})")

WHOLE_BYTES = 64 * 1024
SAMPLES, SAMPLE_BYTES = 16, 4096


def fingerprint(base: Checkpoint | Path, quantize: tuple[int, int] | None = None) -> str:
    """The fingerprint of a checkpoint, in hex.

    Args:
        base: an opened checkpoint or its path.
        quantize: (bits, group size) with which the weights are quantised when they are loaded; it
            is appended, as in `…-q4g64`, because an adapter belongs to one quantisation.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
    """
    checkpoint = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    digest = hashlib.sha256(b"medphi-base-1\n")
    shape = _plain(asdict(checkpoint.config))
    architecture = json.dumps(shape, sort_keys=True, separators=(",", ":"))
    digest.update(f"{architecture}\n".encode())
    handles: dict[Path, BinaryIO] = {}
    try:
        for name, tensor in sorted(checkpoint.tensors.items()):
            extents = "x".join(map(str, tensor.info.shape))
            digest.update(f"{name} {tensor.info.dtype} {extents}\n".encode())
            if tensor.file not in handles:
                handles[tensor.file] = tensor.file.open("rb")
            for piece in _samples(handles[tensor.file], tensor):
                digest.update(piece)
    except OSError as exc:
        raise CheckpointError(f"{checkpoint.path}: cannot be read ({exc.strerror or exc})") from exc
    finally:
        for handle in handles.values():
            handle.close()
    suffix = f"-q{quantize[0]}g{quantize[1]}" if quantize else ""
    return digest.hexdigest() + suffix


def quantized_as(found: str, base: str) -> tuple[int, int] | None:
    """(bits, group size) when `found` is the base `base` quantised on loading; else None."""
    suffix = _SUFFIX.fullmatch(found.removeprefix(base)) if found.startswith(base) else None
    return None if suffix is None else (int(suffix[1]), int(suffix[2]))


def short_fingerprint(text: str) -> str:
    """For messages: the first sixteen digits, and how the base was quantised on loading."""
    digits, dash, suffix = text.partition("-")
    return f"{digits[:16]}…{dash}{suffix[:16]}"


def _samples(handle: BinaryIO, tensor: StoredTensor) -> list[bytes]:
    size = tensor.info.nbytes
    if size <= WHOLE_BYTES:
        ranges = [(0, size)]
    else:
        last = SAMPLES - 1
        ranges = [(k * (size - SAMPLE_BYTES) // last, SAMPLE_BYTES) for k in range(SAMPLES)]
    pieces = []
    for begin, count in ranges:
        handle.seek(tensor.offset + begin)
        pieces.append(handle.read(count))
    return pieces


def _plain(value: Any) -> Any:
    # Nine digits of a float: the last ones of a logarithm differ between machines.
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
