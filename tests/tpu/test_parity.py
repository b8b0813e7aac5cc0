"""Values and all gradients of the TPU kernels beside the float64 oracle, run on the CPU by Pallas' interpreters."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jax_native_flash_attn import flash_attention
from jax_native_flash_attn._kernels.protocol import LinearPass, Target
from jax_native_flash_attn._kernels.tpu.support import TpuKernels
from jax_native_flash_attn._kernels.xla.family import XlaKernels
from jax_native_flash_attn._semantics.call import Call, Config, Inputs
from jax_native_flash_attn._semantics.masks import Band, MaskOperands
from tests.support.cases import FAST_COMPILATION, Case, check_case, features, named_case, with_lengths
from tests.support.grids import in_part, rest, thinned
from tests.support.hopper import VMAPS, shared_operand_gradients, vmap_arguments
from tests.support.oracle import check_out
from tests.support.tpu import interpreted, small_blocks

_FLOATS = ("query", "key", "value", "scale")
_SHAPE = (2, 301, 430, 1, 2, 24)
CASES = {
    "every mask": Case(
        (1, 301, 430, 1, 1, 24),
        mask=(True, False, True, True),
        mask_density=0.7,
        value_dim=40,
        dropout_rate=0.3,
        **features("padded segments", "positions", "soft cap", "sinks", "largest logits"),
    ),
    "lengths": with_lengths(Case((3, 301, 430, 1, 1, 24), "bfloat16", bias=(False, True, True, True), is_causal=True)),
    "causal": Case((1, 700, 900, 1, 2, 64), "bfloat16", is_causal=True),
    "plain": Case((1, 768, 768, 2, 1, 16)),
    "window": Case((1, 900, 900, 1, 1, 16), local_window_size=(150, 20)),
    "scale, soft cap, sinks": Case(
        _SHAPE, scale=-0.5, logits_soft_cap=1.5, sinks="float32", traced=frozenset({"scale"}), with_lse=True
    ),
    "256": named_case("wide", "causal"),
    "80": named_case("eighty", "mask of rows"),
    "one row": named_case("one row", "bias of all"),
    "one key": named_case("one key", "plain"),
    "bias of keys": Case(_SHAPE, bias=(False, True, False, True)),
    "bias of rows": Case(_SHAPE, bias=(True, False, True, False)),
    "sparse mask": Case(_SHAPE, "bfloat16", mask=(False, True, True, True), mask_density=0.02),
    "mask of keys": Case(_SHAPE, mask=(True, True, False, True), is_causal=True),
    "segments": Case(_SHAPE, is_causal=True, **features("segments")),
    "shuffled segments": Case(_SHAPE, **features("shuffled segments", "largest logits")),
    "offset": Case(_SHAPE, **features("offset", "window")),
    "shared dropout": Case(_SHAPE, **features("shared dropout", "causal")),
    "vmap": Case(_SHAPE, vmapped=True, bias=(False, True, False, True), is_causal=True),
    "lengths of keys": with_lengths(Case((3, 301, 430, 1, 1, 24)), of_queries=False),
}


def asked(*args: Any, **options: Any) -> Any:
    return flash_attention(*args, **options, implementation="mosaic_tpu")


@pytest.fixture(scope="module")
def _kernels() -> Iterator[None]:
    with interpreted():
        yield


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("name", thinned(CASES, len(CASES)))
def test_parity(name: str) -> None:
    case = CASES[name]
    # `flash_attention_with_lse` cannot ask for kernels: it takes them, as they come first.
    check_case(case, None if case.with_lse else asked, FAST_COMPILATION)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("kind", [rest("gradient of vmap"), rest("vmap of gradient")])
@pytest.mark.parametrize("in_axes", [VMAPS["shared keys"], VMAPS["shared bias"]], ids=str)
def test_gradients_of_shared_operands(in_axes: Any, kind: str) -> None:
    arguments = vmap_arguments(in_axes)
    actual, expected = (
        jax.jit(shared_operand_gradients(x, in_axes, kind), compiler_options=FAST_COMPILATION)(*arguments)
        for x in ("mosaic_tpu", "pure_jax")
    )
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = (np.asarray(x, np.float64) for x in (a, e))
        np.testing.assert_allclose(a, e, atol=0.02 * np.abs(e).max(), rtol=0)


@in_part(1)
@pytest.mark.usefixtures("_kernels")
def test_weights_without_a_maximum_that_overflow() -> None:
    """Blocks of rows for which they do not, do for the first keys, and in a half for later ones; and values that do."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 768, 2, 16)).astype(np.float32) for _ in range(3))
    query[..., :2] = 0
    query[:, 256:512, :, 0], key[..., 0] = -100, 4
    query[:, 512:640, :, 1], key[..., 1] = 100, 4 * (np.arange(768) >= 384)[:, None]
    value[..., 1, :] *= 1e35
    out = asked(*map(jnp.asarray, (query, key, value)))
    dense = jax.nn.dot_product_attention(*map(jnp.asarray, (query, key, value)))
    for head in range(2):
        at = slice(head, head + 1)
        check_out("out", out[:, :, at], dense[:, :, at], *(x[:, :, at] for x in (query, key, value)))


