"""Functions of scores and indices as the Hopper kernels evaluate them: formulas, their tiles, and which are visited."""

import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import mods
from jax_native_flash_attn._kernels.hopper.formula_addends import magnitude, span
from jax_native_flash_attn._kernels.hopper.formula_builder import make_formula
from jax_native_flash_attn._kernels.hopper.formulas import LOWERED, Formula, Kind, Numbers
from jax_native_flash_attn._semantics.call import Config, Inputs, ModOperands
from jax_native_flash_attn._semantics.masks import Band, MaskOperands
from jax_native_flash_attn._semantics.mods import INDICES, Program, trace_mod
from jax_native_flash_attn._semantics.tile_masks import EMPTY, FULL, PARTIAL
from tests.support.grids import rotated, thinned
from tests.support.targets import needs_backend

B, N, T, S = 2, 2, 70, 100
BLOCK = 64
ONE, INFINITY = np.float32(1), np.float32(np.inf)
FACTOR, FLOOR = 0.75, -(2.0**124)
RNG = np.random.default_rng(0)
IDS = np.sort(RNG.integers(0, 4, (B, S)), -1).astype(np.int32)
TABLE, GATE, ROWS = (RNG.standard_normal(shape).astype(np.float32) for shape in ((N, 9), (B, S), (T,)))
FLAGS = RNG.random(T) < 0.5


