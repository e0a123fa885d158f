"""Write a note with a saved bundle on this machine, by the interpreter: slow, and all of it there.

What runs is what an app runs: the bundle's own tokenizer, adapter pack and program, and no more.
"""

from __future__ import annotations

from mlx_medphi.coreml.bundle import Bundle
from mlx_medphi.coreml.interpreter import Interpreter
from mlx_medphi.coreml.package_file import open_package
from mlx_medphi.coreml.runner import Predictor, Runner
from mlx_medphi.coreml.verify import variants
from mlx_medphi.data.examples import Conversation
from mlx_medphi.errors import BundleError
from mlx_medphi.text.chat import encode_prompt
from mlx_medphi.text.tokenizer import Tokenizer

__all__ = ["rehearse"]


def rehearse(
    bundle: Bundle,
    conversation: Conversation,
    *,
    adapter: str | None = None,
    section: str | None = None,
    max_tokens: int = 256,
    predictor: Predictor | None = None,
) -> str:
    """A note, each token the most likely one.

    Args:
        bundle: an opened bundle.
        conversation: what was said.
        adapter: the name of one of its adapters; None: the base.
        section: the part of the note to write; None: all of it.
        max_tokens: the longest note.
        predictor: what runs the package; None: the interpreter.

    Raises:
        BundleError: no such adapter.
        GenerationError: the conversation is empty or leaves no room.
    """
    known = variants(bundle)
    if adapter not in known:
        names = ", ".join(name for name in known if name) or "none"
        raise BundleError(f"{bundle.path}: no adapter {adapter!r}; it has {names}")
    tokenizer = Tokenizer.load(bundle.tokenizer_directory)
    variant = known[adapter]
    prompt = encode_prompt(tokenizer, conversation, section, variant.shape.context, max_tokens)
    runner = Runner(
        predictor or Interpreter(open_package(bundle.package)), variant.shape, variant.slots
    )
    ids = runner.greedy(
        prompt.ids,
        max_tokens,
        allowed=tokenizer.vocab_size,
        stop=bundle.manifest.medphi.generation.stop_token_ids,
    )
    return tokenizer.decode(ids).rstrip()
