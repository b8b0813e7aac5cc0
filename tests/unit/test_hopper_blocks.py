"""Block shapes of the Hopper kernels: shared memory, and multiprocessors that do not idle."""

import itertools
from typing import Any

import pytest

from jax_native_flash_attn._kernels.hopper.backward_blocks import (
    dbias_blocks,
    dkey_dvalue_blocks,
    dquery_blocks,
    fits_both_key_gradients,
)
from jax_native_flash_attn._kernels.hopper.blocks import Blocks, Chip, forward_blocks, shared_bytes
from jax_native_flash_attn._semantics.sizes import Sizes
from tests.support.grids import in_part

pytestmark = in_part(0)

MOST = 227 * 1024  # bytes of shared memory that a block of threads may use
BARRIERS = 1024  # bytes, and what aligns the buffers

# Of a score: none, a mask, a bias of 16 or 32 bits, both.
SCORE_BYTES = (0, 1, 2, 3, 4, 5)
# Of query and key, and of value.
HEAD_DIMS = (*((H, H) for H in (16, 64, 80, 128, 144, 256)), (192, 128), (64, 128), (256, 128), (16, 256), (256, 16))
LENGTHS = (1, 64, 65, 100, 300, 384, 1000, 5000)


def _blocks(T: int, S: int, heads: int, H: int, *, chip: Chip = Chip(), **settings: Any) -> Blocks:  # noqa: B008
    sizes = Sizes((1,), T, S, heads, 1, H, settings.pop("D", H))
    defaults: dict[str, Any] = {"term_bytes": 0, "column_bytes": 0, "has_dropout": False, "itemsize": 2}
    return forward_blocks(sizes, **(defaults | settings), chip=chip)