def _many(score, b, h, q, k):
    powers = score**3 / (1 + h).astype(score.dtype) + jnp.square(score) + score**-1
    curves = jax.nn.sigmoid(score) + jnp.exp(-score * score) + jnp.tanh(score) + jnp.tanh(q.astype(score.dtype) / 100)
    roots = jnp.sqrt(jnp.abs(score)) + jax.lax.rsqrt(jnp.abs(score) + 1) + jnp.log(jnp.abs(score) + 1)
    counted = (q // 3).astype(score.dtype) * (k % 5).astype(score.dtype) + (k << 1).astype(score.dtype)
    chosen = jnp.where((q > k) ^ (h > 1), jnp.sign(score), jnp.clip(score, -1, 1)) + jnp.exp2(score)
    return powers + curves + roots + counted + chosen + ((~(q & 1)) >> 1).astype(score.dtype)


SCORES: dict[str, tuple[Any, tuple]] = {
    "alibi": (mods.alibi, (mods.alibi_slopes(N),)),
    "soft cap": (mods.SoftCap(2.0), ()),
    "by row and key": (lambda s, b, h, q, k, gate, rows: s * gate[b, k] + rows[q], (GATE, ROWS)),
    "in two steps": (lambda s, b, h, q, k, gate: s * jnp.exp(gate)[b][k], (GATE,)),
    "by a constant": (lambda s, b, h, q, k, table: s + table[h, 3] * table[1, 2], (TABLE,)),
    "outside": (lambda s, b, h, q, k, x: s + x.at[k].get(mode="fill", fill_value=7.0) + x[k], (ROWS[:50],)),
    "outside, one number": (lambda s, b, h, q, k, x: s + x.at[h + 2].get(mode="fill", fill_value=5.0), (ROWS[:4],)),
    "-inf": (lambda s, b, h, q, k: jnp.where(k > q + 3, -jnp.inf, jax.nn.relu(s)), ()),
    "distances": (
        lambda s, b, h, q, k: s + (q - k).astype(s.dtype) * 0.5 + jnp.maximum(q - 2 * k, 3 - k).astype(s.dtype),
        (),
    ),
    "floats of each": (lambda s, b, h, q, k: s - 0.1 * (k.astype(s.dtype) - q.astype(s.dtype)) ** 2, ()),
    "in three steps": (
        lambda s, b, h, q, k, rows, table: (
            ((s - rows[q]) + table[h, 1] * k.astype(s.dtype)) - 0.25 * jnp.abs(k - 50).astype(s.dtype)
        ),
        (ROWS, TABLE),
    ),
    "infinite slope": (mods.alibi, (np.array([0.25, np.inf], np.float32),)),
    "adds -inf": (lambda s, b, h, q, k: s + jnp.where(k > q, -INFINITY, jnp.abs(q - k).astype(s.dtype)), ()),
    "nothing": (lambda s, b, h, q, k: s, ()),
    "key alone": (lambda s, b, h, q, k: s + 0.5 * k.astype(s.dtype) + jnp.tanh(k.astype(s.dtype)), ()),
    "many": (_many, ()),
    "no score": (lambda s, b, h, q, k: 0.25 * h.astype(s.dtype), ()),
}
MASKS: dict[str, tuple[Any, tuple]] = {
    "causal": (mods.causal, ()),
    "prefix": (mods.prefix_lm, (np.array([3, 66], np.int32),)),
    "document": (mods.document, (IDS[:, :T], IDS)),
    "document of bytes": (mods.document, (IDS[:, :T].astype(np.int8), IDS.astype(np.int8))),
    "sliding window": (mods.SlidingWindow(40, 20), ()),
    "dilated": (mods.Dilated(3, 20), ()),
    "neighbourhood": (mods.Neighbourhood(10, 10, 3, 5), ()),
    "keys": (lambda b, h, q, k: k % 2 == 0, ()),
    "flags": (lambda b, h, q, k, t, u: (t[q] & u[h]) | (~t[q] & (k < 5)), (FLAGS, FLAGS[:N])),
    "heads": (lambda b, h, q, k: h >= 1, ()),
}


def _traced(function: Any, args: tuple, *, is_score: bool) -> tuple[Program, dict[str, Any]]:
    name = "score_mod" if is_score else "mask_mod"
    return trace_mod(function, name, args, jnp.float32 if is_score else None)


class _Part(NamedTuple):
    """Of an axis."""

    start: Any
    count: int


class _Ref:
    """A reference of a kernel, of an array."""

    def __init__(self, x: Any):
        self.x, self.shape = x, x.shape

    def __getitem__(self, index: Any) -> Any:
        starts, counts = zip(*(i if isinstance(i, _Part) else (i, 1) for i in index), strict=True)
        x = jax.lax.dynamic_slice(self.x, [jnp.int32(i) for i in starts], counts)
        return x.reshape([i.count for i in index if isinstance(i, _Part)])

    @property
    def at(self) -> "_Ref":
        return self


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`device/mods.py` with arrays in place of registers."""
    from jax_native_flash_attn._kernels.hopper.device import evaluation, mod_operations, mod_reads
    from jax_native_flash_attn._kernels.hopper.device import mods as device_mods

    def columns(x: Any, step: Any) -> Any:
        return x + step * jnp.arange(x.shape[1], dtype=jnp.float32)[None]

    class Plgpu:
        class Layout:
            WGMMA = None

        @staticmethod
        def layout_cast(x: Any, _: Any) -> Any:
            return x

        @staticmethod
        def broadcasted_iota(dtype: Any, shape: Any, axis: int, *, layout: Any) -> Any:
            return jax.lax.broadcasted_iota(dtype, shape, axis)

    class Pl:
        @staticmethod
        def ds(start: Any, count: int) -> _Part:
            return _Part(start, count)

    monkeypatch.setattr(evaluation, "plgpu", Plgpu)
    monkeypatch.setattr(mod_reads, "pl", Pl)
    monkeypatch.setattr(evaluation, "load", lambda x, layout: x)
    monkeypatch.setattr(evaluation, "add_columns", columns)
    monkeypatch.setattr(mod_operations, "soft_cap", lambda x, factor, size: size * jnp.tanh(factor * x))
    return device_mods


def _config(program: Program, first_row: int | None) -> Config:
    named = {"score_mod": program} if program.has_score else {"mask_mod": program}
    return Config(Band(), None, None, None, None, False, first_row=first_row, **named)


def _inputs(named: dict[str, Any], first_row: int, *, is_plain: bool) -> Inputs:
    """Positions that are in order, or, with steps between them, not plain."""
    step = 1 if is_plain else 3
    lead = {"batch_number": jnp.arange(B), "head_number": jnp.arange(N)[None]}
    rows, keys = (
        jnp.int32(first) + step * jnp.arange(n, dtype=jnp.int32)[None] for first, n in ((first_row, T), (0, S))
    )
    operands = ModOperands(
        **lead, query_number=rows, key_number=keys, args={n: jnp.asarray(x)[None] for n, x in named.items()}
    )
    query, key = jnp.zeros((B, T, N, 16)), jnp.zeros((B, S, N, 16))
    return Inputs(query, key, key, jnp.ones(1), None, MaskOperands(), None, None, None, operands)


def _tiles(device_mods: Any, program: Program, inputs: Inputs, config: Config, score: Any, *, transposed: bool) -> Any:
    """(outputs..., B, N, T, S), put together from tiles."""
    from jax_native_flash_attn._kernels.hopper.device.mod_reads import Place
    from jax_native_flash_attn._kernels.hopper.host.mods import prepare_mods

    prepared = prepare_mods(config, inputs, BLOCK, BLOCK, needs_slope=program.has_score)
    prepared = jax.tree.map(_Ref, prepared)

    @jax.jit  # one program for all tiles
    def tile_at(x: Any, b: Any, row: Any, key: Any) -> tuple[list[Any], Any]:
        tile = device_mods.TileMods(prepared, (b, 1 - b), (BLOCK, BLOCK), int(transposed), (None, None), None)
        place = Place(row, key)
        if not transposed:
            tile.load_rows(place.row)
        if not program.has_score:
            return [tile.mask(place)], None
        value, slope = tile.score(x, place)
        added = tile.added(place, lambda y: x + y / FACTOR, FACTOR, FACTOR * FLOOR) if tile.adds else None
        return [value, jnp.ones_like(x) if slope is None else slope], added

    outputs = np.zeros((1 + program.has_score, B, N, T + BLOCK, S + BLOCK), np.float32 if program.has_score else bool)
    score = np.pad(score, [(0, 0)] * 2 + [(0, BLOCK)] * 2)
    for b, row, key in np.ndindex(B, -(-T // BLOCK), -(-S // BLOCK)):
        at = np.s_[b, 1 - b, row * BLOCK : (row + 1) * BLOCK, key * BLOCK : (key + 1) * BLOCK]
        x = score[at].T if transposed else score[at]
        found, added = jax.tree.map(np.asarray, tile_at(x, *map(np.int32, (b, row * BLOCK, key * BLOCK))))
        if added is not None:
            np.testing.assert_allclose(added, np.maximum(found[0], FLOOR), rtol=2e-4, atol=2e-4)
        for output, x in zip(outputs, found, strict=True):
            output[at] = x.T if transposed else x
    return outputs[..., :T, :S]


@needs_backend
@pytest.mark.parametrize(
    ("name", "numbering"), thinned(rotated(SCORES | MASKS, ["plain", "plain, transposed", "offset", "positions"]), 4)
)
def test_tiles(name: str, numbering: str, on_cpu: Any):
    """Each function as its program says, and the derivative of a score's; transposed, as for the gradient of keys."""
    first_row = {"offset": 5, "positions": 2}.get(numbering, 0)
    is_score, transposed = name in SCORES, numbering in ("plain, transposed", "offset")
    function, args = (SCORES | MASKS)[name]
    program, named = _traced(function, args, is_score=is_score)
    config = _config(program, None if numbering == "positions" else first_row)
    formula = make_formula(program, Numbers(T, S, config.first_row), needs_slope=is_score)
    if isinstance(formula, str):
        assert not numbering.startswith("plain"), formula
        assert "which positions, an offset or a ring make another" in formula
        return
    inputs = _inputs(named, first_row, is_plain=numbering != "positions")
    score = RNG.standard_normal((B, N, T, S)).astype(np.float32)
    got = _tiles(on_cpu, program, inputs, config, score, transposed=transposed)
    mods_in = inputs.mods
    assert mods_in is not None
    indices = [
        mods_in.batch_number[:, None, None, None],
        mods_in.head_number[:, :, None, None],
        mods_in.query_number[:, None, :, None],
        mods_in.key_number[:, None, None, :],
    ]
    args_in = [x.reshape(1, 1, 1, 1, *x.shape[1:]) for x in mods_in.args.values()]

    def whole(x: Any, program: Program = program, indices: Any = indices, args_in: Any = args_in) -> Any:
        return program(((x,) if program.has_score else ()) + tuple(indices), args_in)

    if is_score:
        expected = jax.jit(lambda x: jax.jvp(whole, (x,), (jnp.ones_like(x),)))(score)
    else:
        expected = [jax.jit(whole)(None)]
    for x, y in zip(got, expected, strict=True):
        x, y = (np.asarray(z)[[0, 1], [1, 0]] for z in (x, np.broadcast_to(y, x.shape)))
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4, err_msg=name)


