"""Measure a full-size Phi-3-mini in 4 bits: load it, train one step of 64 tokens, write 4 tokens.

    make bench-full-size

The weights are random (made on the first run, 2.1 GB), the shapes and bytes are Phi-3-mini's own.
Computes in float32, because MLX's CPU kernels are some eight times slower in bfloat16. Prints one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

from mlx_medphi.blas import load_blas

TOKENS, SUPERVISED, NEW_TOKENS = 64, 32, 4


def measure(directory: Path) -> dict[str, object]:
    """Times in seconds and peaks in bytes of the three things a user does."""
    import mlx.core as mx
    import numpy as np

    import mlx_medphi as mp
    from mlx_medphi.model.generate import generate_ids
    from mlx_medphi.model.lora import apply_lora
    from mlx_medphi.model.phi3 import parameter_count
    from mlx_medphi.text.chat import EncodedExample
    from mlx_medphi.text.packing import plan
    from mlx_medphi.training.step import Trainer

    times: dict[str, float] = {}

    def timed(name: str, began: float) -> None:
        times[name] = round(time.perf_counter() - began, 2)

    began = time.perf_counter()
    model, _ = mp.load(directory, dtype="float32")
    timed("load_seconds", began)
    ids = np.random.default_rng(0).integers(3, 32000, TOKENS).tolist()
    began = time.perf_counter()
    settings = mp.GenerateConfig(max_tokens=NEW_TOKENS)
    written = list(generate_ids(model, ids[:8], settings, stop_ids=()))
    timed("generate_seconds", began)
    apply_lora(model, mp.LoRAConfig())
    mask = [0] * (TOKENS - SUPERVISED) + [1] * SUPERVISED
    batches = list(plan([EncodedExample("random", ids, mask)], rows=1, seed=0).epoch(0))
    trainer = Trainer(model, mp.TrainConfig(), updates=1)
    began = time.perf_counter()
    update = trainer.update(batches, 1)
    timed("training_step_seconds", began)
    kilobyte = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on a Mac
    return {
        "parameters": parameter_count(model),
        "weights_bytes": sum(f.stat().st_size for f in directory.glob("*.safetensors")),
        "tokens_trained": TOKENS,
        "tokens_written": len(written),
        "loss": round(update.loss, 3),
        **times,
        "peak_mlx_bytes": mx.get_peak_memory(),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte,
        "machine": f"{platform.system()} {platform.machine()}, {mx.default_device()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/random-mini-4bit"))
    arguments = parser.parse_args()
    load_blas()
    if not arguments.model.exists():
        script = Path(__file__).with_name("make_random_phi3.py")
        made = [sys.executable, str(script), "--size", "mini", "--bits", "4"]
        subprocess.run([*made, "--out", str(arguments.model)], check=True, stdout=sys.stderr)
    print(json.dumps(measure(arguments.model), indent=2))


if __name__ == "__main__":
    main()
