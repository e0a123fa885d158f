"""Read metadata.json strictly: what is missing or of another kind is an error, not a guess.

Nothing in the file is trusted; what else is asked of it is in `manifest_checks.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mlx_medphi.coreml.manifest import METADATA, SCHEMA, Manifest
from mlx_medphi.coreml.manifest_checks import contradictions, file_problems
from mlx_medphi.errors import BundleError, capped

__all__ = ["parse_manifest", "read_manifest"]

# A manifest is some tens of kilobytes.
MAX_BYTES = 16 << 20
MAX_WHOLE = 2**53 - 1  # what every JSON reader holds exactly


def read_manifest(directory: Path) -> Manifest:
    """Read and check metadata.json of a bundle.

    Raises:
        BundleError: missing, damaged, made by a newer version, or in contradiction with itself.
    """
    path = Path(directory) / METADATA
    try:
        with path.open("rb") as handle:
            data = handle.read(MAX_BYTES + 1)
    except OSError as exc:
        raise BundleError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    if len(data) > MAX_BYTES:
        raise BundleError(f"{path}: over {MAX_BYTES} bytes, which no bundle needs; export again")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_number, parse_float=_number)
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"{path}: damaged (not JSON in UTF-8); export the bundle again") from exc
    return parse_manifest(value, str(path))


def parse_manifest(value: Any, where: str, *, draft: bool = False) -> Manifest:
    """The manifest that parsed JSON holds.

    Args:
        value: the parsed file.
        where: its name, for messages.
        draft: the list of files is not made yet.

    Raises:
        BundleError: lists what is wrong.
    """
    _check_schema(value, where)
    problems: list[str] = []
    manifest = _read(Manifest, value, "", problems)
    if not problems:
        problems += contradictions(manifest)
    if not problems and not draft:
        problems += file_problems(manifest)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise BundleError(
            f"{where}: not a manifest of this form ({count}): {capped(problems)}; export the "
            "bundle again"
        )
    assert isinstance(manifest, Manifest)
    return manifest


def _number(text: str) -> float:
    """JSON has no infinite numbers, but 1e999 reads as one."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _check_schema(value: Any, where: str) -> None:
    ours = value.get("medphi") if isinstance(value, dict) else None
    if not isinstance(ours, dict):
        raise BundleError(
            f"{where}: has no section 'medphi', so it is not the manifest of a bundle that "
            "mlx_medphi exported"
        )
    schema = ours.get("schema")
    if type(schema) is not int or schema < 1:
        raise BundleError(f"{where}: medphi.schema is {schema!r:.40}, expected a number from 1 up")
    if schema > SCHEMA:
        raise BundleError(
            f"{where}: made by a newer mlx_medphi (schema {schema}, this one reads {SCHEMA}): "
            "update the package"
        )


def _read(kind: Any, value: Any, name: str, problems: list[str]) -> Any:
    """`value` as `kind`; what does not fit is added to `problems`, and None stands for it."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        inner = next(arg for arg in args if arg is not type(None))
        return None if value is None else _read(inner, value, name, problems)
    if is_dataclass(kind):
        return _read_object(kind, value, name, problems)
    if origin is tuple and isinstance(value, list):
        if args[-1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) == len(value):
            pairs = enumerate(zip(args, value, strict=True))
            return tuple(_read(a, v, f"{name}[{i}]", problems) for i, (a, v) in pairs)
    elif isinstance(value, dict) and origin is Mapping:
        return {k: _read(args[1], v, f"{name}.{k:.40}", problems) for k, v in value.items()}
    elif (origin is Literal and value in args and isinstance(value, str)) or _fits(kind, value):
        return float(value) if kind is float else value
    problems.append(f"{name} is {_shown(value)}, expected {_wanted(kind)}")
    return None


def _read_object(kind: Any, value: Any, name: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{name} is {_shown(value)}, expected an object")
        return None
    hints = _hints(kind)
    before, read = len(problems), {}
    for field in fields(kind):
        inner = f"{name}.{field.name}".lstrip(".")
        if field.name in value:
            read[field.name] = _read(hints[field.name], value[field.name], inner, problems)
        else:
            problems.append(f"{inner} is missing")
    return kind(**read) if len(problems) == before else None


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _fits(kind: Any, value: Any) -> bool:
    if kind is float:
        return isinstance(value, float) or (type(value) is int and abs(value) <= MAX_WHOLE)
    return type(value) is kind and (kind is not int or 0 <= value <= MAX_WHOLE)


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return f"{value!r:.40}"


def _wanted(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    words = {str: "text", bool: "true or false", int: "a whole number from 0 up", float: "a number"}
    return words.get(kind, "an object" if get_origin(kind) is Mapping else "a list as described")
