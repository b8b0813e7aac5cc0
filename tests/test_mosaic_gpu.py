"""The Mosaic GPU kernels: parity with the oracle on a Hopper GPU; lowering, dispatch and fallbacks anywhere."""

import functools
import itertools
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import flash_attention, flash_attention_with_lse
from jax_native_flash_attn._kernels import select
from jax_native_flash_attn._kernels.hopper.blocks import Blocks, Chip, forward_blocks, shared_bytes
from jax_native_flash_attn._kernels.xla import kernels
from jax_native_flash_attn._semantics.masks import make_mask
from jax_native_flash_attn._semantics.sizes import Sizes
from tests.support.cases import Case, check_case, enable_x64

needs_backend = pytest.mark.skipif(select._why_not_backend() is not None, reason=str(select._why_not_backend()))
mosaic_attention = functools.partial(flash_attention, implementation="mosaic_gpu")


@pytest.fixture(autouse=True)
def _hopper(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        reason = select._why_not_backend() or select._why_not_device(is_asked=False)
        if reason:
            pytest.skip(reason)


# (B, T, S, K, G, H), lengths around the block shapes and their multiples.
SHAPES = {
    "tile": (1, 128, 128, 1, 1, 64),
    "odd": (2, 301, 333, 2, 2, 64),
    "prime": (1, 509, 521, 1, 3, 128),
    "wide": (1, 200, 190, 2, 1, 256),
    "less wide": (1, 140, 200, 1, 2, 144),
    "narrow": (2, 150, 300, 1, 2, 16),
    "eighty": (1, 260, 140, 2, 2, 80),
    "short": (3, 5, 700, 2, 4, 64),
    "one row": (2, 1, 1000, 2, 4, 128),
    "one key": (2, 70, 1, 1, 2, 32),
    "one head": (3, 131, 77, 1, 1, 64),
    "long": (1, 1100, 1300, 1, 1, 64),
    # More items than multiprocessors, so that blocks go through several; few items, so that keys are split.
    "many items": (5, 70, 90, 16, 2, 32),
    "one row, keys split": (1, 1, 9000, 1, 2, 64),
    "rows, keys split": (2, 70, 5000, 1, 1, 128),
}
CAUSAL: dict[str, Any] = {"is_causal": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": CAUSAL,
    "window": {"local_window_size": (70, 30)},
    "traced window": {"local_window_size": (40, 0), "traced": frozenset({"window"}), "is_causal": True},
    "scale": {"scale": -0.5, "magnitude": 3.0, "traced": frozenset({"scale"})},
    "no scale": {"scale": 0.0, "traced": frozenset({"scale"})},
    "bias": {"bias": (True, True, True, True)},
    "bias of all": {"bias": (False, True, True, True), "is_causal": True},
    "bias of keys": {"bias": (True, False, False, True), "bias_dtype": "float32"},
    "bias of rows": {"bias": (True, True, True, False)},
    "bias of one": {"bias": (False, False, False, False)},
    "bias float32": {"bias": (False, False, True, True), "bias_dtype": "float32"},
    "mask": {"mask": (True, True, True, True)},
    "sparse mask": {"mask": (False, True, True, True), "mask_density": 0.02},
    "mask of keys": {"mask": (True, False, False, True), "is_causal": True},
    "mask of rows": {"mask": (True, True, True, False)},
    "empty mask": {"mask": (False, False, True, True), "mask_density": 0.0},
    "bias and mask": {"bias": (False, True, True, True), "mask": (True, False, False, True)},
    "dropout": {"dropout_rate": 0.3},
    "causal dropout": {"dropout_rate": 0.1, "is_causal": True, "x64": True},
    "float16": {"dtype": "float16", "is_causal": True},
    "x64": {"x64": True, "is_causal": True},
}


def _case(shape: str, options: str) -> Case:
    return Case(SHAPES[shape], **{"dtype": "bfloat16", **OPTIONS[options]})


def _with_lengths(case: Case, *, of_queries: bool = True) -> Case:
    """Lengths over half of each array, one past it and one of zero, and so on, and NaN in the padding."""
    B, T, S, *_ = case.shape
    lengths = [(n // 2 + 1, n + 3, 0) if of_queries else (0, n // 2 + 1, n + 3) for n in (T, S)]
    lengths = [(some * B)[:B] for some in lengths]
    query_lengths = {"query_seq_lengths": lengths[0]} if of_queries else {}
    return Case(**{**case.__dict__, **query_lengths, "key_value_seq_lengths": lengths[1], "poison": True})


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", ["plain", "causal", "window"])
def test_shapes(shape: str, options: str) -> None:
    check_case(_case(shape, options), mosaic_attention)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["odd", "wide"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(shape: str, options: str) -> None:
    check_case(_case(shape, options), mosaic_attention)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["odd", "short", "wide", "many items", "one row, keys split", "rows, keys split"])
@pytest.mark.parametrize("options", ["plain", "causal", "window", "mask", "bias", "bias of keys", "dropout", "scale"])
def test_lengths_with_poisoned_padding(shape: str, options: str) -> None:
    check_case(_with_lengths(_case(shape, options)), mosaic_attention)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["odd", "eighty", "wide", "many items", "one row, keys split", "rows, keys split"])
@pytest.mark.parametrize("options", ["plain", "causal", "bias", "dropout", "scale"])
def test_lengths_of_keys_with_poisoned_padding(shape: str, options: str) -> None:
    check_case(_with_lengths(_case(shape, options), of_queries=False), mosaic_attention)


def _types(B: int, T: int, S: int, N: int, K: int, H: int, dtype: Any = jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]


def _arrays(*sizes: Any) -> list[jax.Array]:
    types = _types(*sizes)
    keys = jax.random.split(jax.random.key(0), len(types))
    return [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, types, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["many items", "one row, keys split", "rows, keys split"])
@pytest.mark.parametrize("options", ["bias", "bias of all", "mask", "mask of keys", "sparse mask", "traced window"])
def test_masks_and_biases_over_items_and_parts(shape: str, options: str) -> None:
    check_case(_case(shape, options), mosaic_attention)


FLOAT32_SHAPES = ["odd", "prime", "eighty", "narrow", "many items", "rows, keys split"]
FLOAT32_OPTIONS = ["plain", "causal", "traced window", "scale", "bias float32", "mask", "mask of keys", "dropout"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "options"),
    [*itertools.product(FLOAT32_SHAPES, ["causal"]), *itertools.product(["prime"], FLOAT32_OPTIONS)],
)
@pytest.mark.parametrize("lengths", ["", "keys", "queries and keys"])
def test_float32(shape: str, options: str, lengths: str) -> None:
    """Beside dense attention in TensorFloat-32."""
    case = Case(SHAPES[shape], **{**OPTIONS[options], "dtype": "float32"})
    case = _with_lengths(case, of_queries=lengths != "keys") if lengths else case
    check_case(case, mosaic_attention, dense_on_cpu=False)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 1000, 1000, 8, 2, 64), (1, 3, 20000, 8, 2, 128), (40, 200, 200, 8, 8, 64)])
