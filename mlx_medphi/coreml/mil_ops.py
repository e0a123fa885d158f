"""Which operations of an ML program can be computed here, and what arguments each takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

from mlx_medphi.coreml.mil_ops_arithmetic import ARITHMETIC
from mlx_medphi.coreml.mil_ops_layout import LAYOUT
from mlx_medphi.errors import BundleError, capped

__all__ = ["CONSTANTS", "OPERATIONS", "STATES", "TAKE_CONSTANTS", "VARIADIC", "check_arguments"]

OPERATIONS: dict[str, Callable[..., Any]] = {**ARITHMETIC, **LAYOUT}
"""Operation -> function of its arguments by name, which gives its output or a tuple of them."""
CONSTANTS = frozenset({"const", "constexpr_blockwise_shift_scale"})
"""Operations that are values, known before the program runs."""
STATES: dict[str, frozenset[str]] = {
    "read_state": frozenset({"input"}),
    "write_state": frozenset({"input", "data"}),
}
"""Operations on states -> their arguments."""
TAKE_CONSTANTS = {"gather": "x", "linear": "weight", "matmul": "y"}
"""Operation -> the argument of which it reads a constant itself; all others get the numbers."""
VARIADIC = frozenset({"values"})
"""Arguments that are a list."""


def check_arguments(op_type: str, given: Collection[str]) -> None:
    """See that an operation has all it needs and nothing that would be passed over.

    Raises:
        BundleError: an argument is missing or not implemented.
    """
    if op_type in STATES:
        needed = known = set(STATES[op_type])
    else:
        parameters = inspect.signature(OPERATIONS[op_type]).parameters
        known = set(parameters)
        needed = {name for name, p in parameters.items() if p.default is p.empty}
    if absent := needed - set(given):
        raise BundleError(f"lacks its argument {capped(absent)}; export the model again")
    if unknown := set(given) - known:
        raise BundleError(f"has arguments that are not implemented: {capped(unknown)}")
