"""Codes carried over stand for MLX's values; how far off they are is known exactly."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_medphi.coreml.codes import (
    Groups,
    Tally,
    carry,
    packed,
    packed_data,
    row_codes,
    row_grid,
    same_codes,
    signed_data,
    unpacked,
)

GROUP = 32
# MLX's own dequantisation in float32 rounds twice.
FLOAT32 = 1e-6
# Rounding to float16 is off by half of its last digit at most.
HALF_ROUNDING = 2.0**-11


def nibbles(data: np.ndarray) -> np.ndarray:
    """Half bytes one by one, (groups, codes)."""
    return np.array([[v for byte in row for v in (byte & 15, byte >> 4)] for row in data.tolist()])


def quantised(weight: np.ndarray, bits: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MLX's packed codes (groups, bytes), and scales and biases in float32, flat."""
    codes, scales, biases = mx.quantize(mx.array(weight), GROUP, bits)
    data = np.array(codes).view(np.uint8).reshape(-1, GROUP * bits // 8)
    return data, *(np.array(p.astype(mx.float32)).reshape(-1) for p in (scales, biases))


def values(groups: Groups, codes: np.ndarray, offset: np.ndarray) -> np.ndarray:
    return groups.scale.astype(np.float64)[:, None] * (codes - offset.astype(np.float64)[:, None])


def carried(
    scale: float | np.ndarray, bias: float | np.ndarray, same: int | None = None, bits: int = 4
) -> Groups:
    scales = np.atleast_1d(np.float32(scale))
    known = None if same is None else np.full(len(scales), same, np.int16)
    return carry(scales, np.atleast_1d(np.float32(bias)), 2**bits - 1, known)


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_with_negative_scales_are_mirrored_to_the_same_values(bits: int) -> None:
    weight = np.random.default_rng(1).standard_normal((64, 128)).astype(np.float16)
    data, scales, biases = quantised(weight, bits)
    before = data.copy()
    groups = carry(scales, biases, 2**bits - 1, None)
    assert 0.3 < groups.mirrored.mean() < 0.7
    np.testing.assert_array_equal(groups.mirrored, scales < 0)
    made = packed_data(data, groups, bits)
    read = nibbles(made) if bits == 4 else made
    found = values(groups, read, groups.zero)
    expected = np.array(mx.dequantize(*quantised_arrays(weight, bits), GROUP, bits))
    # Scales and biases are float16: -bias / scale is whole up to the rounding of both.
    largest = np.abs(expected.reshape(found.shape)).max(axis=1, keepdims=True)
    assert (np.abs(found - expected.reshape(found.shape)) <= 2 * HALF_ROUNDING * largest).all()
    np.testing.assert_array_equal(data, before)
    # A plain group is left as it is, a mirrored one has all its bits inverted.
    np.testing.assert_array_equal(made, np.where(groups.mirrored[:, None], data ^ 255, data))


def quantised_arrays(weight: np.ndarray, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    codes, scales, biases = mx.quantize(mx.array(weight), GROUP, bits)
    return codes, scales.astype(mx.float32), biases.astype(mx.float32)


def test_codes_without_negative_scales_are_not_copied() -> None:
    data = np.arange(32, dtype=np.uint8).reshape(2, 16)
    assert packed_data(data, carried([0.5, 0.5], [-4.0, -4.0]), 4) is data


def test_codes_without_offset_are_the_codes_less_their_zero() -> None:
    weight = np.random.default_rng(2).standard_normal((8, 64)).astype(np.float16)
    data, scales, biases = quantised(weight)
    groups = carry(scales, biases, 15, None)
    expected = nibbles(packed_data(data, groups, 4)) - groups.zero[:, None]
    found = signed_data(data, groups)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("form", ["whole", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_error_is_the_largest_over_all_codes(bits: int, form: str) -> None:
    rng = np.random.default_rng(3)
    scales = (rng.standard_normal(200) * 10.0 ** rng.integers(-7, 2, 200)).astype(np.float32)
    biases = (scales * rng.uniform(-300, 300, 200)).astype(np.float32)
    groups = carry(scales, biases, 2**bits - 1, np.full(200, -1, np.int16))
    offset = groups.zero if form == "whole" else groups.offset()
    found = groups.errors(offset)
    for i in range(200):
        flip = bool(groups.mirrored[i])
        errors, sizes = [], []
        for code in range(2**bits):
            mlx = float(biases[i]) + float(scales[i]) * code
            ours = float(groups.scale[i]) * (
                (2**bits - 1 - code if flip else code) - float(offset[i])
            )
            errors.append(abs(ours - mlx))
            sizes.append(abs(mlx))
        assert found[i] == pytest.approx(max(errors) / max(sizes), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("sign", "data", "zero"), [(1, 1, 0), (-1, 0, 1)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_constant_group_is_one_value(bits: int, sign: int, data: int, zero: int) -> None:
    weight = np.full((1, GROUP), sign * 0.37, np.float16)
    codes, scales, biases = quantised(weight, bits)
    same = same_codes(codes, bits)
    groups = carry(scales, biases, 2**bits - 1, same)
    made = packed_data(codes, groups, bits)
    np.testing.assert_array_equal(nibbles(made) if bits == 4 else made, np.full((1, GROUP), data))
    assert (groups.zero.tolist(), groups.offset().tolist()) == ([zero], [zero])
    # float16 as the weights were: nothing is lost.
    assert values(groups, np.array([[data]]), groups.zero)[0, 0] == float(weight[0, 0])
    assert groups.errors(groups.zero).tolist() == [0.0]
    assert groups.errors(groups.offset()).tolist() == [0.0]
    assert groups.subnormal == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_of_zeros_is_zero(bits: int) -> None:
    codes, scales, biases = quantised(np.zeros((2, GROUP), np.float32), bits)
    groups = carry(scales, biases, 2**bits - 1, same_codes(codes, bits))
    assert not packed_data(codes, groups, bits).any()
    assert not groups.zero.any() and not groups.offset().any()
    assert groups.errors(groups.zero).tolist() == [0.0, 0.0]
    assert groups.subnormal == 0 and (groups.scale > 0).all()


def test_only_equal_codes_make_a_constant_group() -> None:
    data = np.array([[0x33] * 16, [0x34] * 16, [0x33] * 15 + [0x43]], np.uint8)
    assert same_codes(data, 4).tolist() == [3, -1, -1]
    assert same_codes(data, 8).tolist() == [0x33, 0x34, -1]
    assert same_codes(np.full((1, 32), 255, np.uint8), 8).tolist() == [255]


def test_equal_codes_with_an_ordinary_scale_stay_codes() -> None:
    groups = carried([2.0**-14, 0.99 * 2.0**-14], [-(2.0**-11), -(2.0**-11)], same=3)
    assert groups.fixed is not None and groups.fixed.tolist() == [False, True]
    assert groups.zero.tolist() == [8.0, 1.0]
    assert groups.weighs is not None and groups.weighs.tolist() == [True, False]


@pytest.mark.parametrize(("code", "step"), [(0, 1e-5), (7, 2.0**-20), (15, -(2.0**-20))])
def test_a_constant_group_is_the_value_of_its_code(code: int, step: float) -> None:
    groups = carried(step, 0.25 - code * step, same=code)
    assert float(groups.scale[0]) == 0.25
    assert groups.code is not None and groups.code.tolist() == [1]
    assert groups.zero.tolist() == [0.0]
    # The other codes, which no weight of the group has, do not count. The bias is float32.
    assert groups.errors(groups.zero)[0] < FLOAT32


def test_scales_below_the_normal_range_are_counted() -> None:
    assert carried([2.0**-14, -(2.0**-14), 0.99 * 2.0**-14], [0.0, 0.0, 0.0]).subnormal == 1


def test_a_small_scale_keeps_its_codes_and_is_counted() -> None:
    groups = carried([1e-5, 0.01, -3e-7], [-8e-5, -0.08, 24e-7], same=-1)
    assert groups.subnormal == 2
    assert groups.zero.tolist() == [8.0, 8.0, 7.0]
    assert groups.weighs is not None and groups.weighs.tolist() == [False, True, False]
    # The spacing of such float16 is 2^-24.
    np.testing.assert_allclose(groups.scale, [1e-5, 0.01, 3e-7], rtol=1e-3, atol=2.0**-25)


def test_a_scale_that_float16_would_make_zero_is_not_lost() -> None:
    groups = carried(1e-9, -8e-9, same=-1)
    assert float(groups.scale[0]) == 2.0**-24


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [3.0, -3.0])
def test_a_group_far_from_zero_is_as_close_as_float16_is(bits: int, value: float) -> None:
    # 3 / 1e-5 steps from zero: no float16 can be the offset.
    scale = 1e-5 if bits == 4 else 1e-6
    groups = carried(scale, value, same=-1, bits=bits)
    assert np.isfinite(groups.offset()).all()
    assert groups.errors(groups.offset())[0] <= HALF_ROUNDING
    assert groups.errors(groups.zero)[0] <= HALF_ROUNDING


@pytest.mark.parametrize("steps", [65900.0, 100000.0])
def test_no_offset_is_beyond_float16(steps: float) -> None:
    groups = carried(2.0**-10, -(2.0**-10) * steps)
    assert np.isfinite(groups.offset()).all()
    # The codes of such a group differ by 15 steps, from the one value by half of that.
    assert groups.errors(groups.offset())[0] <= HALF_ROUNDING + 7.5 / steps


def test_codes_are_kept_as_long_as_an_offset_can_be_stored() -> None:
    groups = carried(2.0**-10, -(2.0**-10) * 2000)
    assert groups.fixed is None or not groups.fixed.any()
    assert groups.offset().tolist() == [2000.0]


def test_a_step_of_zero_is_a_constant() -> None:
    groups = carried([0.0, 0.0], [0.25, 0.0])
    assert groups.errors(groups.zero).tolist() == [0.0, 0.0]
    assert groups.fixed is not None and groups.fixed.all()


@pytest.mark.parametrize("bias", [np.inf, -np.inf, np.nan, 1e30])
def test_what_float16_cannot_hold_shows_in_the_size(bias: float) -> None:
    assert not carried([0.01, 0.01], [-0.08, bias]).size.max() <= 65504
    assert not carried([bias, 0.01], [-0.08, 0.0]).size.max() <= 65504


@pytest.mark.parametrize(
    ("zeros", "signed", "bits", "form"),
    [
        ([0, 8, 15], False, 4, "integer offset"),
        ([0, 8, 16], False, 4, "no offset"),
        ([-1, 8], False, 4, "no offset"),
        ([0, 127], False, 4, "no offset"),
        ([-112, 8], False, 4, "no offset"),
        ([0, 128], False, 4, "float16 offset"),
        ([-113, 8], False, 4, "float16 offset"),
        ([0, 8, 15], True, 4, "no offset"),
        ([0, 128], True, 4, "float16 offset"),
        ([0, 255], False, 8, "integer offset"),
        ([0, 255], True, 8, "integer offset"),
        ([128, 256], False, 8, "float16 offset"),
        ([-1, 128], False, 8, "float16 offset"),
    ],
)
def test_the_form_holds_for_every_group(
    zeros: list[int], signed: bool, bits: int, form: str
) -> None:
    tally = Tally(signed=signed)
    # Block by block, the odd one last: it must not be forgotten, nor those before it.
    for order in (zeros, zeros[::-1]):
        tally = Tally(signed=signed)
        for zero in order:
            tally.add(carried(0.125, -0.125 * zero, bits=bits))
        assert tally.form == form
        assert tally.error == 0.0


@pytest.mark.parametrize(("part", "form"), [(0.02, "integer offset"), (0.1, "float16 offset")])
def test_whole_offsets_are_taken_only_where_they_are_nearly_whole(part: float, form: str) -> None:
    # Scales and biases that were trained stand for a zero between two codes.
    groups = carried(0.125, -0.125 * (8 + part))
    tally = Tally(signed=False)
    tally.add(groups)
    assert tally.form == form
    assert tally.error == pytest.approx(part / (8 + part), rel=1e-4)
    assert groups.errors(groups.offset())[0] <= HALF_ROUNDING


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("same", [-1, None])
def test_no_block_is_forgotten(order: int, same: int | None) -> None:
    tally = Tally(signed=False)
    for zero, step in [(8.5, 0.125), (8.0, 0.125), (8.0, 1e-5)][::order]:
        tally.add(carried(step, -zero * step, same=same))
    tally.add(carried(0.125, -1.0, same=same))
    tally.add(carried(1e-5, -8e-5, same=-1))
    assert tally.form == "float16 offset"
    assert tally.error == pytest.approx(0.5 / 8.5)
    assert tally.subnormal == 2


def test_groups_with_tiny_scales_do_not_decide_the_form() -> None:
    tally = Tally(signed=False)
    tally.add(carried([0.125, 1e-7], [-1.0, -8e-7], same=-1))
    assert tally.form == "integer offset"
    assert tally.error > 0.1  # 1e-7 is 1.19e-7 in float16
    assert tally.subnormal == 1


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_mlx_quantises_around_zero_gets_whole_offsets(bits: int, dtype: mx.Dtype) -> None:
    weight = mx.array(np.random.default_rng(4).standard_normal((512, 256)) * 0.02).astype(dtype)
    _, scales, biases = mx.quantize(weight, GROUP, bits)
    flat = [np.array(part.astype(mx.float32)).reshape(-1) for part in (scales, biases)]
    tally = Tally(signed=False)
    tally.add(carry(flat[0], flat[1], 2**bits - 1, None))
    assert tally.form == "integer offset"
    # Rounding of bias and scale to the dtype they have, and of the scale to float16.
    limits = {mx.bfloat16: 2.0**-8, mx.float16: 2.0**-10, mx.float32: 2.0**-11}
    assert 0 < tally.error <= 1.01 * limits[dtype]


def test_half_bytes_are_packed_from_the_lower_half_up() -> None:
    assert packed([1, 2, 3]) == bytes([0x21, 0x03])
    data = np.array([[0x21, 0xF3]], np.uint8)
    assert unpacked(data).tolist() == [[1, 2, 3, 15]]
    assert packed(unpacked(data)) == data.tobytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_around_zero_get_the_codes_mlx_gives_them(bits: int) -> None:
    # Rows as wide as a group, so that MLX can do it too; float16, as the scales will be.
    weight = np.random.default_rng(5).standard_normal((256, GROUP)).astype(np.float16)
    data, scales, biases = quantised(weight, bits)
    theirs = carry(scales, biases, 2**bits - 1, None)
    made = packed_data(data, theirs, bits)
    wide = weight.astype(np.float32)
    scale, zero = row_grid(wide, 2**bits - 1)
    np.testing.assert_array_equal(scale, theirs.scale)
    np.testing.assert_array_equal(zero, theirs.zero)
    codes = row_codes(wide, scale, zero, 2**bits - 1)
    read = nibbles(made) if bits == 4 else made
    # MLX chooses codes before it rounds the scale: next to a border it may take the other one.
    differ = codes.astype(int) != read
    assert differ.mean() < (0.005 if bits == 4 else 0.05)
    assert np.abs(codes.astype(int) - read).max() <= 1


@pytest.mark.parametrize("levels", [15, 255])
def test_codes_of_rows_are_the_nearest(levels: int) -> None:
    rng = np.random.default_rng(6)
    shift = np.array([[0], [0.3], [-0.3], [5], [-5]])
    weight = (0.1 * rng.standard_normal((5, 37)) + shift).astype(np.float32)
    scale, zero = row_grid(weight, levels)
    codes = row_codes(weight, scale, zero, levels)
    assert ((zero >= 0) & (zero <= levels)).all()
    for i in range(5):
        grid = float(scale[i]) * (np.arange(levels + 1) - zero[i])
        off = np.abs(grid[codes[i]] - weight[i])
        best = np.abs(grid[:, None] - weight[i][None]).min(axis=0)
        np.testing.assert_allclose(off, best, atol=FLOAT32)
        # Half a step, and at the end where the grid was moved onto zero, and the scale rounded,
        # half a step and a little more.
        assert best.max() <= float(scale[i]) * (1 + levels * HALF_ROUNDING)


@pytest.mark.parametrize("value", [0.0, 0.37, -0.37, 1e-9])
def test_a_row_of_one_value_keeps_it(value: float) -> None:
    weight = np.full((1, 8), value, np.float32)
    scale, zero = row_grid(weight, 15)
    codes = row_codes(weight, scale, zero, 15)
    found = float(scale[0]) * (codes - zero[0])
    np.testing.assert_allclose(found, weight, rtol=HALF_ROUNDING, atol=1e-8)