@needs_backend
def test_every_operation_that_formulas_have_is_computed():
    from jax_native_flash_attn._kernels.hopper.device.mod_operations import OPERATIONS

    assert set(OPERATIONS) == LOWERED


def _formula(function: Any, *args: Any, first_row: int | None = 0, is_score: bool = True) -> Formula | str:
    program, _ = _traced(function, args, is_score=is_score)
    return make_formula(program, Numbers(T, S, first_row), needs_slope=is_score)


def test_what_one_row_or_key_decides_is_a_vector():
    formula = _formula(mods.Neighbourhood(10, 10, 3, 5), is_score=False)
    assert isinstance(formula, Formula)
    tiles = [formula.nodes[i] for i in formula.needed if formula.nodes[i].kind is Kind.TILE]
    assert {x.op for x in tiles} == {"ge", "lt", "and"}
    formula = _formula(mods.document, IDS[:, :T], IDS, is_score=False)
    assert isinstance(formula, Formula)
    assert [formula.nodes[i].kind for i in formula.reads] == [Kind.ROWS, Kind.KEYS]
    # What `jnp` does with a negative index is left out.
    assert {formula.nodes[i].op for i in formula.needed} <= {*INDICES, "read", "eq"}


def test_an_additive_function_has_no_derivative_to_multiply_by():
    additive = (mods.alibi, mods.alibi_slopes(N)), (lambda s, b, h, q, k, x: s + x[q] * x[k], ROWS)
    for function, args in additive:
        formula = _formula(function, args)
        assert isinstance(formula, Formula)
        assert formula.literal(1) == 1
    formula = _formula(lambda s, b, h, q, k: 2 * s)
    assert isinstance(formula, Formula)
    assert formula.literal(1) == 2