@pytest.mark.parametrize(("H", "D"), [x for x in HEAD_DIMS if x not in ((80, 80), (144, 144))])
@pytest.mark.parametrize("T", [1, 64, 65, 4096])
@pytest.mark.parametrize(
    "settings", [{}, {"term_bytes": 2}, {"term_bytes": 1, "column_bytes": 4}, {"has_dropout": True}]
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_for_every_kind_of_call(H: int, D: int, T: int, settings: dict[str, Any], itemsize: int) -> None:
    if itemsize == 4 and (max(H, D) > 128 or T <= 64):
        pytest.skip("pure JAX")
    blocks = _blocks(T, 4096, 8, H, D=D, itemsize=itemsize, **settings)
    scores = (settings.get(name, 0) for name in ("term_bytes", "column_bytes"))
    sizes = Sizes((1,), T, 4096, 8, 1, H, D)
    assert shared_bytes(blocks, sizes, *scores, itemsize) <= 224 * 1024  # barriers take up to 2.7 KiB more
    assert blocks.rows == 64 or T > 64


def test_keys_of_192_columns_and_values_of_128_come_in_tiles_of_128() -> None:
    """Those of 256 columns would not fit twice."""
    blocks = _blocks(4096, 4096, 64, 192, D=128)
    assert (blocks.block_kv, blocks.stages, blocks.warpgroups) == (128, 2, 2)
    assert _blocks(4096, 4096, 64, 256, D=128).block_kv == 64


def test_a_chip_that_nobody_measured_has_the_default_blocks() -> None:
    assert _blocks(512, 512, 8, 64, chip=Chip("9.9", 132)) == _blocks(512, 512, 8, 64)


def test_keys_are_split_only_where_multiprocessors_would_idle() -> None:
    assert _blocks(1, 32768, 8, 128).splits * 8 > 0.8 * Chip().cores
    assert _blocks(1, 32768, 1024, 128).splits == 1
    assert _blocks(1, 512, 1, 128).splits == 1
    assert _blocks(1, 32768, 8, 128, chip=Chip(cores=16)).splits == 2


def check(blocks: Blocks, num_bytes: int) -> None:
    """`num_bytes`: of the buffers, as the kernel lists them."""
    assert num_bytes + BARRIERS <= MOST, blocks
    assert blocks.block_q % 32 == 0
    assert blocks.block_kv % 32 == 0
    assert 1 <= blocks.warpgroups <= 4


def backward_calls(itemsize: int = 2) -> list[tuple[Sizes, int, bool]]:
    """Sizes, bytes of a score, and a switch."""
    return [
        (Sizes((1,), T, S, 2, 1, *head_dims), term_bytes, flag)
        for T, S, head_dims, term_bytes in itertools.product(LENGTHS, LENGTHS[::3], HEAD_DIMS, SCORE_BYTES)
        for flag in (False, True)
        if itemsize == 2 or (max(head_dims) <= 128 and T > 64)
    ]


@pytest.mark.parametrize(("is_even", "is_wide"), [(False, False), (True, False), (True, True)])
def test_buffers_of_the_gradient_of_query_fit(is_even: bool, is_wide: bool) -> None:
    for itemsize in (2, 4) if not is_wide else (2,):
        for z, term_bytes, with_scale in backward_calls(itemsize):
            options = {"with_scale": with_scale, "is_even": is_even, "is_wide": is_wide, "itemsize": itemsize}
            x = dquery_blocks(z, term_bytes, **options)
            query_and_dout = (2 if x.persistent and not is_wide else 1) * x.rows * (z.H + z.D) * itemsize
            query_and_dout = max(query_and_dout, x.rows * z.H * 4 * is_wide)
            key = x.stages * x.block_kv * z.H * itemsize * (2 if itemsize == 4 else 1)
            value = (x.stages - 1) * x.block_kv * z.D * itemsize
            scores = (x.stages - 1) * x.rows * x.block_kv * term_bytes
            check(x, query_and_dout + key + value + scores + with_scale * 3 * x.rows * 4)


@pytest.mark.parametrize("is_even", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_buffers_of_the_gradients_of_key_and_value_fit(is_even: bool, itemsize: int) -> None:
    for z, term_bytes, needs_key in backward_calls(itemsize):
        needs_value = not needs_key or fits_both_key_gradients(z, itemsize)
        wanted = {"needs_key": needs_key, "needs_value": needs_value}
        x = dkey_dvalue_blocks(z, term_bytes, **wanted, is_even=is_even, itemsize=itemsize)
        keys = (2 if x.persistent else 1) * x.warpgroups * x.block_kv
        key_and_value = keys * (z.H + z.D * (needs_key or z.H != z.D)) * itemsize
        columns = z.H + z.D
        if itemsize == 4:  # one of them transposed for each gradient; dout itself for that of key alone
            columns = z.H + (z.H + z.D) * needs_key + z.D * needs_value
        query_and_dout, vectors = x.stages * x.block_q * columns * itemsize, 2 * x.stages * x.block_q * 4
        scores = x.stages * x.warpgroups * x.block_kv * x.block_q * term_bytes
        check(x, key_and_value + query_and_dout + vectors + scores)


def test_buffers_of_the_gradient_of_bias_fit() -> None:
    for itemsize in (2, 4):
        for z, term_bytes, has_key_mask in backward_calls(itemsize):
            x = dbias_blocks(z, term_bytes, has_key_mask=has_key_mask, itemsize=itemsize)
            rows, keys = (n * (z.H + z.D) * itemsize for n in (x.rows, x.block_kv))
            check(x, x.stages * (rows + keys + 2 * x.rows * 4 + x.rows * x.block_kv * term_bytes))


def test_buffers_of_the_forward_fit() -> None:
    for z, term_bytes, has_dropout in backward_calls():
        for column_bytes, starts_with_addend in ((0, False), (8, False), (0, True)):
            x = forward_blocks(
                z,
                term_bytes,
                column_bytes=column_bytes,
                has_dropout=has_dropout,
                itemsize=2,
                chip=Chip(),
                is_masked=False,
                starts_with_addend=starts_with_addend,
            )
            query, out = x.rows * z.H * 2, x.rows * z.D * 2
            query_and_out = query + out if x.persistent else max(query, out)
            key_and_value = x.stages * x.block_kv * (z.H + z.D) * 2
            scores = x.stages * x.block_kv * (x.rows * term_bytes + column_bytes)
            weights = x.rows * x.block_kv * 2 if x.weights_in_shared else 0
            check(x, query_and_out + key_and_value + scores + weights + x.rows * 4)
