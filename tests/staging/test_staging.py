"""Control flow, checkpoint policies, export, compilation and debugging modes; size of programs and temporary memory."""

import functools
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify

from jax_native_flash_attn import flash_attention, flash_attention_with_lse
from tests.support.environment import enable_x64, fast_compilation, of_process
from tests.support.programs import primitives

B, T, N, K, H = 2, 24, 4, 2, 8
BLOCKS: dict[str, Any] = {"block_q": 8, "block_kv": 8}
# Compiling is what takes time here, not running.
FAST = fast_compilation()


def arrays(seed: int = 0, T: int = T, K: int = K, dtype: Any = np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def attention(query: Any, key: Any, value: Any) -> jax.Array:
    return flash_attention(query, key, value, is_causal=True, **BLOCKS)


def loss(query: Any, key: Any, value: Any) -> jax.Array:
    return jnp.sin(attention(query, key, value)).sum()


gradients = jax.grad(loss, (0, 1, 2))


@functools.cache
def expected_value() -> np.ndarray:
    return np.asarray(jax.jit(attention, compiler_options=FAST)(*arrays()))


@functools.cache
def expected_gradients() -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.jit(gradients, compiler_options=FAST)(*arrays())]


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(1.0, float(np.abs(e).max())))


# ---- jit and control flow


@pytest.mark.parametrize("donated", [(0,), (1,), (2,), (0, 1, 2)])
def test_donation(donated: tuple[int, ...]):
    inputs = [jnp.array(x) for x in arrays()]
    with warnings.catch_warnings():
        # A forward pass has one result for three buffers, and none of key's shape.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        out = jax.jit(attention, donate_argnums=donated, compiler_options=FAST)(*inputs)
    assert_close(out, expected_value())
    assert 0 not in donated or inputs[0].is_deleted()

    inputs = [jnp.array(x) for x in arrays()]
    actual = jax.jit(gradients, donate_argnums=donated, compiler_options=FAST)(*inputs)
    assert_close(actual, expected_gradients())
    assert all(inputs[i].is_deleted() for i in donated)


def test_scan_over_layers():
    depth = 3
    query, key, value = arrays()
    weights = np.random.default_rng(1).standard_normal((depth, H, H)).astype(np.float32) / 4

    def layer(x: Any, w: Any) -> Any:
        return x + attention(x @ w, key, value)

    def scanned(weights: Any, x: Any) -> Any:
        return jnp.sin(lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0]).sum()

    def unrolled(weights: Any, x: Any) -> Any:
        for w in weights:
            x = layer(x, w)
        return jnp.sin(x).sum()

    def results(f: Callable[..., Any]) -> Any:
        gradient = jax.grad(f, (0, 1))
        run = lambda *x: (jax.value_and_grad(f, (0, 1))(*x), jax.jvp(gradient, x, x)[1])  # noqa: E731
        return jax.jit(run, compiler_options=FAST)(weights, query)

    assert_close(results(scanned), results(unrolled))


def test_while_loop():
    query, key, value = arrays()

    def run(query: Any, steps: Any) -> Any:
        def step(state: Any) -> Any:
            i, x = state
            return i + 1, attention(x, key, value)

        return lax.while_loop(lambda state: state[0] < steps, step, (jnp.int32(0), query))[1]

    jit = functools.partial(jax.jit, compiler_options=FAST)
    expected = attention(attention(query, key, value), key, value)
    assert_close(jit(run)(query, 2), expected)
    # Forward mode goes through a while loop.
    forward = jit(lambda q: jax.jvp(lambda q: run(q, 2), (q,), (q,))[1])(query)
    twice = jit(lambda q: jax.jvp(lambda q: attention(attention(q, key, value), key, value), (q,), (q,))[1])(query)
    assert_close(forward, twice)


def test_cond_and_switch():
    inputs = arrays()
    branches = [attention, lambda q, k, v: q, lambda q, k, v: 2 * attention(q, k, v)]

    @jax.jit
    def run(index: Any, *inputs: Any) -> Any:
        def f(*x: Any) -> Any:
            return jnp.sin(lax.switch(index, branches, *x)).sum()

        def g(*x: Any) -> Any:
            return jnp.sin(lax.cond(index > 0, attention, lambda q, k, v: 0 * q, *x)).sum()

        return jax.grad(f, (0, 1, 2))(*inputs), jax.grad(g, (0, 1, 2))(*inputs)

    switched, conditional = run(0, *inputs)
    assert_close(switched, expected_gradients())
    assert not any(np.asarray(x).any() for x in conditional)
    switched, conditional = run(1, *inputs)
    assert not np.asarray(switched[1]).any()
    assert_close(conditional, expected_gradients())