def _stopped(s, b, h, q, k):
    return jax.lax.stop_gradient(s) + q.astype(s.dtype)


@pytest.mark.parametrize(
    ("adds", "function"),
    [
        (True, lambda s, b, h, q, k: s),
        (True, lambda s, b, h, q, k: 1.5 + (s - q.astype(s.dtype))),
        (True, lambda s, b, h, q, k: s - jnp.where(q > k, INFINITY, ONE)),
        (False, lambda s, b, h, q, k: q.astype(s.dtype) - s),
        (False, lambda s, b, h, q, k: s + jnp.tanh(s)),
        (False, lambda s, b, h, q, k: jnp.where(q > k, s, -jnp.inf)),
        (False, lambda s, b, h, q, k: 2 * s + 1),
        (False, lambda s, b, h, q, k: 0.0 * q.astype(s.dtype)),
        (False, _stopped),
    ],
)
def test_which_functions_only_add(adds: bool, function: Any):
    formula = _formula(function)
    assert isinstance(formula, Formula)
    assert (formula.addend is not None) == adds


@pytest.mark.parametrize(
    ("largest", "function"),
    [
        (0.0, lambda s, b, h, q, k: s),
        (0.5 * 99, lambda s, b, h, q, k: s - 0.5 * k.astype(s.dtype)),
        (3.0 * 99, lambda s, b, h, q, k: s - (2.0 + h.astype(s.dtype)) * jnp.abs(q - k).astype(s.dtype)),
        (69.0**2, lambda s, b, h, q, k: s + jnp.square(q.astype(s.dtype))),
        (np.inf, lambda s, b, h, q, k: s + jnp.where(q > k, -INFINITY, ONE)),
        (None, lambda s, b, h, q, k: s + jnp.exp(q.astype(s.dtype))),
        (None, lambda s, b, h, q, k: s + jnp.asarray(ROWS)[q]),
    ],
)
def test_how_large_an_addend_can_be(largest: float | None, function: Any):
    """Numbers of heads, which are up to 1 here, are read when kernels run."""
    program, _ = trace_mod(function, "score_mod", (), jnp.float32)
    formula = make_formula(program, Numbers(T, S, 0), needs_slope=False)
    assert isinstance(formula, Formula)
    assert formula.addend is not None
    heads = {i: float(x.op in ("head", "convert_element_type")) or 3.0 for i, x in enumerate(formula.nodes)}
    assert magnitude(formula, formula.addend, heads.__getitem__) == largest


