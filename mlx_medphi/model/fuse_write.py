"""Write a planned checkpoint to a temporary place, and complete it once it has been measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_medphi.files import read_safetensors_header, sha256_file, write_json
from mlx_medphi.model.fuse_checks import FILE_KIND, REPORT_NAME
from mlx_medphi.model.fuse_plan import Precision, Source, fused_config, shard_index
from mlx_medphi.model.shards import Piece, TensorSpec, header_bytes, write_pieces
from mlx_medphi.model.weights import CONFIG_KEY

__all__ = ["Progress", "describe", "write_checkpoint"]

Progress = Callable[[int, int], None]
Files = Mapping[str, Sequence[Piece]]

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template*", GENERATION_NAME,
)  # fmt: skip
# What else a checkpoint's own folder may hold; an adapter or a log there is no part of the model.
OTHER_FILES = (CONFIG_NAME, "*.py", "LICENSE*", "NOTICE*")
# transformers refuses files without a format it knows, and knows "pt" in all versions.
METADATA = {"format": "pt"}
# Room in a single file's header for the digits of the figures that are known only after it is
# written: eleven numbers, beside those that stand for them until then.
HEADER_SPARE = 512


def write_checkpoint(
    source: Source,
    files: Files,
    precision: Precision,
    target: Path,
    progress: Progress | None,
    draft: Mapping[str, Any],
) -> None:
    """Write weights, config and companions.

    Args:
        source: the base and the changes.
        files: the plan.
        precision: what the plan was made for.
        target: an empty directory, or the place of a single file.
        progress: called with the bytes written so far and in all.
        draft: the report as far as it is known; a single file's header gets room for it.

    Raises:
        OSError: the disk is full or cannot be written.
        FuseError: a weight is beyond the range of the dtype it is to be stored in.
    """
    config = _config_text(source, precision)
    watch = _Watch(files, progress)
    if not target.is_dir():
        specs = _specs(files)
        known = _metadata(source, config, _short(draft))
        size = len(header_bytes(specs, known)) + HEADER_SPARE
        text = header_bytes(specs, _metadata(source, config, {}), size)
        write_pieces(target, text, watch.over(p for pieces in files.values() for p in pieces))
        return
    _copy_companions(source, target)
    (target / CONFIG_NAME).write_bytes(config)
    single_base = source.checkpoint.path.is_file()
    for path, header in source.shards.files.items():
        if path.name not in files:
            continue
        pieces = files[path.name]
        if precision == "same" and not single_base:
            # Byte for byte, so that every file has exactly the size of the base's.
            raw = source.shards.header(path)
        else:
            metadata = METADATA if single_base else header.metadata or METADATA
            raw = header_bytes(_specs({path.name: pieces}), metadata)
        name = SINGLE_NAME if single_base else path.name
        write_pieces(target / name, raw, watch.over(pieces))
    index = source.checkpoint.directory / INDEX_NAME
    if index.exists() and not single_base:
        if precision == "same":
            shutil.copyfile(index, target / INDEX_NAME)
        else:
            write_json(target / INDEX_NAME, shard_index(files))


def describe(source: Source, files: Files, target: Path, report: Mapping[str, Any]) -> None:
    """Put the report into what was written: a file in a directory, metadata in a single file."""
    if target.is_dir():
        write_json(target / REPORT_NAME, report)
        return
    header = read_safetensors_header(target)
    # The text that was written with the weights.
    config = header.metadata[CONFIG_KEY].encode("utf-8")
    facts = _metadata(source, config, _short(report))
    text = header_bytes(_specs(files), facts, header.data_start)
    assert len(text) == header.data_start, (len(text), header.data_start)
    with target.open("r+b") as handle:
        handle.write(text)


def _short(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report without the figures of single layers, of which there are hundreds."""
    return {key: value for key, value in report.items() if key != "layers"}


def _config_text(source: Source, precision: Precision) -> bytes:
    changed = fused_config(source, precision)
    if changed is not None:
        return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    path = source.checkpoint.path
    if path.is_dir():
        return (path / CONFIG_NAME).read_bytes()
    return read_safetensors_header(path).metadata[CONFIG_KEY].encode("utf-8")


def _metadata(source: Source, config: bytes, report: Mapping[str, Any]) -> dict[str, str]:
    """What a single file says about itself."""
    folder = source.checkpoint.directory
    values = {**METADATA, CONFIG_KEY: config.decode("utf-8"), "kind": FILE_KIND}
    if (folder / GENERATION_NAME).exists():
        values["generation_config"] = (folder / GENERATION_NAME).read_text(encoding="utf-8")
    if (folder / TOKENIZER_NAME).exists():
        values["tokenizer_sha256"] = sha256_file(folder / TOKENIZER_NAME)
    for key, value in report.items():
        values[key] = value if isinstance(value, str) else json.dumps(value)
    return values


def _copy_companions(source: Source, target: Path) -> None:
    """Tokenizer and whatever else belongs to the model, byte for byte."""
    folder = source.checkpoint.directory
    # Around a single file may lie anything; only its tokenizer is known to be there.
    alone = source.checkpoint.path.is_file()
    for pattern in TOKENIZER_FILES if alone else TOKENIZER_FILES + OTHER_FILES:
        for file in folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def _specs(files: Files) -> list[TensorSpec]:
    return [spec for pieces in files.values() for piece in pieces for spec in piece.tensors]


class _Watch:
    """Counts bytes for a progress bar."""

    def __init__(self, files: Files, progress: Progress | None) -> None:
        self._progress = progress
        self._total = sum(piece.nbytes for pieces in files.values() for piece in pieces)
        self._done = 0

    def over(self, pieces: Iterator[Piece] | Sequence[Piece]) -> Iterator[Piece]:
        """The same pieces, reported as they are used up."""
        for piece in pieces:
            yield piece
            self._done += piece.nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)
