"""Small models with adapters whose B is not zero, and their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_unflatten

from mlx_medphi.config import LoRAConfig
from mlx_medphi.model.checkpoint import build_model, save_model
from mlx_medphi.model.lora import adapted_layers, apply_lora
from mlx_medphi.model.phi3 import Phi3ForCausalLM
from mlx_medphi.model.weights import open_checkpoint
from mlx_medphi.text.tokenizer import Tokenizer

PHI3 = Path(__file__).resolve().parents[1] / "fixtures" / "phi3"
MINI = PHI3 / "mini-4k"

# Logits are within ±4 here; two float32 sums in another order differ by less than this.
SAME = 2e-5
# What is asked of another program's logits.
PARITY = 1e-4


def base(folder: Path = MINI, **how: Any) -> Phi3ForCausalLM:
    """A reference checkpoint, as it is stored or quantised on the way."""
    return build_model(open_checkpoint(folder), **how)


def ids(folder: Path = MINI) -> mx.array:
    """The token ids of a reference checkpoint's logits, (B, T)."""
    tensors: Any = mx.load(str(folder / "reference.safetensors"))
    result: mx.array = tensors["ids"]
    return result


def rows(folder: Path = MINI) -> list[list[int]]:
    """The same ids as token rows."""
    result: list[list[int]] = ids(folder).tolist()  # type: ignore[assignment]
    return result


def reference_logits(file: Path) -> npt.NDArray[np.float32]:
    tensors: Any = mx.load(str(file))
    return np.array(tensors["logits"])


def logits(model: Phi3ForCausalLM, tokens: mx.array | None = None) -> npt.NDArray[np.float32]:
    return np.array(model(ids() if tokens is None else tokens).astype(mx.float32))


def fill(model: Phi3ForCausalLM, size: float = 0.05, seed: int = 1) -> Phi3ForCausalLM:
    """Give every adapted layer a B that is not zero and, for DoRA, magnitudes that moved."""
    for i, (_, layer) in enumerate(adapted_layers(model)):
        key = mx.random.key(1000 * seed + i)
        layer.lora_b = size * mx.random.normal(layer.lora_b.shape, key=key)
        if layer.is_dora:
            layer.m = layer.m * (1 + 0.1 * mx.random.normal(layer.m.shape, key=key))
    mx.eval(model.parameters())
    return model


def adapted(
    folder: Path = MINI, how: dict[str, Any] | None = None, size: float = 0.05, **config: Any
) -> Phi3ForCausalLM:
    """A reference checkpoint with an adapter that changes it."""
    model = base(folder, **(how or {}))
    apply_lora(model, LoRAConfig(**{"rank": 4, "dropout": 0.0, **config}), seed=3)
    return fill(model, size)


def save_base(
    directory: Path,
    folder: Path = MINI,
    dtype: str | None = None,
    quantize: tuple[int, int] | None = None,
    scales: mx.Dtype | None = None,
) -> Path:
    """A reference checkpoint stored in another dtype, or quantised with scales of some dtype."""
    model = base(folder, quantize=quantize)
    if scales is not None:
        floats = [
            (name, array if array.dtype == mx.uint32 else array.astype(scales))
            for name, array in tree_flatten(model.parameters())
        ]
        model.update(tree_unflatten(floats))
    save_model(model, Tokenizer.load(folder), directory, dtype=dtype)
    return directory
