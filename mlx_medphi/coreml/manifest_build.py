"""Facts of an export to the manifest of its bundle: the same facts, the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from mlx_medphi import __version__
from mlx_medphi.config import GenerateConfig, to_dict
from mlx_medphi.coreml.bundle_facts import BundleFacts, terms
from mlx_medphi.coreml.manifest import (
    DECODE,
    MASK_VALUE,
    METADATA,
    PACKAGE,
    PREFILL,
    SCHEMA,
    TEMPLATE,
    TOKENIZER,
    VECTORS,
    AdapterEntry,
    Adapters,
    Assets,
    ChatFormat,
    Compilation,
    Generation,
    Language,
    Manifest,
    MedPhi,
    Source,
    TokenizerFacts,
    json_text,
)
from mlx_medphi.coreml.manifest_program import (
    ComputeUnits,
    CoreML,
    Model,
    Quantization,
    Rope,
    Signature,
    Stored,
    Tensor,
)
from mlx_medphi.coreml.manifest_read import parse_manifest
from mlx_medphi.files import sha256_file
from mlx_medphi.model.config import Phi3Config

if TYPE_CHECKING:
    from mlx_medphi.text.tokenizer import Tokenizer

__all__ = ["build_manifest", "generation_facts", "tokenizer_facts"]

MIN_OS = {"ios": "18.0", "macos": "15.0"}
TOOLS = ("coremltools", "mlx", "numpy", "tokenizers")


def build_manifest(facts: BundleFacts) -> Manifest:
    """The manifest of a bundle, but for its list of files, which are still being made.

    Raises:
        BundleError: the facts contradict each other.
    """
    manifest = Manifest(
        metadata_version="0.2",
        kind="llm",
        name=facts.name,
        assets=Assets(PACKAGE),
        language=Language(
            tokenizer=TOKENIZER.partition("/")[0],
            vocab_size=facts.config.vocab_size,
            max_context_length=facts.context,
            embedded_tokenizer=True,
            function_map=_function_map(facts.adapters),
        ),
        source=Source(facts.base.name, facts.base.revision, terms(facts)),
        compression=_compression(facts.quantization),
        compilation=Compilation((), facts.date),
        medphi=MedPhi(
            schema=SCHEMA,
            coreml=_coreml(facts),
            model=_model(facts.config, facts.context),
            quantization=facts.quantization,
            tokenizer=tokenizer_facts(facts.tokenizer),
            generation=generation_facts(facts.tokenizer, facts.config.vocab_size),
            adapters=_adapters(facts),
            base_fingerprint=facts.base.fingerprint,
            memory=facts.memory,
            cost=facts.cost,
            verification=facts.verification,
            export=to_dict(facts.export),
            exporter={"mlx_medphi": __version__, "commit": facts.commit, **_tools()},
            files=(),
        ),
    )
    # By way of the text: what is checked when it is read is checked before it is written.
    value = json.loads(json_text(manifest))
    return parse_manifest(value, METADATA, draft=True)


def _function_map(adapters: Sequence[AdapterEntry]) -> dict[str, tuple[str, ...]]:
    built_in = [entry.functions for entry in adapters if entry.functions]
    return {role: (role, *(names[role] for names in built_in)) for role in (PREFILL, DECODE)}


def _coreml(facts: BundleFacts) -> CoreML:
    def tensors(items: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
        return tuple(Tensor(t["name"], tuple(map(int, t["shape"])), t["dtype"]) for t in items)

    return CoreML(
        functions={
            name: Signature(tensors(f["inputs"]), tensors(f["outputs"]), tensors(f["states"]))
            for name, f in facts.functions.items()
        },
        default_function=DECODE,
        context_length=facts.context,
        prefill_width=facts.export.prefill,
        mask_value=MASK_VALUE,
        compute_units=ComputeUnits(facts.export.compute_units, facts.tried),
        min_os=MIN_OS,
    )


def _model(config: Phi3Config, context: int) -> Model:
    longrope = config.longrope
    return Model(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        sliding_window=config.sliding_window,
        tied_embeddings=config.tie_word_embeddings,
        rope=Rope(
            type="longrope" if longrope else "default",
            theta=config.rope_theta,
            factors=_factors(config, context),
            attention_factor=longrope.attention_factor if longrope else 1.0,
            rotary_dim=config.rotary_dim,
            switch_length=config.switch_length,
        ),
    )


def _factors(config: Phi3Config, context: int) -> Any:
    if config.longrope is None:
        return "none"
    return "both" if config.uses_long_factors(context) else "short"


def tokenizer_facts(tokenizer: Tokenizer) -> TokenizerFacts:
    """What the manifest says of a tokenizer."""
    # Reads tokenizer.json anew, which only an export does.
    from mlx_medphi.coreml.bundle_tokenizer import template_sha256

    return TokenizerFacts(
        pipeline="tokenizer.json",
        path=TOKENIZER,
        sha256=sha256_file(tokenizer.files["tokenizer.json"]),
        chat_template=TEMPLATE,
        chat_template_sha256=template_sha256(tokenizer),
        chat_format=ChatFormat("phi3", **asdict(tokenizer.template)),
        vectors=VECTORS,
    )


def generation_facts(tokenizer: Tokenizer, rows: int) -> Generation:
    """What the manifest says of ids; `rows` is the height of the embedding."""
    ids = {
        name: int(getattr(tokenizer, f"{name}_id"))
        for name in ("bos", "eos", "pad", "end", "user", "assistant", "system")
    }
    # Rows of the embedding that no token has.
    unused = ((tokenizer.vocab_size, rows - 1),) if rows > tokenizer.vocab_size else ()
    return Generation(tokenizer.stop_ids, ids, unused, to_dict(GenerateConfig()))


def _adapters(facts: BundleFacts) -> Adapters:
    # Imports MLX, which reading a bundle does without.
    from mlx_medphi.model.slot_pack import MODULES

    slots = facts.slot_rank is not None
    mode = facts.export.adapters if slots or facts.adapters else "none"
    return Adapters(
        mode=mode,
        slot_kind=facts.export.slot_kind if slots else None,
        rank_slot=facts.slot_rank,
        modules=tuple(MODULES) if slots else (),
        list=tuple(sorted(facts.adapters, key=lambda entry: entry.name)),
    )


def _compression(stored: Quantization) -> str:
    def one(form: Stored) -> str:
        return "float16" if form.bits == 16 else f"{form.bits}-bit g{form.group}"

    if stored.bits == 16:
        layers = "float16"
    else:
        grain = f"per-block g{stored.group}" if stored.scheme == "block" else "per-channel"
        layers = f"{stored.bits}-bit {grain}, {stored.offset} offset"
    return f"{layers}; embedding {one(stored.embedding)}; head {one(stored.head)}"


def _tools() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
