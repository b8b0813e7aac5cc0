"""The kernel that finds the visible keys of ids and positions: beside NumPy, and what lies between it and attention."""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import flash_attention
from jax_native_flash_attn._kernels.hopper.support import HopperKernels
from jax_native_flash_attn._semantics import visible as semantics
from jax_native_flash_attn._semantics.masks import DEAD, ROWS_OF_BOUNDS, Band, MaskOperands, rows_in_blocks
from jax_native_flash_attn._semantics.visible import Visible
from tests.support.cases import Case, call_types, named_case
from tests.support.families import skip_unless_taken
from tests.support.grids import thinned
from tests.support.hopper import make_arrays, mosaic_attention
from tests.support.targets import needs_backend, pretend_gpu

pytestmark = needs_backend

_LAST = np.iinfo(np.int32).max


def _interpreter() -> Any:
    """Of Mosaic GPU kernels; None where JAX has none that runs ours."""
    from jax.experimental.pallas import mosaic_gpu

    return getattr(mosaic_gpu, "InterpretGPUParams", None)


@dataclasses.dataclass(frozen=True)
class Keys:
    """What a call of `find_visible` gets; batch rows of rows, keys, and lengths."""

    T: int
    S: int
    ids: tuple[str, str] | None = None  # of rows and of keys
    positions: str | None = None  # of keys
    reach: tuple[int | None, int | None] = (None, 0)
    band: Band = dataclasses.field(default_factory=Band)
    batch: tuple[int, int] = (1, 1)
    lengths: tuple[int, ...] | None = None  # of keys: intervals are arrays then
    has_padding: bool = False
    has_dead_rows: bool | None = True
    mask: tuple[int, int, int, int] | None = None  # the shape of a boolean one