@pytest.mark.parametrize(
    ("expected", "function"),
    [
        ((-63, 63), lambda q, k: q - k),
        ((-(64 + 127 + 5), -(64 + 64 + 5)), lambda q, k: -(k + 64 + 5)),
        (None, lambda q, k: q * k),
        (None, lambda q, k: jnp.maximum(q, k)),
    ],
)
def test_span_of_a_tile(expected: tuple[int, int] | None, function: Any):
    """Of rows and keys from 64 on."""
    formula = _formula(lambda s, b, h, q, k: s + jnp.abs(function(q, k)).astype(s.dtype))
    assert isinstance(formula, Formula)
    (node,) = (x for x in formula.nodes if x.op == "abs")
    assert span(formula, node.inputs[0], lambda _: (64, 127), {}.__getitem__) == expected


@pytest.mark.parametrize(
    ("reason", "function", "args", "first_row"),
    [
        ("primitive erf_inv", lambda s, b, h, q, k: jax.lax.erf_inv(s), (), 0),
        ("gathers from an argument by an index .* query_index and key_index", mods.T5RelativeBias(), (TABLE,), 0),
        (
            "gathers from an argument by an index .* from query_index$",
            lambda s, b, h, q, k, x: s + x[q + 1],
            (ROWS,),
            0,
        ),
        ("by query_index and key_index: give that as bias", lambda s, b, h, q, k, x: s + x[q, k], (TABLE,), 0),
        ("by query_index, which positions, an offset", lambda s, b, h, q, k, x: s + x[q], (ROWS,), None),
        ("by key_index, which positions, an offset", lambda s, b, h, q, k, x: s + x[k], (ROWS,), 5),
        ("computes in bfloat16", lambda s, b, h, q, k: (s.astype(jnp.bfloat16) * 2).astype(s.dtype), (), 0),
        ("more than 400 operations", lambda s, b, h, q, k: sum((jnp.tanh(s * i) for i in range(300)), s), (), 0),
        ("array and an index or score together", lambda s, b, h, q, k, x: s + (x * s).sum(), (ROWS,), 0),
        (
            "reads a part of an argument",
            lambda s, b, h, q, k, x: s + jax.lax.dynamic_slice(x, (h,), (3,)).sum(),
            (ROWS,),
            0,
        ),
    ],
)
def test_reasons(reason: str, function: Any, args: tuple, first_row: int | None):
    found = _formula(function, *args, first_row=first_row)
    assert isinstance(found, str)
    assert re.search(reason, found), found


