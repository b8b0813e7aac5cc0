"""Gradients of query, key and value by one Hopper kernel: which calls take it, its programs, and, on a GPU, results."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn import context_parallel_attention, explain
from jax_native_flash_attn._kernels.hopper import backward, cotangent, forward, support
from jax_native_flash_attn._kernels.hopper.addition_order import AdditionOrder
from jax_native_flash_attn._kernels.hopper.blocks import BackwardBlocks, Blocks
from jax_native_flash_attn._kernels.hopper.host.backward import Backward
from jax_native_flash_attn._kernels.hopper.support import HopperKernels
from jax_native_flash_attn._kernels.select import replacing
from jax_native_flash_attn._semantics.call import Config, Inputs
from jax_native_flash_attn._semantics.masks import Band, MaskOperands
from tests.support.cases import named_case
from tests.support.environment import enable_x64
from tests.support.families import skip_unless_taken
from tests.support.grids import rotated, thinned
from tests.support.hopper import mosaic_attention
from tests.support.oracle import assert_as_accurate_as_dense
from tests.support.targets import needs_backend, pretend_gpu

pytestmark = [
    needs_backend,
    pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernel needs JAX 0.11.2"),
]
_BLOCKS = Blocks(64, 64, 2, 2)
_H = 128

# (B, T, S, K, G), whether causal, scale, at most how many blocks of keys at once (None: in launch order), and parts of
# a group.
_CALLS = {
    "full": ((2, 256, 384, 1, 1), False, None, 132, 1),
    "full, heads in turn": ((3, 320, 512, 1, 2), False, 0.2, 5, 1),
    "full, odd lengths": ((1, 200, 328, 2, 1), False, -0.1, 132, 1),
    "one block": ((1, 64, 64, 2, 1), True, None, 132, 1),
    "causal": ((2, 512, 512, 2, 1), True, None, 8, 1),
    "causal, groups": ((2, 504, 504, 1, 3), True, 0.2, 4, 1),
    "causal, parts of groups": ((2, 456, 456, 2, 4), True, 0.2, 8, 2),
    "causal, parts of one": ((1, 512, 512, 1, 3), True, None, 8, 3),
    "full, in launch order": ((2, 328, 512, 2, 2), False, None, None, 1),
    "causal, in launch order": ((1, 1000, 1000, 3, 2), True, 0.2, None, 1),
    "causal, parts in launch order": ((1, 512, 512, 1, 4), True, None, None, 2),
}


def _kernels(shape: tuple[int, ...], *, is_causal: bool, cores: int | None, parts: int = 1) -> HopperKernels:
    """Hopper kernels that make the gradients of a call in one, whether or not that is faster."""
    B, T, S, K, G = shape
    blocks, tiles, heads = -(-S // 128), -(-T // 64), B * K * parts
    workers = min(cores or heads * blocks, heads * blocks)
    order = AdditionOrder(heads, blocks, tiles, G // parts, is_causal, workers, in_launch_order=cores is None)
    return HopperKernels(backward_blocks=BackwardBlocks(_BLOCKS, _BLOCKS, None, order))


def _types(shape: tuple[int, ...], dtype: Any) -> list[jax.ShapeDtypeStruct]:
    B, T, S, K, G = shape
    shapes = (B, T, K * G, _H), (B, S, K, _H), (B, S, K, _H), (B, T, K * G, _H)
    return [jax.ShapeDtypeStruct(x, dtype) for x in shapes]


def _gradients(query: Any, key: Any, value: Any, dout: Any, **options: Any) -> Any:
    return jax.vjp(functools.partial(mosaic_attention, **options), query, key, value)[1](dout)


def _kernels_of(lowered: Any) -> int:
    return lowered.count("custom_call @mosaic_gpu")


@pytest.mark.parametrize(("name", "dtype"), thinned(rotated(_CALLS, ["bfloat16", "float16"]), 3))
def test_lowers_for_cuda_without_a_gpu(name: str, dtype: str) -> None:
    """With 64-bit types beside one of the two dtypes, and inside a soft cap in some."""
    shape, is_causal, scale, cores, parts = _CALLS[name]
    cap = 50.0 if parts > 1 or cores is None else None
    with enable_x64(dtype == "float16"), replacing(_kernels(shape, is_causal=is_causal, cores=cores, parts=parts)):
        gradients = jax.jit(functools.partial(_gradients, is_causal=is_causal, scale=scale, logits_soft_cap=cap))
        text = gradients.trace(*_types(shape, dtype)).lower(lowering_platforms=("cuda",)).as_text()
    assert _kernels_of(text) == 2  # and the forward


def test_gradients_have_the_columns_of_the_call() -> None:
    """Those of the kernel are 128, as of operands padded to that."""
    shape = (1, 256, 256, 1, 1)
    types = [jax.ShapeDtypeStruct((*x.shape[:-1], 120), x.dtype) for x in _types(shape, jnp.bfloat16)]
    with replacing(_kernels(shape, is_causal=False, cores=132)):
        lowered = jax.jit(_gradients).trace(*types).lower(lowering_platforms=("cuda",))
    assert _kernels_of(lowered.as_text()) == 2


_LONG = (2, 4096, 4096, 16, 1)


@pytest.mark.parametrize(
    ("shape", "options", "workers"),
    [
        (_LONG, {}, 132),
        (_LONG, {"is_causal": True}, 128),
        ((2, 4096, 4096, 4, 4), {"is_causal": True}, 128),
        ((2, 4608, 4608, 24, 1), {"is_causal": True}, 48 * 36),  # three heads would be 108 workers
        ((1, 32768, 32768, 16, 1), {"is_causal": True}, 16 * 256),  # more blocks of a head than multiprocessors
        ((1, 8192, 8192, 8, 8), {"is_causal": True}, 128),  # in parts: more than the cache holds
        ((1, 131072, 131072, 2, 1), {"is_causal": True}, None),  # a head more than the cache holds
        ((1, 131072, 131072, 2, 1), {}, 2 * 1024),  # likewise: blocks of keys go through the rows together
        ((1, 8192, 8192, 8, 8), {}, 132),
        ((1, 8192, 8192, 1, 8), {}, None),  # too few blocks of keys; without a mask, groups have no parts
        ((2, 1024, 1024, 66, 1), {}, None),  # short
        ((8, 2048, 2048, 16, 1), {}, 132),
        ((2, 4096, 8192, 16, 1), {}, 32 * 64),  # else blocks of keys would be less than two tiles of rows apart
        ((2, 4100, 4100, 16, 1), {}, None),
        (_LONG, {"local_window_size": (1024, 0)}, None),
        (_LONG, {"logits_soft_cap": 30.0}, 132),
        (_LONG, {"key_value_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32)}, None),
        (_LONG, {"query_offset": jax.ShapeDtypeStruct((2,), jnp.int32), "is_causal": True}, None),
        (_LONG, {"bias": jax.ShapeDtypeStruct((1, 16, 1, 4096), jnp.bfloat16)}, None),
        (_LONG, {"mask": jax.ShapeDtypeStruct((2, 1, 1, 4096), jnp.bool_)}, None),
        (_LONG, {"sinks": jax.ShapeDtypeStruct((16,), jnp.float32)}, 132),
    ],
    ids=str,
)
def test_which_calls_take_it(monkeypatch: pytest.MonkeyPatch, shape: Any, options: Any, workers: int | None) -> None:
    """Those with more workers than multiprocessors in launch order."""
    pretend_gpu(monkeypatch, "9.0")
    monkeypatch.setattr(support, "_core_counts", lambda: frozenset({132}))
    found = explain(*_types(shape, jnp.bfloat16)[:3], platform="cuda", **options).gradient.plan.fused
    assert (None if found is None else found.workers) == workers
    assert found is None or found.in_launch_order == (workers > 132)
    wide = explain(*_types(shape, jnp.float32)[:3], platform="cuda", **options)
    assert wide.gradient.plan is None or wide.gradient.plan.fused is None


def test_a_vmapped_pullback_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cotangents alone have the new batch axis."""
    pretend_gpu(monkeypatch, "9.0")
    monkeypatch.setattr(support, "_core_counts", lambda: frozenset({132}))
    *arrays, dout = _types(_LONG, jnp.bfloat16)
    douts = jax.ShapeDtypeStruct((3, *dout.shape), dout.dtype)

    def pull(query: Any, key: Any, value: Any, douts: Any) -> Any:
        return jax.vmap(jax.vjp(mosaic_attention, query, key, value)[1])(douts)

    lowered = jax.jit(pull).trace(*arrays, douts).lower(lowering_platforms=("cuda",))
    assert _kernels_of(lowered.as_text()) == 3


