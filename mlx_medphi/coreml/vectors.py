"""tokenizer/vectors.json: what the tokenizer does to made-up text, for every reader to repeat.

Written by Python with the bundle; read by Python's and Swift's tests and by `verify`. The file is
ASCII (other characters as \\u escapes), its keys are sorted, and equal tokenizers give equal bytes:

    format, version        "medphi-tokenizer-vectors", 1
    tokenizer_sha256       of the tokenizer.json beside it
    chat_template_sha256   of the chat_template.jinja beside it
    vocab_size             one more than the largest id
    encode   [{name, text, ids, decoded?}]
             Plain text to ids; nothing in it becomes an added token. The ids give the text back,
             or `decoded` where that is there.
    special  [{name, text, ids}]
             The same by the file's own pipeline, where "<|end|>" is that token: what a rendered
             chat template becomes.
    decode   [{name, ids, text, with_special, pieces, flush}]
             Ids to text without any added token (also those that the file does not call special),
             and with them. `pieces` is what each id lets out when they arrive one by one, `flush`
             what is left at the end; joined they are `text`.
    chat     [{name, messages, generation, ids}]
             Messages [{role, content}] to ids; `generation` says whether they end where the model
             is to go on, or in the closing token.
    note     [{name, turns, section, max_length, reserve, prompt, ids, left_out_turns,
             left_out_words}]
             Turns [{speaker, text}] to the user's message before it is shortened, and to the ids of
             the prompt, shortened to max_length less reserve.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_medphi.coreml.bundle_tokenizer import template_sha256
from mlx_medphi.coreml.vector_inputs import Case, inputs
from mlx_medphi.data.examples import Conversation, Message, Turn
from mlx_medphi.data.prompt import user_prompt
from mlx_medphi.errors import BundleError, MedPhiError
from mlx_medphi.files import sha256_file, write_text
from mlx_medphi.text.chat import encode_chat, encode_prompt
from mlx_medphi.text.tokenizer import Tokenizer

__all__ = ["build_vectors", "check_vectors", "write_vectors"]

FORMAT, VERSION = "medphi-tokenizer-vectors", 1
MAX_BYTES = 64 << 20


def write_vectors(tokenizer: Tokenizer, path: Path) -> None:
    """Write the vectors of a tokenizer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(build_vectors(tokenizer), sort_keys=True, separators=(",", ":"))
    # One case on a line, for people who compare two files.
    write_text(path, text.replace('},{"', '},\n{"') + "\n")


def build_vectors(tokenizer: Tokenizer) -> dict[str, Any]:
    """All cases, as the file holds them."""
    made = {
        group: [{**case, **_ANSWERS[group](tokenizer, case)} for case in members]
        for group, members in inputs(tokenizer).items()
    }
    return {**_head(tokenizer), **made}


def check_vectors(tokenizer: Tokenizer, path: str | Path) -> int:
    """Compute every case of a vectors file again.

    Args:
        tokenizer: the one to test.
        path: the file.

    Returns:
        How many cases there are; all of them agree.

    Raises:
        BundleError: the first case that differs, by its name, or a file that is damaged.
    """
    path = Path(path)
    value = _read(path)
    if (value.get("format"), value.get("version")) != (FORMAT, VERSION):
        raise BundleError(
            f"{path}: format {value.get('format')!r:.60}, version {value.get('version')!r:.20}; "
            f"expected {FORMAT!r}, version {VERSION}: update the package or export again"
        )
    for key, expected in _head(tokenizer).items():
        if value.get(key) != expected:
            raise BundleError(
                f"{path}: {key} is {value.get(key)!r:.80}, this tokenizer's is {expected!r:.80}; "
                "the two are not from the same checkpoint"
            )
    count = 0
    for group, answer in _ANSWERS.items():
        members = value.get(group)
        if not isinstance(members, list) or not members:
            raise _damaged(path, f"no list of cases {group!r}")
        for at, case in enumerate(members):
            _check_case(path, f"{group}[{at}]", tokenizer, case, answer)
        count += len(members)
    return count


