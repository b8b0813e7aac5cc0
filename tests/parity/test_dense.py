"""`implementation='dense'`: the semantics of all others, in JAX's own functions, differentiated by JAX."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn import context_parallel_attention, explain, flash_attention, flash_attention_with_lse
from tests.support.cases import FAST_COMPILATION, Case, check_case
from tests.support.environment import enable_x64
from tests.support.oracle import float64_oracle
from tests.support.programs import collective_elements

with_lse: Any = flash_attention_with_lse
dense = functools.partial(with_lse, implementation="dense")

# Each argument, and rows without a key, in few compilations.
SHAPE = (2, 13, 19, 2, 2, 8)
CASES = {
    "by index": Case(
        SHAPE,
        is_causal=True,
        local_window_size=(9, 3),
        query_offset=(4, -5),
        query_seq_lengths=(11, 13),
        key_value_seq_lengths=(19, 12),
        poison=True,
        bias=(False, True, True, True),
        mask=(True, True, False, True),
        scale=0.3,
        dropout_rate=0.2,
        value_dim=5,
        traced=frozenset({"window", "offset", "lengths", "scale"}),
        with_lse=True,
    ),
    "ids, positions, sinks": Case(
        SHAPE,
        segment_ids="padding between",
        query_positions="permuted",
        key_value_positions="zig-zag",
        is_causal=True,
        local_window_size=(9, 0),
        logits_soft_cap=1.5,
        magnitude=3.0,
        sinks="float32",
        bias=(True, True, True, False),
        traced=frozenset({"ids", "positions"}),
        with_lse=True,
    ),
    "float64": Case(SHAPE, "float64", segment_ids="shuffled", logits_soft_cap=0.8, bias=(True, True, True, True)),
    "bfloat16": Case(SHAPE, "bfloat16", local_window_size=(2, -1), query_offset=-3, with_lse=True),
    "float16": Case(
        SHAPE, "float16", dropout_rate=0.3, broadcast_dropout=True, vmapped=True, mask=(True, True, True, True)
    ),
}

B, T, N, K, H = 2, 8, 4, 2, 8
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.standard_normal((B, T, n, H)).astype(np.float32) for n in (N, K, K))
IDS = np.array([[0, 0, 0, 1, 1, 2, -1, -1]] * B, np.int32)


def run(function: Any, **options: Any) -> Any:
    return jax.jit(functools.partial(function, **options), compiler_options=FAST_COMPILATION)(QUERY, KEY, VALUE)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_lse_and_gradients(case: Case):
    function = with_lse if case.with_lse else flash_attention
    check_case(case, functools.partial(function, implementation="dense"), FAST_COMPILATION)


# ---- what converters and quantisers see

# What ONNX and the like have. `stop_gradient` is of the largest logit.
PLAIN = """
    add and broadcast_in_dim concatenate convert_element_type div dot_general eq exp ge gt iota is_finite le log lt max
    min mul ne neg not or reduce_max reduce_or reduce_sum reshape select_n slice squeeze stack stop_gradient sub tanh
    transpose
"""
OF_DROPOUT = "random_unwrap shift_left shift_right_logical xor"
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masks by index": {
        "is_causal": True,
        "local_window_size": (3, 0),
        "query_offset": jnp.array([1, 2]),
        "query_seq_lengths": jnp.array([3, 8]),
        "key_value_seq_lengths": jnp.array([8, 0]),
        "mask": RNG.random((B, N, T, T)) < 0.5,
    },
    "ids, positions, bias, cap, sinks": {
        "is_causal": True,
        "query_segment_ids": IDS,
        "key_value_segment_ids": IDS,
        "query_positions": IDS,
        "bias": np.ones((N, T, T), np.float32),
        "logits_soft_cap": 5.0,
        "sinks": np.ones(N, np.float32),
    },
    "dropout": {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)},
}


def equations(jaxpr: Any) -> Iterator[Any]:
    """With those of the functions that JAX's own jit: `jnp.where` and `jnp.clip`."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit"):
            assert eqn.params["name"] in ("_where", "clip"), eqn.params["name"]
            yield from equations(eqn.params["jaxpr"].jaxpr)
        else:
            yield eqn


