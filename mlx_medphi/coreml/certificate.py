"""`parity.json` and `parity.safetensors`: what every run of the package is compared with.

parity.json holds `schema`, `reference` (what the logits are), `limits`, and `cases`: for each the
`name`, `prompt`, `adapter` (null: the base), `ids` of the prompt, the `continuation` MLX adds
greedily, and `rows`: positions in the ids read (prompt and all of the continuation but its last)
whose logits lie, in this order, in the tensor `name` of parity.safetensors, (rows, vocab) float32.
An app reads the same ids on its device and compares.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mlx_medphi.coreml.golden import Case, Golden, Prompt
from mlx_medphi.coreml.manifest import Manifest, added_adapters
from mlx_medphi.coreml.parity import LIMITS
from mlx_medphi.errors import BundleError, capped
from mlx_medphi.files import atomic_path, write_json
from mlx_medphi.model.shards import Piece, TensorSpec, header_bytes, write_pieces

__all__ = [
    "GOLDEN_FILE",
    "PARITY_FILE",
    "check_golden",
    "read_golden",
    "write_golden",
]

PARITY_FILE, GOLDEN_FILE = "parity.json", "parity.safetensors"
SCHEMA = 1
REFERENCE = "MLX, from the weights as they are stored in this package, computed in "


def write_golden(directory: Path, golden: Golden) -> None:
    """Write both files into a bundle that is being made.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    cases = [
        {
            "name": case.name,
            "prompt": case.prompt.name,
            "adapter": case.adapter,
            "ids": list(case.prompt.ids),
            "rows": list(case.rows),
            "continuation": list(case.continuation),
        }
        for case in golden.cases
    ]
    document = {
        "schema": SCHEMA,
        "reference": REFERENCE + golden.dtype,
        "logits": GOLDEN_FILE,
        "limits": {name: asdict(limits) for name, limits in LIMITS.items()},
        "cases": cases,
    }
    write_json(directory / PARITY_FILE, document)
    pieces = [_piece(case) for case in golden.cases]
    header = header_bytes([spec for piece in pieces for spec in piece.tensors], {})
    with atomic_path(directory / GOLDEN_FILE) as temporary:
        write_pieces(temporary, header, pieces)


def _piece(case: Case) -> Piece:
    spec = TensorSpec(case.name, "F32", case.logits.shape)
    return Piece((spec,), lambda: [np.ascontiguousarray(case.logits, "<f4").tobytes()])


def read_golden(directory: Path) -> Golden:
    """Read both files back.

    Raises:
        BundleError: missing, damaged, or not fitting each other.
    """
    path = directory / PARITY_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(directory / GOLDEN_FILE)
    except (OSError, ValueError, RecursionError, SafetensorError) as exc:
        raise BundleError(f"{directory}: the golden logits cannot be read ({exc})") from exc
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise BundleError(f"{path}: not a certificate of schema {SCHEMA}; update mlx_medphi")
    try:
        return Golden(tuple(_case(entry, tensors) for entry in document["cases"]))
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise BundleError(f"{path}: damaged ({exc!r}); export again") from exc


def _case(entry: dict[str, Any], tensors: dict[str, Any]) -> Case:
    ids = tuple(int(token) for token in entry["ids"])
    continuation = tuple(int(token) for token in entry["continuation"])
    rows = tuple(int(row) for row in entry["rows"])
    prompt = Prompt(
        str(entry["prompt"]), ids, tuple(r for r in rows if r < len(ids)), len(continuation)
    )
    logits = np.asarray(tensors[entry["name"]], np.float32)
    case = Case(prompt, entry["adapter"], continuation, logits)
    known = entry["name"] == case.name and prompt.name in LIMITS
    known = known and isinstance(case.adapter, (str, type(None)))
    if not known or case.rows != rows or logits.ndim != 2 or len(logits) != len(rows):
        raise ValueError(f"case {entry['name']}")
    if not ids or min(*ids, *continuation, *rows, 0) < 0 or not np.isfinite(logits).all():
        raise ValueError(f"case {entry['name']}")
    return case


def check_golden(golden: Golden, manifest: Manifest, directory: Path) -> None:
    """Refuse golden logits that are not of this bundle, or leave one of its adapters out.

    An adapter that came after them needs none; the base, and every adapter that was compared or
    that the certificate names, needs those of every prompt.

    Raises:
        BundleError: what does not fit.
    """
    facts = manifest.medphi
    entries = facts.adapters.list
    slots = facts.adapters.mode == "slots"
    due: set[str | None] = {None, *(e.name for e in entries if e.functions or slots)}
    vocab, context = facts.model.vocab_size, facts.coreml.context_length
    problems = [
        f"case {case.name} is of another model"
        for case in golden.cases
        if case.logits.shape[1] != vocab
        or max(case.prompt.ids + case.continuation) >= vocab
        or len(case.ids) > context
    ]
    found = {case.adapter for case in golden.cases}
    problems += [f"there is no adapter {name}" for name in found - due]
    due -= set(added_adapters(manifest))
    names, prompts = {c.name for c in golden.cases}, {c.prompt.name for c in golden.cases}
    asked = {f"{prompt}-{name or 'base'}" for prompt in prompts for name in found}
    problems += [f"there is no case {name}" for name in asked - names]
    if golden.cases or facts.verification.level in ("graph", "predict"):
        problems += [f"there are no logits of {name or 'the base'}" for name in due - found]
    if problems:
        raise BundleError(
            f"{directory / PARITY_FILE}: does not fit the bundle: {capped(problems)}; export again"
        )