# ---- jax.checkpoint

SAVE_OUT_AND_LSE = jax.checkpoint_policies.save_only_these_names("flash_attention_out", "flash_attention_lse")


@pytest.mark.parametrize(
    ("policy", "forward_kernels"),
    [
        (None, 2),
        (jax.checkpoint_policies.nothing_saveable, 2),
        (SAVE_OUT_AND_LSE, 1),
        (jax.checkpoint_policies.everything_saveable, 1),
    ],
    ids=["none", "nothing", "out and lse", "everything"],
)
def test_checkpoint(policy: Any, forward_kernels: int):
    def block(query: Any, key: Any, value: Any) -> Any:
        return jnp.sin(attention(jnp.cos(query), key, value))

    checkpointed = jax.checkpoint(block, policy=policy)

    def derivatives(f: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2))

    jaxpr = jax.make_jaxpr(derivatives(checkpointed))(*arrays())
    assert primitives(jaxpr.jaxpr).count("flash_attention") == forward_kernels
    results = [jax.jit(derivatives(f), compiler_options=FAST)(*arrays()) for f in (checkpointed, block)]
    assert_close(*results)


def test_second_order_through_a_checkpoint():
    def hvp(f: Callable[..., Any]) -> Any:
        gradient = jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2))
        return jax.jit(lambda *x: jax.jvp(gradient, x, x)[1], compiler_options=FAST)(*arrays())

    assert_close(hvp(jax.checkpoint(attention, policy=SAVE_OUT_AND_LSE)), hvp(attention))


# ---- export, ahead of time, persistent cache


def round_trip(f: Callable[..., Any], *arguments: Any) -> jax.export.Exported:
    pytest.importorskip("flatbuffers", reason="jax.export needs it to serialise")
    return jax.export.deserialize(jax.export.export(jax.jit(f))(*arguments).serialize())


def test_export_through_bytes():
    exported = round_trip(attention, *arrays())
    assert_close(exported.call(*arrays()), expected_value())
    exported = round_trip(gradients, *arrays())
    assert_close(exported.call(*arrays()), expected_gradients())


def test_gradient_of_an_exported_function():
    pytest.importorskip("flatbuffers", reason="jax.export needs it to serialise")
    serialized = jax.export.export(jax.jit(attention))(*arrays()).serialize(vjp_order=1)
    exported = jax.export.deserialize(serialized)
    actual = jax.jit(jax.grad(lambda *x: jnp.sin(exported.call(*x)).sum(), (0, 1, 2)))(*arrays())
    assert_close(actual, expected_gradients())


def test_export_with_a_symbolic_batch():
    (batch,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in arrays()]
    for f, expected in ((attention, expected_value()), (gradients, expected_gradients())):
        assert_close(round_trip(f, *shapes).call(*arrays()), expected)


def test_export_with_a_symbolic_batch_of_packed_sequences():
    (batch,) = jax.export.symbolic_shape("b")
    rng = np.random.default_rng(0)
    query, key, value = arrays()
    ids = np.sort(rng.integers(-1, 3, (B, T)), axis=1).astype(np.int32)
    extras = {
        "query_segment_ids": ids,
        "key_value_segment_ids": ids,
        "query_positions": rng.permuted(np.tile(np.arange(T, dtype=np.int32), (B, 1)), axis=1),
        "key_value_positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    }
    sinks, offset = rng.standard_normal(N).astype(np.float32), np.array([3, -2], np.int32)

    def packed(query, key, value, extras, sinks):
        return flash_attention_with_lse(
            query, key, value, sinks=sinks, is_causal=True, logits_soft_cap=3.0, return_max_logits=True, **extras
        )

    def continued(query, key, value, offset, sinks):
        out, _ = flash_attention_with_lse(query, key, value, sinks=sinks, is_causal=True, query_offset=offset)
        return out

    def gradient(query, key, value, extras, sinks):
        return jax.grad(lambda *x: jnp.sin(packed(*x[:3], extras, x[3])[0]).sum(), (0, 1, 2, 3))(
            query, key, value, sinks
        )

    def types(x: Any, *, has_batch: bool = True) -> Any:
        return jax.tree.map(lambda y: jax.ShapeDtypeStruct((batch, *y.shape[1:]) if has_batch else y.shape, y.dtype), x)

    functions: list[tuple[Any, Any]] = [(packed, extras), (gradient, extras), (continued, offset)]
    for f, order in functions:
        given = query, key, value, order, sinks
        exported = round_trip(f, *types(given[:4]), types(sinks, has_batch=False))
        assert_close(exported.call(*given), jax.jit(f, compiler_options=FAST)(*given))


def test_export_with_a_symbolic_length():
    (length,) = jax.export.symbolic_shape("t")
    shapes = [jax.ShapeDtypeStruct((x.shape[0], length, *x.shape[2:]), x.dtype) for x in arrays()]
    with pytest.raises(NotImplementedError, match="query must have static axes but for the batch"):
        jax.export.export(jax.jit(attention))(*shapes)


def test_ahead_of_time_compilation():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays()]
    compiled = jax.jit(gradients).lower(*shapes).compile()
    assert_close(compiled(*arrays()), expected_gradients())


