"""`medphi generate`: a conversation in, its note out, piece by piece."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import mlx_medphi as mp
from mlx_medphi.cli.options import (
    AdapterOption,
    DtypeOption,
    GroupSizeOption,
    JsonOption,
    ModelOption,
    OfflineOption,
    QuantizeOption,
    RevisionOption,
    quantization,
    with_settings,
)
from mlx_medphi.cli.show import examples, print_json
from mlx_medphi.config import GenerateConfig, updated
from mlx_medphi.data.examples import Conversation
from mlx_medphi.data.prompt import prompt_parts
from mlx_medphi.errors import DataError, UsageError, capped

__all__ = ["generate", "read_conversation"]

EXAMPLES = examples(
    "medphi generate --model models/phi-3-mini --adapter runs/a/adapter --conversation visit.txt",
    "medphi generate --model fused --conversation data/mts/test.jsonl --row 3 --max-tokens 200",
    "pbpaste | medphi generate --model fused --conversation - --section GENHX",
)


@with_settings(GenerateConfig)
def generate(
    model: ModelOption,
    conversation: Annotated[
        str,
        typer.Option(
            metavar="FILE|-",
            help="Text with one 'Doctor: …' line per turn, or prepared .jsonl; - is a pipe.",
        ),
    ],
    adapter: AdapterOption = None,
    row: Annotated[
        str | None, typer.Option(help="Which row of a .jsonl: its number from 1, or its id.")
    ] = None,
    section: Annotated[
        str | None,
        typer.Option(help="Part of the note to write, e.g. GENHX [default: the row's, or all]."),
    ] = None,
    shorten: Annotated[
        bool,
        typer.Option(help="Leave out turns of a conversation longer than the model's context."),
    ] = True,
    quantize: QuantizeOption = None,
    group_size: GroupSizeOption = 64,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    **typed: Any,
) -> int:
    """Write a note for a conversation.

    The note may be wrong: a clinician must read and correct it before anyone relies on it.
    """
    config = updated(GenerateConfig(), typed, "command line")
    spoken, own_section = read_conversation(conversation, row)
    section = own_section if section is None else _checked_section(section)
    loaded, tokenizer = mp.load(
        model,
        adapter=adapter,
        revision=revision,
        dtype=dtype,
        quantize=quantization(quantize, group_size),
        offline=offline,
    )
    stream = mp.stream_note(
        loaded, tokenizer, spoken, section=section, config=config, shorten=shorten
    )
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if not as_json:
            print(piece, end="", flush=True)
    if not as_json:
        print()
        return 0
    print_json(
        {
            "note": "".join(pieces).rstrip(),
            "prompt_tokens": stream.prompt_tokens,
            "note_tokens": len(stream.ids),
            "finish_reason": stream.finish_reason,
            "left_out_turns": stream.left_out_turns,
            "left_out_words": stream.left_out_words,
        }
    )
    return 0


def read_conversation(source: str, row: str | None) -> tuple[Conversation, str | None]:
    """The conversation of a text file, a pipe or one row of a .jsonl, and that row's section.

    Raises:
        UsageError: no such file or row, a folder, a closed pipe, or a row of what has no rows.
        DataError: not UTF-8, or without words.
    """
    path = Path(source)
    if path.suffix.lower() == ".jsonl":
        return _row(path, row)
    if row is not None:
        raise UsageError(f"--row belongs to a .jsonl file; {source} is one conversation")
    content = _content(source)
    try:
        conversation = Conversation.from_text(content.decode("utf-8-sig"))
    except UnicodeDecodeError as exc:
        raise DataError(
            f"{source}: byte {exc.start} is not UTF-8. Save the conversation as UTF-8 text."
        ) from exc
    if not conversation.turns:
        raise DataError(f"{source}: no words in it. Expected lines such as 'Doctor: How are you?'.")
    return conversation, None


def _checked_section(section: str) -> str:
    try:
        prompt_parts(section)
    except DataError as exc:
        raise UsageError(f"--section: {exc}") from exc
    return section


def _content(source: str) -> bytes:
    if source == "-":
        if sys.stdin is None:
            raise UsageError("-: standard input is closed. Give it a conversation, or name a file.")
        return sys.stdin.buffer.read()
    path = Path(source)
    if not path.exists() or path.is_dir():
        found = "a folder, not a file" if path.is_dir() else "no such file"
        raise UsageError(f"{path}: {found}. Give a text or .jsonl file, or - for a pipe.")
    return path.read_bytes()


def _row(path: Path, row: str | None) -> tuple[Conversation, str | None]:
    rows = mp.load_examples(path)
    if row is None:
        raise UsageError(f"{path}: {len(rows):,} rows; say which with --row NUMBER or --row ID")
    by_number = {str(number): example for number, example in enumerate(rows, start=1)}
    example = by_number.get(row) or next((e for e in rows if e.id == row), None)
    if example is None:
        raise UsageError(
            f"{path}: no row {row}. Expected 1 to {len(rows)}, or an id such as "
            f"{capped(e.id for e in rows[:3])}."
        )
    return example.conversation, example.note.section
