"""Padding and cutting of what the Hopper kernels read and write, of 16 bits two numbers at a time."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn._kernels.hopper.pallas import cut_last_axis, pad_axis

DTYPES = ("bfloat16", "float16", "float32", "int16", "bool")


def numbers(dtype: str, last: int) -> jax.Array:
    """Of any kind, but for denormal ones, which XLA:CPU does not keep where it copies bfloat16 by itself."""
    x = 100 * np.random.default_rng(last).standard_normal((3, 5, 2, last))
    if jnp.issubdtype(dtype, jnp.floating):
        x[0, 0, :, :4] = np.nan, np.inf, -np.inf, -0.0
    return jnp.asarray(x.astype(np.float32)).astype(dtype)


def bits_of(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pad_and_cut_keep_all_bits(dtype: str) -> None:
    for last, axis, missing in itertools.product((8, 9, 72), (-1, -3, 1), (0, 1, 8)):
        x = numbers(dtype, last)
        padded = pad_axis(x, axis, x.shape[axis] + missing)
        widths = [(0, missing if a == axis % x.ndim else 0) for a in range(x.ndim)]
        expected = np.pad(bits_of(x).reshape(*x.shape, -1), [*widths, (0, 0)])
        np.testing.assert_array_equal(bits_of(padded).reshape(expected.shape), expected)
    for last, length in itertools.product((16, 17), (16, 15, 8, 1)):
        x = numbers(dtype, last)
        np.testing.assert_array_equal(bits_of(cut_last_axis(x, length)), bits_of(x[..., :length]))


def test_pad_with_another_number() -> None:
    x = jnp.ones((2, 4), jnp.bfloat16)
    np.testing.assert_array_equal(pad_axis(x, -1, 6, 3).astype(float), [[1, 1, 1, 1, 3, 3]] * 2)
    np.testing.assert_array_equal(pad_axis(x, 0, 3, 3).astype(float), [[1] * 4, [1] * 4, [3] * 4])


def test_copies_take_pairs_of_16_bits() -> None:
    text = jax.jit(lambda x: cut_last_axis(pad_axis(x, -1, 80), 72)).lower(numbers("bfloat16", 72)).as_text()
    assert "stablehlo.pad" in text
    assert "40xui32" in text
