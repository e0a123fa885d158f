"""Small bases and adapters to be exported, and what lies in a folder afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_medphi.config import ExportConfig, LoRAConfig
from mlx_medphi.model.adapter import save_adapter
from mlx_medphi.model.checkpoint import build_model, save_model
from mlx_medphi.model.lora import adapted_layers, apply_lora
from mlx_medphi.model.weights import open_checkpoint
from mlx_medphi.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "tests" / "fixtures" / "phi3" / "mini-4k"
TINY = ROOT / "mlx_medphi" / "assets" / "tiny"


def settings(**changes: Any) -> ExportConfig:
    """Small extents, and groups that divide the widths of mini-4k."""
    return ExportConfig(**{"context": 64, "prefill": 16, "group_size": 32, **changes})


def make_adapter(
    path: Path,
    base: Path = MINI,
    *,
    quantize: tuple[int, int] | None = None,
    seed: int = 1,
    size: float = 0.05,
    **lora: Any,
) -> Path:
    """An adapter whose B is not zero, as training on `base` would leave it.

    Args:
        path: a file ending in .safetensors, or a directory.
        base: what it is trained on.
        quantize: (bits, group size) with which the base is quantised on loading.
        seed: other numbers.
        size: how large B is.
        lora: settings other than rank 4 on all projections.
    """
    model = build_model(open_checkpoint(base), quantize=quantize)
    apply_lora(model, LoRAConfig(**{"rank": 4, "dropout": 0.0, **lora}), seed=seed)
    for i, (_, layer) in enumerate(adapted_layers(model)):
        key = mx.random.key(1000 * seed + i)
        layer.lora_b = size * mx.random.normal(layer.lora_b.shape, key=key)
    save_adapter(model, path)
    return path


def quantised_base(folder: Path, bits: int, group: int = 32, base: Path = MINI) -> Path:
    """A base that MLX has quantised and stored."""
    model = build_model(open_checkpoint(base), quantize=(bits, group))
    save_model(model, Tokenizer.load(base), folder)
    return folder


def one_block(folder: Path) -> Path:
    """The first block of mini-4k with its tokenizer: what takes the least time to export."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(MINI / name, folder / name)
    config = json.loads((MINI / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    tensors: Any = mx.load(str(MINI / "model.safetensors"))
    kept = {name: array for name, array in tensors.items() if ".layers.1." not in name}
    mx.save_safetensors(str(folder / "model.safetensors"), kept)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of every file below a folder, hidden ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def flip(path: Path, at: int | None = None) -> None:
    """Change one bit of a file, in its middle unless told where."""
    data = bytearray(path.read_bytes())
    place = len(data) // 2 if at is None else at
    data[place] ^= 1
    path.write_bytes(bytes(data))


def largest_difference(first: Any, second: Any) -> float:
    """Of two arrays."""
    return float(np.abs(np.asarray(first, np.float64) - np.asarray(second, np.float64)).max())
