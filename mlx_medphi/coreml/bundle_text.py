"""A bundle in words: its licence, its notice, and one line each for size, weights and proof."""

from __future__ import annotations

from mlx_medphi import __version__
from mlx_medphi.coreml.bundle_base import UNKNOWN_TERMS, Base
from mlx_medphi.coreml.manifest import METADATA, PARITY, VECTORS, Manifest, Verification
from mlx_medphi.coreml.manifest_program import Quantization, Stored

__all__ = ["licence_text", "notice_text", "readable", "stored_as", "verified_as"]

NOT_ON_APPLE = "It has not run on Apple hardware."


def readable(nbytes: int) -> str:
    """Bytes for people; GB is 1e9 bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{nbytes} bytes"


def stored_as(weights: Quantization) -> str:
    """How the weights are stored, in one line."""
    layers = "float16"
    if weights.bits != 16:
        grain = f"groups of {weights.group}" if weights.scheme == "block" else "one scale per row"
        layers = f"{weights.bits} bits, {grain}"
    return f"{layers}; embedding {_form(weights.embedding)}, head {_form(weights.head)}"


def verified_as(verification: Verification) -> str:
    """How far it was verified, in one line."""
    reached = {
        "none": "Not verified.",
        "spec": "The saved package was read back and is what its manifest says (spec).",
        "graph": "The saved package was computed step by step on another machine and gives what "
        "MLX computes from the same weights (spec, graph).",
        "predict": "Core ML itself gave what MLX computes from the same weights (spec, graph, "
        "predict).",
    }[verification.level]
    return reached if verification.level == "predict" else f"{reached} {NOT_ON_APPLE}"


def licence_text(base: Base, said: str) -> str:
    """LICENSE: the base's own text where it lies beside the base, else what is known of its terms.

    Args:
        base: the model that was exported.
        said: its terms in one line.
    """
    if base.licence.text is not None:
        return base.licence.text.strip("\n") + "\n"
    if said == UNKNOWN_TERMS:
        return (
            f"The weights in this bundle were made from {base.name}. No licence lay beside it, so "
            "its terms\nare unknown here: look at the base's page before you pass this bundle on.\n"
        )
    return (
        f"The weights in this bundle were made from {base.name}. Its terms: {said}.\n"
        "The full text did not lie beside it: look at the base's page.\n"
    )


def notice_text(manifest: Manifest) -> str:
    """NOTICE: what is in the bundle, and on whose terms."""
    source, names = manifest.source, [entry.name for entry in manifest.medphi.adapters.list]
    revision = f", revision {source.revision}" if source.revision else ""
    lines = [
        manifest.name,
        "",
        f"Written by mlx_medphi {__version__}. It holds:",
        "",
        f"- the weights of {source.model_id}{revision}, converted. Terms: {source.licence}.",
        "- its tokenizer files, unchanged, on the same terms.",
    ]
    if names:
        lines.append(
            f"- what training added ({', '.join(names)}). Terms: those of whoever trained it, and "
            "of the data it was trained on."
        )
    lines += [
        f"- test vectors, certificate, manifest and card made by mlx_medphi ({VECTORS}, {PARITY},",
        f"  {METADATA}, README.md): made-up text only, MIT.",
    ]
    return "\n".join(lines) + "\n"


def _form(stored: Stored) -> str:
    return "float16" if stored.bits == 16 else f"{stored.bits} bits"
