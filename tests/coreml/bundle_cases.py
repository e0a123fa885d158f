"""A small bundle without a model: every file a real one has, the package's own made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_medphi.config import ExportConfig
from mlx_medphi.coreml.bundle import Bundle
from mlx_medphi.coreml.bundle_base import Base, Licence
from mlx_medphi.coreml.bundle_facts import BundleFacts
from mlx_medphi.coreml.bundle_write import finish_bundle
from mlx_medphi.coreml.manifest import METADATA, PACKAGE, PARITY, AdapterEntry, Verification
from mlx_medphi.coreml.manifest_program import Memory, Quantization, Stored
from mlx_medphi.coreml.sums import write_sums
from mlx_medphi.files import sha256_file
from mlx_medphi.model.config import Phi3Config
from mlx_medphi.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "tests" / "fixtures" / "phi3" / "mini-4k"
TINY = ROOT / "mlx_medphi" / "assets" / "tiny"

FINGERPRINT = "ab" * 32
GRAPH = Verification("graph", {"operations": 12}, {"top1": 1.0, "kl": 1.25e-7})


def read_config(checkpoint: Path) -> Phi3Config:
    return Phi3Config.from_hf(json.loads((checkpoint / "config.json").read_text()))


def signatures(config: Phi3Config, context: int) -> dict[str, Any]:
    """The two functions of a package without slots."""
    cache = (config.num_hidden_layers, config.num_key_value_heads, context, config.head_dim)
    return {
        name: {
            "inputs": [
                {"name": "inputIds", "shape": (1, width), "dtype": "int32"},
                {"name": "position", "shape": (1,), "dtype": "int32"},
                {"name": "causalMask", "shape": (1, 1, width, context), "dtype": "float16"},
                {"name": "lastIndex", "shape": (1,), "dtype": "int32"},
            ],
            "outputs": [{"name": "logits", "shape": (1, 1, config.vocab_size), "dtype": "float16"}],
            "states": [
                {"name": state, "shape": cache, "dtype": "float16"}
                for state in ("keyCache", "valueCache")
            ],
        }
        for name, width in (("decode", 1), ("prefill", 64))
    }


def make_facts(checkpoint: Path = MINI, **changes: Any) -> BundleFacts:
    """Facts of an export with slots of rank 16 and without an adapter."""
    config = read_config(checkpoint)
    context = 512
    values: dict[str, Any] = {
        "name": "notes",
        "config": config,
        "export": ExportConfig(),
        "context": context,
        "base": Base("owner/base", FINGERPRINT, "c0ffee", Licence("mit", None)),
        "tokenizer": Tokenizer.load(checkpoint),
        "functions": signatures(config, context),
        "quantization": Quantization(
            "exported", "block", 4, 64, "integer", Stored(8, 64), Stored(8, 64), {}, None, 0
        ),
        "memory": Memory(1_000_000, 1536, 1536 * context, 50_000, 2_000_000),
        "slot_rank": 16,
        "verification": GRAPH,
        **changes,
    }
    return BundleFacts(**values)


def fill_package(directory: Path) -> None:
    """What an export has written before the bundle is finished."""
    data = directory / PACKAGE / "Data" / "com.apple.CoreML"
    (data / "weights").mkdir(parents=True)
    (directory / PACKAGE / "Manifest.json").write_text('{"fileFormatVersion": "1.0.0"}\n')
    (data / "model.mlmodel").write_bytes(bytes(range(256)))
    (data / "weights" / "weight.bin").write_bytes(bytes(range(256)) * 64)
    (directory / PARITY).write_text('{"schema": 1}\n')


def add_adapter(directory: Path, name: str = "soap", **changes: Any) -> AdapterEntry:
    """A file in the place of an adapter's pack, and its entry."""
    path = directory / "adapters" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(name.encode() * 100)
    values: dict[str, Any] = {
        "name": name,
        "path": f"adapters/{name}.safetensors",
        "sha256": sha256_file(path),
        "rank": 8,
        "functions": {},
        "training": {"rows": 320, "updates": 80, "valid_loss": 0.25, "valid_loss_before": 1.5},
        **changes,
    }
    return AdapterEntry(**values)


def make_bundle(directory: Path, checkpoint: Path = MINI, **changes: Any) -> Bundle:
    """A whole bundle in a new directory, with one adapter."""
    fill_package(directory)
    changes.setdefault("adapters", (add_adapter(directory),))
    return finish_bundle(directory, make_facts(checkpoint, **changes))


def rewrite(bundle: Path, change: Any, *, seal: bool = True) -> None:
    """Change metadata.json as a program would that knows how to write the hashes again."""
    path = bundle / METADATA
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value, indent=2, sort_keys=True), encoding="utf-8")
    if seal:
        write_sums(bundle)
