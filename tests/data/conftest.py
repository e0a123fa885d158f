"""Small hand-made examples; nobody in them exists."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mlx_medphi.data.examples import Conversation, Example, Note

MakeExample = Callable[..., Example]


@pytest.fixture
def example() -> MakeExample:
    """A factory: `example("a", "Doctor: Hi.", "A note.", split="train")`."""

    def make(
        row_id: str,
        dialogue: str = "Doctor: How are you?\nPatient: My knee hurts.",
        note: str = "Knee pain.",
        *,
        section: str | None = None,
        source: str = "jsonl",
        **rest: object,
    ) -> Example:
        conversation = Conversation.from_text(dialogue)
        return Example(row_id, source, conversation, Note(note, section), **rest)  # type: ignore[arg-type]

    return make
