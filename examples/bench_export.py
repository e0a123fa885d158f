"""Export a full-size Phi-3-mini to Core ML and measure time, peak memory and size.

    make bench-export

Two checkpoints of random weights with Phi-3-mini's own shapes are made on the first run: 4 bits
(2.1 GB) and float16 (7.6 GB), which is quantised to 4 bits on the way. Both functions are exported
and the saved package is checked part by part (level spec). Each export runs in a process of its
own; plainly copying the package's bytes is timed beside it. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mlx_medphi.blas import load_blas

# What each export may take on two processor cores: seconds, and bytes of resident memory.
LIMITS = {"4bit": (45, 1.0e9), "float16": (90, 1.5e9)}
MADE = {"4bit": ["--bits", "4"], "float16": ["--dtype", "float16"]}
KILOBYTE = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on a Mac


def measure(model: Path, out: Path) -> dict[str, float | int | str]:
    """Export once in this process."""
    import mlx_medphi as mp

    stages: dict[str, float] = {}
    began = time.perf_counter()

    def progress(stage: str, done: int, total: int) -> None:
        stages[stage] = round(time.perf_counter() - began, 1)

    bundle = mp.export(model, out, level="spec", progress=progress)
    seconds = time.perf_counter() - began
    return {
        "seconds": round(seconds, 1),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE,
        "package_bytes": sum(f.stat().st_size for f in bundle.package.rglob("*") if f.is_file()),
        "weights": bundle.manifest.compression,
        "seconds_at_the_end_of": stages,  # type: ignore[dict-item]
    }


def copy_seconds(package: Path, target: Path) -> float:
    """How long plainly copying the package takes."""
    began = time.perf_counter()
    shutil.copytree(package, target)
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return round(seconds, 1)


def run(kind: str, models: Path) -> dict[str, object]:
    """Make the checkpoint where it is missing, export it in a new process, compare with a copy."""
    model, out = models / f"random-mini-{kind}", models / f"bench-{kind}.medphi"
    if not model.exists():
        script = Path(__file__).with_name("make_random_phi3.py")
        made = [sys.executable, str(script), "--size", "mini", *MADE[kind], "--out", str(model)]
        subprocess.run(made, check=True, stdout=sys.stderr)
    shutil.rmtree(out, ignore_errors=True)
    once = [sys.executable, __file__, "--once", str(model), "--out", str(out)]
    done = subprocess.run(once, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    copied = copy_seconds(out / "model" / "Phi3.mlpackage", models / "bench-copy.mlpackage")
    shutil.rmtree(out)
    seconds, memory = LIMITS[kind]
    return {
        **found,
        "copying_the_package_seconds": copied,
        "times_a_copy": round(found["seconds"] / max(copied, 0.1), 1),
        "limit_seconds": seconds,
        "limit_resident_bytes": int(memory),
        "within_limits": found["seconds"] <= seconds and found["peak_resident_bytes"] <= memory,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--only", choices=sorted(LIMITS))
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    load_blas()
    if arguments.once:
        print(json.dumps(measure(arguments.once, arguments.out)))
        return 0
    kinds = [arguments.only] if arguments.only else list(LIMITS)
    found = {kind: run(kind, arguments.models) for kind in kinds}
    machine = f"{platform.system()} {platform.machine()}"
    print(json.dumps({**found, "machine": machine}, indent=2))
    return 0 if all(result["within_limits"] for result in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
