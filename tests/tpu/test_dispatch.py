"""When the TPU kernels are taken, in programs lowered for TPUs without one; which tiles they visit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu  # noqa: F401  (says so if it cannot be imported)
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn import context_parallel_attention, explain, flash_attention
from jax_native_flash_attn._kernels.protocol import Pass, Target
from jax_native_flash_attn._kernels.tpu.blocks import Blocks
from jax_native_flash_attn._kernels.tpu.host.ranges import key_tiles, occupied_tiles, query_tiles
from jax_native_flash_attn._kernels.tpu.support import TpuKernels
from jax_native_flash_attn._semantics.call import Call, Config, Inputs
from jax_native_flash_attn._semantics.join_masks import make_mask
from jax_native_flash_attn._semantics.masks import Band, MaskOperands
from tests.support.environment import enable_x64
from tests.support.tpu import kernel_count

B, T, N, K, H = 2, 256, 4, 2, 64
TYPES = [jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16) for n in (N, K, K)]


def causal(*x: jax.Array) -> jax.Array:
    return flash_attention(*x, is_causal=True)


def gradients(*x: jax.Array) -> Any:
    out, pullback = jax.vjp(causal, *x)
    return pullback(out)


def test_taken_where_a_program_is_for_tpus_alone() -> None:
    assert kernel_count(causal, *TYPES) == 1
    assert kernel_count(gradients, *TYPES) == 3
    for platforms in (("cpu", "tpu"), ("cpu",), ("cuda",)):
        assert kernel_count(causal, *TYPES, platforms=platforms) == 0
    assert kernel_count(lambda *x: flash_attention(*x, implementation="pure_jax"), *TYPES) == 0


@pytest.mark.parametrize(("platforms", "expected"), [(("tpu",), 1), (("cpu", "tpu"), 0)])
def test_exports(platforms: tuple[str, ...], expected: int) -> None:
    exported = jax.export.export(jax.jit(causal), platforms=platforms)(*TYPES)
    restored = jax.export.deserialize(exported.serialize())
    assert restored.platforms == platforms
    assert restored.mlir_module().count("tpu_custom_call") == expected


def test_derivatives_of_derivatives_are_pure_jax() -> None:
    def along(x: jax.Array) -> jax.Array:
        return jax.jvp(jax.grad(lambda x: causal(x, x, x).astype(jnp.float32).sum()), (x,), (x,))[1]

    x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    # What is differentiated is made by the kernel; what differentiates, is not.
    assert kernel_count(along, x) == 1
    assert kernel_count(lambda *x: jax.jvp(causal, x, x)[1], x, x, x) == 1


@pytest.mark.parametrize(
    ("reason", "change", "options"),
    [
        ("bfloat16 and float32, got float16", {"dtype": "float16"}, {}),
        ("got float64", {"dtype": "float64"}, {}),
        ("up to 256, got 264", {"H": 264}, {}),
        ("block_q and block_kv", {}, {"block_q": 64}),
        ("names an algorithm", {}, {"precision": "BF16_BF16_F32"}),
        ("score_mod is a function", {}, {"score_mod": lambda score, *_: 2 * score}),
        ("mask_mod is a function", {}, {"mask_mod": lambda b, h, q, k: q >= k}),
    ],
)
def test_what_is_not_supported(reason: str, change: dict[str, Any], options: dict[str, Any]) -> None:
    dtype, width = jnp.dtype(change.get("dtype", "bfloat16")), change.get("H", H)
    with enable_x64(dtype == jnp.float64):
        types = [jax.ShapeDtypeStruct((*x.shape[:-1], width), dtype) for x in TYPES]
        found = explain(*types, **options, platform="tpu")
        assert found.forward.family == found.gradient.family == "pure_jax"
        assert reason in found.forward.reasons["mosaic_tpu"]
        with pytest.raises(NotImplementedError, match=f"'mosaic_tpu' does not run here: .*{reason}"):
            explain(*types, **options, implementation="mosaic_tpu", platform="tpu")


def test_explain() -> None:
    found = explain(*TYPES, platform="tpu")
    assert found.forward.family == found.gradient.family == "mosaic_tpu"
    assert found.forward.plan.resident == found.gradient.plan.dquery.resident == 256
    assert found.tangent.reasons["mosaic_tpu"] == "it has no kernel for tangents"
    assert "not for a TPU alone" in explain(*TYPES, platform="cpu").forward.reasons["mosaic_tpu"]


def test_what_xla_splits_is_pure_jax() -> None:
    call = Call(
        Config(make_mask_of(8, 8)[0], None, None, None, None, needs_lse=False),
        Inputs(*(jnp.zeros((1, 8, 1, 8)),) * 3, jnp.ones((1,)), None, make_mask_of(8, 8)[1], None, None, None),
    )
    supports = TpuKernels().supports
    assert supports(call, Pass.FORWARD, Target("tpu")) is None
    assert "jax.shard_map" in (supports(call, Pass.FORWARD, Target("tpu", is_sharded=True)) or "")


def test_a_ring_and_explicit_axes() -> None:
    mesh = AbstractMesh((2,), ("s",), axis_types=(AxisType.Auto,))
    split = P(None, "s")

    def ring(*x: jax.Array) -> jax.Array:
        return context_parallel_attention(*x, is_causal=True, axis_name="s")

    over_all = jax.shard_map(ring, mesh=mesh, in_specs=(split,) * 3, out_specs=split)
    assert kernel_count(over_all, *TYPES) > 0
    mesh = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("b"))
        types = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in TYPES]
        assert kernel_count(gradients, *types) == 3


# ---- tiles


def make_mask_of(rows: int, keys: int, **options: Any) -> Any:
    names = ("traced_window", "query_lengths", "key_value_lengths", "allowed")
    given: dict[str, Any] = {"is_causal": False, "static_window": None, **dict.fromkeys(names)}
    return make_mask(rows, keys, **(given | options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"static_window": (300, 40)},
        {"key_value_lengths": jnp.array([1000, 300]), "is_causal": True},
        {"query_lengths": jnp.array([0, 700]), "key_value_lengths": jnp.array([0, 1000])},
    ],
    ids=str,
)
def test_tiles(options: dict[str, Any]) -> None:
    """A tile is visited if a row attends a key of it, and has no mask only if every row attends all of its keys."""
    rows, keys = 900, 1000
    band, mask = make_mask_of(rows, keys, **options)
    start, stop = (mask.key_start, mask.key_stop) if mask.key_start is not None else band.intervals(rows, keys)
    start, stop = (np.broadcast_to(np.asarray(x), (2, 1, rows))[:, 0, :, None] for x in (start, stop))
    dead = np.zeros((2, rows, 1), bool) if mask.dead is None else np.asarray(mask.dead)[:, 0, :, None]
    padded = np.pad((np.arange(keys) >= start) & (np.arange(keys) < stop), ((0, 0), (0, 124), (0, 24)))
    live = padded & ~np.pad(dead, ((0, 0), (0, 124), (0, 0)))
    tiles, full = padded.reshape(2, 4, 256, 8, 128).any((2, 4)), live.reshape(2, 4, 256, 8, 128)
    # Rows behind the last one do not count where they are resident.
    is_row = (np.arange(1024) < rows).reshape(4, 256)[None, :, :, None, None]
    is_key = (np.arange(1024) < keys).reshape(8, 128)[None, None, None]
    call = call_of(rows, keys, band, mask)
    by_rows = np.broadcast_to(key_tiles(call, Blocks(256, 128, 128, 256)), (2, 4, 4))
    _check(by_rows, tiles, (full | ~is_row).all((2, 4)) & is_key.all((2, 4)))
    by_keys = np.broadcast_to(query_tiles(call, Blocks(128, 256, 256, 128)), (2, 8, 4))
    _check(
        by_keys, tiles.swapaxes(1, 2), (full | ~is_key).all((2, 4)).swapaxes(1, 2), whole=is_row.all((2, 4))[:, :, 0]
    )


def call_of(rows: int, keys: int, band: Any, mask: Any) -> Call:
    key_value = (jnp.zeros((2, keys, 1, 8)),) * 2
    inputs = Inputs(jnp.zeros((2, rows, 1, 8)), *key_value, jnp.ones((1,)), None, mask, None, None, None)
    return Call(Config(band, None, None, None, None, needs_lse=False), inputs)


@pytest.mark.parametrize("shape", [(2, 3, 900, 1000), (1, 1, 900, 1000), (2, 1, 1, 1000), (1, 1, 900, 1)], ids=str)
@pytest.mark.parametrize("has_dead_row", [False, True])
def test_tiles_that_a_boolean_mask_leaves(shape: tuple[int, ...], has_dead_row: bool) -> None:
    rng = np.random.default_rng(0)
    allowed = rng.random((2, 4, 8)) < 0.4
    allowed[0, 2] = allowed[1, 1] = False
    # One element of a tile, in one head, where there is one.
    of_elements = np.zeros((*shape[:2], 4, 256, 8, 128), bool)
    of_elements[:, -1, :, 100, :, 50] = allowed[: shape[0]]
    of_elements = of_elements.reshape(*shape[:2], 1024, 1024)[..., :900, :1000]
    of_elements = of_elements.any(-2, keepdims=True) if shape[-2] == 1 else of_elements
    of_elements = of_elements.any(-1, keepdims=True) if shape[-1] == 1 else of_elements
    # Rows that attend all.
    dead = jnp.zeros((1, 1, 900), bool).at[..., 600].set(True) if has_dead_row else None
    mask = MaskOperands(allowed=jnp.asarray(of_elements), dead=dead)
    padded = np.pad(of_elements.any(1), [(0, 0)] + [(0, 1024 - n if n > 1 else 0) for n in shape[2:]])
    expected = np.broadcast_to(padded, (shape[0], 1024, 1024)).reshape(-1, 4, 256, 8, 128).any((2, 4))
    expected = expected | (has_dead_row & (np.arange(4) == 2))[:, None]
    call = call_of(900, 1000, Band(), mask)
    for found, blocks in (
        (occupied_tiles(call, Blocks(256, 128, 128, 256), streams_rows=False), expected),
        (occupied_tiles(call, Blocks(128, 256, 256, 128), streams_rows=True), expected.swapaxes(1, 2)),
    ):
        np.testing.assert_array_equal(found, blocks)


def test_a_mask_of_more_tiles_than_scalar_memory_holds() -> None:
    allowed = jnp.ones((1, 1, 1, 1 << 16), bool)
    call = call_of(1 << 16, 1 << 16, Band(), MaskOperands(allowed=allowed))
    assert occupied_tiles(call, Blocks(256, 128, 128, 256), streams_rows=False) is None


def _check(ranges: np.ndarray, visible: np.ndarray, full: np.ndarray, whole: np.ndarray | None = None) -> None:
    number = np.arange(visible.shape[-1])
    first, full_first, full_stop, stop = (ranges[..., i, None] for i in range(4))
    visited, unmasked = (first <= number) & (number < stop), (full_first <= number) & (number < full_stop)
    assert (visited | ~visible).all()
    # At both ends of a range something is visible: nothing is visited in vain.
    assert (visible.any(-1) == visited.any(-1)).all()
    assert (visited.sum(-1) == np.where(visible, number + 1, 0).max(-1) - first[..., 0])[visible.any(-1)].all()
    assert (full | ~unmasked).all()
    expected = full if whole is None else full & whole[:, None, :]
    assert (unmasked.sum(-1) == expected.sum(-1)).all()
