"""Checks of settings: types by their annotations, ranges, choices; all problems told at once."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mlx_medphi.errors import ConfigError

__all__ = [
    "at_least",
    "check_types",
    "finite_positive",
    "in_range",
    "one_of",
    "raise_all",
    "type_problem",
]


def check_types(config: Any) -> None:
    """Check every field of a settings object by its annotation; numpy's numbers become Python's.

    Raises:
        ConfigError: names every field that has another type.
    """
    hints = get_type_hints(type(config))
    names = [field.name for field in fields(config)]
    problems = [type_problem(name, getattr(config, name), hints[name]) for name in names]
    raise_all(type(config).__name__, problems)
    for name in names:
        value = getattr(config, name)
        # A sweep hands over numpy's numbers; run.json and repr want Python's.
        if type(value) is not bool and isinstance(value, Integral):
            object.__setattr__(config, name, int(value))
        elif type(value) is not bool and isinstance(value, Real):
            object.__setattr__(config, name, float(value))


def type_problem(name: str, value: Any, hint: Any) -> str | None:
    """What is wrong with a value of another type than its annotation; None where it fits."""
    if _fits(value, hint):
        return None
    problem = f"{name} is {value!r}, expected {_words(hint)}"
    if isinstance(value, str) and _fits(0.5, hint):
        with suppress(ValueError):
            # YAML 1.1 takes 2e-4 for text; with a point it is a number.
            problem = f"{problem}; write {float(value):.12f}".rstrip("0")
    return problem


def _fits(value: Any, hint: Any) -> bool:
    options = get_args(hint) if get_origin(hint) not in (tuple, Literal) else ()
    if options:  # a union
        return any(_fits(value, option) for option in options)
    if get_origin(hint) is Literal:
        # 4.0 and True equal whole numbers and are none.
        return value in get_args(hint) and not isinstance(value, (bool, float))
    if get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return "a list of names"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
        str: "text",
    }
    if options := get_args(hint):
        return " or ".join(_words(option) for option in options)
    return names.get(hint, str(hint))


def at_least(name: str, value: int, low: int) -> str | None:
    """What is wrong with a number below `low`."""
    return None if value >= low else f"{name} is {value}, expected at least {low}"


def finite_positive(name: str, value: float) -> str | None:
    """What is wrong with a number that is not above 0, or no number."""
    good = 0 < value < math.inf
    return None if good else f"{name} is {value}, expected a positive number"


def in_range(name: str, value: float, low: float, high: float) -> str | None:
    """What is wrong with a number outside of `low` to `high`, both included."""
    return (
        None
        if low <= value <= high
        else f"{name} is {value}, expected between {low:g} and {high:g}"
    )


def one_of(name: str, value: str, options: tuple[str, ...]) -> str | None:
    """What is wrong with a word that is no option."""
    return (
        None if value in options else f"{name} is {value!r}, expected one of {', '.join(options)}"
    )


def raise_all(where: str, problems: list[str | None]) -> None:
    """Raise one error for all problems, if there is any.

    Raises:
        ConfigError: names `where` and every problem once.
    """
    found = list(dict.fromkeys(problem for problem in problems if problem))
    if found:
        raise ConfigError(f"{where}: " + "; ".join(found))