# ---- which tiles are visited


def _masks(T: int, S: int, classes: np.ndarray, dead: np.ndarray | None = None) -> MaskOperands:
    start = jnp.zeros((1, 1, T), jnp.int32)
    rows = None if dead is None else jnp.asarray(dead)[None, None]
    return MaskOperands(start, start + S, tile_classes=jnp.asarray(classes, jnp.int8)[None, None], dead=rows)


@needs_backend
@pytest.mark.parametrize(
    ("mask_block", "blocks", "shape"),
    thinned(
        itertools.product(
            (128, 48), [(128, 128), (192, 64), (64, 128), (256, 192)], [(300, 500), (256, 256), (130, 70)]
        ),
        5,
    ),
)
def test_lists_hold_what_is_not_empty(shape: tuple[int, int], blocks: tuple[int, int], mask_block: int):
    from jax_native_flash_attn._kernels.hopper.host.intervals import row_intervals
    from jax_native_flash_attn._kernels.hopper.host.tile_classes import (
        kernel_classes,
        query_tiles_of_classes,
        with_order,
    )

    (T, S), (rows, keys) = shape, blocks
    rng = np.random.default_rng(1)
    allowed = np.kron(rng.choice([0, 1, 1], (-(-T // 90), -(-S // 40))), np.ones((90, 40), int))[:T, :S] > 0
    allowed &= rng.random((T, S)) < np.where(np.arange(S) < S // 2, 2, 0.999)
    dead = ~allowed.any(1)

    def tiles(block_q: int, block_kv: int) -> np.ndarray:
        found = np.empty((-(-T // block_q), -(-S // block_kv)), np.int8)
        for i, j in np.ndindex(*found.shape):
            tile = allowed[i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
            found[i, j] = FULL if tile.all() else PARTIAL if tile.any() else EMPTY
        return found

    config = Config(Band(), None, None, None, None, False, mask_block=mask_block)

    @jax.jit
    def results(mask: MaskOperands) -> Any:
        classes, plain = kernel_classes(config, mask, T, S, rows, keys), row_intervals(mask, T, S, rows, keys)
        assert plain is not None
        return classes, with_order(plain, classes), query_tiles_of_classes(classes, (1,))

    classes, listed, found = jax.tree.map(np.asarray, results(_masks(T, S, tiles(mask_block, mask_block), dead)))
    classes = classes[0, 0]
    exact = tiles(rows, keys)
    assert (classes[exact == PARTIAL] == PARTIAL).all()  # others may count as in part, never the other way round
    assert (classes[classes == FULL] == exact[classes == FULL]).all()
    dead_blocks = np.pad(dead, (0, -T % rows)).reshape(-1, rows).any(1)
    assert (classes[dead_blocks] == PARTIAL).all()
    if rows % mask_block == keys % mask_block == 0:
        is_known = ~dead_blocks[:, None] & ((np.arange(classes.shape[1]) < classes.shape[1] - 1) | (S % keys == 0))
        np.testing.assert_array_equal(classes[is_known], exact[is_known])
    assert listed.tile_order is not None
    for i, (first, edges, stop, end) in enumerate(listed.tile_ranges[0, 0]):
        order = listed.tile_order[0, 0, i]
        assert (first, stop) == (0, end)
        assert end >= 1
        if (classes[i] != EMPTY).any():
            np.testing.assert_array_equal(np.sort(order[:edges]), np.flatnonzero(classes[i] == PARTIAL))
            np.testing.assert_array_equal(np.sort(order[edges:end]), np.flatnonzero(classes[i] == FULL))
    assert found.order is not None
    for j, (first, end) in enumerate(zip(found.firsts[0], found.ends[0], strict=True)):
        met = found.order[0, j, first:end]
        np.testing.assert_array_equal(np.sort(met), np.flatnonzero(classes[:, j] != EMPTY))
