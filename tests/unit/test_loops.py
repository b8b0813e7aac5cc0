"""The loops over tiles, against dense masks: each allowed score is visited once, and tiles go where they came from."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn._kernels.xla.loops import Nest
from jax_native_flash_attn._kernels.xla.shapes import TileShape
from jax_native_flash_attn._semantics.join_masks import make_mask
from jax_native_flash_attn._semantics.sizes import Sizes
from tests.support.environment import fast_compilation
from tests.support.grids import thinned
from tests.support.oracle import allowed_pairs

B, T, S, K, G, H = 2, 7, 9, 2, 2, 3
N = K * G
SIZES = Sizes((B,), T, S, K, G, H, H)
# Blocks that divide the lengths or do not, one tile and many, one head and batch row or several.
TILES = {
    "several of each": TileShape((1,), 1, 3, 4),
    "no overlap": TileShape((1,), 1, 7, 3, merges_lead=True),
    "all heads": TileShape((B,), K, 2, 2),
    "all heads, merged": TileShape((B,), K, 4, 5, merges_lead=True),
    "heads of a row": TileShape((1,), K, 3, 9, merges_lead=True),
    "one tile": TileShape((B,), K, T, S),
    "sharded": TileShape((B,), K, 3, 4, is_sharded=True),
}
rng = np.random.default_rng(0)
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (2, 1)},
    "window ahead": {"local_window_size": (-3, 5)},
    "traced window": {"local_window_size": np.array([2, 0], np.int32), "is_causal": True},
    "lengths of keys": {"key_value_seq_lengths": np.array([4, 9], np.int32), "is_causal": True},
    "lengths of both": {
        "query_seq_lengths": np.array([7, 2], np.int32),
        "key_value_seq_lengths": np.array([0, 6], np.int32),
    },
    "mask of scores": {"mask": rng.random((B, N, T, S)) < 0.3},
    "sparse mask": {"mask": rng.random((1, 1, T, S)) < 0.1, "is_causal": True},
    "mask of keys": {"mask": rng.random((B, 1, 1, S)) < 0.4},
    "mask of rows": {"mask": rng.random((B, 1, T, 1)) < 0.5},
}


compiled = functools.partial(jax.jit, compiler_options=fast_compilation())


def make_nest(masks: dict[str, Any], tile: TileShape, **options: Any) -> Nest:
    window = masks.get("local_window_size")
    is_traced = isinstance(window, np.ndarray)
    band, mask = make_mask(
        T,
        S,
        is_causal=masks.get("is_causal", False),
        static_window=None if is_traced else window,
        traced_window=window if is_traced else None,
        query_lengths=masks.get("query_seq_lengths"),
        key_value_lengths=masks.get("key_value_seq_lengths"),
        allowed=None if "mask" not in masks else jnp.asarray(masks["mask"]),
    )
    return Nest(SIZES, tile, band, mask, **options)


def dense(masks: dict[str, Any]) -> np.ndarray:
    """How often each score is to be visited: rows without a key attend all, padded ones none."""
    allowed = allowed_pairs((B, N, T, S), **masks)
    lengths = masks.get("query_seq_lengths")
    padded = np.zeros((B, T), bool) if lengths is None else np.arange(T) >= lengths[:, None]
    dead = ~allowed.any(-1) & ~padded[:, None]
    return (allowed | dead[..., None]).astype(int)


def visits(nest: Nest) -> jax.Array:
    """How often the loops visit each score, (B, N, T, S), in tiles where it counts."""

    def row(at: Any, found: jax.Array) -> jax.Array:
        def column(columns: Any, mask: Any, found: jax.Array) -> jax.Array:
            shape = (*nest.row_shape, nest.tile.block_kv)
            counted = jnp.ones(shape, int) if mask is None else jnp.broadcast_to(mask.allowed, shape).astype(int)
            if mask is None and nest.mask.dead is not None:  # only a tile's mask tells that a row is dead
                counted += jnp.where(nest.row_slice(nest.mask.dead, at)[..., None], 100, 0)
            return nest.write_score(found, nest.owned_rows(counted, at), at, columns, add=True)

        return nest.columns(at, column, found)

    return nest.rows(row, jnp.zeros((B, N, T, S), int))


# Each mask in tiles of three shapes: two are the most general, and of the others each has its turn.
GENERAL = ("several of each", "all heads")
OTHERS = [name for name in TILES if name not in GENERAL]
VISITS = [(masks, tile) for i, masks in enumerate(MASKS) for tile in (*GENERAL, OTHERS[i % len(OTHERS)])]


@pytest.mark.parametrize(("masks", "tile"), thinned(VISITS, 2))
def test_each_allowed_score_is_visited_once(masks: str, tile: str):
    np.testing.assert_array_equal(compiled(lambda: visits(make_nest(MASKS[masks], TILES[tile])))(), dense(MASKS[masks]))


@pytest.mark.parametrize("masks", ["causal", "lengths of both", "mask of scores"])
@pytest.mark.parametrize("tile", ["several of each", "all heads"])
def test_loops_with_static_trip_counts_visit_the_same(masks: str, tile: str):
    def run() -> jax.Array:
        return visits(make_nest(MASKS[masks], TILES[tile], differentiable=True))

    np.testing.assert_array_equal(compiled(run)(), dense(MASKS[masks]))


@pytest.mark.parametrize(("window", "is_causal"), [((2, 1), False), ((3, 0), True), ((-1, 3), False)])
@pytest.mark.parametrize("block_q", [2, 3, 7])
def test_tiles_that_follow_a_band_have_all_keys_of_their_rows(window: Any, is_causal: bool, block_q: int):
    masks = {"local_window_size": window, "is_causal": is_causal}
    block_kv = min(S, block_q + sum(window))
    nest = make_nest(masks, TileShape((1,), K, block_q, block_kv, merges_lead=True, follows_band=True))
    np.testing.assert_array_equal(compiled(lambda: visits(nest))(), dense(masks))


def test_positions_of_tiles_are_counters():
    """XLA:CPU makes a kernel, which takes long to compile, of whatever computes an index."""
    lowered = jax.jit(lambda: visits(make_nest({}, TileShape((1,), 1, T, S, merges_lead=True)))).lower()
    text = lowered.as_text()
    assert text.count("stablehlo.while") == 2  # over batch rows and heads
    assert not any(f"stablehlo.{name}" in text for name in ("divide", "remainder", "select", "minimum"))


@pytest.mark.parametrize("tile", TILES)
def test_tiles_are_written_where_they_were_read(tile: str):
    nest = make_nest({}, TILES[tile])
    arrays = {"query": (B, T, N, H), "row": (B, N, T), "score": (B, N, T, S), "key": (B, S, K, H), "batch": (B,)}
    arrays = {
        name: np.arange(1.0, 1 + np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in arrays.items()
    }

    def run(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def row(at: Any, found: dict[str, jax.Array]) -> dict[str, jax.Array]:
            found = dict(found)
            query, row = nest.query_slice(arrays["query"], at), nest.row_slice(arrays["row"], at)
            assert query.shape == (*nest.row_shape, H)
            assert row.shape == nest.row_shape
            found["query"] = nest.write_query(found["query"], query, at, add=False)
            found["row"] = nest.write_row(found["row"], row, at, add=False)

            def column(columns: Any, mask: Any, found: dict[str, jax.Array]) -> dict[str, jax.Array]:
                found = dict(found)
                score, key = nest.score_slice(arrays["score"], at, columns), nest.key_slice(arrays["key"], at, columns)
                assert score.shape == (*nest.row_shape, nest.tile.block_kv)
                found["score"] = nest.write_score(found["score"], score, at, columns, add=False)
                if nest.tile.is_sharded:
                    return found
                # Of the columns that the tile owns, once for each row of tiles.
                owned = nest.column_positions(columns) >= columns.owned
                owned = jnp.where(owned[:, None], key, 0)
                found["key"] = nest.add_key(found["key"], owned, at, columns)
                transposed = jnp.swapaxes(owned, -1, -2)
                found["transposed key"] = nest.add_key_transposed(found["transposed key"], transposed, at, columns)
                return found

            return nest.columns(at, column, found)

        zeros = {name: jnp.zeros_like(x) for name, x in arrays.items()}
        return nest.rows(row, zeros | {"transposed key": jnp.zeros((B, K, H, S))})

    found = compiled(run)(arrays)
    for name in ("query", "row", "score"):
        np.testing.assert_array_equal(found[name], arrays[name], name)
    if not nest.tile.is_sharded:
        np.testing.assert_array_equal(found["key"], nest.num_query_tiles * arrays["key"])
        np.testing.assert_array_equal(found["transposed key"], np.moveaxis(np.asarray(found["key"]), 1, -1))


def test_results_are_summed_over_axes_of_size_1():
    nest = make_nest({}, TILES["several of each"])
    scores = np.random.default_rng(0).integers(0, 9, (B, N, T, S))

    def run(shape: tuple[int, ...]) -> jax.Array:
        def row(at: Any, found: jax.Array) -> jax.Array:
            def column(columns: Any, mask: Any, found: jax.Array) -> jax.Array:
                score = nest.owned_rows(nest.score_slice(jnp.asarray(scores), at, columns), at)
                score = jnp.where(nest.column_positions(columns) >= columns.owned, score, 0)
                return nest.write_score(found, score, at, columns, add=True)

            return nest.columns(at, column, found)

        return nest.rows(row, jnp.zeros(shape, int))

    for shape in ((B, N, T, S), (1, N, T, S), (B, 1, 1, S), (1, 1, T, 1)):
        axes = tuple(i for i, n in enumerate(shape) if n == 1)
        found = compiled(run, static_argnums=0)(shape)
        np.testing.assert_array_equal(found, scores.sum(axes, keepdims=True), str(shape))


def test_a_tile_shape_says_whether_it_holds_whole_heads():
    whole = TileShape((B,), K, T, S)
    assert whole.holds_whole_heads(SIZES)
    assert not dataclasses.replace(whole, block_kv=S - 1).holds_whole_heads(SIZES)
    assert not dataclasses.replace(whole, batch=(1,), heads=1).holds_whole_heads(SIZES)
