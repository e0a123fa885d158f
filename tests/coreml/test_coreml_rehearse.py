"""A note written from a saved bundle is the note that MLX writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_cases import TINY, make_adapter, settings

import mlx_medphi as mp
from mlx_medphi.config import GenerateConfig
from mlx_medphi.coreml.bundle import Bundle
from mlx_medphi.coreml.export import export
from mlx_medphi.coreml.rehearse import rehearse
from mlx_medphi.data.examples import Conversation
from mlx_medphi.data.synthetic import sample
from mlx_medphi.errors import BundleError, GenerationError
from mlx_medphi.text.chat import encode_prompt

TOKENS = 24
# The base answers the one with a letter and the other with a number; it has never seen a note.
CONVERSATIONS = [example.conversation for example in sample(2, seed=5, held_out=True)]


@pytest.fixture(scope="module")
def soap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "soap.safetensors", TINY, size=0.3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, soap: Path) -> Bundle:
    """The embedded base in 16 bits; what it computes is compared below."""
    out = tmp_path_factory.mktemp("bundle") / "notes.medphi"
    config = settings(bits=16, context=256, prefill=64)
    return export(TINY, out, adapters=[soap], config=config, level="spec")


def written(conversation: Conversation, adapter: Path | None = None, **more: Any) -> str:
    """What MLX writes, greedily and in float32."""
    model, tokenizer = mp.load(TINY, dtype="float32", adapter=adapter)
    config = GenerateConfig(max_tokens=TOKENS)
    return mp.generate_note(model, tokenizer, conversation, config=config, **more)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_saved_package_writes_mlxs_text(bundle: Bundle, conversation: Conversation) -> None:
    text = rehearse(bundle, conversation, max_tokens=TOKENS)
    assert text
    assert text == written(conversation)


def test_with_an_adapter_in_its_slots_it_writes_the_adapted_text(
    bundle: Bundle, soap: Path
) -> None:
    text = rehearse(bundle, CONVERSATIONS[0], adapter="soap", max_tokens=TOKENS)
    assert text == written(CONVERSATIONS[0], soap)
    assert text != written(CONVERSATIONS[0])


def test_a_section_is_asked_for_in_the_prompt(bundle: Bundle) -> None:
    text = rehearse(bundle, CONVERSATIONS[0], section="GENHX", max_tokens=TOKENS)
    assert text == written(CONVERSATIONS[0], section="GENHX")


def test_only_the_bundle_is_read(bundle: Bundle, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(bundle.path, tmp_path / "moved.medphi"))
    there = mp.open_bundle(moved)
    text = rehearse(there, CONVERSATIONS[1], max_tokens=4)
    assert text == rehearse(bundle, CONVERSATIONS[1], max_tokens=4)
    shutil.rmtree(moved / "tokenizer")
    with pytest.raises(mp.MedPhiError, match="tokenizer"):
        rehearse(there, CONVERSATIONS[1], max_tokens=4)


def test_an_unknown_adapter_is_named_with_those_there_are(bundle: Bundle) -> None:
    with pytest.raises(BundleError) as caught:
        rehearse(bundle, CONVERSATIONS[0], adapter="letter")
    assert str(caught.value) == f"{bundle.path}: no adapter 'letter'; it has soap"


@pytest.mark.parametrize(
    ("conversation", "tokens"),
    [(Conversation(()), 8), (CONVERSATIONS[0], 256)],
    ids=["empty", "no room for a note"],
)
def test_what_leaves_no_room_is_told(
    bundle: Bundle, conversation: Conversation, tokens: int
) -> None:
    with pytest.raises(GenerationError):
        rehearse(bundle, conversation, max_tokens=tokens)


def test_a_text_ends_where_its_model_ends_it(bundle: Bundle) -> None:
    class Ending:
        """Says the same token three times, and then a stop token."""

        def __init__(self) -> None:
            self.calls = 0

        def new_state(self, function: str) -> dict[str, Any]:
            return {}

        def run(self, function: str, inputs: Any, state: Any = None) -> dict[str, Any]:
            logits = np.zeros((1, 1, bundle.manifest.medphi.model.vocab_size), np.float16)
            if int(inputs["position"][0]) + int(inputs["lastIndex"][0]) + 1 >= prompt:
                self.calls += 1
                logits[..., stops[-1] if self.calls == 4 else letter] = 1
            return {"logits": logits}

    tokenizer = mp.Tokenizer.load(bundle.tokenizer_directory)
    stops = bundle.manifest.medphi.generation.stop_token_ids
    (letter,) = tokenizer.encode_text("a")[-1:]
    prompt = len(encode_prompt(tokenizer, CONVERSATIONS[0], None, 256, 8).ids)
    predictor = Ending()
    text = rehearse(bundle, CONVERSATIONS[0], max_tokens=8, predictor=predictor)
    assert predictor.calls == 4
    assert text == tokenizer.decode([letter] * 3).rstrip()