@in_part(0)
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("kind", ["tiles", rest("keys"), rest("tiles and rows")])
def test_tiles_that_a_boolean_mask_empties(kind: str) -> None:
    """They are not visited: values there may be NaN. But rows without a key attend all."""
    rng = np.random.default_rng(0)
    query, key, value, dout = (jnp.asarray(rng.standard_normal((1, 600, 2, 16)), jnp.bfloat16) for _ in range(4))
    number = np.arange(600) // 256
    allowed = (number[:, None] != number) if kind != "keys" else number[None, None] != 1
    if kind == "tiles and rows":
        allowed = allowed & (np.arange(600) != 300)[:, None]
    mask, poison = jnp.asarray(allowed.reshape(1, 1, -1, 600)), jnp.where(number == 1, jnp.nan, 0)[None, :, None, None]

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILATION)
    def results(implementation: Any, value: jax.Array, mask: jax.Array) -> Any:
        def call(*x: jax.Array) -> jax.Array:
            return flash_attention(*x, mask=mask, implementation=implementation)

        out, pullback = jax.vjp(call, query, key, value)
        return out, *pullback(dout)

    expected = results("pure_jax", value, mask)
    actual = results("mosaic_tpu", value, mask)
    for a, e in zip(actual, expected, strict=True):
        a, e = (np.asarray(x, np.float64) for x in (a, e))
        np.testing.assert_allclose(a, e, atol=0.02 * np.abs(e).max(), rtol=0)
    poisoned = results("mosaic_tpu", value + poison.astype(value.dtype), mask)[0]
    is_free = np.ones(600, bool) if kind == "keys" else number == 1
    assert np.isfinite(np.asarray(poisoned, np.float32)[:, is_free]).all() == (kind != "tiles and rows")


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("sinks", thinned([None, jnp.ones(2)], 2), ids=["plain", "sinks"])
def test_nan_of_a_query_is_that_of_its_row(sinks: jax.Array | None) -> None:
    query, key, value = (jax.random.normal(jax.random.key(i), (1, 300, 2, 24)) for i in range(3))
    expected = flash_attention(query, key, value, sinks=sinks, implementation="pure_jax").at[:, 7].set(jnp.nan)
    actual = asked(query.at[:, 7].set(jnp.nan), key, value, sinks=sinks)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.whole_grid
def test_with_copies_and_semaphores() -> None:
    """By the interpreter that follows each copy between memories, and fills what was not written with NaN.

    It has effects that a primitive would have to declare, so kernels are called without one.
    """
    kernels = TpuKernels(interpret=pltpu.InterpretParams(uninitialized_memory="nan"), **small_blocks())
    query, key, value, dout = (jax.random.normal(jax.random.key(i), (1, 300, 2, 24)) for i in range(4))
    scale, mask = jnp.full((1,), 0.2), MaskOperands()
    call = Call(
        Config(Band(upper=0), None, None, None, None, needs_lse=True),
        Inputs(query, key[..., :1, :], value[..., :1, :], scale, None, mask, None, None, None),
    )
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in call.inputs._asdict().items() if name in _FLOATS
    }

    def results(family: Any, target: Target) -> Any:
        out, lse, *_ = family.forward(call, target)
        return out, lse, family.cotangent(call, LinearPass(out, lse, {"out": dout}, wanted), target)

    actual, expected = results(kernels, Target("tpu")), results(XlaKernels(), Target("cpu"))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5 * float(jnp.abs(e).max()), rtol=0)


@pytest.mark.whole_grid
def test_blocks_of_the_table() -> None:
    """As for a TPU of no known generation, with several blocks in each axis."""
    with interpreted(has_small_blocks=False):
        check_case(Case((1, 1100, 1300, 1, 1, 16), is_causal=True), asked, FAST_COMPILATION)
