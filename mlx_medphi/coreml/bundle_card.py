"""README.md of a bundle: the model card.

It is made from the manifest alone, so it can be written again when a bundle is verified further. It
holds no patient's words and no path of a machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mlx_medphi.coreml.bundle_text import readable, stored_as, verified_as
from mlx_medphi.coreml.manifest import (
    GENERATION,
    METADATA,
    PACKAGE,
    PARITY,
    SUMS,
    AdapterEntry,
    Manifest,
)

__all__ = ["card"]

NOT_A_DEVICE = (
    "This is not a medical device. A note that a model wrote must be read and corrected by a "
    "clinician before anyone relies on it."
)
MODES = {
    "slots": "in slots that the app fills at run time; empty slots are the base itself",
    "functions": "built in, as functions of their own beside the base's",
    "fused": "folded into the weights",
    "none": "none, and no room for one",
}
CASES = {
    "cases": "the package against MLX, the same weights",
    "fidelity": "the exported weights against those before",
}
FIGURES = {"top1": "same first choice", "kl": "KL", "max_abs": "largest difference of a logit"}
TRAINING = {
    "rows": "conversations with notes",
    "updates": "updates",
    "valid_loss_before": "validation loss before",
    "valid_loss": "validation loss after",
    "seed": "seed",
    "data_hash": "hash of the data",
}


def card(manifest: Manifest) -> str:
    """The model card, README.md."""
    sections = (
        _head, _facts, _adapters, _verification, _limits, _calls, _files, _terms,
    )  # fmt: skip
    return "\n\n".join("\n".join(section(manifest)) for section in sections) + "\n"


def _head(manifest: Manifest) -> Iterator[str]:
    source = manifest.source
    yield f"# {_cell(manifest.name)}"
    yield ""
    yield (
        f"{_cell(source.model_id)} as a Core ML package for apps: it reads the conversation of a "
        "visit and drafts the clinical note. Made by mlx_medphi."
    )
    yield ""
    yield f"**{NOT_A_DEVICE}**"


def _facts(manifest: Manifest) -> Iterator[str]:
    ours = manifest.medphi
    package = sum(e.bytes for e in ours.files if e.path.startswith(f"{manifest.assets.main}/"))
    systems = ", ".join(f"{'iOS' if k == 'ios' else 'macOS'} {v}" for k, v in
                        sorted(ours.coreml.min_os.items()))  # fmt: skip
    yield "## What it is"
    yield ""
    rows = {
        "base": f"{_cell(manifest.source.model_id)}, fingerprint {ours.base_fingerprint[:16]}…",
        "package": readable(package),
        "weights": stored_as(ours.quantization),
        "context": f"{ours.coreml.context_length} tokens for conversation and note together",
        "keys and values": f"{readable(ours.memory.kv)} at the full context",
        "memory": f"{readable(ours.memory.resident)} resident, as computed, not measured",
        "adapters": _adapter_line(manifest),
        "runs on": f"{systems} and later; advised: {ours.coreml.compute_units.recommended}",
        "verified": verified_as(ours.verification),
    }
    yield from _table(("", ""), rows.items())


def _adapters(manifest: Manifest) -> Iterator[str]:
    adapters = manifest.medphi.adapters
    yield "## Adapters and their training"
    yield ""
    yield f"Adapters: {MODES[adapters.mode]}."
    for entry in adapters.list:
        yield ""
        yield f"### {_cell(entry.name)}"
        yield ""
        yield from _table(("", ""), _adapter_facts(entry, manifest).items())


def _adapter_facts(entry: AdapterEntry, manifest: Manifest) -> dict[str, str]:
    sizes = {file.path: file.bytes for file in manifest.medphi.files}
    facts = {"rank": str(entry.rank)}
    if entry.path is not None:
        facts["file"] = f"{_cell(entry.path)}, {readable(sizes.get(entry.path, 0))}"
    if entry.functions:
        facts["functions"] = ", ".join(_cell(name) for name in sorted(entry.functions.values()))
    known = {text: entry.training[key] for key, text in TRAINING.items() if key in entry.training}
    facts |= {name: _value(value) for name, value in known.items() if value is not None}
    if not known:
        facts["training"] = "its file says nothing of it"
    return facts


def _verification(manifest: Manifest) -> Iterator[str]:
    verification = manifest.medphi.verification
    yield "## How far it was verified"
    yield ""
    yield verified_as(verification)
    for level in ("spec", "graph", "predict"):
        figures = getattr(verification, level)
        plain = {k: _value(v) for k, v in sorted((figures or {}).items()) if _is_plain(v)}
        if plain:
            yield ""
            yield from _table((level, ""), plain.items())
        for name in ("cases", "fidelity"):
            yield from _comparisons(CASES[name], (figures or {}).get(name))
    yield ""
    yield f"All figures are in `{METADATA}`; `medphi verify` makes them anew from `{PARITY}`."


def _comparisons(title: str, cases: Any) -> Iterator[str]:
    """The figures of each prompt; nothing where there are none."""
    known = [case for case in cases or () if isinstance(case, dict) and "name" in case]
    if known:
        yield ""
        yield f"| {title} | {' | '.join(FIGURES.values())} |"
        yield "|---" * (len(FIGURES) + 1) + "|"
    for case in known:
        figures = [_value(case.get(key, "")) for key in FIGURES]
        yield f"| {' | '.join([_cell(str(case['name'])), *figures])} |"


def _limits(manifest: Manifest) -> Iterator[str]:
    model, context = manifest.medphi.model, manifest.medphi.coreml.context_length
    yield "## Limits"
    yield ""
    yield "- It can leave out, mix up or invent what was said, in a note that reads well."
    yield "- It drafts notes; it does not diagnose, triage or advise."
    yield f"- A conversation longer than the context, {context} tokens, loses turns in its middle."
    if model.sliding_window is not None and model.sliding_window < context:
        yield f"- A token sees {model.sliding_window} tokens, itself among them, and no more."
    if model.rope.factors == "both":
        yield (
            f"- Where conversation and note grow past {model.rope.switch_length} tokens, all of it "
            "is read anew, which takes as long as the first reading."
        )
    if manifest.medphi.adapters.list:
        yield "- What the adapters know comes from the data they were trained on, and its gaps."


def _calls(manifest: Manifest) -> Iterator[str]:
    """How an app calls the functions: what shapes and names alone do not tell."""
    ours = manifest.medphi
    coreml, model, rope = ours.coreml, ours.model, ours.model.rope
    width, context = coreml.prefill_width, coreml.context_length
    seen = "itself and everything before it"
    if model.sliding_window is not None:
        seen = f"itself and the {model.sliding_window - 1} tokens before it"
    yield "## Calling it"
    yield ""
    yield (
        f"`prefill` reads {width} tokens, `decode` one; all functions work on one state. A "
        f"conversation begins at position 0; its first slots may hold anything. `{METADATA}` has "
        "names, shapes and ids."
    )
    yield ""
    yield (
        f"- `inputIds`: a prompt in blocks of {width}; a last block that is shorter is filled up "
        f"with any id. Where a block would end behind slot {context}, call `decode`."
    )
    yield (
        "- `position`: the slot of the first token of the call: how many were read before. "
        f"Position and tokens together never exceed {context}."
    )
    yield (
        f"- `causalMask`: row r is the query at position + r, column k the key in slot k: 0 where "
        f"the query sees the key, {coreml.mask_value:g} elsewhere. A query sees {seen}; so do the "
        "rows that fill a block up."
    )
    yield "- `lastIndex`: the row within the call whose logits come back: the last real token's."
    if rope.factors == "both":
        yield (
            f"- `ropeRow`: the same as position while the whole sequence has at most "
            f"{rope.switch_length} tokens. When it grows beyond, read all of it again from "
            f"position 0, with ropeRow = {context} + position from then on."
        )
    if ours.adapters.mode == "slots":
        yield (
            "- Adapter slots: fill each with the tensor of its name from an adapter's file; zeros "
            "are the base. Begin anew after a change: the keys in the state belong to the old one."
        )
    yield (
        "- `logits`: the highest is the next token; the ids in `suppress_ranges` (both ends "
        "included) are no tokens. A note ends with an id of `stop_token_ids`."
    )
    yield (
        f"- `{PARITY}`: read a case's `ids` and then its `continuation`; the logits after each "
        "position in `rows` are the rows of the case's tensor in the file beside it."
    )


def _files(manifest: Manifest) -> Iterator[str]:
    proof = [e.path for e in manifest.medphi.files if e.path.startswith("parity.")] or [PARITY]
    yield "## Files"
    yield ""
    rows = {
        f"`{PACKAGE}`": "the model",
        "`tokenizer/`": "the base's tokenizer, unchanged, and vectors to test one with",
        "`adapters/`": "what training added, to be loaded beside the model",
        f"`{GENERATION}`": "the ids that end a note",
        f"`{METADATA}`": "names, shapes, sizes and hashes; what an app reads first",
        ", ".join(f"`{path}`" for path in sorted(proof)): "the certificate",
        f"`{SUMS}`": f"`sha256sum -c {SUMS}` checks every file",
    }
    if not any(entry.path for entry in manifest.medphi.adapters.list):
        del rows["`adapters/`"]
    yield from _table(("file", ""), rows.items())


def _terms(manifest: Manifest) -> Iterator[str]:
    yield "## Terms"
    yield ""
    yield f"Weights: {_cell(manifest.source.licence)}. See `LICENSE` and `NOTICE`."


def _adapter_line(manifest: Manifest) -> str:
    adapters = manifest.medphi.adapters
    names = ", ".join(_cell(entry.name) for entry in adapters.list) or "none yet"
    if adapters.mode == "slots":
        return f"{names}; slots of rank {adapters.rank_slot}, filled at run time"
    return "none" if adapters.mode == "none" else f"{names}; {MODES[adapters.mode]}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else _cell(str(value))


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield f"| {head[0]} | {head[1]} |"
    yield "|---|---|"
    for name, value in rows:
        yield f"| {name} | {value} |"


def _cell(text: str) -> str:
    """Text that ends no line and no cell, whatever a name holds."""
    return " ".join(text.replace("|", "/").replace("`", "'").split())