@pytest.mark.parametrize("is_causal", thinned([False, True], 2, 1))
def test_programs_for_other_gpus(monkeypatch: pytest.MonkeyPatch, is_causal: bool) -> None:
    """Without a mask, blocks of threads run in launch order, unless it is known that all of some can run at once."""
    types, orders = _types((4, *_LONG[1:]), jnp.bfloat16), []
    pretend_gpu(monkeypatch, "9.0")

    def fused(call: Any, order: AdditionOrder, *others: Any) -> Any:
        orders.append(order)
        return backward.fused(call, order, *others)

    monkeypatch.setattr(cotangent, "fused", fused)
    gradients = functools.partial(_gradients, is_causal=is_causal)

    def is_in_launch_order(devices: int = 1) -> bool:
        jax.clear_caches()
        mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))
        split = jax.shard_map(gradients, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
        lowered = jax.jit(split if devices > 1 else gradients).trace(*types).lower(lowering_platforms=("cuda",))
        assert _kernels_of(lowered.as_text()) == 2
        return orders.pop().in_launch_order

    assert is_in_launch_order() != is_causal
    monkeypatch.setattr(support, "_core_counts", lambda: frozenset({132}))
    assert not is_in_launch_order()
    assert is_in_launch_order(devices=2) != is_causal
    jax.clear_caches()
    exported = jax.export.export(jax.jit(gradients), platforms=["cuda"], disabled_checks=_UNCHECKED)(*types)
    assert _kernels_of(exported.mlir_module()) == 2
    assert orders.pop().in_launch_order != is_causal


@pytest.mark.parametrize("kind", thinned(["full", "causal", "balanced"], 2))
def test_blocks_of_a_ring(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """It makes the gradients of those that are whole, and of whole halves, unrounded, in launch order."""
    options: dict[str, Any] = {"is_causal": kind != "full", "order": "balanced" if kind == "balanced" else None}
    orders = []
    pretend_gpu(monkeypatch, "9.0")

    def fused(call: Any, order: AdditionOrder, *dtypes: Any) -> Any:
        orders.append(order)
        assert dtypes == (jnp.float32, jnp.float32)
        return backward.fused(call, order, *dtypes)

    def local(*x: jax.Array) -> jax.Array:
        return context_parallel_attention(*x, axis_name="s", strategy="ring", **options)

    monkeypatch.setattr(cotangent, "fused", fused)
    mesh, split = AbstractMesh((2,), ("s",), axis_types=(AxisType.Auto,)), P(None, "s")
    ring = jax.shard_map(local, mesh=mesh, in_specs=(split,) * 3, out_specs=split)
    gradients = jax.jit(lambda *x: jax.vjp(ring, *x[:3])[1](x[3]))
    text = gradients.trace(*_types((1, 8192, 8192, 64, 1), jnp.bfloat16)).lower(lowering_platforms=("cuda",)).as_text()
    assert [order.in_launch_order for order in orders] == ([True] if kind == "causal" else [True, True])
    assert _kernels_of(text) == (2 + 1 + 2 if kind == "causal" else 2 + 2)


@pytest.mark.parametrize(
    ("is_causal", "last"), [(False, [{"query", "key", "value"}]), (True, [{"key", "value"}, {"query"}])]
)
def test_what_a_ring_asks_of_it(monkeypatch: pytest.MonkeyPatch, is_causal: bool, last: list[set[str]]) -> None:
    """Of a block with a mask by rows, for which each gradient has its own kernel, those that travel home come first."""
    asked, make = [], cotangent.cotangent
    pretend_gpu(monkeypatch, "9.0")

    def made(call: Any, given: Any, *others: Any, **named: Any) -> Any:
        asked.append(set(given.wanted))
        return make(call, given, *others, **named)

    def launch(*unused: Any, out_types: Any, **named: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_types)

    for module in (backward, forward):  # kernels are left out: they take long to lower
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(cotangent, "cotangent", made)
    mesh, split = AbstractMesh((2,), ("s",), axis_types=(AxisType.Auto,)), P(None, "s")
    attention = functools.partial(context_parallel_attention, axis_name="s", strategy="ring", is_causal=is_causal)
    ring = jax.shard_map(attention, mesh=mesh, in_specs=(split,) * 3, out_specs=split)
    gradients = jax.jit(lambda *x: jax.vjp(ring, *x[:3])[1](x[3]))
    gradients.trace(*_types((1, 8192, 8192, 64, 1), jnp.bfloat16)).lower(lowering_platforms=("cuda",))
    assert asked == [{"query", "key", "value"}, *last]


@pytest.mark.parametrize(
    ("parts", "query_dtype", "key_dtype"),
    [(1, "float16", "float16"), (2, "float16", "float16"), (1, "float16", "float32"), (2, "float32", "float32")],
)
def test_what_is_made_of_what_the_kernel_leaves(
    monkeypatch: pytest.MonkeyPatch, parts: int, query_dtype: str, key_dtype: str
) -> None:
    """Numbers in place of a kernel's: query's are scaled; key's are summed over parts; each is rounded as asked."""
    left: list[Any] = []

    def launch(*unused: Any, out_types: Any, **named: Any) -> Any:
        rng = np.random.default_rng(0)
        left.append(jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), out_types))
        return left[0]

    monkeypatch.setattr(backward, "launch", launch)
    B, T, K, G = 2, 72, 3, 4
    query, key, value, dout = (jnp.zeros(x.shape, x.dtype) for x in _types((B, T, T, K, G), jnp.float16))
    inputs = Inputs(query, key, value, jnp.asarray([0.3, 0.5]), None, MaskOperands(), None, None, None)
    rows = jnp.zeros((B, K * G, T), jnp.float32)
    config = Config(Band(upper=0), None, None, None, None, needs_lse=True)
    order = AdditionOrder(B * K * parts, 1, 2, G // parts, True, B * K * parts, in_launch_order=True)
    found = backward.fused(Backward(config, inputs, inputs.sizes, dout, rows, rows), order, query_dtype, key_dtype)

    def expected(x: jax.Array, dtype: str) -> np.ndarray:
        if parts == 1 and key_dtype == "float16":  # as the kernel leaves it
            assert (x.shape, x.dtype) == (key.shape, key.dtype)
            return np.asarray(x)
        assert (x.shape, x.dtype) == ((B, parts, 128, K, _H), jnp.float32)
        return np.asarray(x).sum(1)[:, :T].astype(dtype)

    scaled = (np.asarray(left[0].query) * np.asarray([0.3, 0.5], np.float32)[:, None, None, None]).astype(query_dtype)
    keys, values = (expected(x, key_dtype) for x in (left[0].key, left[0].value))
    for x, like in [(found.query, scaled), (found.key, keys), (found.value, values)]:
        assert x.dtype == like.dtype
        np.testing.assert_array_equal(x, like)


_UNCHECKED = [jax.export.DisabledSafetyCheck.custom_call(x) for x in ("mosaic_gpu", "mosaic_gpu_v2")]


def _dense(
    query: Any, key: Any, value: Any, dout: Any, scale: float, *, is_causal: bool, dtype: Any, cap: float | None = None
) -> tuple:
    """Gradients of dense attention in float64, with weights and their cotangents rounded to `dtype`, if that is one."""
    rounded = (lambda x: x) if dtype is None else (lambda x: np.asarray(jnp.asarray(x, dtype), np.float64))
    G = query.shape[2] // key.shape[2]
    keys, values = (np.repeat(x, G, axis=2) for x in (key, value))
    logits = np.einsum("btnh,bsnh->bnts", query, keys) * scale
    tangents: Any = 0.0 if cap is None else np.tanh(logits / cap)
    logits = logits if cap is None else cap * tangents
    if is_causal:
        logits = np.where(np.tri(*logits.shape[-2:], dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = rounded(np.einsum("bnts,bsnh->btnh", rounded(weights), values))
    dweights = np.einsum("btnh,bsnh->bnts", dout, values)
    delta = np.einsum("btnh,btnh->bnt", dout, out)[..., None]
    dlogits = rounded(weights * (dweights - delta) * (1 - tangents**2) * scale)
    dquery = np.einsum("bnts,bsnh->btnh", dlogits, keys)
    dkey, dvalue = (np.einsum("bnts,btnh->bsnh", x, y) for x, y in ((dlogits, query), (rounded(weights), dout)))
    grouped = (x.reshape(*x.shape[:2], -1, G, x.shape[-1]).sum(-2) for x in (dkey, dvalue))
    return tuple(map(rounded, (dquery, *grouped)))


def _arrays(shape: tuple[int, ...], dtype: Any) -> list[jax.Array]:
    rng = np.random.default_rng(7)
    return [jnp.asarray(rng.standard_normal(x.shape, np.float32), dtype) for x in _types(shape, dtype)]


@pytest.mark.gpu(says_why=True)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", _CALLS)
def test_gradients(name: str, dtype: Any) -> None:
    """As accurate as dense attention's in the same dtype, and the same bits in every run."""
    _check_gradients(name, dtype, None)


@pytest.mark.gpu(says_why=True)
@pytest.mark.parametrize("cap", [50.0, 12.0, 5.0, 1.0])
@pytest.mark.parametrize("name", ["full, odd lengths", "causal, groups"])
def test_gradients_inside_a_soft_cap(name: str, cap: float) -> None:
    """Of which the largest logits, about 5, are a small part, or another that has a polynomial of its own."""
    _check_gradients(name, jnp.bfloat16, cap)


def _check_gradients(name: str, dtype: Any, cap: float | None) -> None:
    skip_unless_taken(named_case("tile", "plain"), "mosaic_gpu")
    shape, is_causal, scale, cores, parts = _CALLS[name]
    arrays, multiplier = _arrays(shape, dtype), _H**-0.5 if scale is None else scale
    call = functools.partial(_gradients, is_causal=is_causal, scale=scale, logits_soft_cap=cap)
    with replacing(_kernels(shape, is_causal=is_causal, cores=cores, parts=parts)):
        gradients = jax.jit(call).lower(*arrays).compile()
    assert _kernels_of(gradients.as_text().replace('custom_call_target="', "custom_call @")) == 2
    found = gradients(*arrays)
    query, key, value, dout = (np.asarray(x, np.float64) for x in arrays)
    exact, narrow = (
        _dense(query, key, value, dout, multiplier, is_causal=is_causal, dtype=x, cap=cap) for x in (None, dtype)
    )
    for of, *results in zip(("query", "key", "value"), found, narrow, exact, strict=True):
        assert_as_accurate_as_dense(of, *results)
    for _ in range(5):
        again = gradients(*arrays)
        assert all(bool((x == y).all()) for x, y in zip(found, again, strict=True))


@pytest.mark.gpu(says_why=True)
@pytest.mark.parametrize("is_causal", [False, True])
def test_long_calls_take_it(is_causal: bool) -> None:
    """And have the gradients of two kernels, but for rounding."""
    skip_unless_taken(named_case("tile", "plain"), "mosaic_gpu")
    arrays = _arrays(_LONG, jnp.bfloat16)
    assert explain(*arrays[:3], is_causal=is_causal).gradient.plan.fused is not None
    gradients = functools.partial(_gradients, is_causal=is_causal)
    found, again = (jax.jit(gradients)(*arrays) for _ in range(2))
    with replacing(HopperKernels(backward_blocks=BackwardBlocks(_BLOCKS, _BLOCKS, None))):
        two = jax.jit(gradients)(*arrays)
    for x, y, z in zip(found, again, two, strict=True):
        assert bool((x == y).all())
        x, z = (np.asarray(a, np.float32) for a in (x, z))
        np.testing.assert_allclose(x, z, rtol=0, atol=2 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(z).max())
