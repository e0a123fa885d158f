"""Make the tiny base's tokenizer: Phi-3's structure and special tokens, synthetic text.

    python examples/make_tiny_tokenizer.py --out mlx_medphi/assets/tiny

The same text gives the same bytes. The sha256 printed at the end is the one that the README in
mlx_medphi/assets/tiny records.
"""

from __future__ import annotations

import argparse
import json
import re
import string
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# The script must find the package without an installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mlx_medphi.data import synthetic_pretraining
from mlx_medphi.data.prompt import chat_messages
from mlx_medphi.data.synthetic import sample
from mlx_medphi.files import sha256_file, write_json

VOCAB_SIZE = 1152
WORD_WEIGHT = 200
SPACE = "\u2581"
HEAD = ("<unk>", "<s>", "</s>")
TAIL = (
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
)
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Phi-3 has no pre-tokenizer, so the rule "no merge across words or around punctuation" has to be
# in the merges themselves.
_PIECE = re.compile(rf"{SPACE}?(?:[A-Za-z]+|[0-9]+)|{SPACE}|[^{SPACE}A-Za-z0-9\s]")


def training_texts() -> Iterator[str]:
    """Every kind of text the tiny base and its adapter meet."""
    examples = [
        *sample(1500, 1),
        *synthetic_pretraining.reading(3000, 1),
        *synthetic_pretraining.repeating(2000, 1),
    ]
    for example in examples:
        for message in chat_messages(example):
            yield message.content
    # Names, drugs and numbers are each one piece, so that copying one is copying one token.
    for _ in range(WORD_WEIGHT):
        yield " ".join(synthetic_pretraining.word_pool())


def pieces(text: str) -> list[str]:
    """Cut a text into the stretches inside which merges may be learned."""
    return _PIECE.findall(SPACE + text.replace(" ", SPACE))


def learned_pieces(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Pieces in the order of their ids, and the merges that make them."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = [SPACE, *string.ascii_letters, *string.digits, *string.punctuation]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(HEAD) - len(BYTES) - len(TAIL),
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
        special_tokens=[],
    )
    learner.train_from_iterator((" ".join(pieces(text)) for text in texts), trainer)
    model = json.loads(learner.to_str())["model"]
    # Releases of the library write a merge as one string or as a pair.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), merges


def tokenizer_file(texts: Iterable[str]) -> dict[str, Any]:
    """Learn the merges and lay out the file exactly as Phi-3's tokenizer.json."""
    learned, merges = learned_pieces(texts)
    names = [*HEAD, *BYTES, *learned]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(len(names)),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": merges,
        },
    }


def added_tokens(first: int) -> list[dict[str, Any]]:
    """Phi-3's added tokens with its flags; `first` is the id after the last learned piece."""
    return [
        {
            "id": index,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": content not in ("<unk>", "<s>", "<|endoftext|>"),
            "normalized": False,
            "special": content != "</s>",
        }
        for index, content in [*enumerate(HEAD), *enumerate(TAIL, start=first)]
    ]


def tokenizer_config(added: list[dict[str, Any]], max_length: int) -> dict[str, Any]:
    """The tokenizer_config.json beside it, in Phi-3's form."""
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in added
        },
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "model_max_length": max_length,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }


def write_tokenizer(out: Path, max_length: int = 1024) -> str:
    """Write tokenizer.json and tokenizer_config.json; returns the sha256 of the former."""
    out.mkdir(parents=True, exist_ok=True)
    built = tokenizer_file(training_texts())
    write_json(out / "tokenizer.json", built)
    write_json(out / "tokenizer_config.json", tokenizer_config(built["added_tokens"], max_length))
    return sha256_file(out / "tokenizer.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    print(write_tokenizer(parser.parse_args().out))


if __name__ == "__main__":
    main()
