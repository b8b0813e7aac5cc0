"""Programs of attention of a sequence that is split over devices: collectives, steps, memory; processes; errors."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn import balanced_order, context_parallel_attention, context_parallel_attention_with_lse
from jax_native_flash_attn._kernels import select
from jax_native_flash_attn._kernels.xla.family import XlaKernels
from jax_native_flash_attn._sharding import collectives
from jax_native_flash_attn._sharding import passes as passes_module
from tests.sharding.test_meshes import assert_two_processes_agree
from tests.support.environment import DEVICE_COUNT, fast_compilation
from tests.support.grids import rotated, thinned
from tests.support.programs import collective_counts, collective_elements, largest_in_text, primitives

pytestmark = pytest.mark.skipif(jax.device_count() < DEVICE_COUNT, reason="needs eight devices")

FAST = fast_compilation()
ROWS = P(None, "s")
T, N, K, H = 32, 8, 4, 4


def make_mesh(devices: int = 4) -> Mesh:
    return jax.make_mesh((devices,), ("s",), axis_types=(AxisType.Auto,))


def arrays(length: int = T) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, length, heads, H)).astype(np.float32) for heads in (N, K, K)]


def attention(strategy: Any = "ring", devices: int = 4, **options: Any) -> Callable[..., Any]:
    """Of query, key, value, and arrays by name, of which those with two axes have one of tokens."""

    def split(query: Any, key: Any, value: Any, others: dict[str, Any] | None = None) -> jax.Array:
        others = others or {}
        f = functools.partial(context_parallel_attention, axis_name="s", strategy=strategy, **options)
        return jax.shard_map(
            lambda *x: f(*x[:3], **x[3]),
            mesh=make_mesh(devices),
            in_specs=(ROWS,) * 3 + ({name: ROWS if np.ndim(x) == 2 else P() for name, x in others.items()},),
            out_specs=ROWS,
        )(query, key, value, others)

    return split


def gradient(f: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2))


def compiled(f: Callable[..., Any], *x: Any, devices: int = 4) -> Any:
    sharding = NamedSharding(make_mesh(devices), ROWS)
    types = [jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=sharding) for y in x[:3]]
    return jax.jit(f, compiler_options=FAST).lower(*types, *x[3:]).compile()


# ---- collectives

IDS = {name: np.zeros((1, T), np.int32) for name in ("query_segment_ids", "key_value_segment_ids")}
POSITIONS = {name: np.arange(T, dtype=np.int32)[None] for name in ("query_positions", "key_value_positions")}
# By strategy: of a plain call, of its gradient too, and of ids or positions.
COLLECTIVES = {
    "ring": ({"collective-permute"}, set(), {"all-gather"}),
    "all_to_all": ({"all-to-all"}, set(), {"all-gather"}),
    "all_gather": ({"all-gather"}, {"reduce-scatter"}, {"all-gather"}),
}


@pytest.mark.parametrize(
    ("strategy", "others"),
    [*((x, "nothing") for x in COLLECTIVES), *thinned(rotated(COLLECTIVES, ["ids", "positions"]), 2)],
)
def test_collectives(strategy: str, others: str) -> None:
    value, of_gradient, of_others = COLLECTIVES[strategy]
    given = {"nothing": {}, "ids": IDS, "positions": POSITIONS}[others]
    f, expected = attention(strategy, is_causal=True), value | (of_others if given else set())
    assert set(collective_counts(compiled(f, *arrays(), given).as_text())) == expected
    assert set(collective_counts(compiled(gradient(f), *arrays(), given).as_text())) == expected | of_gradient


@pytest.mark.parametrize("are_together", [True, False])
def test_order_of_gradients_and_transfers(are_together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of key and value travel unrounded, and rounded home: meanwhile, and not before, a device makes those of its
    own block, or the last others."""
    events: list[tuple] = []
    held: list[Any] = []
    make, shift, barrier = select.cotangent, collectives.shift, lax.optimization_barrier

    def made(call: Any, given: Any, target: Any) -> Any:
        events.append(("made", *sorted(given.wanted), *(["held"] if any(given.lse is x for x in held) else [])))
        return make(call, given, target)

    def sent(tree: Any, ring: Any, hop: int) -> Any:
        events.append(("sent", *{str(x.dtype) for x in jax.tree.leaves(tree)}, hop))
        return shift(tree, ring, hop)

    def barred(operands: Any) -> Any:
        results = barrier(operands)
        held.extend(jax.tree.leaves(results))
        return results

    monkeypatch.setattr(XlaKernels, "makes_gradients_together", lambda *_: are_together)
    monkeypatch.setattr(select, "cotangent", made)
    monkeypatch.setattr(passes_module, "shift", sent)
    monkeypatch.setattr(lax, "optimization_barrier", barred)
    jax.jit(gradient(attention())).lower(*(jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in arrays()))

    every, step, home = ("made", "key", "query", "value"), ("sent", "float32", 1), ("sent", "bfloat16", -3)
    if are_together:
        assert events == [every, every, step, every, step, home, (*every, "held")]
    else:
        assert events == [every, every, every, step, ("made", "key", "value"), step, home, ("made", "query", "held")]


