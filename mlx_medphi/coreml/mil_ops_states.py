"""The states of a model while it runs, and checks of arrays that come from outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np

from mlx_medphi.coreml.mil_ops_half import Array
from mlx_medphi.coreml.mil_ops_weights import numpy_dtype
from mlx_medphi.coreml.package_file import TensorType
from mlx_medphi.errors import BundleError, capped

__all__ = ["State", "check_array", "check_names"]


class State(MutableMapping[str, Array]):
    """The states of a model by name; made by `Interpreter.new_state`.

    `state[name]` is the present array, and writing into it changes the state. A run may replace
    the array or write into it: ask again after each run, and copy what is to be kept.
    """

    def __init__(self, types: Mapping[str, TensorType]) -> None:
        """All zeros."""
        self.types = dict(types)
        self.arrays = {
            name: np.zeros(kind.shape, numpy_dtype(kind.dtype)) for name, kind in types.items()
        }

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def __setitem__(self, name: str, value: Array) -> None:
        """Copy an array of the state's own type and shape in."""
        if name not in self.types:
            raise BundleError(f"no state {name!r}, only {capped(self.types)}")
        check_array("state", name, value, self.types[name])
        self.arrays[name] = np.array(value, order="C")

    def __delitem__(self, name: str) -> None:
        raise BundleError(f"the state {name!r} belongs to the model; set it to zeros instead")

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def copy(self) -> State:
        """The same values, independent of this one."""
        other = State(self.types)
        for name, array in self.arrays.items():
            other.arrays[name] = array.copy()
        return other


def check_names(kind: str, given: Mapping[str, Any], wanted: Mapping[str, TensorType]) -> None:
    """See that just these names are given.

    Raises:
        BundleError: one is missing or not expected.
    """
    if given.keys() != wanted.keys():
        raise BundleError(
            f"{kind}s {capped(given) or 'none'} given, expected {capped(wanted) or 'none'}"
        )


def check_array(kind: str, name: str, value: Array, wanted: TensorType) -> None:
    """See that an array has the declared type and shape.

    Raises:
        BundleError: it has not, or is no numpy array.
    """
    if not isinstance(value, np.ndarray):
        raise BundleError(f"{kind} {name!r} is a {type(value).__name__}, expected an array")
    if value.dtype != numpy_dtype(wanted.dtype) or value.shape != wanted.shape:
        raise BundleError(
            f"{kind} {name!r} is {value.dtype} {list(value.shape)}, expected {wanted}"
        )
