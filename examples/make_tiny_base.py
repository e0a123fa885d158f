"""Make the tiny Phi-3-shaped base of `medphi demo` from nothing.

    python examples/make_tiny_base.py --out mlx_medphi/assets/tiny --run runs/tiny-base

It learns to read and copy from made-up conversations by the library's own full-parameter training,
in about half an hour on two CPU cores. One seed on one machine gives one set of weights.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Both scripts must find the package, and each other, without being installed.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from mlx_medphi.blas import load_blas  # noqa: E402

load_blas()  # before MLX is imported, or it is of no use

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from make_tiny_tokenizer import TAIL, write_tokenizer  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlx_medphi.config import TrainConfig  # noqa: E402
from mlx_medphi.data import synthetic_pretraining as pretraining  # noqa: E402
from mlx_medphi.data.examples import Example  # noqa: E402
from mlx_medphi.files import atomic_path, sha256_file, write_json, write_text  # noqa: E402
from mlx_medphi.model.config import Phi3Config  # noqa: E402
from mlx_medphi.model.phi3 import Phi3ForCausalLM  # noqa: E402
from mlx_medphi.text.tokenizer import Tokenizer  # noqa: E402
from mlx_medphi.training.events import Evaluated, Event, Stepped  # noqa: E402
from mlx_medphi.training.loop import train  # noqa: E402

Matrix = Any  # (rows, columns) float32 numpy array

HIDDEN, LAYERS, HEADS, INNER, CONTEXT = 192, 4, 4, 512, 1024
REPEAT_UPDATES, REPEAT_ROWS = 100, 12
READ_ROWS = 4
LEARNING_RATE = 2e-3
WARMUP_UPDATES = 60
VALID_ROWS = 32

# The start: how strongly a value head copies, how far apart the pieces lie, what all pieces share.
COPY, SPREAD, SHARED = 0.15, 0.04, 0.2
# Heads of the first block and how many tokens back each looks at the start.
LOOK_BACK = ((0, 1), (1, 1), (2, 2))
SHARPNESS, PAIRS = 5.0, 4


def raw_config(vocab_size: int, end_of_text: int) -> dict[str, Any]:
    """config.json in the form Phi-3-mini-4k was published with."""
    return {
        "architectures": ["Phi3ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": end_of_text,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "max_position_embeddings": CONTEXT,
        "model_type": "phi3",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "original_max_position_embeddings": CONTEXT,
        "pad_token_id": end_of_text,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def start(config: Phi3Config, seed: int) -> list[tuple[str, mx.array]]:
    """Weights that already lean towards copying, so that half an hour on two cores is enough.

    In every block value and output projections begin near each other's transpose: what a head
    looks at, it copies (a mimetic start, Trockman and Kolter 2023). Some heads of the first block
    begin by looking one or two tokens back. All of it is trained.
    """
    rng = np.random.default_rng(seed)

    def random(rows: int, columns: int, gain: float = 1.0) -> Matrix:
        return (gain / math.sqrt(columns) * rng.standard_normal((rows, columns))).astype(np.float32)

    size = config.hidden_size
    pieces = (SPREAD * rng.standard_normal((config.vocab_size, size))).astype(np.float32)
    pieces[:, 0] = SHARED
    weights: list[tuple[str, Matrix]] = [("model.embed_tokens.weight", pieces)]
    for layer in range(config.num_hidden_layers):
        query, key = random(size, size), random(size, size)
        basis = np.linalg.qr(rng.standard_normal((size, size)))[0].astype(np.float32)
        value = 0.9 * basis + 0.3 * random(size, size)
        output = COPY * (0.9 * basis.T + 0.3 * random(size, size))
        if layer == 0:
            look_back(query, key, config)
            for head, _ in LOOK_BACK:
                # Not the piece's own direction: "before me stood X" must not read as "I am X".
                output[:, _head(head, config)] = COPY * random(
                    size, config.head_dim, math.sqrt(config.head_dim / size)
                )
        name = f"model.layers.{layer}."
        down_gain = 0.3 / math.sqrt(2 * config.num_hidden_layers)
        weights += [
            (f"{name}self_attn.qkv_proj.weight", np.concatenate([query, key, value])),
            (f"{name}self_attn.o_proj.weight", output),
            (f"{name}mlp.gate_up_proj.weight", random(2 * config.intermediate_size, size)),
            (f"{name}mlp.down_proj.weight", random(size, config.intermediate_size, down_gain)),
        ]
    return [(name, mx.array(array)) for name, array in weights]


def look_back(query: Matrix, key: Matrix, config: Phi3Config) -> None:
    """Make some heads look a fixed distance back, in place.

    All pieces share their first coordinate. A key made from it alone is the same everywhere, and
    so is a query turned back by that many tokens: their product depends on the distance only.
    """
    half = config.head_dim // 2
    shared = SHARED / math.sqrt(SPREAD**2 + SHARED**2 / config.hidden_size)  # after the norm
    angle = config.rope_theta ** (-np.arange(half) / half)
    for head, distance in LOOK_BACK:
        rows = _head(head, config)
        query[rows] *= 0.2
        key[rows] *= 0.2
        for pair in range(PAIRS):
            first, second = rows.start + pair, rows.start + half + pair
            key[first, 0], key[second, 0] = SHARPNESS / shared, 0.0
            query[first, 0] = SHARPNESS / shared * math.cos(distance * angle[pair])
            query[second, 0] = -SHARPNESS / shared * math.sin(distance * angle[pair])


def _head(head: int, config: Phi3Config) -> slice:
    return slice(head * config.head_dim, (head + 1) * config.head_dim)


def make_base(out: Path, run: Path, updates: int, seed: int) -> None:
    """Write the tokenizer into `out`, train in two stages under `run`, write the model too."""
    digest = write_tokenizer(out, CONTEXT)
    tokenizer = Tokenizer.load(out)
    raw = raw_config(tokenizer.vocab_size, tokenizer.eos_id)
    config = Phi3Config.from_hf(raw)
    model = Phi3ForCausalLM(config)
    model.load_weights(start(config, seed), strict=False)  # the norms keep their ones
    stages: tuple[tuple[str, Callable[[int, int], list[Example]], int, int], ...] = (
        ("repeat", pretraining.repeating, REPEAT_UPDATES, REPEAT_ROWS),
        ("read", pretraining.reading, updates, READ_ROWS),
    )
    for name, make, count, rows in stages:
        settings = TrainConfig(
            iters=count,
            learning_rate=LEARNING_RATE,
            final_learning_rate=0.02,
            warmup=min(0.5, WARMUP_UPDATES / count),
            batch_size=rows,
            max_length=CONTEXT,
            eval_every=min(200, count),
            seed=seed,
        )
        examples, valid = make(count * rows, seed + 1), make(VALID_ROWS, seed + 2)
        train(
            model,
            tokenizer,
            examples,
            valid,
            out=run / name,
            config=settings,
            lora=None,
            on_event=_Printer(name),
        )
    save(model, raw, out, digest, updates, seed)


class _Printer:
    def __init__(self, stage: str) -> None:
        self.stage = stage

    def __call__(self, event: Event) -> None:
        if isinstance(event, Evaluated) or (isinstance(event, Stepped) and event.step % 50 == 0):
            print(self.stage, event, flush=True)


def save(
    model: Phi3ForCausalLM, raw: dict[str, Any], out: Path, digest: str, updates: int, seed: int
) -> None:
    """Write the float16 weights, both configurations and the page that says what this is."""
    weights = {name: array.astype(mx.float16) for name, array in tree_flatten(model.parameters())}
    with atomic_path(out / "model.safetensors") as temporary:
        mx.save_safetensors(str(temporary), weights, metadata={"format": "pt"})
    write_json(out / "config.json", raw)
    eos = raw["eos_token_id"]
    stops = [eos + TAIL.index(name) for name in ("<|endoftext|>", "<|assistant|>", "<|end|>")]
    write_json(
        out / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": stops, "pad_token_id": eos},
    )
    card = CARD.format(
        count=sum(array.size for array in weights.values()),
        layers=LAYERS,
        heads=HEADS,
        hidden=HIDDEN,
        context=CONTEXT,
        updates=updates,
        seed=seed,
        tokenizer=digest,
        model=sha256_file(out / "model.safetensors"),
    )
    write_text(out / "README.md", card)


CARD = """# The tiny base of `medphi demo`

A made-up model for a made-up task: {count:,} parameters in Phi-3's architecture ({layers} blocks,
{heads} heads, width {hidden}, {context} tokens), float16, with a tokenizer of Phi-3's structure and
special tokens. It is no language model and knows no medicine.

Everything it has read was generated by this project (`mlx_medphi/data/synthetic_pretraining.py`):
people who do not exist, drugs with invented names, doses that mean nothing. It repeats words,
answers questions about a conversation, lists its facts and writes letters and labels. It has never
seen a note; that is what the demo's adapter teaches it.

Made by `python examples/make_tiny_base.py --updates {updates} --seed {seed}`.

| file | sha256 |
|---|---|
| tokenizer.json | {tokenizer} |
| model.safetensors | {model} |
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished base")
    parser.add_argument(
        "--run", type=Path, required=True, help="new folder for the two training runs"
    )
    parser.add_argument("--updates", type=int, default=1000, help="updates of the reading stage")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_base(arguments.out, arguments.run, arguments.updates, arguments.seed)


if __name__ == "__main__":
    main()
