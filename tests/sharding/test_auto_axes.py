"""Programs over several devices under plain `jit`: whatever jax.nn's can do, ours can.

Each test runs the same program with `jax.nn.dot_product_attention` and with `flash_attention`.
"""

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import serialize_executable
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn import flash_attention
from tests.support.environment import DEVICE_COUNT, fast_compilation, lenient_promotion, of_process
from tests.support.grids import in_part, thinned
from tests.support.programs import collective_elements
from tests.support.targets import pretend_whole_kernels

pytestmark = pytest.mark.skipif(jax.device_count() < DEVICE_COUNT, reason="needs eight devices")

B, T, FEATURES = 2, 24, 16
FAST = fast_compilation()
OLD_JAX = jax.__version_info__ < (0, 10)
# Several tiles, so that a collective of a tile would be one in a loop.
ATTENTIONS: dict[str, Callable[..., jax.Array]] = {
    "jax.nn": jax.nn.dot_product_attention,
    "ours": functools.partial(flash_attention, block_q=8, block_kv=8),
}


@pytest.fixture(autouse=True)
def _lenient():
    with lenient_promotion():
        yield


def auto_mesh(*shape: int) -> Any:
    return jax.make_mesh(shape, ("x", "y")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def close(actual: Any, expected: Any) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=2e-5 * max(1.0, float(np.abs(e).max())))


# ---- a fused projection, sharded over tensor-parallel devices


def transformed(f: Callable[..., jax.Array]) -> dict[str, Callable[..., Any]]:
    gradient = jax.grad(lambda *x: jnp.sin(f(*x)).sum())
    return {
        "value": f,
        "grad": gradient,
        "jvp": lambda w, x: jax.jvp(lambda w: f(w, x), (w,), (w,))[1],
        "hvp": lambda w, x: jax.jvp(lambda w: gradient(w, x), (w,), (w,))[1],
    }


def projected(attention: Callable[..., jax.Array], N: int, K: int, H: int) -> Callable[..., jax.Array]:
    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        parts = jnp.split(x @ w, [N * H, (N + K) * H], -1)
        return attention(*(z.reshape(B, T, -1, H) for z in parts), is_causal=True)

    return f


# Heads fewer than devices, as many, more, grouped, and so that a shard begins inside a head.
PROJECTIONS = {
    "4 heads on 8": (4, 4, 8, (8,), P(None, "x")),
    "8 heads on 8": (8, 8, 8, (8,), P(None, "x")),
    "12 heads on 8": (12, 12, 4, (8,), P(None, "x")),
    "16/2 heads on 8": (16, 2, 4, (8,), P(None, "x")),
    "8/2 heads on 4 x 2": (8, 2, 8, (4, 2), P("y", "x")),
}


@pytest.mark.parametrize(
    ("as_units", "transformation", "projection"),
    thinned(
        (
            (as_units, name, projection)
            for projection in PROJECTIONS
            for as_units, name in [
                *((False, name) for name in ("value", "grad", "jvp", "hvp")),
                (True, "grad"),
                (True, "hvp"),
            ]
        ),
        every=7,
    ),
)
def test_fused_projection(
    projection: str, transformation: str, as_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    N, K, H, mesh_shape, spec = PROJECTIONS[projection]
    rng = np.random.default_rng(0)
    w = rng.standard_normal((FEATURES, (N + 2 * K) * H)).astype(np.float32) / 4
    x = rng.standard_normal((B, T, FEATURES)).astype(np.float32)
    mesh = auto_mesh(*mesh_shape)
    if as_units:
        pretend_whole_kernels(monkeypatch)
    found, results = {}, {}
    for name, attention in ATTENTIONS.items():
        f = transformed(projected(attention, N, K, H))[transformation]
        shardings = NamedSharding(mesh, spec), NamedSharding(mesh, P())
        compiled = jax.jit(f, in_shardings=shardings, compiler_options=FAST).lower(w, x).compile()
        results[name] = compiled(w, x)
        found[name] = collective_elements(compiled.as_text())
    close(results["ours"], results["jax.nn"])
    ours, reference = found["ours"], found["jax.nn"]
    assert "loop" not in ours
    if not as_units:
        # Where heads are cut, jax.nn sums the logits of their parts; ours gathers the parts, which is linear in T.
        assert ours.keys() - reference.keys() <= {"all-gather"}
        if N >= DEVICE_COUNT:
            assert sum(ours.values()) <= sum(reference.values())


def test_a_batch_of_fewer_rows_than_devices() -> None:
    mesh = auto_mesh(8)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, T, 2, 8)).astype(np.float32)
    f = jax.grad(lambda x: jnp.sin(flash_attention(*(x.reshape(2, 8 * T, 2, 8),) * 3, is_causal=True)).sum())
    close(jax.jit(f, in_shardings=NamedSharding(mesh, P("x")))(x), jax.jit(f)(x))