def _make_ids(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    ids, n = rng.integers(0, 6, shape), shape[1]
    if kind != "shuffled":
        ids.sort()
    if kind == "padded":
        ids[:, n - n // 4 :] = -1
    if kind == "padded in front":
        ids[:, : n // 4] = rng.integers(-5, 0, n // 4)
    if kind == "padded between":
        ids[:, n // 3 : n // 2] = -7
    if kind == "last out of order":
        ids[:, -1] = 0
    if kind == "largest":
        ids[:, -1] = _LAST
    if kind == "all padded":
        ids[:] = -2
    return ids.astype(np.int32)


def _make(keys: Keys) -> tuple[MaskOperands, Any]:
    rng = np.random.default_rng(0)
    (rows_batch, keys_batch), mask = keys.batch, MaskOperands()
    if keys.ids is not None:
        query_ids, key_ids = (
            _make_ids(kind, shape, rng)
            for kind, shape in zip(keys.ids, ((rows_batch, keys.T), (keys_batch, keys.S)), strict=True)
        )
        mask = mask._replace(query_ids=query_ids[:, None, :, None], key_ids=key_ids[:, None, None, :])
    if keys.positions is not None:
        place = np.arange(keys.S)[None].repeat(keys_batch, 0)
        if keys.positions == "restarting":
            place = place % 50
        if keys.positions == "permuted":
            place = rng.permuted(place, axis=1)
        at = rng.integers(-9, keys.S, (rows_batch, keys.T))
        left, right = keys.reach
        mask = mask._replace(
            key_positions=place.astype(np.int32)[:, None, None, :],
            lowest_position=None if left is None else (at - left).astype(np.int32)[:, None, :, None],
            highest_position=None if right is None else (at + right).astype(np.int32)[:, None, :, None],
        )
    if keys.lengths is not None:
        start, stop = keys.band.intervals(keys.T, keys.S)
        stop = np.minimum(stop[None, None], np.asarray(keys.lengths, np.int32)[:, None, None])
        mask = mask._replace(key_start=start[None, None], key_stop=stop)
    if keys.mask is not None:
        mask = mask._replace(allowed=rng.random(keys.mask) < 0.05)
    padded = rng.random((rows_batch, 1, keys.T)) < 0.3 if keys.has_padding else None
    return jax.tree.map(jnp.asarray, mask), padded


class Expected(NamedTuple):
    """`has_key`: of rows that are none, that is not known."""

    is_exact: int
    is_row: np.ndarray
    has_key: np.ndarray
    row_start: np.ndarray
    row_stop: np.ndarray
    row_bounds: np.ndarray


def _expected(keys: Keys, operands: MaskOperands, padded: Any) -> Expected:
    """Of every element, in NumPy."""
    mask: Any = jax.tree.map(np.asarray, operands)
    T, S = keys.T, keys.S
    column = np.arange(S)
    start, stop = keys.band.intervals(T, S) if keys.lengths is None else (mask.key_start, mask.key_stop)
    allowed = np.asarray((column >= start[..., None]) & (column < stop[..., None]))
    allowed = allowed.reshape((-1, 1, T, S))
    is_row = np.ones((1, 1, T), bool) if padded is None else ~padded
    if mask.query_ids is not None:
        allowed = allowed & (mask.query_ids == mask.key_ids)
        is_row = is_row & (mask.query_ids[..., 0] >= 0)
    if mask.lowest_position is not None:
        allowed = allowed & (mask.key_positions >= mask.lowest_position)
    if mask.highest_position is not None:
        allowed = allowed & (mask.key_positions <= mask.highest_position)
    allowed = allowed & is_row[..., None]
    has_key, is_row = allowed.any(-1), np.broadcast_to(is_row, allowed.shape[:-1])
    dead, none = ((DEAD, S), (S, 0)) if keys.has_dead_rows else ((S, 0), (S, 0))
    row_start = np.where(has_key, allowed.argmax(-1), np.where(is_row, dead[0], none[0]))
    row_stop = np.where(has_key, S - allowed[..., ::-1].argmax(-1), np.where(is_row, dead[1], none[1]))
    missing = [(0, 0), (0, 0), (0, rows_in_blocks(T) - T)]
    row_start, row_stop = np.pad(row_start, missing, constant_values=S), np.pad(row_stop, missing)
    bounds = []
    for at in range(0, rows_in_blocks(T), ROWS_OF_BOUNDS):
        first, end = (x[..., at : at + ROWS_OF_BOUNDS] for x in (row_start, row_stop))
        sure, visited = np.where(first == DEAD, 0, end), np.maximum(first, 0)
        bounds.append(np.stack([visited.min(-1), visited.max(-1), sure.min(-1), end.max(-1)], -1))
    if mask.allowed is not None:
        has_key = (allowed & mask.allowed).any(-1)
    return Expected(int(_is_sorted(mask)), is_row, np.asarray(has_key), row_start, row_stop, np.stack(bounds, -2))


def _is_sorted(mask: Any) -> bool:
    """Keys by id, then position; padding before all others, or behind; the last of all ids is none."""
    rows = []
    batch = max(x.shape[0] for x in (mask.key_ids, mask.key_positions) if x is not None)
    for b in range(batch):
        ids, places = (None if x is None else x[b % x.shape[0], 0, 0] for x in (mask.key_ids, mask.key_positions))
        places = np.zeros_like(ids) if places is None else places
        if ids is None:
            pairs = [(0, place) for place in places]
        else:
            padding = (-1, 0) if ids[0] < 0 else (_LAST, 0)
            pairs = [(x, place) if x >= 0 else padding for x, place in zip(ids, places, strict=True)]
            rows.append(not (ids == _LAST).any())
        rows.append(pairs == sorted(pairs))
    return all(rows)


def _assert_found(keys: Keys, found: Visible, expected: Expected) -> None:
    assert found.is_exact.dtype == jnp.int32
    assert (np.asarray(found.is_exact) == expected.is_exact).all()
    has_key = np.asarray(found.has_key)
    np.testing.assert_array_equal(has_key & expected.is_row, np.broadcast_to(expected.has_key, has_key.shape))
    for name in ("row_start", "row_stop", "row_bounds"):
        if keys.has_dead_rows is None:
            assert getattr(found, name) is None
            continue
        x, y = np.asarray(getattr(found, name)), getattr(expected, name)
        np.testing.assert_array_equal(x, np.broadcast_to(y, x.shape), name)
    T = found.key_start.shape[-1]
    has_key = ((expected.row_start >= 0) & (expected.row_start < expected.row_stop))[..., :T]
    for name in ("key_start", "key_stop"):  # of rows with a key; no other is looked at
        x, y = np.asarray(getattr(found, name)), getattr(expected, name.replace("key", "row"))[..., :T]
        np.testing.assert_array_equal(np.where(has_key, x, 0), np.where(has_key, y, 0), name)


CASES = {
    "sorted": Keys(130, 150, ("sorted", "sorted"), band=Band(upper=20)),
    "shuffled": Keys(70, 700, ("sorted", "shuffled"), batch=(2, 2)),
    "padded": Keys(64, 513, ("padded", "padded in front"), batch=(2, 1), has_dead_rows=False),
    "padded between": Keys(65, 129, ("padded between", "padded between"), band=Band(-9, 40), batch=(1, 2)),
    "one key": Keys(3, 1, ("shuffled", "all padded"), has_padding=True),
    "last out of order": Keys(5, 1024, ("shuffled", "last out of order")),
    "largest": Keys(63, 512, ("largest", "largest"), has_dead_rows=False),
    "positions": Keys(130, 333, positions="sorted", reach=(40, 3), batch=(2, 1), has_padding=True),
    "permuted positions": Keys(66, 200, positions="permuted", reach=(20, None), band=Band(lower=-30)),
    "ids, positions, lengths": Keys(
        90, 600, ("sorted", "sorted"), "restarting", (9, 30), batch=(2, 2), lengths=(600, 100), has_padding=True
    ),
    "several parts": Keys(70, 8300, ("shuffled", "sorted"), "sorted", (None, 30), band=Band(upper=4000)),
    "several parts, shuffled": Keys(65, 16500, ("sorted", "shuffled"), batch=(1, 2), band=Band(lower=20)),
}
# Rows that several masks leave no key together, though each leaves them some.
MASKED = {
    "mask": Keys(66, 90, positions="permuted", batch=(2, 2), has_dead_rows=None, mask=(2, 1, 66, 90)),
    "mask of keys": Keys(66, 90, positions="permuted", reach=(30, 0), has_dead_rows=None, mask=(2, 1, 1, 90)),
    "mask of heads": Keys(
        66, 90, ("shuffled", "shuffled"), batch=(2, 2), lengths=(90, 40), has_dead_rows=None, mask=(1, 3, 66, 90)
    ),
    "mask of rows": Keys(
        66, 90, ("sorted", "shuffled"), band=Band(upper=-4), has_padding=True, has_dead_rows=None, mask=(1, 1, 66, 1)
    ),
    "stops before all keys": Keys(66, 90, ("sorted", "sorted"), batch=(2, 2), lengths=(90, -5), has_padding=True),
}
_ALL = CASES | MASKED
_NAMES = [*thinned(CASES, 4), *MASKED]


@pytest.mark.skipif(_interpreter() is None, reason="JAX before 0.12 has no interpreter of Mosaic GPU kernels")
@pytest.mark.parametrize("name", _NAMES)
def test_the_kernel_finds_what_numpy_does(name: str) -> None:
    from jax_native_flash_attn._kernels.hopper import visible

    keys = _ALL[name]
    mask, padded = _make(keys)
    band = keys.band if keys.lengths is None else None
    interpret = _interpreter()()
    found = visible.find_visible(mask, keys.T, keys.S, padded, keys.has_dead_rows, band, interpret=interpret)
    _assert_found(keys, found, _expected(keys, mask, padded))


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("may_branch", [True, False])
def test_xla_finds_what_numpy_does(name: str, may_branch: bool) -> None:
    """Whether keys are sorted is not said where XLA may not branch."""
    keys = _ALL[name]
    mask, padded = _make(keys)
    band = keys.band if keys.lengths is None else None
    find = functools.partial(semantics.find_visible, T=keys.T, S=keys.S, may_branch=may_branch)
    found = find(mask, padded=padded, has_dead_rows=keys.has_dead_rows, band=band)
    expected = _expected(keys, mask, padded)
    _assert_found(keys, found, expected if may_branch else expected._replace(is_exact=0))


_SHAPE = (2, 512, 512, 2, 2, 64)
_IDS = {name: jax.ShapeDtypeStruct((2, 512), jnp.int32) for name in ("query_segment_ids", "key_value_segment_ids")}
_PLACES = {name: _IDS["query_segment_ids"] for name in ("query_positions", "key_value_positions")}


def _text(masks: Any, *, with_gradients: bool = False, shape: Any = _SHAPE, **options: Any):
    def call(masks: Any, query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        attend = functools.partial(flash_attention, **masks, is_causal=True, **options)
        if not with_gradients:
            return attend(query, key, value)
        out, pullback = jax.vjp(attend, query, key, value)
        return out, pullback(out)

    types = list(call_types(Case(shape, "bfloat16")).values())[:3]
    return jax.jit(call).trace(masks, *types).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("masks", "with_gradients"), [(_IDS, False), (_PLACES, False), (_IDS | _PLACES, True)])
def test_nothing_lies_between_two_kernels(masks: Any, with_gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No branch, loop, search or reduction of XLA's before attention; its kernel reads what the other one found."""
    pretend_gpu(monkeypatch, "9.0")
    text = _text(masks, with_gradients=with_gradients)
    assert not re.search(r"stablehlo\.(case|if|while|gather|dynamic_gather|sort)\b", text)
    kernels = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(kernels) == (4 if with_gradients else 2)
    if not with_gradients:
        assert not re.search(r"stablehlo\.(concatenate|pad)\b", text)


def test_pure_jax_asked_for_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "9.0")
    assert "mosaic_gpu" not in _text(_IDS, implementation="pure_jax")


@pytest.mark.parametrize("shape", [(2, 3, 256, 2, 4, 64), (2, 200, 256, 2, 2, 16), (2, 256, 256, 2, 1, 256)])
def test_other_shapes_lower(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of groups side by side; lengths that are no multiples; short tiles of the gradients of keys."""
    pretend_gpu(monkeypatch, "9.0")
    masks = {name: jax.ShapeDtypeStruct((2, shape[1 + (name.startswith("key"))]), jnp.int32) for name in _IDS}
    assert "mosaic_gpu" in _text(masks, with_gradients=shape[1] > 3, shape=shape)


def test_calls_under_vmap_share_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ids of each call's own, and lengths and keys' ids that they share."""
    pretend_gpu(monkeypatch, "9.0")

    def call(rows: jax.Array, keys: jax.Array, lengths: jax.Array, *arrays: jax.Array) -> Any:
        masks: dict[str, Any] = {"query_segment_ids": rows, "key_value_segment_ids": keys}
        return flash_attention(*arrays, **masks, query_seq_lengths=lengths, key_value_seq_lengths=lengths)

    types = (
        jax.ShapeDtypeStruct((3, 2, 512), jnp.int32),
        _IDS["query_segment_ids"],
        jax.ShapeDtypeStruct((2,), jnp.int32),
    )
    arrays = list(call_types(Case(_SHAPE, "bfloat16")).values())[:3]
    mapped = jax.jit(jax.vmap(call, (0, None, None, None, None, None)))
    text = mapped.trace(*types, *arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert not re.search(r"stablehlo\.(case|if|while)\b", text)
    assert sum("custom_call @mosaic_gpu" in line for line in text.splitlines()) == 2


# ---- on a GPU


_on_gpu = pytest.mark.gpu(says_why=True)


@_on_gpu
@pytest.mark.parametrize("name", _ALL)
def test_the_kernel_finds_on_a_gpu_what_numpy_does(name: str) -> None:
    from jax_native_flash_attn._kernels.hopper import visible

    skip_unless_taken(named_case("tile", "plain"), "mosaic_gpu")
    keys = _ALL[name]
    mask, padded = _make(keys)
    band = keys.band if keys.lengths is None else None
    find = jax.jit(lambda mask, padded: visible.find_visible(mask, keys.T, keys.S, padded, keys.has_dead_rows, band))
    _assert_found(keys, find(mask, padded), _expected(keys, mask, padded))


_LONG = (2, 1000, 1000, 2, 2, 64)
ATTENTION = {
    "sorted": (_LONG, "sorted", {"is_causal": True}),
    "shuffled": (_LONG, "shuffled", {"is_causal": True}),
    "padded": ((2, 512, 512, 1, 4, 128), "padded", {"is_causal": True}),
    "padded in front, window": (_LONG, "padded in front", {"local_window_size": (300, 20)}),
    "padded between, sinks": (_LONG, "padded between", {"sinks": np.ones(4, np.float32)}),
    "all keys, cross": ((1, 300, 2000, 2, 1, 128), "sorted", {}),
    "lengths": (_LONG, "padded", {"key_value_seq_lengths": np.array([900, 13], np.int32), "is_causal": True}),
    "few rows": ((2, 7, 3000, 2, 4, 64), "sorted", {}),
    "short tiles": ((1, 512, 512, 2, 1, 256), "shuffled", {"is_causal": True}),
}


@_on_gpu
@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_that_of_intervals_by_xla(
    name: str, with_positions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, forward and gradients."""
    skip_unless_taken(named_case("tile", "plain"), "mosaic_gpu")
    shape, kind, options = ATTENTION[name]
    B, T, S, *_ = shape
    rng = np.random.default_rng(1)
    masks = {"query_segment_ids": _make_ids(kind, (B, T), rng), "key_value_segment_ids": _make_ids(kind, (B, S), rng)}
    if with_positions:
        options = {"is_causal": True, **options}  # without a reach, positions say nothing
        masks |= {"query_positions": rng.integers(0, S, (B, T)), "key_value_positions": np.arange(S)[None].repeat(B, 0)}
    masks = {name: jnp.asarray(x, jnp.int32) for name, x in masks.items()}
    arrays = make_arrays(Case(shape, "bfloat16"))

    def call(masks: Any, query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        attend = functools.partial(mosaic_attention, **masks, **options)
        out, pullback = jax.vjp(attend, query, key, value)
        return attend(query, key, value), out, pullback(out)

    results = [jax.tree.map(np.asarray, jax.jit(call)(masks, *arrays))]
    monkeypatch.setattr(HopperKernels, "finds_visible", lambda *args: False)
    jax.clear_caches()
    results.append(jax.tree.map(np.asarray, jax.jit(lambda *args: call(*args))(masks, *arrays)))
    jax.clear_caches()
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.view(np.uint16), y.view(np.uint16)), *results)


@_on_gpu
def test_vmap_on_a_gpu() -> None:
    """Ids that calls have for themselves, and keys' ids that they share."""
    skip_unless_taken(named_case("tile", "plain"), "mosaic_gpu")
    query, key, value = make_arrays(Case((2, 300, 300, 2, 2, 64), "bfloat16"))
    rng = np.random.default_rng(2)
    rows = jnp.asarray(np.stack([_make_ids(kind, (2, 300), rng) for kind in ("sorted", "shuffled", "padded")]))
    keys = jnp.asarray(_make_ids("sorted", (2, 300), rng))

    def attend(rows: jax.Array) -> jax.Array:
        masks: dict[str, Any] = {"query_segment_ids": rows, "key_value_segment_ids": keys}
        return mosaic_attention(query, key, value, **masks, is_causal=True)

    found = np.asarray(jax.jit(jax.vmap(attend))(rows))
    np.testing.assert_array_equal(found, np.stack([np.asarray(jax.jit(attend)(x)) for x in rows]))