def _check_case(
    path: Path, place: str, tokenizer: Tokenizer, case: Any, answer: Callable[..., Case]
) -> None:
    try:
        found = answer(tokenizer, case)
        # `decoded` is there only where it differs from the text.
        keys = sorted(found.keys() | ({"decoded"} & case.keys()))
        wrong = [key for key in keys if found.get(key) != case[key]]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as exc:
        raise _damaged(path, f"{place} is no such case") from exc
    except MedPhiError as exc:
        raise BundleError(f"{path}: {place} cannot be encoded: {exc}") from exc
    if wrong:
        raise BundleError(
            f"{path}: {place}, {case.get('name')!r:.80}: {wrong[0]} differs"
            f"{_where(found.get(wrong[0]), case[wrong[0]])}. The tokenizer is not the one that the "
            "file was made with, or an incompatible version of the tokenizers library reads it"
        )


def _where(found: Any, expected: Any) -> str:
    """Where two lists of ids part; nothing for other values."""
    if not isinstance(found, list) or not isinstance(expected, list):
        return ""
    pairs = zip(found, expected, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))

    def item(values: list[Any]) -> str:
        return f"{values[at]!r:.40}" if at < len(values) else "the end"

    return f" at place {at}: {item(found)}, expected {item(expected)}"


def _head(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer_sha256": sha256_file(tokenizer.files["tokenizer.json"]),
        "chat_template_sha256": template_sha256(tokenizer),
        "vocab_size": tokenizer.vocab_size,
    }


def _encode(tokenizer: Tokenizer, case: Mapping[str, Any]) -> Case:
    ids = tokenizer.encode_text(case["text"])
    back = tokenizer.decode(ids, skip_special=False)
    return {"ids": ids} if back == case["text"] else {"ids": ids, "decoded": back}


def _special(tokenizer: Tokenizer, case: Mapping[str, Any]) -> Case:
    return {"ids": tokenizer.encode_with_special(case["text"])}


def _decode(tokenizer: Tokenizer, case: Mapping[str, Any]) -> Case:
    ids, stream = case["ids"], tokenizer.stream()
    return {
        "text": tokenizer.decode(ids),
        "with_special": tokenizer.decode(ids, skip_special=False),
        "pieces": [stream.step(number) for number in ids],
        "flush": stream.flush(),
    }


def _chat(tokenizer: Tokenizer, case: Mapping[str, Any]) -> Case:
    messages = [Message(m["role"], m["content"]) for m in case["messages"]]
    return {"ids": encode_chat(tokenizer, messages, case["generation"]).ids}


def _note(tokenizer: Tokenizer, case: Mapping[str, Any]) -> Case:
    turns = tuple(Turn(turn["speaker"], turn["text"]) for turn in case["turns"])
    conversation, section = Conversation(turns), case["section"]
    made = encode_prompt(tokenizer, conversation, section, case["max_length"], case["reserve"])
    return {
        "prompt": user_prompt(conversation.text(), section),
        "ids": made.ids,
        "left_out_turns": made.left_out_turns,
        "left_out_words": made.left_out_words,
    }


_ANSWERS: dict[str, Callable[[Tokenizer, Mapping[str, Any]], Case]] = {
    "encode": _encode,
    "special": _special,
    "decode": _decode,
    "chat": _chat,
    "note": _note,
}


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as handle:
            data = handle.read(MAX_BYTES + 1)
        value = json.loads(data.decode("utf-8")) if len(data) <= MAX_BYTES else None
    except OSError as exc:
        raise BundleError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    except (ValueError, RecursionError) as exc:
        raise _damaged(path, "not JSON") from exc
    if not isinstance(value, dict):
        raise _damaged(path, "no JSON object of a usual size")
    return value


def _damaged(path: Path, what: str) -> BundleError:
    return BundleError(f"{path}: damaged ({what}); fetch or export the bundle again")
