"""Options made from the settings' own fields: no default and no help text is written twice."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer

from mlx_medphi.errors import UsageError

__all__ = [
    "AdapterOption",
    "DtypeOption",
    "GroupSizeOption",
    "JsonOption",
    "ModelOption",
    "OfflineOption",
    "QuantizeOption",
    "RevisionOption",
    "field_help",
    "quantization",
    "with_settings",
]

Verb = TypeVar("Verb", bound=Callable[..., int])
_ATTRIBUTE = re.compile(r"^    (\w+): (.+)$")

ModelOption = Annotated[
    str,
    typer.Option(
        "--model", metavar="DIR|ID", help="A Phi-3 checkpoint directory, or a hub id OWNER/NAME."
    ),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter", metavar="PATH", help="An adapter: own file, mlx-lm or PEFT directory."
    ),
]
QuantizeOption = Annotated[
    int | None,
    typer.Option("--quantize", metavar="4|8", help="Quantise the base to so many bits on loading."),
]
GroupSizeOption = Annotated[
    int, typer.Option("--group-size", metavar="32|64", help="Weights that share a scale.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="float32|float16|bfloat16",
        help="Compute in this [default: as stored].",
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a hub id [default: its main]."),
]
OfflineOption = Annotated[
    bool,
    typer.Option(
        "--offline", help="Take a hub id from what was fetched before, never the network."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def quantization(bits: int | None, group_size: int) -> tuple[int, int] | None:
    """What `load` calls `quantize`, from the two options.

    Raises:
        UsageError: other bits than the help offers.
    """
    if bits not in (None, 4, 8):
        raise UsageError(f"--quantize is {bits}, expected 4 or 8")
    return None if bits is None else (bits, group_size)


def field_help(config: type) -> dict[str, str]:
    """The text of each field in the `Attributes:` part of a class's docstring, on one line."""
    texts: dict[str, str] = {}
    name = ""
    _, _, attributes = inspect.cleandoc(config.__doc__ or "").partition("Attributes:\n")
    for line in attributes.splitlines():
        if found := _ATTRIBUTE.match(line):
            name = found[1]
            texts[name] = found[2]
        elif name and line.strip():
            texts[name] += " " + line.strip()
    return texts


def with_settings(*configs: type, more: dict[str, str] | None = None) -> Callable[[Verb], Verb]:
    """Give a verb one option for each field of the settings.

    The verb takes them as `**typed: Any`; one that was not typed is absent, so that a file's value
    or the default stands.

    Args:
        configs: dataclasses whose docstrings describe their fields.
        more: further choices that a field has on the command line, by field.
    """
    options = [option for config in configs for option in _options(config, more or {})]

    def decorate(verb: Verb) -> Verb:
        own = inspect.signature(verb, eval_str=True)
        kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]

        def called(**values: Any) -> int:
            unset = {p.name for p in options if values[p.name] in (None, [])}
            return verb(**{name: value for name, value in values.items() if name not in unset})

        called.__name__, called.__doc__ = verb.__name__, verb.__doc__
        called.__module__ = verb.__module__
        called.__signature__ = inspect.Signature([*kept, *options])  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in (*kept, *options)}
        return called  # type: ignore[return-value]

    return decorate


def _options(config: type, more: dict[str, str]) -> list[inspect.Parameter]:
    hints = get_type_hints(config)
    helps = field_help(config)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(
                field, hints[field.name], helps[field.name], more.get(field.name)
            ),
        )
        for field in fields(config)
    ]


def _annotation(field: Field[Any], hint: Any, text: str, more: str | None) -> Any:
    flag = "--" + field.name.replace("_", "-")
    name: str = flag
    metavar = None
    default = None if field.default is MISSING else field.default
    if hint is bool:
        name = f"{flag}/--no-{flag[2:]}"
        default = None if default is None else flag[2:] if default else f"no-{flag[2:]}"
    if choices := [str(choice) for choice in _choices(hint)]:
        metavar = "|".join([*choices, more] if more else choices)
    if get_origin(hint) is tuple:
        default = ", ".join(default) if default else None
        text = f"{text} Repeat the option for several."
    # Typer would put brackets of its own around a default given as text.
    shown = "" if default in (None, "") else f" [default: {default}]"
    option = typer.Option(name, help=_for_people(text) + shown, show_default=False, metavar=metavar)
    return Annotated[_plain_type(hint) | None, option]


def _for_people(text: str) -> str:
    """A field's text in the words of the command line: `iters` is --iters, None is absence."""
    text = re.sub(r"; None means (.+)\.$", r" [default: \1].", text)
    text = re.sub(r"`(\w+)`", lambda name: "--" + name[1].replace("_", "-"), text)
    return text[:1].upper() + text[1:].replace(" is None", " is not given")


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values a field may have, where they are few; None is absence."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    found = [option for option in get_args(hint) if get_origin(option) is Literal]
    return get_args(found[0]) if found else ()


def _plain_type(hint: Any) -> Any:
    """What typer parses: a field's choices are checked by the settings, which name them all."""
    if choices := _choices(hint):
        return type(choices[0])
    if get_origin(hint) is tuple:
        return list[str]
    options = [option for option in get_args(hint) if option is not type(None)]
    return options[0] if options else hint
