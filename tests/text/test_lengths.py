"""Token lengths of examples, and the published table of them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mlx_medphi.data.examples import Conversation, Example, Note, Turn
from mlx_medphi.data.prompt import chat_messages
from mlx_medphi.text.chat import encode_chat, encode_examples
from mlx_medphi.text.lengths import LengthSummary, measure_lengths
from mlx_medphi.text.tokenizer import Tokenizer


def rows() -> list[Example]:
    return [
        Example(f"row/{n}", "synthetic", Conversation((Turn("Doctor", "pain " * n),)), Note("No."))
        for n in (1, 40, 80, 160)
    ]


def test_lengths_are_counted_in_tokens(tokenizer: Tokenizer) -> None:
    lengths = measure_lengths(tokenizer, rows())
    counts = [len(tokenizer.encode_text(row.conversation.text())) for row in rows()]
    assert lengths.conversation.count == 4
    assert lengths.conversation.max == max(counts)
    assert lengths.conversation.mean == sum(counts) / 4
    assert lengths.note.median == len(tokenizer.encode_text("No."))
    assert lengths.example.max == len(encode_chat(tokenizer, chat_messages(rows()[3])).ids)


def test_rows_over_a_limit_are_those_that_would_be_shortened(tokenizer: Tokenizer) -> None:
    longest = measure_lengths(tokenizer, rows()).example.max
    limits = (300, 400, longest - 1, longest)
    lengths = measure_lengths(tokenizer, rows(), limits)
    for limit in limits:
        assert lengths.over[limit] == encode_examples(tokenizer, rows(), limit).shortened
    assert lengths.over[longest] == () and lengths.over[longest - 1] == ("row/160",)


def test_no_examples_give_zeros(tokenizer: Tokenizer) -> None:
    assert measure_lengths(tokenizer, []).example == LengthSummary(0, 0, 0, 0, 0, 0, 0)


def test_percentiles_are_lengths_of_examples() -> None:
    assert LengthSummary.of([1, 2, 3, 10]) == LengthSummary(4, 4.0, 2.5, 10, 10, 10, 10)


# Figures of the files as published, line breaks as LF, with Phi-3-mini's tokenizer:
# mean, median, p95 and max of conversation and of note; pairs (with 60 tokens for the prompt)
# longer than 2048 and 4096.
TABLE = {
    "mts-dialog/MTS-Dialog-TrainingSet": ((177, 108, 542, 2582), (65, 27, 237, 1652), (2, 1)),
    "mts-dialog/MTS-Dialog-ValidationSet": ((149, 94, 494, 890), (58, 28, 200, 437), (0, 0)),
    "mts-dialog/MTS-Dialog-TestSet-1-MEDIQA-Chat-2023": (
        *((166, 111, 488, 907), (62, 26, 262, 560), (0, 0)),
    ),
    "aci-bench/train": ((1803, 1759, 2729, 4167), (768, 750, 1125, 1511), (54, 3)),
    "aci-bench/valid": ((1706, 1714, 2477, 2477), (785, 840, 1329, 1329), (15, 0)),
}


@pytest.mark.parametrize("name", TABLE)
def test_published_files_have_their_known_lengths(
    phi3: Tokenizer, shared_data: Path, name: str
) -> None:
    with (shared_data / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    note = "note" if name.startswith("aci") else "section_text"
    counts = [
        [len(phi3.encode_text(row[column].replace("\r\n", "\n"))) for row in rows]
        for column in ("dialogue", note)
    ]
    found = [LengthSummary.of(column) for column in counts]
    *known, over = TABLE[name]
    assert [(round(s.mean), round(s.median), s.p95, s.max) for s in found] == known
    pairs = [conversation + note + 60 for conversation, note in zip(*counts, strict=True)]
    assert tuple(sum(pair > limit for pair in pairs) for limit in (2048, 4096)) == over
