"""Between float16 and float32, exactly, at the same speed for every value.

numpy's conversion takes forty times as long where a value overflows or is below the normal range,
as the small probabilities of a softmax are, and it warns. These work on the bits, in pieces that
stay in the processor's cache, and never warn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "narrow", "round_in_place", "widen"]

Array = npt.NDArray[Any]

PIECE = 1 << 15  # numbers; all buffers of a piece fit into 512 kB
SMALL = 2048  # below this a dozen calls cost more than one slow conversion
SIGN, INFINITE, MAGNITUDE = np.uint16(0x8000), np.uint16(0x7C00), np.uint32(0x7FFFFFFF)
# A float16's fields, moved up by 13 bits into those of a float32; the two biases differ by 112.
FIELDS = np.uint32(0x8FFFE000).view(np.int32)
REBIAS = np.float32(2.0**112)
# Smallest normal float16, as bits of a float32.
SMALLEST = np.uint32(0x38800000)
NAN = np.uint16(0x7E00)


def widen(x: Array) -> Array:
    """float16 as float32, C-contiguous; anything else as it is."""
    if x.dtype != np.float16:
        return x
    if x.size < SMALL:
        return x.astype(np.float32)
    source = np.ascontiguousarray(x).reshape(-1)
    result = np.empty(x.shape, np.float32)
    flat = result.reshape(-1)
    for start in range(0, x.size, PIECE):
        _widen_piece(source[start : start + PIECE], flat[start : start + PIECE])
    return result


def narrow(x: Array, dtype: npt.DTypeLike) -> Array:
    """float32 as `dtype`; to float16 it rounds to nearest, ties to even, and overflows to inf."""
    if x.dtype != np.float32 or dtype != np.float16:
        return x.astype(dtype, copy=False)
    if x.size < SMALL:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return x.astype(np.float16)
    source = np.ascontiguousarray(x).reshape(-1).view(np.uint32)
    result = np.empty(x.shape, np.float16)
    flat = result.reshape(-1).view(np.uint16)
    for start in range(0, x.size, PIECE):
        flat[start : start + PIECE] = _narrow_piece(source[start : start + PIECE])
    return result


def round_in_place(x: Array, spare: Array) -> None:
    """Round float32 numbers to 11 significant bits, ties to even: float16 without its range.

    It equals rounding to float16 where no magnitude reaches 65520 and every value below the
    normal range is a multiple of the smallest float16.

    Args:
        x: float32, C-contiguous; rounded where it lies.
        spare: uint32, at least as large; overwritten.
    """
    bits = x.reshape(-1).view(np.uint32)
    half = spare.reshape(-1)[: bits.size]
    np.right_shift(bits, 13, out=half)
    np.bitwise_and(half, 1, out=half)
    np.add(half, 0xFFF, out=half)
    np.add(bits, half, out=bits)
    np.bitwise_and(bits, 0xFFFFE000, out=bits)


def _widen_piece(x: Array, out: Array) -> None:
    bits = x.view(np.uint16)
    if (bits & ~SIGN).max() >= INFINITE:
        out[...] = x
        return
    fields = out.view(np.int32)
    fields[...] = x.view(np.int16)
    np.left_shift(fields, 13, out=fields)
    np.bitwise_and(fields, FIELDS, out=fields)
    np.multiply(out, REBIAS, out=out)


def _narrow_piece(bits: Array) -> Array:
    magnitude = bits & MAGNITUDE
    # Normal numbers: round the 13 lower bits away, ties to even, and change the bias.
    normal = np.maximum(magnitude, SMALLEST)
    odd = normal >> 13
    odd &= 1
    normal += odd
    normal -= np.uint32((112 << 23) - 0xFFF)
    normal >>= 13
    np.minimum(normal, INFINITE, out=normal)
    # Smaller ones: beside 0.5 the last bit of a float32 is that of the smallest float16, so the
    # sum rounds. Each of the two parts is 0x400 where the other one counts.
    small = np.minimum(magnitude, SMALLEST).view(np.float32)
    small += np.float32(0.5)
    normal += small.view(np.uint32)
    normal -= np.uint32(0x3F000000 + 0x400)
    result: Array = normal.astype(np.uint16)
    if magnitude.max() > 0x7F800000:
        result[magnitude > 0x7F800000] = NAN
    result |= ((bits >> 16) & SIGN).astype(np.uint16)
    return result
