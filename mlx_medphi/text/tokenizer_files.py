"""The tokenizer files of a checkpoint directory, read and checked; nothing here writes to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from mlx_medphi.errors import TokenizerError

__all__ = ["FILE_NAMES", "TokenizerFiles"]

_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_TEMPLATE, _GENERATION = "chat_template.jinja", "generation_config.json"
_COMPANIONS = ("special_tokens_map.json", "added_tokens.json", "tokenizer.model")
FILE_NAMES = frozenset((_TOKENIZER, _CONFIG, _TEMPLATE, _GENERATION, *_COMPANIONS))
"""Every file of a checkpoint that belongs to its tokenizer."""


@dataclass(frozen=True, eq=False)
class TokenizerFiles:
    """What the files say.

    Args:
        paths: the files that exist, by name.
        pipeline: tokenizer.json as it is, without cutting to a length and without padding.
        plain: the same without added tokens, and without vocabulary entries for them.
        chat_template: the jinja source.
        tokens: the text of bos_token, eos_token and pad_token where the config names them.
        generation_stops: eos_token_id of generation_config.json, empty when there is none.
    """

    paths: Mapping[str, Path]
    pipeline: tokenizers.Tokenizer
    plain: tokenizers.Tokenizer
    chat_template: str
    tokens: Mapping[str, str]
    generation_stops: tuple[int, ...]

    @classmethod
    def read(cls, directory: Path) -> TokenizerFiles:
        """Read the files of a checkpoint directory.

        Raises:
            TokenizerError: a file is missing or damaged; the message names it.
        """
        names = (_TOKENIZER, _CONFIG, _TEMPLATE, _GENERATION, *_COMPANIONS)
        paths = {name: directory / name for name in names if (directory / name).is_file()}
        config = _read_json(directory / _CONFIG)
        pipeline, plain = _pipelines(directory / _TOKENIZER)
        return cls(
            paths=paths,
            pipeline=pipeline,
            plain=plain,
            chat_template=_chat_template(paths, config, directory / _CONFIG),
            tokens={name: _token(config, name) for name in ("bos_token", "eos_token", "pad_token")},
            generation_stops=_generation_stops(paths.get(_GENERATION), pipeline),
        )


def _pipelines(path: Path) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    spec = _read_json(path)
    model, tokens = spec.get("model"), spec.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or not tokens:
        raise _damaged(path, "no vocabulary or no added_tokens")
    if not isinstance(tokens, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) for token in tokens
    ):
        raise _damaged(path, "added_tokens is not a list of objects with content")
    added = {token["content"] for token in tokens}
    # Without its entry a token cannot come out of merges, fallbacks or whole-word look-ups.
    vocab = {text: number for text, number in model["vocab"].items() if text not in added}
    plain: dict[str, Any] = {
        "added_tokens": [],
        "post_processor": None,
        "model": {**model, "vocab": vocab},
    }
    # A saved truncation would cut notes without a word.
    whole = {"truncation": None, "padding": None}
    try:
        made = [
            tokenizers.Tokenizer.from_str(json.dumps({**spec, **change}))
            for change in (whole, {**plain, **whole})
        ]
    except Exception as exc:  # tokenizers raises bare Exception for whatever it cannot read
        raise _damaged(path, str(exc)) from exc
    return made[0], made[1]


def _chat_template(paths: Mapping[str, Path], config: Mapping[str, Any], where: Path) -> str:
    if _TEMPLATE in paths:
        return _read_text(paths[_TEMPLATE])
    source = config.get("chat_template")
    if isinstance(source, list):  # several named templates
        named = [entry for entry in source if isinstance(entry, dict)]
        found = [entry.get("template") for entry in named if entry.get("name") == "default"]
        source = found[-1] if found else None
    if not isinstance(source, str):
        raise TokenizerError(
            f"{where}: no chat_template, and no {_TEMPLATE} beside it. Expected the template of an "
            "instruction-tuned Phi-3; take both files from such a checkpoint."
        )
    return source


def _token(config: Mapping[str, Any], name: str) -> str:
    value = config.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _generation_stops(path: Path | None, pipeline: tokenizers.Tokenizer) -> tuple[int, ...]:
    if path is None:
        return ()
    found = _read_json(path).get("eos_token_id")
    stops = found if isinstance(found, list) else [] if found is None else [found]
    wrong = [stop for stop in stops if not _is_id(stop, pipeline)]
    if wrong:
        raise TokenizerError(
            f"{path}: eos_token_id holds {wrong[0]!r}, which is no id of {_TOKENIZER}. Expected "
            "one id or a list of ids; take both files from the same checkpoint."
        )
    return tuple(stops)


def _is_id(value: object, pipeline: tokenizers.Tokenizer) -> bool:
    # The library takes 32 bits without a sign and raises an error of its own for more.
    return type(value) is int and 0 <= value < 2**32 and pipeline.id_to_token(value) is not None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as exc:
        raise TokenizerError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    except UnicodeDecodeError as exc:
        raise _damaged(path, f"byte {exc.start} is not UTF-8") from exc


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise TokenizerError(
            f"{path}: no such file. Expected a checkpoint directory with {_TOKENIZER} and "
            f"{_CONFIG}; copy both from the base model."
        )
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as exc:
        raise _damaged(path, str(exc)) from exc
    if not isinstance(value, dict):
        raise _damaged(path, "not a JSON object")
    return value


def _damaged(path: Path, what: str) -> TokenizerError:
    return TokenizerError(f"{path}: damaged ({what}). Copy it again from the base model.")
