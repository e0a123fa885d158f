"""The tokenizer's files in a bundle: copies of the base's, and its chat template as a file.

The copies are byte for byte, so `Tokenizer.load` on that folder gives the base's own tokenizer.
"""

from __future__ import annotations

import hashlib
import shutil
from functools import lru_cache
from pathlib import Path

from mlx_medphi.coreml.manifest import GENERATION, TEMPLATE, TOKENIZER, json_text
from mlx_medphi.files import write_text
from mlx_medphi.text.tokenizer import Tokenizer
from mlx_medphi.text.tokenizer_files import TokenizerFiles

__all__ = ["template_bytes", "template_sha256", "write_generation_config", "write_tokenizer"]


@lru_cache(maxsize=1)  # an export asks several times, and tokenizer.json is long
def template_bytes(tokenizer: Tokenizer) -> bytes:
    """The chat template as chat_template.jinja holds it; from tokenizer_config.json without one."""
    own = tokenizer.files.get(Path(TEMPLATE).name)
    if own is not None:
        return own.read_bytes()
    directory = tokenizer.files[Path(TOKENIZER).name].parent
    return TokenizerFiles.read(directory).chat_template.encode("utf-8")


def template_sha256(tokenizer: Tokenizer) -> str:
    """The hash by which the manifest and adapter packs name the chat template."""
    return hashlib.sha256(template_bytes(tokenizer)).hexdigest()


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Copy the tokenizer's files into a bundle's tokenizer folder."""
    folder = (directory / TOKENIZER).parent
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in tokenizer.files.items():
        shutil.copyfile(source, folder / name)
    (directory / TEMPLATE).write_bytes(template_bytes(tokenizer))


def write_generation_config(tokenizer: Tokenizer, directory: Path) -> None:
    """Write generation_config.json with every id that ends a text, not only what its base lists."""
    value = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.stop_ids,
        "pad_token_id": tokenizer.pad_id,
    }
    write_text(directory / GENERATION, json_text(value))
