"""MLX's codes, scales and biases as Core ML stores them: the same codes, written another way.

MLX: value = scale · code + bias, where scales may be negative. Core ML: value = scale · (data −
offset). A group with a negative scale gets its codes mirrored, and the offset is −bias / scale: a
whole number where the group has a code for zero. Groups all of whose codes stand for one value are
written as that value, times 1, 0 or −1. Packed codes stay packed where only that is done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "HALF_MAX",
    "HALF_NORMAL",
    "Form",
    "Groups",
    "Tally",
    "carry",
    "packed_data",
    "row_codes",
    "row_grid",
    "same_codes",
    "signed_data",
    "packed",
    "unpacked",
]

Form = Literal["float16", "integer offset", "no offset", "float16 offset"]
Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

HALF_MAX = 65504.0
"""The largest float16."""
HALF_NORMAL = 2.0**-14
"""The smallest float16 with all its digits."""

NORMAL_BITS = 0x0400
INT8_MAX = 127
# Beyond this many steps from zero an offset does not fit a float16, and the codes of a group differ
# by less than the rounding of a weight to float16 does.
FLAT = 60000.0
# Rounding a scale and a bias to bfloat16 moves -bias / scale by 1/256 of its size. A group that is
# further from whole steps was made by something else, e.g. had its scales trained.
WHOLE = 1 / 250


@dataclass(frozen=True)
class Groups:
    """What Core ML gets in place of scales and biases, flat arrays with one entry per group.

    Attributes:
        levels: the largest code.
        mirrored: whether codes become `levels` − code; it means nothing where `fixed`.
        scale: float16, above zero.
        zero: the code for zero: a whole number, out of the codes' range where there is none.
        low, high: MLX's values at the smallest and the largest code, once mirrored.
        fixed: whether all data of the group become `code`; None: of no group.
        code: 0 or 1 where `fixed`.
        weighs: whether a group has a say in how its tensor is stored; None: all have. Scales with
            fewer digits than float16 usually has are off in every form, and their groups hardly
            matter beside others.
    """

    levels: int
    mirrored: npt.NDArray[np.bool_]
    scale: npt.NDArray[np.float16]
    zero: Floats
    low: Floats
    high: Floats
    fixed: npt.NDArray[np.bool_] | None = None
    code: Bytes | None = None
    weighs: npt.NDArray[np.bool_] | None = None

    @property
    def size(self) -> Floats:
        """The largest |value| that each group can hold; inf or nan where one is not finite."""
        size: Floats = np.maximum(self.high, -self.low)
        return size

    @property
    def subnormal(self) -> int:
        """Scales with fewer digits than float16 usually has."""
        return int(np.count_nonzero(self.scale.view(np.uint16) < NORMAL_BITS))

    def offset(self) -> npt.NDArray[np.float16]:
        """The offsets of the form "float16 offset"."""
        offset = -self.low / self.scale.astype(np.float64)
        if self.fixed is not None:
            offset = np.where(self.fixed, self.zero, offset)
        return offset.astype(np.float16)

    def errors(self, offset: npt.NDArray[np.floating]) -> Floats:
        """For each group max |value − MLX's| / max |MLX's| over all codes it could hold.

        Both values are linear in the code, so the two outer codes decide. Sums are exact; what a
        value loses when it is itself rounded to float16 is not counted.
        """
        scale = self.scale.astype(np.float64)
        first = scale * -offset.astype(np.float64, copy=False)
        last = scale * self.levels
        if self.fixed is not None and self.code is not None:
            first += np.where(self.fixed, scale * self.code, 0)
            last[self.fixed] = 0
        last += first
        last -= self.high
        first -= self.low
        np.maximum(np.abs(first, out=first), np.abs(last, out=last), out=first)
        size = self.size
        # Where all is zero there is nothing to be off.
        first /= np.maximum(size, np.finfo(np.float64).tiny, out=size)
        return first


class Tally:
    """What the groups of a tensor have in common, gathered block by block.

    Attributes:
        form: how the tensor is stored; with each block it can only fall back further.
        error: the largest of `Groups.errors` with whole offsets.
        subnormal: the sum of `Groups.subnormal`.
    """

    def __init__(self, *, signed: bool) -> None:
        """Begin; `signed` says that int8 is wanted where uint4 would do."""
        self.form: Form = "no offset" if signed else "integer offset"
        self.error = 0.0
        self.subnormal = 0
        self._signed = signed
        self._deciding = 0.0
        self._lowest, self._highest = 0.0, 0.0

    def add(self, groups: Groups) -> None:
        """Count the groups of one block."""
        errors = groups.errors(groups.zero)
        worst = float(errors.max())
        if groups.weighs is not None:
            self._deciding = max(
                self._deciding, float(errors.max(initial=0.0, where=groups.weighs))
            )
        else:
            self._deciding = max(self._deciding, worst)
        self.error = max(self.error, worst)
        self.subnormal += groups.subnormal
        self._lowest = min(self._lowest, float(groups.zero.min()))
        self._highest = max(self._highest, float(groups.zero.max()))
        inside = self._lowest >= 0 and self._highest <= groups.levels
        fits = self._highest <= INT8_MAX and groups.levels - self._lowest <= INT8_MAX
        if self._deciding > WHOLE or not (inside or fits):
            self.form = "float16 offset"
        elif fits and (self._signed or not inside):
            self.form = "no offset"
        else:
            self.form = "integer offset"


@np.errstate(all="ignore")  # what is not finite shows in `Groups.size`
def carry(
    scales: npt.NDArray[np.float32],
    biases: npt.NDArray[np.float32],
    levels: int,
    same: npt.NDArray[np.int16] | None,
) -> Groups:
    """MLX's groups in Core ML's terms.

    Args:
        scales, biases: as MLX has them, flat.
        levels: the largest code, 15 or 255.
        same: for each group the code that all its weights have, or −1; it is only looked at where
            the scale is below the normal range of float16, and None says that none is.
    """
    steps, start = scales.astype(np.float64), biases.astype(np.float64)
    end = start + levels * steps
    low, high = np.minimum(start, end), np.maximum(start, end)
    np.abs(steps, out=steps)
    # In whole numbers, with which numpy is faster: without its sign, and no step of zero.
    bits = scales.astype(np.float16).view(np.uint16) & np.uint16(0x7FFF)
    scale = np.maximum(bits, np.uint16(1), out=bits).view(np.float16)
    zero = np.rint(-low / steps)
    groups = Groups(levels, scales < 0, scale, zero, low, high)
    far = max(-float(zero.min()), float(zero.max()))
    if same is None and far <= FLAT / 2:  # also false where a step is zero
        return groups
    alike = np.zeros(len(scales), np.bool_) if same is None else same >= 0
    alike &= steps < HALF_NORMAL
    value = (low + high) / 2
    flat = (np.abs(value) > FLAT * scale.astype(np.float64)) | (steps == 0)
    if same is not None:
        value = np.where(alike, start + same * scales.astype(np.float64), value)
    return _fixed(groups, alike | flat, alike, value, ~(steps < HALF_NORMAL))


def _fixed(
    groups: Groups,
    fixed: npt.NDArray[np.bool_],
    alike: npt.NDArray[np.bool_],
    value: Floats,
    weighs: npt.NDArray[np.bool_],
) -> Groups:
    """Groups some of which are written as one value: 1 or −1 times it, or 0."""
    size = np.abs(value).astype(np.float16)
    # What float16 cannot tell from zero is zero, at a scale that no arithmetic stumbles over.
    there = size.view(np.uint16) > 0
    return replace(
        groups,
        scale=np.where(fixed, np.where(there, size, np.float16(1)), groups.scale),
        zero=np.where(fixed, there & (value < 0), groups.zero),
        low=np.where(alike, value, groups.low),
        high=np.where(alike, value, groups.high),
        fixed=fixed,
        code=(there & (value > 0)).astype(np.uint8),
        weighs=weighs,
    )


def same_codes(data: Bytes, bits: int) -> npt.NDArray[np.int16]:
    """The code that all weights of a group have, or −1; `data` is (groups, packed bytes)."""
    first = data[:, 0]
    alike = (data == first[:, None]).all(axis=1)
    if bits == 4:
        alike &= first >> 4 == first & 15
    return np.where(alike, first & (2**bits - 1), np.int16(-1))


def packed_data(data: Bytes, groups: Groups, bits: int) -> Bytes:
    """Codes of 4 or 8 bits for the forms with an offset, as packed as they came.

    Args:
        data: MLX's codes, (groups, packed bytes); not changed.
    """
    turn, fixed = groups.mirrored, groups.fixed
    if fixed is None and not turn.any():
        return data
    # Mirroring a code is inverting its bits. Word by word: numpy is slow on rows of few bytes.
    words = data.view(np.uint64)
    inverted = np.where(turn, np.uint64(2**64 - 1), np.uint64(0))
    out = np.empty_like(words)
    for k in range(words.shape[1]):
        np.bitwise_xor(words[:, k], inverted, out=out[:, k])
    if fixed is not None and groups.code is not None:
        # One code in all places of a word.
        ones = np.uint64(0x1111111111111111 if bits == 4 else 0x0101010101010101)
        out[fixed] = (groups.code[fixed] * ones)[:, None]
    return out.view(np.uint8)


def signed_data(data: Bytes, groups: Groups) -> npt.NDArray[np.int8]:
    """Codes of 4 bits less their offset, one byte each, (groups, codes): no offset is needed."""
    codes = unpacked(packed_data(data, groups, 4)).view(np.int8)
    codes -= groups.zero.astype(np.int8)[:, None]
    return codes


def packed(codes: npt.ArrayLike) -> bytes:
    """Codes of 4 bits, two to a byte, the first in the lower half; a half byte may be left over."""
    flat = np.asarray(codes).astype(np.uint8, copy=False).reshape(-1)
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] | flat[1::2] << 4).tobytes()


def unpacked(data: Bytes) -> Bytes:
    """Codes of 4 bits, one byte each: twice as many columns."""
    codes = np.empty((*data.shape, 2), np.uint8)
    np.bitwise_and(data, 15, out=codes[..., 0])
    np.right_shift(data, 4, out=codes[..., 1])
    return codes.reshape(*data.shape[:-1], -1)


def row_grid(
    weight: npt.NDArray[np.float32], levels: int
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """Scale and whole offset, 0 … `levels`, of each row taken as one group.

    MLX's way to choose them, but for two things: the range takes in zero, so that no row needs an
    offset outside, and the scale is rounded to what is stored before codes are chosen for it.

    Args:
        weight: finite numbers, (rows, columns).
    """
    low = np.minimum(weight.min(axis=1), 0).astype(np.float64)
    high = np.maximum(weight.max(axis=1), 0).astype(np.float64)
    down = -low > high
    edge = np.where(down, low, high)
    # MLX keeps steps above this; a row of zeros has some step then.
    step = np.maximum((high - low) / levels, 1e-7)
    steps = np.rint(np.abs(edge) / step)
    # The outer value with the larger size is a whole number of steps away from zero.
    scale = np.where(steps > 0, np.abs(edge) / np.maximum(steps, 1), step).astype(np.float16)
    zero = np.where(down, steps, levels - steps)
    return scale, zero.astype(np.float32)


def row_codes(
    weight: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float16],
    zero: npt.NDArray[np.float32],
    levels: int,
) -> Bytes:
    """The nearest codes for rows on their grid, (rows, columns)."""
    codes = weight / scale.astype(np.float32)[:, None]
    codes += zero[:, None]
    np.rint(codes, out=codes)
    np.clip(codes, 0, levels, out=codes)
    return codes.astype(np.uint8)
