"""Train Phi-3 on MTS-Dialog with the library: read, split, train, keep, write a note.

    python examples/train_on_mts_dialog.py --data mts-dialog/ --model models/mini --out runs/mts

`--data` is the folder with MTS-Dialog's csv files (CC BY 4.0; Ben Abacha, Yim, Fan and Lin, EACL
2023).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx_medphi as mp
from mlx_medphi.blas import load_blas


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True, help="a directory or a hub id")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iters", type=int, help="updates; three passes without it")
    parser.add_argument("--quantize", type=int, choices=(4, 8))
    parser.add_argument("--max-length", type=int, default=1024)
    arguments = parser.parse_args()
    load_blas()  # before the first name that needs MLX

    # Training rows that share a note or a dialogue with a test row are left out and listed. The
    # data is published and de-identified, so the screen's findings are accepted.
    splits = mp.prepare(mp.load_examples(arguments.data), accept_identifiers=True)
    print(f"{len(splits.train)} rows to train on; left out: {splits.report.dropped_by_reason}")

    quantize = None if arguments.quantize is None else (arguments.quantize, 64)
    model, tokenizer = mp.load(arguments.model, quantize=quantize)
    held_out = splits.test[0]
    config = mp.GenerateConfig(max_tokens=120)

    def note() -> str:
        return mp.generate_note(
            model, tokenizer, held_out.conversation, section=held_out.note.section, config=config
        )

    print(f"before: {note()}")
    result = mp.train(
        model,
        tokenizer,
        splits.train,
        splits.valid,
        out=arguments.out,
        config=mp.TrainConfig(iters=arguments.iters, max_length=arguments.max_length),
        lora=mp.LoRAConfig(rank=16),
    )
    print(f"after:  {note()}")
    print(f"validation loss {result.first_loss:.3f} -> {result.best_loss:.3f}")

    path = arguments.out / "medical_changes.safetensors"
    info = mp.adapter_info(path)
    print(f"stored: {path}, {info.bytes / 1e6:.1f} MB, {info.parameters:,} parameters")


if __name__ == "__main__":
    main()
