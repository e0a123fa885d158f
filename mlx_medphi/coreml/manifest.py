"""metadata.json of a bundle: what it says, key for key.

The classes below are the schema: a field is a key, its type is what the key may hold. The first
seven keys are those of Apple's bundles (schema 0.2); all of ours lie under `medphi`. Every key is
written and must be there to be read; keys beside them are left alone. What describes the package
itself is in `manifest_program.py`. The Swift package reads the same file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from mlx_medphi.coreml.manifest_program import CoreML, Memory, Model, Quantization

__all__ = [
    "CARD", "DECODE", "GENERATION", "MASK_VALUE", "METADATA", "PACKAGE", "PARITY", "PREFILL",
    "SCHEMA", "SUMS", "TEMPLATE", "TOKENIZER", "VECTORS",
    "AdapterEntry", "Adapters", "Assets", "ChatFormat", "Compilation", "FileEntry", "Generation",
    "Language", "Level", "Manifest", "MedPhi", "Source", "TokenizerFacts", "Verification",
    "added_adapters", "json_text", "plain",
]  # fmt: skip

SCHEMA = 1
"""The number that a reader checks first; it grows when an older reader would go wrong."""

METADATA, SUMS, CARD, PARITY = "metadata.json", "SHA256SUMS", "README.md", "parity.json"
GENERATION, PACKAGE = "generation_config.json", "model/Phi3.mlpackage"
TOKENIZER, VECTORS = "tokenizer/tokenizer.json", "tokenizer/vectors.json"
TEMPLATE = "tokenizer/chat_template.jinja"

PREFILL, DECODE = "prefill", "decode"
MASK_VALUE = -10000.0
"""What a mask adds to hide a key: finite in float16 also where two such numbers meet."""

Level = Literal["none", "spec", "graph", "predict"]


@dataclass(frozen=True)
class ChatFormat:
    """What surrounds the messages of a chat; see `text/template.py`. The name is "phi3"."""

    name: str
    opening: str
    closing: str
    after_role: str
    after_end: str
    knows_system: bool
    skips_empty_system: bool


@dataclass(frozen=True)
class TokenizerFacts:
    """Hashes are of the bytes of `path` and of chat_template.jinja beside it."""

    pipeline: Literal["tokenizer.json"]
    path: str
    sha256: str
    chat_template: str
    chat_template_sha256: str
    chat_format: ChatFormat
    vectors: str


@dataclass(frozen=True)
class Generation:
    """Ids that end a text, ids by their part in a chat, ids that no token has (first and last of
    each range, both included), and settings to begin with."""

    stop_token_ids: tuple[int, ...]
    special_token_ids: Mapping[str, int]
    suppress_ranges: tuple[tuple[int, int], ...]
    defaults: Mapping[str, Any]


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter of the bundle.

    Attributes:
        name: what an app asks for.
        path: its pack; None where it exists in the package only.
        sha256: of that file.
        rank: its own rank, before padding to the slots'.
        functions: functions mode: "prefill" and "decode" -> the functions it is built into.
        training: what it says of its training: numbers and hashes.
    """

    name: str
    path: str | None
    sha256: str | None
    rank: int
    functions: Mapping[str, str]
    training: Mapping[str, Any]


@dataclass(frozen=True)
class Adapters:
    """How adapters reach the model; `slot_kind` and `rank_slot` are None without slots."""

    mode: Literal["fused", "slots", "functions", "none"]
    slot_kind: Literal["state", "input"] | None
    rank_slot: int | None
    modules: tuple[str, ...]
    list: tuple[AdapterEntry, ...]


@dataclass(frozen=True)
class Verification:
    """How far the bundle was verified, and each level's figures; None where it was not reached."""

    level: Level = "none"
    spec: Mapping[str, Any] | None = None
    graph: Mapping[str, Any] | None = None
    predict: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class MedPhi:
    """Everything that Apple's schema has no key for."""

    schema: int
    coreml: CoreML
    model: Model
    quantization: Quantization
    tokenizer: TokenizerFacts
    generation: Generation
    adapters: Adapters
    base_fingerprint: str
    memory: Memory
    cost: Mapping[str, Any]
    verification: Verification
    export: Mapping[str, Any]
    exporter: Mapping[str, str | None]
    files: tuple[FileEntry, ...]


@dataclass(frozen=True)
class Assets:
    """The package's path in the bundle."""

    main: str


@dataclass(frozen=True)
class Language:
    """What Apple's schema says of a language model; `tokenizer` is a folder of the bundle."""

    tokenizer: str
    vocab_size: int
    max_context_length: int
    embedded_tokenizer: bool
    function_map: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Source:
    """Where the weights come from: hub id or folder name, revision, terms."""

    model_id: str
    revision: str | None
    licence: str


@dataclass(frozen=True)
class Compilation:
    """Compiled for nothing; the date is SOURCE_DATE_EPOCH's, so that the bytes repeat."""

    targets: tuple[str, ...]
    date: str


@dataclass(frozen=True)
class Manifest:
    """The whole of metadata.json."""

    metadata_version: Literal["0.2"]
    kind: Literal["llm"]
    name: str
    assets: Assets
    language: Language
    source: Source
    compression: str
    compilation: Compilation
    medphi: MedPhi


def json_text(value: Any) -> str:
    """JSON whose bytes repeat: sorted keys, two spaces, UTF-8, a final line feed."""
    return (
        json.dumps(plain(value), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
        + "\n"
    )


def plain(value: Any) -> Any:
    """Objects, mappings and tuples as what JSON has."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def added_adapters(manifest: Manifest) -> tuple[str, ...]:
    """The adapters that an app put into a bundle's slots after it was compared with MLX.

    The manifest keeps what was compared then, and who adds an adapter leaves that as it is. A
    manifest that does not name what was compared has no added adapters: each must have its logits.
    """
    graph = manifest.medphi.verification.graph
    cases = graph.get("cases") if graph is not None else None
    if manifest.medphi.adapters.mode != "slots" or not isinstance(cases, (list, tuple)):
        return ()
    if not all(isinstance(case, Mapping) and "adapter" in case for case in cases):
        return ()
    compared = [case["adapter"] for case in cases]
    if None not in compared:
        return ()
    entries = manifest.medphi.adapters.list
    return tuple(e.name for e in entries if e.name not in compared and not e.functions)
