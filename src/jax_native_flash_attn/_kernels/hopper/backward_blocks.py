"""Block shapes of the kernels for derivatives: the first that fit into shared memory and registers."""

from collections.abc import Callable

from ..._semantics.sizes import Sizes
from .blocks import RESERVED, SHARED_MEMORY, Blocks

_BARRIERS = 1024  # of these, for barriers and the compiler
_MOST_COLUMNS = {2: 256, 4: 192}  # of the gradients of key and value in one kernel, by the bytes of an element
_SHORT_ITEM = 1 << 16  # keys, or query rows, that an item of the backward visits, times columns (64 at least)


def _takes_persistent(sizes: Sizes, visited: int, *, is_even: bool) -> bool:
    """Whether blocks of a derivative go through several items, whose loads then overlap (5 to 10% of a gradient).

    With long items there is nothing to gain, and with 1024 keys and 128 columns 2% to lose; items that take different
    times are better given to whichever multiprocessor is free.
    """
    columns = max(sizes.H, sizes.D)
    return is_even and columns <= 128 and visited * max(columns, 64) <= _SHORT_ITEM


def dquery_blocks(
    sizes: Sizes, term_bytes: int, *, with_scale: bool, is_even: bool, is_wide: bool, itemsize: int = 2
) -> Blocks:
    """Block shape of the kernel for the gradient of query (and of scale: its sum takes shared memory too).

    `is_even`: items take about the same time, but for what a causal mask makes of them. `is_wide`: the result is in
    float32 beside 16-bit operands, and takes the memory of query and dout. `itemsize`: bytes of an element of query.
    """
    H, D = sizes.H, sizes.D
    is_float32 = itemsize == 4
    most_warpgroups = 2 if with_scale or is_float32 else 3
    persistent = _takes_persistent(sizes, sizes.S, is_even=is_even)
    columns_of_keys = 2 * H if is_float32 else H  # they come transposed, too
    return _first_that_fits(
        lambda x: (
            max(itemsize * (H + D) * (1 + x.persistent), 4 * H * is_wide) * x.rows
            + itemsize * (columns_of_keys * x.stages + D * (x.stages - 1)) * x.block_kv
            + (x.stages - 1) * x.rows * x.block_kv * term_bytes
            + 4096 * with_scale
        ),
        # Moments for the gradient of scale take registers that three warpgroups do not have. Of float32, a third
        # warpgroup takes the memory of a third stage.
        *(
            Blocks(64, block_kv, stages, min(warpgroups, most_warpgroups), persistent=each)
            for each in ((True, False) if persistent else (False,))
            for warpgroups in (_warpgroups(sizes, sizes.T), 1)
            for block_kv in ((64, 32) if is_float32 else (64,))
            for stages in (3, 2)
        ),
    )


def fits_both_key_gradients(sizes: Sizes, itemsize: int) -> bool:
    """Whether registers and, of float32, shared memory hold the gradients of key and value at once."""
    columns = sizes.H + sizes.D
    return columns <= _MOST_COLUMNS[itemsize]


def dkey_dvalue_blocks(
    sizes: Sizes, term_bytes: int, *, needs_key: bool, needs_value: bool, is_even: bool, itemsize: int = 2
) -> Blocks:
    """Of the kernel for the gradients of key and value: there block_kv keys belong to one warpgroup."""
    H, D = sizes.H, sizes.D
    persistent = _takes_persistent(sizes, sizes.group_rows, is_even=is_even)
    wanted = {"needs_key": needs_key, "needs_value": needs_value}
    return _first_that_fits(
        lambda x: _dkey_dvalue_bytes(x, sizes, term_bytes, itemsize=itemsize, **wanted),
        *(
            Blocks(block_q, 64, stages, 1 if sizes.S <= 64 else 2, persistent=each)
            for each in ((True, False) if persistent else (False,))
            for block_q, stages in ((64, 3 if H + D <= 128 else 2), (64, 2), (32, 3), (32, 2), (32, 1))
        ),
    )


def _dkey_dvalue_bytes(
    x: Blocks, sizes: Sizes, term_bytes: int, *, needs_key: bool, needs_value: bool, itemsize: int
) -> int:
    """Shared memory, but for what is reserved."""
    H, D = sizes.H, sizes.D
    key_and_value = H if H == D and not needs_key else H + D
    query_and_dout = H + D
    if itemsize == 4:  # as they are, for scores, and transposed, for the results
        query_and_dout = H + D * needs_key + H * needs_key + D * needs_value
    return (
        itemsize * key_and_value * (1 + x.persistent) * x.warpgroups * x.block_kv
        + itemsize * query_and_dout * x.stages * x.block_q
        + x.stages * x.warpgroups * x.block_kv * x.block_q * term_bytes
    )


def dkey_dvalue_vectors(
    x: Blocks, sizes: Sizes, term_bytes: int, *, needs_key: bool, needs_value: bool, itemsize: int
) -> int:
    """For how many further vectors of query rows there is room in shared memory."""
    wanted = {"needs_key": needs_key, "needs_value": needs_value}
    room = SHARED_MEMORY - RESERVED - _dkey_dvalue_bytes(x, sizes, term_bytes, itemsize=itemsize, **wanted)
    return room // (4 * x.stages * x.block_q)


def dbias_blocks(sizes: Sizes, term_bytes: int, *, has_key_mask: bool, itemsize: int = 2) -> Blocks:
    """Of the kernel for the gradient of bias. With a vector along 128 keys, tiles would not fit into the registers."""
    columns = sizes.H + sizes.D
    return _first_that_fits(
        # Three warpgroups' vectors (lse and delta) take more than what is reserved for them.
        lambda x: x.stages * (itemsize * columns * (x.rows + x.block_kv) + x.rows * (8 + x.block_kv * term_bytes)),
        *(
            Blocks(64, block_kv, stages, warpgroups)
            for warpgroups in (_warpgroups(sizes, sizes.T) if has_key_mask else 1 if sizes.T <= 64 else 2, 1)
            for block_kv in ((64,) if has_key_mask else (128, 64))
            for stages in (3, 2)
        ),
        Blocks(64, 64, 1, 1),
        reserved=_BARRIERS,
    )


def tangent_blocks(sizes: Sizes, term_bytes: int, *, is_even: bool) -> Blocks:
    """Of the tangent kernel, with all tangents; `term_bytes` of these too."""
    H, D = sizes.H, sizes.D
    persistent = _takes_persistent(sizes, sizes.S, is_even=is_even)
    return _first_that_fits(
        lambda x: (
            (4 * H + 2 * D * (H != D)) * (1 + x.persistent) * x.rows
            + x.stages * x.block_kv * (4 * (H + D) + x.rows * term_bytes)
        ),
        *(
            Blocks(64, 64, stages, warpgroups, persistent=each)
            for warpgroups in (1 if sizes.T <= 64 else 2, 1)
            for each in ((True, False) if persistent else (False,))
            for stages in (3, 2)
        ),
        Blocks(64, 64, 1, 1),
    )


def _warpgroups(sizes: Sizes, rows: int) -> int:
    """How many compute; a third one has to do with 160 registers per thread, and saves less than rows that are none."""
    if rows <= 64:
        return 1
    return 3 if max(sizes.H, sizes.D) <= 64 and rows >= 384 and -rows % 192 <= -rows % 128 + rows / 16 else 2


def _first_that_fits(shared_bytes: Callable[[Blocks], int], *candidates: Blocks, reserved: int = RESERVED) -> Blocks:
    """By the bytes of what is not in `reserved`."""
    return next(x for x in candidates if shared_bytes(x) <= SHARED_MEMORY - reserved)