CACHE = """
import sys
import jax, jax.numpy as jnp
from jax_native_flash_attn import flash_attention

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
events = []
jax.monitoring.register_event_listener(lambda name, **unused: events.append(name))

@jax.jit
def gradient(x):
    return jax.grad(lambda x: flash_attention(x, x, x, is_causal=True).sum())(x)

gradient.lower(jax.ShapeDtypeStruct((1, 16, 2, 8), jnp.float32)).compile()
print(*(events.count("/jax/compilation_cache/" + kind) for kind in ("cache_hits", "cache_misses")))
"""


@pytest.mark.parametrize("devices", [1, 2])
def test_persistent_compilation_cache(devices: int, tmp_path: Path):
    def run() -> tuple[int, int]:
        process = subprocess.run(
            [sys.executable, "-c", CACHE, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            env=of_process(devices),
        )
        hits, misses = (int(n) for n in process.stdout.split())
        return hits, misses

    assert run() == (0, 1)
    assert run() == (1, 0)


# ---- debugging modes and configuration


@pytest.mark.parametrize("flag", ["jax_debug_nans", "jax_debug_infs"])
def test_debug_nans_and_infs(flag: str):
    # No NaN or infinity arises inside, even with masked rows and NaN in padding.
    query, key, value = arrays()
    lengths = np.array([T - 5, 3], np.int32)
    key[1, 3:] = value[1, 3:] = np.nan

    def masked(query: Any, key: Any, value: Any) -> Any:
        return jnp.sin(flash_attention(query, key, value, is_causal=True, key_value_seq_lengths=lengths, **BLOCKS))

    expected = jax.jit(masked)(query, key, value)
    jax.config.update(flag, True)
    try:
        assert_close(jax.jit(masked)(query, key, value), expected)
        assert_close(jax.jit(gradients)(*arrays()), expected_gradients())
        jax.jit(jax.grad(lambda *x: masked(*x).sum(), (0, 1, 2)))(query, key, value)
    finally:
        jax.config.update(flag, False)


def test_debug_nans_finds_a_nan_of_the_caller():
    query, key, value = arrays()
    query[0, 0] = np.nan
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.jit(attention)(query, key, value)


def test_disable_jit():
    inputs = tuple(arrays(T=9))

    def results() -> Any:
        return attention(*inputs), gradients(*inputs), jax.jvp(attention, inputs, inputs)[1]

    expected = jax.jit(results, compiler_options=FAST)()
    with jax.disable_jit():
        assert_close(results(), expected)


def test_float32_under_x64():
    with enable_x64():
        out = jax.jit(attention)(*arrays())
        derivatives = jax.jit(gradients)(*arrays())
        hvp = jax.jit(lambda *x: jax.jvp(gradients, x, x)[1])(*arrays())
    assert {x.dtype for x in (out, *derivatives, *hvp)} == {np.dtype(np.float32)}
    assert_close(out, expected_value())
    assert_close(derivatives, expected_gradients())


def test_default_matmul_precision():
    def text(**options: Any) -> str:
        return jax.jit(lambda *x: flash_attention(*x, **BLOCKS, **options)).lower(*arrays()).as_text()

    assert "HIGHEST" not in text()
    assert "HIGHEST" in text(precision="highest")
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in text()
        assert "HIGHEST" not in text(precision="default")
        assert_close(jax.jit(gradients)(*arrays()), expected_gradients())
    with jax.default_matmul_precision("tensorfloat32"):
        assert "HIGHEST" not in text()


def test_the_jaxpr_is_short():
    jaxpr = jax.make_jaxpr(attention)(*arrays())
    names = primitives(jaxpr.jaxpr)
    assert names.count("flash_attention") == 1
    assert len(jaxpr.jaxpr.eqns) <= 8
    assert len(str(jaxpr)) < 3000
    gradient = primitives(jax.make_jaxpr(gradients)(*arrays()).jaxpr)
    assert gradient.count("flash_attention") == 1
    assert gradient.count("flash_attention_linear_kernel") == 1


# ---- what grows with the sequence length


def shapes_of(T: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((1, T, heads, 32), jnp.float32) for heads in (2, 1, 1)]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"local_window_size": (100, 50)}], ids=str)
def test_programs_do_not_grow_with_the_sequence_length(options: dict[str, Any]):
    # So that tracing and compiling take no longer; a time would be no stable test.
    def value_and_gradient(*x: Any) -> Any:
        return jax.value_and_grad(lambda *x: flash_attention(*x, **options).sum(), (0, 1, 2))(*x)

    def program_size(T: int) -> int:
        return len(jax.jit(value_and_gradient).lower(*shapes_of(T)).as_text("hlo"))

    assert program_size(65536) <= 1.3 * program_size(2048)


