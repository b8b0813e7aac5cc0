"""Memory: nothing of T * S elements, temporary memory linear in T, and a resident set to match."""

import functools
import itertools
import math
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_native_flash_attn import flash_attention, mods
from tests.support.environment import fast_compilation, lenient_promotion
from tests.support.grids import thinned
from tests.support.programs import equations, largest_in_text

B, N, K, H = 2, 4, 2, 32
FAST = fast_compilation()

# Extra arrays of a call by sequence length, then its static options.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({}, {"is_causal": True}),
    "window": ({}, {"local_window_size": (200, 100)}),
    "lengths": ({"query_seq_lengths": ((B,), jnp.int32), "key_value_seq_lengths": ((B,), jnp.int32)}, {}),
    "mask (B,1,1,S)": ({"mask": ((B, 1, 1, "T"), jnp.bool_)}, {}),
    "bias (1,N,1,S)": ({"bias": ((1, N, 1, "T"), jnp.float32)}, {}),
    "dropout": ({}, {"dropout_rate": 0.1}),
    "segment ids": (
        {"query_segment_ids": ((B, "T"), jnp.int32), "key_value_segment_ids": ((B, "T"), jnp.int32)},
        {"is_causal": True},
    ),
    "positions, sinks": (
        {
            "query_positions": ((B, "T"), jnp.int32),
            "key_value_positions": ((B, "T"), jnp.int32),
            "sinks": ((N,), jnp.float32),
        },
        {"is_causal": True, "logits_soft_cap": 20.0},
    ),
    "functions": (
        {},
        {"score_mod": mods.alibi, "score_mod_args": (mods.alibi_slopes(N),), "mask_mod": mods.Dilated(3)},
    ),
}


def call_and_arguments(name: str, T: int) -> tuple[Any, tuple[Any, ...]]:
    """A loss of query, key, value, bias, and all of its arguments as shapes."""
    extras, options = SETTINGS[name]
    shapes = {
        k: jax.ShapeDtypeStruct(tuple(T if n == "T" else n for n in shape), dtype)
        for k, (shape, dtype) in extras.items()
    }
    bias = shapes.pop("bias", None)
    rng = jax.eval_shape(lambda: jax.random.key(0)) if "dropout_rate" in options else None
    query = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    key = jax.ShapeDtypeStruct((B, T, K, H), jnp.float32)

    def loss(query, key, value, bias, shapes, rng):
        return flash_attention(query, key, value, bias, **shapes, **options, dropout_rng=rng).sum()

    return loss, (query, key, key, bias, shapes, rng)


def functions(name: str, T: int) -> tuple[dict[str, Any], tuple[Any, ...]]:
    loss, arguments = call_and_arguments(name, T)
    argnums = (0, 1, 2) if arguments[3] is None else (0, 1, 2, 3)
    return {"value": loss, "gradient": jax.grad(loss, argnums)}, arguments


def largest_intermediate(jaxpr: Any) -> int:
    avals = (variable.aval for equation in equations(jaxpr) for variable in equation.outvars)
    return max(aval.size for aval in avals if hasattr(aval, "size"))


def test_the_search_for_quadratic_arrays_finds_them():
    def dense(x):
        return jax.nn.softmax(x @ x.T) @ x

    x = jax.ShapeDtypeStruct((512, 8), jnp.float32)
    assert largest_intermediate(jax.make_jaxpr(jax.jit(dense))(x).jaxpr) == 512 * 512
    lowered = jax.jit(dense).lower(x)
    assert largest_in_text(lowered.as_text())[0] == 512 * 512
    assert largest_in_text(lowered.compile().as_text())[0] == 512 * 512


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, "gradient") for name in SETTINGS), *thinned(((name, "value") for name in SETTINGS), 3)],
)
def test_no_array_of_t_times_s_elements_and_temporary_memory_linear_in_t(name: str, mode: str):
    T = 4096
    function, arguments = functions(name, T)
    jaxpr = jax.make_jaxpr(function[mode])(*arguments)
    assert largest_intermediate(jaxpr.jaxpr) < T * T
    # The kernels are opaque parameters of primitives: look at what they lower and compile to.
    lowered = jax.jit(function[mode], compiler_options=FAST).lower(*arguments)
    size, shape = largest_in_text(lowered.as_text())
    assert size < T * T, shape
    compiled: Any = lowered.compile()
    size, shape = largest_in_text(compiled.as_text())
    assert size < T * T, shape

    function, arguments = functions(name, 4 * T)
    longer: Any = jax.jit(function[mode], compiler_options=FAST).lower(*arguments).compile()
    short, long = (x.memory_analysis().temp_size_in_bytes for x in (compiled, longer))
    assert long <= 4.2 * short
    assert long < 16384**2  # bytes: a quarter of one dense matrix of one head