@pytest.mark.parametrize(
    ("options", "steps", "keys"),
    [
        ({}, 3, 24),
        ({"is_causal": True}, 3, 24),
        ({"is_causal": True, "local_window_size": (0, 0)}, 0, 0),
        ({"is_causal": True, "local_window_size": (1, 0)}, 1, 1),
        ({"is_causal": True, "local_window_size": (8, 0)}, 1, 8),
        ({"is_causal": True, "local_window_size": (9, 0)}, 2, 9),
        ({"is_causal": True, "local_window_size": (17, 0)}, 3, 17),
        ({"is_causal": True, "local_window_size": (24, 0)}, 3, 24),
        # The next device's keys, which are those of three places before.
        ({"local_window_size": (1, 1)}, 2, 16),
        ({"local_window_size": (1, 1), "order": "balanced"}, 2, 16),
    ],
    ids=str,
)
def test_keys_that_no_row_attends_are_not_sent(options: dict[str, Any], steps: int, keys: int) -> None:
    f = attention(**options)
    text = compiled(f, *arrays()).as_text()
    assert collective_counts(text).get("collective-permute", 0) == steps
    assert collective_elements(text).get("collective-permute", 0) == keys * 2 * K * H


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"is_causal": True, "local_window_size": (0, 0)}, 0),
        ({"is_causal": True, "local_window_size": (9, 0)}, 2),
        ({"local_window_size": (1, 1), "order": "balanced"}, 2),
    ],
    ids=str,
)
def test_keys_that_no_row_attends_are_not_sent_for_gradients(options: dict[str, Any], steps: int) -> None:
    """Blocks travel again, but for those that XLA has kept, and gradients of key and value behind them, and home."""
    found = collective_counts(compiled(gradient(attention(**options)), *arrays()).as_text())
    assert 2 * steps <= found.get("collective-permute", 0) <= 3 * steps


_UNSEEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({"is_causal": True}, {}),
    "window": ({"local_window_size": (40, 7)}, {}),
    "traced window": ({}, {"local_window_size": np.array([40, 3], np.int32)}),
    "lengths": ({}, {"key_value_seq_lengths": np.array([17], np.int32)}),
    "offset": ({"is_causal": True}, {"query_offset": np.array([1], np.int32)}),
    "ids": ({}, {name: np.repeat(np.arange(2, dtype=np.int32), 16)[None] for name in IDS}),
}