@pytest.mark.parametrize("name", CALLS)
def test_programs_hold_plain_operations_alone(name: str):
    # Of NumPy arrays a program copies first, in some versions.
    options = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in CALLS[name].items()}
    program = jax.make_jaxpr(functools.partial(dense, **options))(QUERY, KEY, VALUE)
    found = [eqn.primitive.name for eqn in equations(program.jaxpr)]
    assert set(found) <= {*PLAIN.split(), *(OF_DROPOUT.split() if name == "dropout" else [])}
    assert found.count("dot_general") == 2


def test_products_go_through_the_functions_that_quantisers_replace(monkeypatch: pytest.MonkeyPatch):
    """qwix and the like put their own in the place of `jax.numpy.einsum`."""
    seen: list[str] = []
    einsum = jnp.einsum
    monkeypatch.setattr(jnp, "einsum", lambda *args, **kwargs: (seen.append(args[0]), einsum(*args, **kwargs))[1])
    jax.eval_shape(dense, QUERY, KEY, VALUE)
    assert seen == ["btkgh,bskh->bkgts", "bkgts,bskd->btkgd"]


# ---- derivatives and sharding are JAX's


def test_second_derivatives_by_both_modes():
    options: dict[str, Any] = {"is_causal": True, "query_segment_ids": IDS, "key_value_segment_ids": IDS}

    def second(f: Any) -> Any:
        def loss(*x: Any) -> jax.Array:
            out, lse = f(*x, **options)
            return jnp.sin(out).sum() + jnp.where(lse > -1e30, jnp.cos(lse), 0).sum()

        x = tuple(jnp.asarray(a, jnp.float64) for a in (QUERY, KEY, VALUE))
        derivative = functools.partial(jax.jvp, jax.grad(loss, (0, 1, 2)), x, tuple(jnp.cos(a) for a in x))
        return jax.jit(lambda: derivative()[1], compiler_options=FAST_COMPILATION)()

    with enable_x64(True):
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-9, 1e-9), second(dense), second(float64_oracle))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_batch_rows_and_heads_shard_without_gathering(kind: AxisType):
    mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        shards = [jax.device_put(x, NamedSharding(mesh, P("b", None, "h"))) for x in (QUERY, KEY, VALUE)]
        program = jax.jit(functools.partial(dense, is_causal=True)).lower(*shards).compile()
        out, lse = program(*shards)
    expected = run(dense, is_causal=True)
    assert not collective_elements(program.as_text())
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)


def test_a_split_sequence_is_gathered():
    dropout: dict[str, Any] = {"dropout_rate": 0.3, "dropout_rng": jax.random.key(0)}
    mesh = jax.make_mesh((2,), ("s",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def attention(strategy: Any) -> Any:
        options: Any = {"axis_name": "s", "implementation": "dense", "strategy": strategy, "is_causal": True}
        call = functools.partial(context_parallel_attention, **options, **dropout)
        return jax.shard_map(call, mesh=mesh, in_specs=P(None, "s"), out_specs=P(None, "s"))

    expected, _ = run(dense, is_causal=True, **dropout)
    np.testing.assert_allclose(run(attention("all_gather")), expected, atol=1e-5)
    with pytest.raises(NotImplementedError, match=r"'dense' has no ring, .* over 's': take strategy='all_gather'"):
        run(attention("ring"))


# ---- `explain`


def test_it_is_explained():
    x = [jax.ShapeDtypeStruct((2, 256, n, 64), jnp.bfloat16) for n in (4, 2, 2)]
    found = explain(*x, implementation="dense", compiles=True)
    scores = 4 * 2 * 4 * 256 * 256
    assert {found.forward.family, found.gradient.family, found.tangent.family} == {"dense"}
    assert found.forward.reasons["pure_jax"] == "implementation='dense' was asked for"
    assert "2 x 4 x 256 x 256 in float32: 2.0 MiB" in str(found)
    assert found.temporary_bytes is not None
    assert found.temporary_bytes["gradient"] > found.temporary_bytes["forward"] >= scores
