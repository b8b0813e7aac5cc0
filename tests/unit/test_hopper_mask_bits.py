"""Boolean masks as the Hopper kernels read them: the bits of tiles, and which tiles they leave out. No kernel runs."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn._semantics.join_masks import make_mask
from jax_native_flash_attn._semantics.visible import first_and_end
from tests.support.grids import in_part
from tests.support.targets import needs_backend, why_no_backend

if why_no_backend() is None:
    from jax_native_flash_attn._kernels.hopper.host import intervals, mask_bits

pytestmark = [needs_backend, in_part(0)]

T, S = 150, 330


def random_mask() -> np.ndarray:
    return np.random.default_rng(0).random((2, 1, T, S)) < 0.5


def of_documents(*, rows_without_keys: bool) -> np.ndarray:
    """Blocks along the diagonal; rows 70 to 72 may have no key."""
    mask = np.arange(T)[:, None] * 5 // T == np.arange(S) * 5 // S
    if rows_without_keys:
        mask[70:73] = False
    return mask[None, None]


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_first_and_end_of_rows(density: float) -> None:
    allowed = np.random.default_rng(1).random((2, 1, 40, 70)) < density
    first, end = map(np.asarray, first_and_end(jnp.asarray(allowed)))
    for at in np.ndindex(allowed.shape[:-1]):
        keys = allowed[at].nonzero()[0]
        assert (first[at], end[at]) == ((keys[0], keys[-1] + 1) if len(keys) else (70, 0))


@pytest.mark.parametrize("columns", [32, 64, 128, 256])
def test_word_m_of_a_row_has_the_columns_m_by_eights(columns: int) -> None:
    allowed = random_mask()
    for packed, mask in (
        (mask_bits.pack_rows(jnp.asarray(allowed), columns), allowed),
        (mask_bits.pack_columns(jnp.asarray(allowed), columns), np.swapaxes(allowed, -1, -2)),
    ):
        words = np.asarray(packed).view(np.uint32)
        *_, length, width = mask.shape
        assert words.shape == (2, 1, length, -(-width // columns), mask_bits.WORDS)
        bits = words[..., None, :] >> np.arange(columns // 8, dtype=np.uint32)[:, None] & 1
        bits = bits.reshape(2, 1, length, -1)
        np.testing.assert_array_equal(bits[..., :width], mask)
        assert not bits[..., width:].any()


@pytest.mark.parametrize("rows_without_keys", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_tiles_that_a_mask_leaves_empty_at_either_end_are_not_visited(is_causal: bool, rows_without_keys: bool) -> None:
    block_q, block_kv = 32, 64
    allowed = jnp.asarray(of_documents(rows_without_keys=rows_without_keys))
    nothing = dict.fromkeys(("static_window", "traced_window", "query_lengths", "key_value_lengths"))
    _, mask = make_mask(T, S, is_causal=is_causal, allowed=allowed, **nothing)
    ranges = intervals.row_intervals(mask, T, S, block_q, block_kv, skips_empty=True).tile_ranges
    transposed = mask_bits.visited(mask_bits.pack_columns(allowed, block_q), block_kv)
    of_keys = intervals.query_tiles(mask, T, S, block_q, block_kv, (1,), is_computed=False, visited=transposed)
    assert of_keys is not None
    firsts, ends = of_keys.firsts, of_keys.ends

    dense = np.array(allowed[0, 0])
    dense &= np.tri(T, S, dtype=bool) if is_causal else True
    dense |= ~dense.any(1, keepdims=True)  # rows without keys attend all
    has_key = [
        [dense[r : r + block_q, c : c + block_kv].any() for c in range(0, S, block_kv)] for r in range(0, T, block_q)
    ]
    for block, tiles in enumerate(np.array(has_key)):
        first, full_first, full_stop, stop = np.asarray(ranges)[0, 0, block]
        # Causality and the mask are looked at apart: one more tile may be visited where they exclude each other.
        assert first <= tiles.nonzero()[0].min() <= tiles.nonzero()[0].max() < stop <= len(tiles)
        assert first <= full_first <= full_stop <= stop
        assert stop - first <= tiles.sum() + 1
    for block, tiles in enumerate(np.array(has_key).T):
        stop = np.asarray(ends)[0, block]
        first = min(np.asarray(firsts)[0, block], stop)
        assert first <= tiles.nonzero()[0].min(initial=T) or not tiles.any()
        assert tiles.nonzero()[0].max(initial=-1) < stop or not tiles.any()
        assert stop - first <= tiles.sum() + (2 if rows_without_keys else 1)