def test_two_runs_are_bitwise_equal(shape: tuple[int, ...]) -> None:
    def call(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        attention = functools.partial(mosaic_attention, is_causal=True)
        out, pullback = jax.vjp(attention, query, key, value)
        return out, pullback(out)

    arrays = _arrays(*shape)
    first, second = (jax.tree.map(np.asarray, jax.jit(call)(*arrays)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def _last_row(call: Any, *operands: Any) -> Any:
    """Out and gradients of the last batch row, of all that `call` takes."""

    def run(operands: Any) -> Any:
        out, pullback = jax.vjp(lambda *floats: call(*floats, *operands[3:]), *operands[:3])
        return jax.tree.map(lambda x: x[-1].astype(jnp.float32), (out, pullback(out)))

    return jax.tree.map(np.asarray, jax.jit(run)(operands))


def _check_last_row(found: Any, expected: Any) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(y).max())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["elements", "bias", "mask"])
def test_offsets_beyond_32_bits(kind: str) -> None:
    """More than 2**31 elements in query, or in a bias or mask: the last batch row is as by itself."""
    B, T, S, N, K, H = (17, 8192, 8192, 128, 128, 128) if kind == "elements" else (3, 4096, 4096, 50, 50, 64)
    operands = _arrays(B, T, S, N, K, H)
    options: list[str] = []
    if kind != "elements":
        scores = jax.random.normal(jax.random.key(1), (B, N, T, S), jnp.bfloat16)
        operands.append(scores if kind == "bias" else scores > 0)
        options.append(kind)

    def call(query: Any, key: Any, value: Any, *others: Any) -> Any:
        return mosaic_attention(query, key, value, **dict(zip(options, others, strict=True)))

    _check_last_row(_last_row(call, *operands), _last_row(call, *(x[-1:] for x in operands)))


@pytest.mark.gpu
def test_dropout_of_more_than_32_bits_of_scores() -> None:
    operands = _arrays(3, 6000, 4096, 70, 70, 64)
    options: Any = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(3)}
    implementations: Any = ("mosaic_gpu", "pure_jax")
    found, expected = (
        _last_row(functools.partial(flash_attention, implementation=implementation, **options), *operands)
        for implementation in implementations
    )
    _check_last_row(found, expected)


