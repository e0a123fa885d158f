"""Is the weight file what the program says it is: whole, shared by all functions, and finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_medphi.coreml.blobs import BITS, BlobFile
from mlx_medphi.coreml.lint_ops import CONSTEXPR
from mlx_medphi.coreml.lint_view import Constant, View
from mlx_medphi.coreml.package import WEIGHT_REFERENCE
from mlx_medphi.coreml.package_file import TensorType
from mlx_medphi.errors import BundleError

__all__ = ["Stored", "number_findings", "quantized_layers", "sharing_findings", "stored_findings"]

LIMIT = 6e4
"""No float16 constant is larger: two of them may meet in a sum, and 65504 is the largest."""
# Scales, tables, norms and adapters are far below this; larger ones are whole float16 matrices.
SCANNED_BYTES = 16 << 20
# Floats of a constant that may stand in the program: an epsilon or a factor, no weight.
INLINE = 1
# A record of the weight file starts on a multiple of this and is as long.
ALIGN = 64


@dataclass(frozen=True)
class Stored:
    """The constants of the weight file that a program names: name and type, by their offset."""

    names: Mapping[int, str]
    types: Mapping[int, TensorType]

    @classmethod
    def of(cls, views: Iterable[View]) -> Stored:
        """Those of some functions."""
        names: dict[int, str] = {}
        types: dict[int, TensorType] = {}
        for view in views:
            for name, constant in view.constants():
                if constant.offset is not None and constant.type is not None:
                    names.setdefault(constant.offset, name)
                    types.setdefault(constant.offset, constant.type)
        return cls(names, types)


def sharing_findings(
    views: Mapping[str, View], pairs: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """(function, what is wrong): each pair has the same constants, and all have the base's."""
    own = {name: Stored.of([view]).names for name, view in views.items()}
    for wide, narrow in pairs:
        apart = {**own[wide], **own[narrow]}.items()
        lonely = {at: name for at, name in apart if at not in own[wide] or at not in own[narrow]}
        yield from _unshared(narrow, lonely, wide)
    base = pairs[0][0]
    for wide, _ in pairs[1:]:
        lonely = {at: name for at, name in own[base].items() if at not in own[wide]}
        yield from _unshared(wide, lonely, base)


def _unshared(here: str, lonely: Mapping[int, str], there: str) -> Iterator[tuple[str, str]]:
    if lonely:
        first = min(lonely)
        yield (
            here,
            f"{len(lonely)} constants are not shared with {there}, the first {lonely[first]!r} "
            f"at byte {first}; they would be held twice",
        )


def stored_findings(views: Mapping[str, View], blobs: BlobFile) -> Iterator[tuple[str, str]]:
    """(where, what is wrong) with the weight file as a container."""
    told: set[str] = set()
    for view in views.values():
        for name, constant in view.constants():
            lines = _record(name, constant, blobs) if constant.offset is not None else ()
            for line in lines:
                # All functions share a constant; one of them speaks for it.
                if line not in told:
                    told.add(line)
                    yield view.name, line
    stored = Stored.of(views.values())
    try:
        records = list(_records(blobs))
    except BundleError as exc:
        yield "weight file", str(exc)
        return
    unused = sorted(set(records) - stored.names.keys())
    if unused:
        yield (
            "weight file",
            (f"{len(unused)} constants that no function uses, the first at byte {unused[0]}"),
        )


def _record(name: str, constant: Constant, blobs: BlobFile) -> Iterator[str]:
    assert constant.offset is not None
    if constant.file != WEIGHT_REFERENCE:
        yield f"the constant {name!r} lies in {constant.file!r}, expected {WEIGHT_REFERENCE}"
        return
    try:
        dtype, data = blobs.part(constant.offset)
    except BundleError as exc:
        yield f"the constant {name!r}: {exc}"
        return
    expected = constant.type
    if expected is None or expected.dtype not in BITS:
        yield f"the constant {name!r} has no type of a weight file"
        return
    nbytes = (math.prod(expected.shape) * BITS[expected.dtype] + 7) // 8
    if (dtype, len(data)) != (expected.dtype, nbytes):
        yield (
            f"the constant {name!r} is {len(data)} bytes of {dtype} in the weight file, expected "
            f"{nbytes} of {expected.dtype}"
        )


def _records(blobs: BlobFile) -> Iterator[int]:
    """The offsets of all records, one after the other to the end of the file."""
    position = ALIGN
    end = ALIGN
    for _ in range(blobs.count):
        position = -(-end // ALIGN) * ALIGN
        _, data = blobs.part(position)
        yield position
        end = position + ALIGN + len(data)
    size = blobs.path.stat().st_size
    if size != end:
        raise BundleError(f"{size} bytes, its {blobs.count} constants end at byte {end}")


def quantized_layers(views: Mapping[str, View]) -> int:
    """Weights that are stored as codes, over all functions."""
    found = {
        constant.offset
        for view in views.values()
        for op in view.by_type.get(CONSTEXPR, ())
        if (constant := view.constant(op, "data")) is not None
    }
    return len(found)


def number_findings(views: Mapping[str, View], blobs: BlobFile) -> Iterator[tuple[str, str]]:
    """(function, what is wrong) with the numbers of float constants."""
    seen: set[int] = set()
    for view in views.values():
        scales, zeros = _offsets(view, CONSTEXPR, "scale"), _offsets(view, "linear", "bias")
        for name, constant in view.constants():
            if constant.offset in seen:
                continue
            if constant.offset is not None:
                seen.add(constant.offset)
            values = _numbers(constant, blobs)
            if values is None:
                continue
            problem = _range(values, constant.offset in scales)
            if problem is None and constant.offset in zeros and values.any():
                problem = "is a bias, expected zeros alone"
            if constant.offset is None and values.size > INLINE:
                problem = f"has {values.size} numbers in the program, not in the weight file"
            if problem is not None:
                yield view.name, f"the constant {name!r} {problem}"


def _offsets(view: View, kind: str, parameter: str) -> set[int]:
    """Where the constants lie that some operations take as one parameter."""
    found = [view.constant(op, parameter) for op in view.by_type.get(kind, ())]
    return {c.offset for c in found if c is not None and c.offset is not None}


def _numbers(constant: Constant, blobs: BlobFile) -> npt.NDArray[np.floating] | None:
    """The numbers of a float constant; None for others, whole matrices and what is damaged."""
    if constant.type is None or not constant.type.dtype.startswith("float"):
        return None
    if constant.offset is None:
        return constant.values if isinstance(constant.values, np.ndarray) else None
    try:
        dtype, data = blobs.part(constant.offset)
    except BundleError:
        return None
    if dtype != constant.type.dtype or len(data) > SCANNED_BYTES:
        return None
    return np.frombuffer(data, dtype)


def _range(values: npt.NDArray[np.floating], positive: bool) -> str | None:
    if values.dtype == np.float16:
        # As whole numbers magnitudes keep their order, ten times as fast.
        largest = int((values.view(np.uint16) & np.uint16(0x7FFF)).max(initial=0))
        inside = largest <= int(np.float16(LIMIT).view(np.uint16))
    else:
        inside = bool(np.isfinite(values).all())
    if not inside:
        return f"holds a number that is not finite or beyond ±{LIMIT:g}"
    if positive and int(values.view(np.int16).min(initial=1)) <= 0:
        return "holds a scale that is not above zero"
    return None