@pytest.mark.parametrize("name", _UNSEEN)
def test_blocks_that_no_row_attends_are_not_computed(name: str) -> None:
    """What is not read may be NaN: the last quarter of the keys, which rows of the first half do not attend."""
    options, others = _UNSEEN[name]
    query, key, value = arrays()
    f = jax.jit(attention(**options, block_q=4, block_kv=4), compiler_options=FAST)
    expected = f(query, key, value, others)
    value[:, 3 * T // 4 :] = np.nan
    np.testing.assert_array_equal(f(query, key, value, others)[:, : T // 2], expected[:, : T // 2])


def test_more_devices_take_no_more_text() -> None:
    def operations(devices: int) -> list[int]:
        f, x = attention(devices=devices, is_causal=True), arrays(8 * devices)
        return [len(jax.jit(g).lower(*x).as_text().splitlines()) for g in (f, gradient(f))]

    np.testing.assert_allclose(operations(5), operations(8), atol=3)  # older JAX shares a function or two less


def test_a_policy_that_saves_results_does_not_go_around_again() -> None:
    def derivative(policy: Any) -> Any:
        f = attention(is_causal=True)
        return gradient(jax.checkpoint(lambda q, k, v: jnp.sin(f(jnp.cos(q), k, v)), policy=policy))

    saved = jax.checkpoint_policies.save_only_these_names("flash_attention_out", "flash_attention_lse")
    for policy, passes in ((saved, 1), (None, 2)):
        jaxpr = jax.make_jaxpr(derivative(policy))(*arrays()).jaxpr
        assert primitives(jaxpr).count("flash_attention") == passes
    results = [jax.jit(derivative(policy), compiler_options=FAST)(*arrays()) for policy in (saved, None)]
    for a, e in zip(*results, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


# In arrays of the size of a device's query: of the value, and of the gradient. None: not a part, as keys are gathered.
_PARTS = {"ring": (12, 24), "all_to_all": (5.5, 9), "all_gather": None}


@pytest.mark.parametrize(
    ("strategy", "devices", "of_gradient"), thinned(itertools.product(_PARTS, (2, 4, 8), (False, True)), 5)
)
def test_memory_of_a_device_is_its_part(strategy: str, devices: int, of_gradient: bool) -> None:
    length, heads, width = 16384, 8, 32
    types = [jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32)] * 3
    parts = _PARTS[strategy]
    f = attention(strategy, devices, is_causal=True, block_q=32, block_kv=32)
    program = compiled(gradient(f) if of_gradient else f, *types, devices=devices)
    part = length // devices * heads * width
    largest = (2 if strategy == "ring" else 1) * part if parts else length * heads * width
    assert largest_in_text(program.as_text())[0] <= largest
    if parts:
        assert program.memory_analysis().temp_size_in_bytes <= parts[of_gradient] * 4 * part


# ---- processes

WORKER = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[1]))
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_native_flash_attn import balanced_order, context_parallel_attention, flash_attention

mesh = jax.make_mesh((4,), ("s",), axis_types=(AxisType.Auto,))
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
rng = np.random.default_rng(0)
inputs = [rng.standard_normal((2, 32, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]
rows, order = P(None, "s"), balanced_order(32, 4)
positions = jnp.broadcast_to(order, (2, 32))
options = dict(is_causal=True, dropout_rate=0.2, dropout_rng=jax.random.key(3))

def run(f):
    return jax.jit(lambda *x: (f(*x), *jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2))(*x)))

def split(*x):
    local = lambda *x: context_parallel_attention(*x, axis_name="s", strategy=sys.argv[3], order="balanced", **options)
    return jax.shard_map(local, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows)(*x)

def whole(*x):
    return flash_attention(*x, query_positions=positions, key_value_positions=positions, **options)

sharding = NamedSharding(mesh, rows)
results = run(split)(*(jax.make_array_from_callback(x.shape, sharding, lambda i, x=x: x[i]) for x in inputs))
expected = run(whole)(*(jax.device_put(x, jax.local_devices()[0]) for x in inputs))
for a, e in zip(results, expected, strict=True):
    e = np.asarray(e)
    for shard in a.addressable_shards:
        assert shard.data.size == e.size // 4
        np.testing.assert_allclose(np.asarray(shard.data), e[shard.index], rtol=0, atol=2e-5 * max(1, abs(e).max()))
print("agrees")
"""


@pytest.mark.parametrize("strategy", thinned(COLLECTIVES, 3))
def test_two_processes_agree_with_one(strategy: str) -> None:
    assert_two_processes_agree(WORKER, strategy)


# ---- errors

_X = {"query": (2, 4, 4, 3), "key": (2, 6, 2, 3), "value": (2, 6, 2, 3)}
_POSITIONS = np.zeros((2, 4), np.int32)
# Of shapes on each of four devices.
_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "order": ({"order": "zig-zag"}, r"order must be None or 'balanced', .* got 'zig-zag'"),
    "strategy": (
        {"strategy": "ulysses"},
        r"strategy must be one of \(None, 'ring', 'all_to_all', 'all_gather'\), got 'ulysses'",
    ),
    "axis": ({"axis_name": "t"}, r"axis_name must be a mesh axis of the jax.shard_map around this call, got 't'"),
    "axes": ({"axis_name": ("s", "t")}, r"axis_name must be a mesh axis .* got \('s', 't'\)"),
    "positions": (
        {"order": "balanced", "query_positions": _POSITIONS},
        r"order='balanced' says where tokens stand, got query_positions beside it: leave one of them out",
    ),
    "positions of keys": (
        {"order": "balanced", "key_value_positions": np.zeros((2, 6), np.int32)},
        r"got key_value_positions beside it",
    ),
    "odd rows": (
        {"order": "balanced", "query": (2, 3, 4, 3)},
        r"order='balanced' needs two equal parts on each device, got 3 query rows and 6 keys",
    ),
    "odd keys": ({"order": "balanced", "key": (2, 5, 2, 3), "value": (2, 5, 2, 3)}, r"got 4 query rows and 5 keys"),
    "lengths of keys": (
        {"order": "balanced", "key_value_seq_lengths": np.ones(2, np.int32)},
        r"key_value_seq_lengths cannot say in order='balanced' which tokens are padding, .* give padding a negative id",
    ),
    "lengths": ({"order": "balanced", "query_seq_lengths": np.ones(2, np.int32)}, r"query_seq_lengths cannot say in"),
    "mask of part": (
        {"mask": np.ones((2, 1, 4, 6), bool)},
        r"mask must have all keys beside the rows of a device, \(B, N, 4, 24\), or all rows beside its keys, "
        r"\(B, N, 16, 6\), got \(2, 1, 4, 6\): leave one of its last two axes unsharded",
    ),
    "bias of part": ({"bias": np.ones((1, 4, 4, 6), np.float32)}, r"bias must have all keys .* got \(1, 4, 4, 6\)"),
    "bias of one key": (
        {"bias": np.ones((4, 16, 1), np.float32), "key": (2, 1, 2, 3), "value": (2, 1, 2, 3)},
        r"bias must have the keys of all devices where each has one, got \(1, 4, 16, 1\)",
    ),
    "heads": (
        {"strategy": "all_to_all", "query": (2, 4, 6, 3)},
        r"strategy='all_to_all' gives each of the 4 devices equally many heads, got 6 query heads and 2 key/value heads"
        r": take strategy='ring'",
    ),
    "key heads": (
        {"strategy": "all_to_all", "query": (2, 4, 12, 3), "key": (2, 6, 6, 3), "value": (2, 6, 6, 3)},
        r"got 12 query heads and 6 key/value heads",
    ),
    "ids of one side": ({"query_segment_ids": _POSITIONS}, r"query_segment_ids need key_value_segment_ids"),
}


@pytest.mark.parametrize("f", [context_parallel_attention, context_parallel_attention_with_lse])
@pytest.mark.parametrize("name", _ERRORS)
def test_errors(name: str, f: Callable[..., Any]) -> None:
    changes, message = _ERRORS[name]
    call = {"axis_name": "s", **_X, **changes}
    call = {name: np.ones(x, np.float32) if name in _X else x for name, x in call.items()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(jax.shard_map(lambda: f(**call), mesh=make_mesh(), in_specs=(), out_specs=P(), check_vma=False))


@pytest.mark.parametrize("f", [context_parallel_attention, context_parallel_attention_with_lse])
def test_outside_of_shard_map_and_unknown_arguments(f: Callable[..., Any]) -> None:
    x = arrays()
    with pytest.raises(
        ValueError, match=r"axis_name must be a mesh axis of the jax.shard_map around this call, got 's'"
    ):
        f(*x, axis_name="s")
    with pytest.raises(TypeError, match=rf"{f.__name__}\(\) got an unexpected keyword argument 'is_casual'"):
        f(*x, axis_name="s", is_casual=True)


@pytest.mark.parametrize(("length", "devices"), [(12, 4), (15, 2)])
def test_balanced_order_of_other_lengths(length: int, devices: int) -> None:
    with pytest.raises(ValueError, match=rf"length must be a multiple of 2 \* devices = {2 * devices}, got {length}"):
        balanced_order(length, devices)


def test_balanced_order_of_no_numbers() -> None:
    with pytest.raises(ValueError, match="devices must be at least 1, got 0"):
        balanced_order(8, 0)
    with pytest.raises(ValueError, match="length must be at least 1, got -8"):
        balanced_order(-8, 2)
    with pytest.raises(TypeError, match="length must be an int, got '16'"):
        balanced_order("16", 2)  # pyright: ignore[reportArgumentType]


def test_balanced_order() -> None:
    np.testing.assert_array_equal(balanced_order(8, 2), [0, 1, 6, 7, 2, 3, 4, 5])
    assert balanced_order(8, 2).dtype == np.int32
    x = np.arange(48)
    np.testing.assert_array_equal(x[balanced_order(48, 3)][balanced_order(48, 3, inverse=True)], x)
    # Each device has equally many pairs of a causal mask.
    rows = balanced_order(48, 3).reshape(3, -1)
    assert len(set((rows + 1).sum(1))) == 1