@pytest.mark.gpu
def test_vmap_over_some_operands() -> None:
    query, key, value = _arrays(2, 100, 150, 4, 2, 64)
    queries = jnp.stack([query, query * 2, -query])
    run = jax.vmap(lambda q: mosaic_attention(q, key, value, is_causal=True))
    expected = [mosaic_attention(q, key, value, is_causal=True) for q in queries]
    np.testing.assert_array_equal(jax.jit(run)(queries).astype(jnp.float32), jnp.stack(expected).astype(jnp.float32))


def _close(actual: Any, expected: Any) -> None:
    """Up to the rounding of 16-bit results and weights."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = (np.asarray(x, np.float64) for x in (a, e))
        np.testing.assert_allclose(a, e, atol=0.02 * np.abs(e).max(), rtol=0)


def _vmapped(implementation: str, in_axes: Any, kind: str) -> Any:
    """Gradients of a `vmap` in which operands with `None` in `in_axes` are shared: their sums, or one for each."""

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array, scale: jax.Array) -> jax.Array:
        out = flash_attention(query, key, value, bias, scale=scale, is_causal=True, implementation=implementation)
        return (out.astype(jnp.float32) ** 2).sum()

    gradients = functools.partial(jax.grad, argnums=range(5))
    if kind == "gradient of vmap":
        return gradients(lambda *args: jax.vmap(loss, in_axes)(*args).sum())
    return jax.vmap(gradients(loss), in_axes)


VMAPS = {
    "shared keys": (0, None, None, None, None),
    "shared query": (None, 0, 0, None, None),
    "shared value": (None, 0, None, None, None),
    "shared scale": (0, 0, None, 0, None),
    "shared bias": (0, 0, 0, None, 0),
    "all but scale": (None, None, None, None, 0),
}


def _vmap_arguments(in_axes: Any) -> list[jax.Array]:
    query, key, value = _arrays(2, 100, 150, 4, 2, 64)
    bias = jax.random.normal(jax.random.key(1), (1, 4, 1, 150))
    arguments = (query, key, value, bias, jnp.float32(0.1))
    return [jnp.stack([x, x * 2, -x]) if axis == 0 else x for x, axis in zip(arguments, in_axes, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("in_axes", VMAPS.values(), ids=VMAPS)
@pytest.mark.parametrize("kind", ["gradient of vmap", "vmap of gradient"])
def test_gradients_of_shared_operands(in_axes: Any, kind: str) -> None:
    arguments = _vmap_arguments(in_axes)
    actual, expected = (jax.jit(_vmapped(x, in_axes, kind))(*arguments) for x in ("mosaic_gpu", "pure_jax"))
    _close(actual, expected)


@pytest.mark.gpu
def test_jacobian_batches_the_cotangents_alone() -> None:
    query, key, value = _arrays(1, 3, 70, 2, 1, 64)

    def jacobian(implementation: str) -> Any:
        return jax.jacrev(lambda *x: flash_attention(*x, implementation=implementation)[0, :, 0, :2], argnums=(0, 1, 2))

    _close(*(jax.jit(jacobian(x))(query, key, value) for x in ("mosaic_gpu", "pure_jax")))


@pytest.mark.gpu
@pytest.mark.parametrize("with_out", [False, True])
def test_cotangent_of_lse(with_out: bool) -> None:
    arrays = _arrays(2, 100, 150, 4, 2, 64)
    bias = jax.random.normal(jax.random.key(1), (2, 1, 100, 1))

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
        out, lse = flash_attention_with_lse(query, key, value, bias, is_causal=True)
        return (lse**2).sum() + ((out.astype(jnp.float32) ** 2).sum() if with_out else 0.0)

    gradients = jax.jit(jax.grad(loss, argnums=range(4)))
    # In float32 the gradients are pure JAX's.
    _close(gradients(*arrays, bias), gradients(*(x.astype(jnp.float32) for x in arrays), bias))


@pytest.mark.gpu
@pytest.mark.parametrize("full", list(itertools.product((False, True), repeat=4)), ids=str)
def test_gradient_of_bias_in_each_shape(full: Any) -> None:
    check_case(Case(SHAPES["odd"], dtype="bfloat16", bias=full, mask=(True, False, False, True)), mosaic_attention)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [-0.125, 0.3, 3.7, -1e-13, 1e-20])
@pytest.mark.parametrize("mask", [None, (True, False, False, True)])
def test_any_scale_beside_a_bias(scale: float, mask: Any) -> None:
    """Products start with the bias, divided by what is left of the scale."""
    case = Case(SHAPES["odd"], dtype="bfloat16", bias=(False, True, True, True), mask=mask, scale=scale)
    check_case(case, mosaic_attention)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(20, 500, 500, 8, 8, 64), (40, 190, 300, 8, 4, 32), (30, 130, 200, 8, 8, 128)], ids=str
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_that_go_through_several_items_of_the_backward(shape: Any, is_causal: bool) -> None:
    arrays = _arrays(*shape)

    def gradients(implementation: str) -> Any:
        def run(*arrays: jax.Array) -> Any:
            out, pullback = jax.vjp(
                lambda *x: flash_attention(*x, is_causal=is_causal, implementation=implementation), *arrays
            )
            return out, pullback(out)

        return jax.jit(run)(*arrays)

    first, second = gradients("mosaic_gpu"), gradients("mosaic_gpu")
    jax.tree.map(np.testing.assert_array_equal, first, second)
    _close(first, gradients("pure_jax"))


@pytest.mark.gpu
@pytest.mark.parametrize("value", [-1e4, -1e8, -1e9, -1e10, -1e30, float(jnp.finfo(jnp.float32).min), -jnp.inf])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_bias_that_masks_is_a_mask(value: float, dtype: Any) -> None:
    """Also where a row has no other bias in all of the first tiles: the kernel visits the last ones first."""
    arrays = _arrays(2, 300, 700, 4, 2, 64)
    mask = jnp.arange(700)[None] <= jnp.arange(300)[:, None]
    mask &= jax.random.uniform(jax.random.key(1), mask.shape) < 0.1
    mask = mask.at[:, 0].set(True)[None, None]

    def gradients(*masking: Any) -> Any:
        def call(*arrays: jax.Array) -> Any:
            return mosaic_attention(*arrays, *masking)

        out, pullback = jax.vjp(call, *arrays)
        return out, pullback(out)

    _close(jax.jit(gradients)(jnp.where(mask, 0.0, value).astype(dtype)), jax.jit(gradients)(None, mask))


@pytest.mark.gpu
@pytest.mark.parametrize("value", [-1e4, -1e9, -1e10, -1e30, -jnp.inf])
def test_rows_that_a_bias_masks_are_finite(value: float) -> None:
    """All keys are equal there."""
    query, key, values = _arrays(1, 130, 260, 2, 2, 64)
    bias = jnp.where(jnp.arange(130) % 3 == 0, value, 0.0)[None, None, :, None] * jnp.ones((1, 1, 1, 260))
    out, lse = jax.jit(flash_attention_with_lse)(query, key, values, bias)
    expected = values.astype(jnp.float32).mean(1, keepdims=True)
    if value < -1e8:  # where logits have absorbed the products
        _close(out[:, ::3], jnp.broadcast_to(expected, out[:, ::3].shape))
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert np.isfinite(np.asarray(lse, np.float32)).all()


@pytest.mark.gpu
def test_two_runs_of_the_gradient_of_bias_are_bitwise_equal() -> None:
    query, key, value = _arrays(30, 200, 200, 4, 4, 32)
    bias = jax.random.normal(jax.random.key(1), (1, 4, 200, 200))
    run = jax.jit(jax.grad(lambda b: mosaic_attention(query, key, value, b).astype(jnp.float32).sum()))
    np.testing.assert_array_equal(run(bias), run(bias))


@pytest.mark.gpu
def test_default_takes_the_kernel_on_hopper() -> None:
    text = jax.jit(flash_attention).lower(*_arrays(1, 128, 128, 2, 2, 64)).as_text()
    assert "mosaic_gpu" in text


# ---- without a GPU


def _blocks(T: int, S: int, heads: int, H: int, *, chip: Chip = Chip(), **settings: Any) -> Blocks:  # noqa: B008
    defaults: dict[str, Any] = {"score_bytes": 0, "column_bytes": 0, "has_dropout": False, "itemsize": 2}
    return forward_blocks(Sizes((1,), T, S, heads, 1, H, H), **(defaults | settings), chip=chip)


@pytest.mark.parametrize("H", [16, 64, 128, 256])
@pytest.mark.parametrize("T", [1, 64, 65, 4096])
@pytest.mark.parametrize(
    "settings", [{}, {"score_bytes": 2}, {"score_bytes": 1, "column_bytes": 4}, {"has_dropout": True}]
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_for_every_kind_of_call(H: int, T: int, settings: dict[str, Any], itemsize: int) -> None:
    if itemsize == 4 and (H > 128 or T <= 64):
        pytest.skip("pure JAX")
    blocks = _blocks(T, 4096, 8, H, itemsize=itemsize, **settings)
    scores = (settings.get(name, 0) for name in ("score_bytes", "column_bytes"))
    assert shared_bytes(blocks, H, *scores, itemsize) <= 224 * 1024  # barriers take up to 2.7 KiB more
    assert blocks.rows == 64 or T > 64


def test_a_chip_that_nobody_measured_has_the_default_blocks() -> None:
    assert _blocks(512, 512, 8, 64, chip=Chip("9.9", 132)) == _blocks(512, 512, 8, 64)


def test_keys_are_split_only_where_multiprocessors_would_idle() -> None:
    assert _blocks(1, 32768, 8, 128).parts * 8 > 0.8 * Chip().cores
    assert _blocks(1, 32768, 1024, 128).parts == 1
    assert _blocks(1, 512, 1, 128).parts == 1
    assert _blocks(1, 32768, 8, 128, chip=Chip(cores=16)).parts == 2


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ({"key_value_lengths": 2}, True),
        ({"key_value_lengths": 2, "is_causal": True}, True),
        ({"is_causal": True}, False),
        ({"key_value_lengths": 2, "query_lengths": 2}, False),
        ({"key_value_lengths": 2, "static_window": (3, 0)}, False),
        ({"key_value_lengths": 2, "static_window": (10**6, -2)}, False),
        ({"key_value_lengths": 2, "traced_window": 2}, False),
        ({"key_value_lengths": 2, "allowed": (1, 1, 5, 7)}, False),
    ],
)
def test_kernels_compute_intervals_from_lengths_of_keys_alone(masks: dict[str, Any], expected: bool) -> None:
    names = ("static_window", "traced_window", "query_lengths", "key_value_lengths", "allowed")
    arguments = {name: masks.get(name) for name in names}
    for name in ("traced_window", "query_lengths", "key_value_lengths"):
        arguments[name] = None if arguments[name] is None else jnp.ones(2, jnp.int32)
    arguments["allowed"] = None if arguments["allowed"] is None else jnp.ones((1, 1, 5, 7), bool)
    band, _ = make_mask(5, 7, is_causal=masks.get("is_causal", False), **arguments)
    assert band.is_cut == expected


@needs_backend
@pytest.mark.parametrize(("items", "workers", "parts"), [(1, 1, 1), (300, 132, 1), (264, 132, 2), (7, 132, 3)])
def test_every_item_has_one_worker(items: int, workers: int, parts: int) -> None:
    from jax_native_flash_attn._kernels.hopper.scheduler import Work

    work = Work((items,), 1, parts, 1, min(workers, items * parts))
    rounds, rest = divmod(work.items, work.workers)
    taken = []
    for worker in range(work.workers):
        seen: list[int] = []
        mine = rounds + int(work.place(rounds, worker) < rest)
        seen += [k * work.workers + int(work.place(k, worker)) for k in range(mine)]
        taken += seen
    assert sorted(taken) == list(range(work.items))


def _lowered(implementation: str | None, *platforms: str, arrays: Any = None, **options: Any) -> str:
    attention = jax.jit(functools.partial(flash_attention, implementation=implementation, **options))
    return attention.trace(*(arrays or _types(1, 128, 128, 2, 2, 64))).lower(lowering_platforms=platforms).as_text()


@needs_backend
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        *((shape, CAUSAL) for shape in ("tile", "many items", "one row, keys split")),
        *(("prime", x) for x in ({}, CAUSAL, {"local_window_size": (5, 5)}, {"return_residual": True})),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_cuda_without_a_gpu(shape: str, options: dict[str, Any], dtype: str) -> None:
    B, T, S, K, G, H = SHAPES[shape]
    if T == 1 and dtype == "float32":
        pytest.skip("a row of float32 takes pure JAX")
    arrays = _types(B, T, S, K * G, K, H, jnp.dtype(dtype))
    assert "mosaic_gpu" in _lowered("mosaic_gpu", "cuda", arrays=arrays, **options)


@needs_backend
@pytest.mark.parametrize("H", [64, 256])
@pytest.mark.parametrize("which", ["bias", "mask", "both"])
def test_bias_and_mask_lower_for_cuda_without_a_gpu(H: int, which: str) -> None:
    bias = None if which == "mask" else jax.ShapeDtypeStruct((1, 2, 200, 300), jnp.bfloat16)
    mask = None if which == "bias" else jax.ShapeDtypeStruct((2, 1, 1, 300), bool)
    arrays = [*_types(2, 200, 300, 2, 1, H), bias, mask]
    assert "mosaic_gpu" in _lowered("mosaic_gpu", "cuda", arrays=arrays)


@needs_backend
@pytest.mark.parametrize("H", [64, 80])
def test_rows_of_any_number_are_not_copied(H: int) -> None:
    """But for those whose tiles are several columns wide, and by JAX that cannot swizzle rows, which are padded."""
    arrays = _types(2, 301, 333, 4, 4, H)

    def gradients(*arrays: jax.Array) -> Any:
        out, pullback = jax.vjp(mosaic_attention, *arrays)
        return out, pullback(out)

    text = jax.jit(gradients).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    rows = rf"tensor<2x3\d\dx4x{H}x"
    assert not re.search(rf"stablehlo\.slice.*{rows}", text)
    is_padded = H > 64 or jax.__version_info__ < (0, 11, 2)
    assert bool(re.search(rf"stablehlo\.pad.*{rows}", text)) == is_padded


@pytest.fixture
def no_pure_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("took the pure JAX kernels")

    for name in ("forward", "cotangent"):
        monkeypatch.setattr(kernels, name, refuse)


GRADIENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": CAUSAL,
    "window": {"local_window_size": (70, 30)},
    "lengths": {"key_value_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32)},
    "lengths of both": {
        "query_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32),
        "key_value_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32),
    },
    "bias": {"bias": jax.ShapeDtypeStruct((1, 4, 130, 150), jnp.bfloat16)},
    "bias of keys": {"bias": jax.ShapeDtypeStruct((2, 1, 1, 150), jnp.bfloat16)},
    "bias of rows": {"bias": jax.ShapeDtypeStruct((2, 4, 130, 1), jnp.bfloat16)},
    "mask": {"mask": jax.ShapeDtypeStruct((1, 4, 130, 150), bool)},
    "bias and mask": {
        "bias": jax.ShapeDtypeStruct((2, 4, 130, 150), jnp.float32),
        "mask": jax.ShapeDtypeStruct((2, 1, 130, 150), bool),
    },
    "scale": {"scale": jax.ShapeDtypeStruct((), jnp.float32)},
    "dropout": {"dropout_rate": 0.1},
}


@needs_backend
@pytest.mark.usefixtures("no_pure_jax")
@pytest.mark.parametrize(
    ("options", "head_dim"),
    [
        *((options, 128) for options in GRADIENTS),
        *itertools.product(("plain", "bias and mask"), (16, 144, 256)),
        ("mask", 256),  # needs the most shared memory
    ],
)
def test_gradients_lower_for_cuda_without_a_gpu(options: str, head_dim: int) -> None:
    traced = {name: x for name, x in GRADIENTS[options].items() if isinstance(x, jax.ShapeDtypeStruct)}
    static = {name: x for name, x in GRADIENTS[options].items() if name not in traced}

    def gradients(operands: Any) -> Any:
        varying = {name: x for name, x in operands.items() if x.dtype not in (jnp.int32, bool)}
        rng = jax.random.key(0) if "dropout_rate" in static else None
        loss = lambda v: mosaic_attention(**{**operands, **v}, dropout_rng=rng, **static).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(loss)(varying)

    query, key, value = (
        jax.ShapeDtypeStruct((2, n, h, head_dim), jnp.bfloat16) for n, h in ((130, 4), (150, 2), (150, 2))
    )
    operands = {"query": query, "key": key, "value": value, **traced}
    text = jax.jit(gradients).trace(operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@needs_backend
@pytest.mark.usefixtures("no_pure_jax")
@pytest.mark.parametrize(
    ("shared", "kind"),
    [
        *((name, "gradient of vmap") for name in ("shared keys", "shared value", "shared bias")),
        *((name, "vmap of gradient") for name in ("shared keys", "shared query", "shared scale", "all but scale")),
    ],
)
def test_gradients_of_shared_operands_lower_for_cuda(shared: str, kind: str) -> None:
    in_axes = VMAPS[shared]
    run = jax.jit(_vmapped("mosaic_gpu", in_axes, kind))
    arguments = jax.eval_shape(functools.partial(_vmap_arguments, in_axes))
    assert "mosaic_gpu" in run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@needs_backend
def test_pure_jax_unless_asked_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_compute_capabilities", frozenset)
    assert "mosaic_gpu" not in _lowered(None, "cuda")
    assert "mosaic_gpu" not in _lowered("pure_jax", "cuda")


@needs_backend
@pytest.mark.parametrize(("capability", "expected"), [("9.0", True), ("8.0", False), ("10.0", False)])
def test_dispatch_by_compute_capability(capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_compute_capabilities", lambda: frozenset({capability}))
    for implementation in (None, "xla"):
        assert ("mosaic_gpu" in _lowered(implementation, "cuda")) == expected
    assert "mosaic_gpu" not in _lowered("pure_jax", "cuda")


def test_several_platforms_take_pure_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_compute_capabilities", lambda: frozenset({"9.0"}))
    assert "mosaic_gpu" not in _lowered(None, "cpu", "cuda")


@pytest.mark.parametrize(
    ("reason", "arrays", "options"),
    [
        ("compiled for cpu", None, {}),
        ("precision is .*HIGHEST", (1, 128, 128, 2, 2, 64, jnp.float32), {"precision": "highest"}),
        ("more than 64 query rows", (1, 64, 128, 2, 2, 64, jnp.float32), {}),
        ("got float64", (1, 128, 128, 2, 2, 64, jnp.float64), {}),
        ("multiples of 16", (1, 128, 128, 2, 2, 40), {}),
        ("block_q", None, {"block_q": 64}),
    ],
)
def test_asking_where_it_cannot_run_is_an_error(reason: str, arrays: Any, options: dict[str, Any]) -> None:
    platform = "cpu" if reason == "compiled for cpu" else "cuda"
    with enable_x64("float64" in reason), pytest.raises(NotImplementedError, match=reason):
        _lowered("mosaic_gpu", platform, arrays=arrays and _types(*arrays), **options)


@needs_backend
def test_unsupported_calls_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_compute_capabilities", lambda: frozenset({"9.0"}))
    assert "mosaic_gpu" not in _lowered(None, "cuda", arrays=_types(1, 128, 128, 2, 2, 40))
    float32 = _types(1, 128, 128, 2, 2, 64, jnp.float32)
    assert "mosaic_gpu" in _lowered(None, "cuda", arrays=float32)
    # As XLA multiplies on a GPU; each spelling as the others of the same precision.
    for precision in ("highest", "float32", jax.lax.Precision.HIGHEST, ("default", "highest"), "F32_F32_F32"):
        assert "mosaic_gpu" not in _lowered(None, "cuda", arrays=float32, precision=precision)
    for precision in ("default", "fastest", "bfloat16", "high", "bfloat16_3x", "tensorfloat32", ("high", "default")):
        assert "mosaic_gpu" in _lowered(None, "cuda", arrays=float32, precision=precision)
    assert "mosaic_gpu" not in _lowered(None, "cuda", precision="BF16_BF16_F32")


def test_one_warning_on_a_hopper_gpu_without_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_why_not_backend", lambda: "no module named absl")
    for capabilities, implementation, warns in (
        ({"9.0"}, "pure_jax", False),
        (set(), None, False),
        ({"8.0"}, None, False),
        ({"9.0"}, None, True),
        ({"9.0"}, None, False),  # once
    ):
        monkeypatch.setattr(select, "_compute_capabilities", lambda c=capabilities: frozenset(c))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert "mosaic_gpu" not in _lowered(implementation, "cuda")
            assert "mosaic_gpu" not in _lowered(implementation, "cpu")
        messages = [str(w.message) for w in found if "flash_attention" in str(w.message)]
        assert len(messages) == warns, (capabilities, implementation)
        assert all("absl" in m and "[hopper]" in m for m in messages)


@needs_backend
@pytest.mark.parametrize(
    ("owned", "visits"), [(144, 256), (288, 256), (48, 384), (1, 10), (1, 1000), (5000, 3), (7, 1)]
)
def test_parts_of_the_gradient_of_bias_keep_multiprocessors_busy(owned: int, visits: int) -> None:
    from jax_native_flash_attn._kernels.hopper.dbias import _visits_of_a_part

    part = _visits_of_a_part(owned, visits)
    parts = -(-visits // part)
    assert parts * owned <= 16 * Chip().cores or parts == 1
    rounds = -(-owned * parts // Chip().cores)
    ideal = max(1, owned * visits / Chip().cores)
    if owned * visits >= 32 * Chip().cores:  # else beginnings and ends decide
        assert rounds * part <= 1.25 * ideal, (rounds, part)