# ---- what a program can become


def sharded_types(mesh: Any, spec: P) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((4, T, 2, 8), jnp.float32, sharding=NamedSharding(mesh, spec))] * 3


def value_and_gradients(attention: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda *x: jax.value_and_grad(lambda *x: jnp.sin(attention(*x, is_causal=True)).sum(), (0, 1, 2))(*x)


def inputs() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((4, T, 2, 8)).astype(np.float32) for _ in range(3)]


@functools.cache
def expected(attention: str) -> Any:
    return jax.jit(value_and_gradients(ATTENTIONS[attention]))(*inputs())


SPECS = [P("x", None, "y"), P()]
_EACH = [pytest.param("jax.nn", marks=in_part(1)), "ours"]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("attention", _EACH)
def test_export_over_devices(attention: str, spec: P) -> None:
    mesh = auto_mesh(4, 2)
    types, f = sharded_types(mesh, spec), value_and_gradients(ATTENTIONS[attention])
    shardings = tuple(x.sharding for x in types)
    for platforms in (["cpu"], ["cpu", "cuda", "tpu"]):
        exported = export.export(jax.jit(f, in_shardings=shardings), platforms=platforms)(*types)
        restored = export.deserialize(exported.serialize())
        close(jax.jit(restored.call, in_shardings=shardings)(*inputs()), expected(attention))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("attention", _EACH)
def test_compiled_programs_are_saved(attention: str, spec: P) -> None:
    types, f = sharded_types(auto_mesh(4, 2), spec), value_and_gradients(ATTENTIONS[attention])
    compiled = jax.jit(f).lower(*types).compile()
    restored = serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
    placed = [jax.device_put(x, like.sharding) for x, like in zip(inputs(), types, strict=True)]
    close(restored(*placed), compiled(*placed))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_lowering_without_devices(attention: str, platform: str) -> None:
    mesh = AbstractMesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    types, f = sharded_types(mesh, P("x", None, "y")), value_and_gradients(ATTENTIONS[attention])
    text = jax.jit(f).trace(*types).lower(lowering_platforms=(platform,)).as_text()
    assert "CustomSPMDPartitioning" not in text


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("attention", _EACH)
def test_the_older_partitioner(attention: str, spec: P) -> None:
    types, f = sharded_types(auto_mesh(4, 2), spec), value_and_gradients(ATTENTIONS[attention])
    wanted = expected(attention)
    before: bool = jax.config.jax_use_shardy_partitioner  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        compiled = jax.jit(f).lower(*types).compile()
        placed = [jax.device_put(x, like.sharding) for x, like in zip(inputs(), types, strict=True)]
        close(compiled(*placed), wanted)
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)


CACHED = """
import sys, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax_native_flash_attn import flash_attention
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
events = []
jax.monitoring.register_event_listener(lambda name, **unused: events.append(name))
mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
x = jax.ShapeDtypeStruct((4, 8, 4, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x", None, "y")))
jax.jit(jax.grad(lambda x: flash_attention(x, x, x).sum())).lower(x).compile()
print(events.count("/jax/compilation_cache/cache_hits"))
"""


@in_part(1)
def test_a_second_process_finds_the_program_in_the_cache(tmp_path: Any) -> None:
    environment = of_process(8)
    hits = [
        int(subprocess.check_output([sys.executable, "-c", CACHED, str(tmp_path)], env=environment)) for _ in range(2)
    ]
    assert hits == [0, 1]
