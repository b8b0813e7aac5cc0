"""Block shapes of the Mosaic GPU kernels: one table per chip generation, filled by `benchmarks/tune_mosaic.py`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ._tiles import Sizes

_SHARED_MEMORY = 227 * 1024  # bytes that one block may use on Hopper
_RESERVED = 4 * 1024  # for barriers and the compiler


@dataclass(frozen=True)
class Blocks:
    """Shape of one block's work.

    Attributes:
      block_q: query rows of one compute warpgroup, a multiple of 64.
      block_kv: keys of one tile, a multiple of 64.
      stages: tiles of keys and values in shared memory at once.
      warpgroups: how many compute, each with its own rows; one more loads.
      weights_in_shared: whether the softmax weights reach the second product through shared memory, not registers.
    """

    block_q: int
    block_kv: int
    stages: int
    warpgroups: int
    weights_in_shared: bool = False

    @property
    def rows(self) -> int:
        return self.block_q * self.warpgroups

    @property
    def registers(self) -> tuple[int, int]:
        """Per thread: of the compute warpgroups, and of the one that loads."""
        return {1: (240, 24), 2: (240, 24), 3: (160, 24)}[self.warpgroups]


def forward_blocks(sizes: Sizes, score_bytes: int, *, has_dropout: bool) -> Blocks:
    """Block shape of the forward kernel; `score_bytes` are those of one score of bias and mask in shared memory."""
    if sizes.T <= 64:
        blocks = Blocks(64, 128 if sizes.H <= 128 else 64, 3 if sizes.H <= 128 else 2, 1)
    elif sizes.H <= 128:
        blocks = Blocks(64, 128, 2, 2)
    else:
        blocks = Blocks(64, 64, 2, 2, weights_in_shared=True)
    if has_dropout:
        # The random bits need as many registers as the scores.
        blocks = replace(blocks, block_kv=64)
    smaller: tuple[dict[str, Any], ...] = (
        {},
        {"weights_in_shared": False},
        {"block_kv": 64},
        {"weights_in_shared": False, "block_kv": 64},
        {"weights_in_shared": False, "block_kv": 64, "warpgroups": 1},
    )
    candidates = [replace(blocks, **changes) for changes in smaller]
    fits = [x for x in candidates if shared_bytes(x, sizes.H, score_bytes) <= _SHARED_MEMORY - _RESERVED]
    return fits[0] if fits else candidates[-1]


def dquery_blocks(sizes: Sizes, score_bytes: int, *, with_scale: bool) -> Blocks:
    """Block shape of the kernel for the gradient of query (and of scale: its sum takes shared memory too)."""
    return _first_that_fits(
        lambda x: (
            2 * sizes.H * (2 * x.rows + (2 * x.stages - 1) * x.block_kv)
            + (x.stages - 1) * x.rows * x.block_kv * score_bytes
            + 4096 * with_scale
        ),
        *(Blocks(64, 64, stages, warpgroups) for warpgroups in (_warpgroups(sizes, sizes.T), 1) for stages in (3, 2)),
    )


def dkey_dvalue_blocks(sizes: Sizes, score_bytes: int, *, needs_dlogits: bool) -> Blocks:
    """Of the kernel for the gradients of key and value: there block_kv keys belong to one warpgroup."""
    return _first_that_fits(
        lambda x: (
            2 * sizes.H * ((1 + needs_dlogits) * x.warpgroups * x.block_kv + 2 * x.stages * x.block_q)
            + x.stages * x.warpgroups * x.block_kv * x.block_q * score_bytes
        ),
        *(
            Blocks(block_q, 64, stages, 1 if sizes.S <= 64 else 2)
            for block_q, stages in ((64, 3 if sizes.H <= 64 else 2), (64, 2), (32, 3), (32, 2), (32, 1))
        ),
    )


def dbias_blocks(sizes: Sizes, score_bytes: int) -> Blocks:
    """Of the kernel for the gradient of bias."""
    return _first_that_fits(
        lambda x: x.stages * (4 * sizes.H * (x.rows + x.block_kv) + x.rows * x.block_kv * score_bytes),
        *(
            Blocks(64, block_kv, stages, warpgroups)
            for warpgroups in (1 if sizes.T <= 64 else 2, 1)
            for block_kv in (128, 64)
            for stages in (3, 2)
        ),
        Blocks(64, 64, 1, 1),
    )


def _warpgroups(sizes: Sizes, rows: int) -> int:
    """How many compute; a third one has to do with 160 registers per thread."""
    if rows <= 64:
        return 1
    return 3 if sizes.H <= 64 and rows >= 384 else 2


def _first_that_fits(shared_bytes: Callable[[Blocks], int], *candidates: Blocks) -> Blocks:
    """By the bytes of matrices; vectors and barriers take less than 3 KiB more."""
    return next(x for x in candidates if shared_bytes(x) <= _SHARED_MEMORY - 3 * 1024)


def shared_bytes(blocks: Blocks, head_dim: int, score_bytes: int) -> int:
    """Shared memory of the forward kernel, but for barriers."""
    tile = 2 * 2 * blocks.block_kv * head_dim + blocks.rows * blocks.block_kv * score_bytes
    weights = 2 * blocks.rows * blocks.block_kv if blocks.weights_in_shared else 0
    return 2 * blocks.rows * head_dim + blocks.stages * tile + 4 * blocks.rows + weights
