"""JSON Lines as mlx-lm reads them: chat (`messages`) and `prompt`/`completion` rows.

Rows in the project's own prompt form come back as the conversations and notes they were written
from; other rows keep their messages and are trained on as they are. mlx-lm's third form, plain
`text`, says nowhere which part is the note, so it is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast, get_args

from mlx_medphi.data.examples import Conversation, Example, Message, Note, Role, Turn
from mlx_medphi.data.prompt import chat_messages, parse_user_prompt
from mlx_medphi.data.reading import Faults, read_text
from mlx_medphi.errors import DataError

__all__ = ["SOURCE", "example_from_row", "read", "row_from_example"]

SOURCE = "jsonl"
_SPLITS = ("train", "valid", "test")
_SECONDS = (float, int, type(None))


class _RowFault(Exception):
    """What is wrong with one row; `read` adds the place."""


def read(path: Path) -> list[Example]:
    """Read a .jsonl file. Rows keep their `id`, `source`, `split` and `group` when they have them.

    A file called train, valid or test gives its name as the split of rows that name none.

    Raises:
        DataError: a line is not JSON, or a row has no note, as a list of all such lines.
    """
    faults = Faults(path)
    examples: list[Example] = []
    seen: set[str] = set()
    # str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _check_characters(line, row)
            example = example_from_row(row, f"{SOURCE}/{path.stem}/{number:06d}", path.stem)
            if example.id in seen:
                raise _RowFault("its id occurs twice")
        except json.JSONDecodeError as exc:
            faults.add(f"line {number}", f"not JSON ({exc.msg} at character {exc.pos})")
        except (ValueError, RecursionError):
            faults.add(f"line {number}", "a number too long or lists too deep to be read")
        except (_RowFault, DataError) as exc:
            faults.add(f"line {number}", str(exc))
        else:
            seen.add(example.id)
            examples.append(example)
    faults.raise_if_any(
        'Expected {"messages": [{"role": …, "content": …}, …]} that ends with an assistant '
        'message, or {"prompt": …, "completion": …}.'
    )
    if not examples:
        raise DataError(f"{path}: no rows. Expected one JSON object per line.")
    return examples


def _check_characters(line: str, row: Any) -> None:
    """Refuse half of a surrogate pair, which JSON can write and no file in UTF-8 can hold."""
    if "\\ud" in line.lower():
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as exc:
            half = ord(exc.object[exc.start])
            raise _RowFault(
                f"holds \\u{half:04x}, half of a character; write the row again as UTF-8"
            ) from exc


def example_from_row(row: Any, fallback_id: str, stem: str) -> Example:
    """Make an example of one parsed row; `stem` is the file's name without its ending."""
    if not isinstance(row, dict):
        raise _RowFault("not a JSON object")
    messages = _messages(row)
    named = stem if stem in _SPLITS else None
    split = _text(row, "split") if "split" in row else named
    example_id = _text(row, "id") or fallback_id
    augmented = row.get("augmented", False)
    if not isinstance(augmented, bool):
        raise _RowFault('"augmented" is neither true nor false')
    own = _own_form(messages)
    if own is None:
        asked = "\n".join(m.content for m in messages if m.role == "user")
        own = Conversation((Turn("", asked),)), Note(messages[-1].content)
        kept: tuple[Message, ...] | None = messages
    else:
        kept = None
    return Example(
        id=example_id,
        source=_text(row, "source") or SOURCE,
        conversation=_with_times(own[0], row.get("times")),
        note=own[1],
        split=split,
        group=_text(row, "group"),
        messages=kept,
        augmented=augmented,
    )


def row_from_example(example: Example) -> dict[str, Any]:
    """The row that `example_from_row` reads back to an equal example; mlx-lm reads `messages`."""
    messages = [{"role": m.role, "content": m.content} for m in chat_messages(example)]
    row: dict[str, Any] = {"messages": messages, "id": example.id, "source": example.source}
    # Null too: the file's name must not stand in for a split that the row never had.
    row["split"] = example.split
    optional = {
        "section": example.note.section,
        "group": example.group,
        "augmented": example.augmented or None,
    }
    row.update({key: value for key, value in optional.items() if value is not None})
    if any(turn.start is not None or turn.end is not None for turn in example.conversation.turns):
        row["times"] = [[turn.start, turn.end] for turn in example.conversation.turns]
    return row


def _messages(row: dict[str, Any]) -> tuple[Message, ...]:
    if row.get("tools"):
        raise _RowFault('it has "tools", which notes have no use for: remove them')
    # mlx-lm, too, looks for the pair first.
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise _RowFault('"prompt" and "completion" must be text')
        return _checked((Message("user", prompt), Message("assistant", completion)))
    if "messages" in row:
        return _chat(row["messages"])
    if "text" in row:
        raise _RowFault('plain "text" does not say which part is the note')
    raise _RowFault('neither "messages" nor "prompt" with "completion"')


def _chat(content: Any) -> tuple[Message, ...]:
    if not isinstance(content, list):
        raise _RowFault('"messages" is not a list')
    messages: list[Message] = []
    for position, item in enumerate(content, start=1):
        if not isinstance(item, dict) or not isinstance(item.get("content"), str):
            raise _RowFault(f"message {position} has no text under content")
        if item.get("role") not in get_args(Role):
            raise _RowFault(f"message {position} has a role other than system, user, assistant")
        messages.append(Message(cast(Role, item["role"]), item["content"]))
    return _checked(tuple(messages))


def _checked(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not messages or messages[-1].role != "assistant" or not messages[-1].content.strip():
        raise _RowFault("it does not end with an assistant message that holds a note")
    if not any(m.role == "user" and m.content.strip() for m in messages):
        raise _RowFault("no user message holds a conversation")
    return messages


def _own_form(messages: tuple[Message, ...]) -> tuple[Conversation, Note] | None:
    if [m.role for m in messages] != ["user", "assistant"]:
        return None
    parsed = parse_user_prompt(messages[0].content)
    if parsed is None:
        return None
    conversation = Conversation.from_text(parsed[0])
    # Only an exact copy may stand in for the message that was given.
    if not conversation.turns or conversation.text() != parsed[0]:
        return None
    return conversation, Note(messages[1].content, parsed[1])


def _with_times(conversation: Conversation, times: Any) -> Conversation:
    if times is None:
        return conversation
    turns = conversation.turns
    if not isinstance(times, list) or len(times) != len(turns) or not all(map(_is_span, times)):
        raise _RowFault('"times" must hold one [start, end] in seconds for each turn')
    return Conversation(
        tuple(
            Turn(turn.speaker, turn.text, start, end)
            for turn, (start, end) in zip(turns, times, strict=True)
        )
    )


def _is_span(span: Any) -> bool:
    return isinstance(span, list) and len(span) == 2 and all(type(x) in _SECONDS for x in span)


def _text(row: dict[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is None:
        return None
    # mlx-lm data sets in the wild number their rows.
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise _RowFault(f'"{key}" is not a text')
    return value
