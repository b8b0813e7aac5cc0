"""Shapes of tiles in pure JAX: what every tile must be, whatever the tables say."""

from typing import Any

import numpy as np
import pytest

from jax_native_flash_attn._kernels.xla import shapes
from jax_native_flash_attn._kernels.xla.limits import Limits
from jax_native_flash_attn._semantics.sizes import Sizes


@pytest.mark.parametrize("limit", [-1, 0, 1, 2, 7, 12, 100])
def test_largest_divisor(limit: int):
    for n in range(1, 100):
        assert shapes.largest_divisor(n, limit) == max(d for d in range(1, n + 1) if n % d == 0 and d <= max(1, limit))


@pytest.mark.parametrize("block", [1, 2, 7, 16, 48, 50, 128])
def test_balanced_blocks_cover_a_length(block: int):
    granule = 16 if block % 16 == 0 else 1
    for length in range(600):
        found = shapes.balanced_block(length, block)
        count = -(-length // found)
        assert 1 <= found <= max(1, length)
        # An eighth more than asked for, up to whole rows and whole granules; and no more blocks than that takes.
        assert 8 * (found - granule) < 9 * block, (length, found)
        assert count <= max(1, -(-length // block)), (length, found)
        if length % block == 0 and length > 0:
            assert found == block
        if length <= block:
            assert count <= 1
        # They overlap by less than what makes them equal and whole.
        assert count * found - length < max(1, count) * granule, (length, found)


def random_arguments(rng: np.random.Generator) -> dict[str, Any]:
    """Of `choose_tile`, by name."""

    def size(most: int) -> int:
        return int(np.exp(rng.uniform(0, np.log(most))))

    def flag() -> bool:
        return bool(rng.random() < 0.5)

    batch = tuple(size(40) for _ in range(rng.integers(0, 4)))
    H = 8 * size(32)
    sizes = Sizes(batch, size(9000), size(9000), size(16), size(8), H, H)
    names = ("is_banded", "is_masked", "is_elementwise", "has_documents", "has_ids", "fuses_softmax", "joins_heads")
    names += ("is_derivative", "has_16_bits", "converts", "collects_rounded", "all_heads", "has_all_keys")
    form = {name: flag() for name in ("varies_in_batch", "splits_rows", "reads_keys", "keeps_batch")}
    is_narrow = rng.random() < 0.2
    return {
        "sizes": sizes,
        "platform": "cpu" if flag() else "accelerator",
        "limits": Limits(),
        "block_q": size(300) if rng.random() < 0.3 else None,
        "block_kv": size(300) if rng.random() < 0.3 else None,
        "band_width": size(1200) if is_narrow else None,
        "key_stop": sizes.S if flag() else int(rng.integers(0, sizes.S + 1)),
        "form": shapes.AcceleratorForm(**form),
        **{name: flag() or (is_narrow and name in ("is_banded", "is_masked")) for name in names},
    }


@pytest.mark.parametrize("seed", range(4))
def test_every_tile_fits_its_call(seed: int):
    rng = np.random.default_rng(seed)
    for _ in range(500):
        arguments = random_arguments(rng)
        z: Sizes = arguments["sizes"]
        tile = shapes.choose_tile(**arguments)
        context = f"{arguments} {tile}"
        assert len(tile.batch) == len(z.batch), context
        assert all(n % rows == 0 for n, rows in zip(z.batch, tile.batch, strict=True)), context
        assert z.K % tile.heads == 0, context
        assert 1 <= tile.block_q <= z.T, context
        assert 1 <= tile.block_kv <= z.S, context
        if arguments["all_heads"]:
            assert (tile.batch, tile.heads) == (z.batch, z.K), context
        if tile.follows_band:  # one tile has all keys of its rows
            assert tile.block_kv >= tile.block_q + arguments["band_width"] - 1, context
        if tile.fuses_softmax:
            assert (tile.block_q, tile.block_kv) == (z.T, z.S), context
        if tile.joins_heads:
            assert tile.heads == z.K, context
        # What the caller asked for is an upper bound (`balanced_block`), unless a tile follows a band.
        asked = ((arguments["block_q"], tile.block_q), (arguments["block_kv"], tile.block_kv))
        for wanted, found in asked:
            assert wanted is None or 8 * (found - 16) < 9 * wanted, context
