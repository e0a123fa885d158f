"""Make a Phi-3 checkpoint with random weights, for trying the commands and for measurements.

    python examples/make_random_phi3.py --size 36m --tokenizer DIR --out models/random-36m
    python examples/make_random_phi3.py --size mini --bits 4 --out models/random-mini-4bit

The weights know nothing: notes written by such a model are noise until it is trained, and nearly
noise after it. `--tokenizer` is a folder with Phi-3's tokenizer.json and tokenizer_config.json,
copied byte for byte; without it the embedded model's small tokenizer is taken.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import mlx.core as mx

SIZES = {
    # hidden, intermediate, layers, heads, kv heads: mini is Phi-3-mini-4k-instruct's own shape
    "36m": (320, 896, 12, 5, 5),
    "mini": (3072, 8192, 32, 32, 32),
}
TINY = Path(__file__).parent.parent / "mlx_medphi" / "assets" / "tiny"
GROUP = 64
VOCABULARY = 32064


def config(size: str, bits: int | None, dtype: str) -> dict[str, object]:
    """config.json in the form Phi-3-mini-4k-instruct was published with."""
    hidden, intermediate, layers, heads, kv_heads = SIZES[size]
    values: dict[str, object] = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "torch_dtype": dtype,
    }
    if bits is not None:
        values["quantization"] = {"group_size": GROUP, "bits": bits}
    return values


def linear(
    name: str, outputs: int, inputs: int, bits: int | None, dtype: mx.Dtype, key: mx.array
) -> dict[str, mx.array]:
    """A weight with standard deviation 0.02, or random codes of the same spread."""
    if bits is None:
        return {
            f"{name}.weight": (0.02 * mx.random.normal((outputs, inputs), key=key)).astype(dtype)
        }
    codes = mx.random.randint(-(2**31), 2**31 - 1, (outputs, inputs * bits // 32), key=key)
    levels = 2**bits - 1
    step = 0.02 * 12**0.5 / levels  # uniform over `levels` steps has this standard deviation
    # As MLX's quantiser leaves them: zero is a code, and half of the scales are negative.
    signs = 1 - 2 * mx.random.randint(0, 2, (outputs, inputs // GROUP), key=key)
    scales = (step * signs).astype(dtype)
    return {
        f"{name}.weight": codes.view(mx.uint32),
        f"{name}.scales": scales,
        f"{name}.biases": -(2 ** (bits - 1)) * scales,
    }


def write_weights(size: str, bits: int | None, dtype: mx.Dtype, seed: int, out: Path) -> None:
    """One shard per eight layers, so that nothing larger is ever in memory."""
    hidden, intermediate, layers, heads, kv_heads = SIZES[size]
    head_dim = hidden // heads
    keys = iter(mx.random.split(mx.random.key(seed), 4 * layers + 2))
    norm = mx.ones(hidden, dtype=dtype)
    shards: list[dict[str, mx.array]] = []
    for start in range(0, layers, 8):
        shard: dict[str, mx.array] = {}
        for i in range(start, min(start + 8, layers)):
            block = f"model.layers.{i}"
            width = (heads + 2 * kv_heads) * head_dim
            shard |= linear(f"{block}.self_attn.qkv_proj", width, hidden, bits, dtype, next(keys))
            shard |= linear(
                f"{block}.self_attn.o_proj", hidden, heads * head_dim, bits, dtype, next(keys)
            )
            shard |= linear(
                f"{block}.mlp.gate_up_proj", 2 * intermediate, hidden, bits, dtype, next(keys)
            )
            shard |= linear(f"{block}.mlp.down_proj", hidden, intermediate, bits, dtype, next(keys))
            shard[f"{block}.input_layernorm.weight"] = norm
            shard[f"{block}.post_attention_layernorm.weight"] = norm
        shards.append(shard)
    shards[-1] |= linear("model.embed_tokens", VOCABULARY, hidden, bits, dtype, next(keys))
    shards[-1] |= linear("lm_head", VOCABULARY, hidden, bits, dtype, next(keys))
    shards[-1]["model.norm.weight"] = norm
    index: dict[str, str] = {}
    total = 0
    while shards:
        shard = shards.pop(0)
        name = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        mx.save_safetensors(str(out / name), shard, {"format": "pt"})
        index |= dict.fromkeys(shard, name)
        total += sum(tensor.nbytes for tensor in shard.values())
        print(f"{name}: {len(shard)} tensors")
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (out / "model.safetensors.index.json").write_text(json.dumps(listing, indent=1))
    print(f"{total:,} bytes of weights in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="36m")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantised; float32 without it")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="default: float32, or bfloat16 scales with --bits",
    )
    parser.add_argument("--tokenizer", type=Path, default=TINY)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    dtype = arguments.dtype or ("float32" if arguments.bits is None else "bfloat16")
    values = config(arguments.size, arguments.bits, dtype)
    (arguments.out / "config.json").write_text(json.dumps(values, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(arguments.tokenizer / name, arguments.out / name)
    write_weights(arguments.size, arguments.bits, getattr(mx, dtype), arguments.seed, arguments.out)


if __name__ == "__main__":
    main()