SETTINGS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "lengths": {"key_value_seq_lengths": np.array([3000], np.int32)},
    "dropout": {"dropout_rate": 0.1},
    "bias (1,N,1,S)": {},
}


@pytest.mark.parametrize(
    ("setting", "mode"),
    [
        ("causal", "jvp"),
        ("causal", "hvp"),
        ("causal", "gradient of gradient"),
        ("lengths", "gradient of gradient"),
        ("dropout", "jvp"),
        ("dropout", "hvp"),
        ("bias (1,N,1,S)", "hvp"),
    ],
)
def test_temporary_memory_of_derivatives_is_linear(setting: str, mode: str):
    options = dict(SETTINGS[setting])

    def temporary_bytes(T: int) -> int:
        operands = shapes_of(T)
        if setting.startswith("bias"):
            operands.append(jax.ShapeDtypeStruct((1, 2, 1, T), jnp.float32))
        argnums = range(len(operands))

        def f(*x: Any) -> jax.Array:
            rng = jax.random.key(0) if "dropout_rate" in options else None
            return flash_attention(*x, **options, dropout_rng=rng)

        gradient = jax.grad(lambda *x: jnp.sin(f(*x)).sum(), argnums)
        transformed = {
            "jvp": lambda *x: jax.jvp(f, x, x),
            "hvp": lambda *x: jax.jvp(gradient, x, x)[1],
            "gradient of gradient": jax.grad(lambda *x: sum(g.sum() for g in gradient(*x)), argnums),
        }[mode]
        compiled: Any = jax.jit(transformed, compiler_options=FAST).lower(*operands).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(4096), temporary_bytes(16384)
    assert long <= 4.2 * short
    assert long < 16384**2  # bytes: an eighth of the dense weights


@pytest.mark.parametrize("kind", ["value", "jit", "gradient", "jvp"])
def test_checkify_finds_nan(kind: str):
    query, key, value = arrays()
    lengths = np.full(B, 20, np.int32)
    call = lambda *x: flash_attention(*x, is_causal=True, key_value_seq_lengths=lengths)  # noqa: E731
    function = {
        "value": call,
        "jit": jax.jit(call),
        "gradient": jax.grad(lambda *x: call(*x).sum(), (0, 1, 2)),
        "jvp": lambda *x: jax.jvp(call, x, x)[1],
    }[kind]
    checked = jax.jit(checkify.checkify(function, errors=checkify.nan_checks))
    checked(query, key, value)[0].throw()
    for position in range(3):
        poisoned = [x.copy() for x in (query, key, value)]
        poisoned[position][1, 3, 0, 0] = np.nan
        assert "nan" in str(checked(*poisoned)[0].get())
    # NaN in padding is harmless, and so no error.
    if kind in ("value", "jit"):
        key[:, 20:], value[:, 20:] = np.nan, np.nan
        checked(query, key, value)[0].throw()