@pytest.mark.parametrize("is_vmapped", [False, True])
@pytest.mark.parametrize("name", ["segment ids", "positions, sinks"])
def test_temporary_memory_of_long_packed_sequences(name: str, is_vmapped: bool):
    """Which the ids are is not known: they may be in any order. A boolean mask has 1 GiB for each batch row."""
    loss, arguments = call_and_arguments(name, 32768)
    if is_vmapped:  # each batch row is a call of its own
        query, key, value, bias, extras, rng = arguments
        axes = (0, 0, 0, None, {name: None if name == "sinks" else 0 for name in extras}, None)

        def mapped(query, key, value, bias, extras, rng):
            def one(query, key, value, bias, extras, rng):
                extras = {name: x if name == "sinks" else x[None] for name, x in extras.items()}
                return loss(query[None], key[None], value[None], bias, extras, rng)

            return jax.vmap(one, axes)(query, key, value, bias, extras, rng).sum()

        compiled: Any = jax.jit(mapped, compiler_options=FAST).lower(query, key, value, bias, extras, rng).compile()
    else:
        compiled = jax.jit(loss, compiler_options=FAST).lower(*arguments).compile()
    size, shape = largest_in_text(compiled.as_text())
    assert size < 32768**2 / 8, shape
    out = 4 * B * 32768 * N * H  # the loss is a sum over it
    assert compiled.memory_analysis().temp_size_in_bytes < out + 64 * 2**20


# B, T, S, N, H: few scores in many heads, very few, and decoding.
SMALL_SHAPES = ((64, 64, 64, 8, 64), (256, 16, 16, 8, 32), (8, 1, 1024, 8, 64))
SMALL_MASKS: dict[str, tuple[str, ...]] = {
    "lengths of keys": ("key_value_seq_lengths",),
    "lengths of queries": ("query_seq_lengths",),
    "both lengths": ("query_seq_lengths", "key_value_seq_lengths"),
    "mask of keys": ("mask",),
}


@functools.cache
def temporary_bytes(attention: Any, shape: tuple[int, ...], masks: tuple[str, ...], dtype: str, mode: str) -> int:
    B, T, S, N, H = shape
    query, key = (jax.ShapeDtypeStruct((B, n, N, H), dtype) for n in (T, S))
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
    extras = {name: jax.ShapeDtypeStruct((B, 1, 1, S), jnp.bool_) if name == "mask" else lengths for name in masks}

    def call(query, key, value, extras):
        return attention(query, key, value, **extras)

    def loss(*args):
        return call(*args).astype(jnp.float32).sum()

    function = call if mode == "value" else jax.grad(loss, (0, 1, 2))
    compiled: Any = jax.jit(function).lower(query, key, key, extras).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("shape", "dtype", "masks", "mode"),
    thinned(
        [
            (shape, ("bfloat16", "float16")[(i + i // 2) % 2], masks, mode)
            for i, (shape, masks, mode) in enumerate(
                itertools.product(SMALL_SHAPES, SMALL_MASKS, ["value", "gradient"])
            )
        ],
        every=5,
    ),
    ids=str,
)
def test_temporary_memory_of_short_16_bit_calls(shape: tuple[int, ...], dtype: str, masks: str, mode: str):
    ours = temporary_bytes(flash_attention, shape, SMALL_MASKS[masks], dtype, mode)
    with lenient_promotion():
        # jax.nn does not run in float16 on a CPU.
        theirs = temporary_bytes(jax.nn.dot_product_attention, shape, SMALL_MASKS[masks], "bfloat16", mode)
    B, _, S, N, _ = shape
    # Beside the arrays, what is decided about masks: a few bytes for each batch row and key or head.
    assert ours <= theirs + 8 * B * (S + N)


def largest_copy(text: str) -> int:
    """Elements of the largest array that optimised HLO copies."""
    found = re.findall(r"= [a-z]+\d*\[([\d,]+)\]\S* copy\(", text)
    return max((math.prod(map(int, sizes.split(","))) for sizes in found), default=0)


@pytest.mark.parametrize("masks", ["query_offset", "key_value_seq_lengths", "mask", "none"])
def test_decoding_copies_no_cache(masks: str):
    """The program writes a token into caches that are donated to it, and attends."""
    S, N, H = 8192, 8, 32

    def decode(query, key, keys, values, offset):
        keys, values = (jax.lax.dynamic_update_slice_in_dim(x, key, offset, axis=1) for x in (keys, values))
        options: dict[str, Any] = {
            "query_offset": {"query_offset": offset, "is_causal": True},
            "key_value_seq_lengths": {"key_value_seq_lengths": offset[None] + 1},
            "mask": {"mask": (jnp.arange(S) <= offset)[None, None, None]},
            "none": {},
        }[masks]
        return flash_attention(query, keys, values, **options), keys, values

    token, cache = (jax.ShapeDtypeStruct((1, length, N, H), jnp.float32) for length in (1, S))
    jitted = jax.jit(decode, donate_argnames=("keys", "values"), compiler_options=FAST)
    compiled: Any = jitted.lower(token, token, cache, cache, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    assert largest_copy(compiled.as_text()) < cache.size
    # Nor is it copied under another name, by a fusion.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * cache.size


RUN = """
import resource
import jax, jax.numpy as jnp
from jax_native_flash_attn import flash_attention

@jax.jit
def step(query, key, value, rng):
    def loss(query, key, value):
        return flash_attention(query, key, value, is_causal=True, dropout_rate=0.1, dropout_rng=rng).sum()
    return jax.value_and_grad(loss, (0, 1, 2))(query, key, value)

def run(T):
    arrays = (jax.random.normal(k, (1, T, 2, 32)) for k in jax.random.split(jax.random.key(0), 3))
    jax.block_until_ready(step(*arrays, jax.random.key(1)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(run(512), run(8192))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_peak_resident_memory_of_a_long_run():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    output = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True, env=environment)
    short, long = (int(kib) for kib in output.stdout.split())
    dense_mib = 2 * 8192**2 * 4 / 2**20  # one (N, T, S) array of float32; dense needs about three
    assert (long - short) / 1024 < dense_mib / 4
