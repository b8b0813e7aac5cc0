"""equinox.nn.MultiheadAttention with flash_attention, against Equinox' own."""

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("equinox", reason="equinox is not installed")

import equinox as eqx

from jax_native_flash_attn.adapters.equinox import MultiheadAttention
from tests.adapters.comparison import assert_close, compiled
from tests.support.environment import lenient_promotion

B, T, S, HEADS = 2, 9, 7, 3
SIZES: dict[str, Any] = {
    "num_heads": HEADS,
    "query_size": 6,
    "key_size": 5,
    "value_size": 4,
    "output_size": 8,
    "qk_size": 4,
    "vo_size": 3,
    "use_query_bias": True,
    "use_output_bias": True,
}


@pytest.fixture(autouse=True)
def equinox_promotion():
    """Equinox mixes dtypes in its own layers."""
    with lenient_promotion():
        yield


def inputs() -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, T, 6), (B, S, 5), (B, S, 4)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def layers(**options: Any) -> tuple[eqx.nn.MultiheadAttention, MultiheadAttention]:
    """Equinox' own, and ours from it."""
    layer = eqx.nn.MultiheadAttention(**SIZES, **options, key=jax.random.key(1))
    return layer, MultiheadAttention.from_layer(layer)


def results(layer: Any, *, with_rngs: bool = False, **options: Any) -> Any:
    """Output, and gradients of parameters and inputs, over a batch."""
    rngs = jax.random.split(jax.random.key(2), B) if with_rngs else None

    def loss(layer: Any, arrays: Any) -> Any:
        call = lambda rng, *arrays: layer(*arrays, key=rng, **options)  # noqa: E731
        out = jax.vmap(call, (0 if with_rngs else None, 0, 0, 0))(rngs, *arrays)
        return (out**2).sum(), out

    parameters, rest = eqx.partition((layer, inputs()), eqx.is_inexact_array)
    gradients, out = compiled(jax.grad(lambda p: loss(*eqx.combine(p, rest)), has_aux=True))(parameters)
    return out, gradients


CAUSAL = np.tril(np.ones((T, S), bool))
# Of each head, with a row without keys.
HOLES = np.random.default_rng(0).random((HEADS, T, S)) > 0.3
HOLES[1, 3] = False


def test_dropout():
    theirs, ours = layers(dropout_p=0.4)
    expected = results(theirs, mask=HOLES, with_rngs=True)
    assert_close(results(ours, mask=HOLES.astype(np.int32), with_rngs=True), expected)


def test_dropout_with_one_mask_for_all_heads():
    _, layer = layers(dropout_p=0.4)
    arrays = [x[0] for x in inputs()]
    out = eqx.filter_eval_shape(layer, *arrays, HOLES[:1], key=jax.random.key(0))  # as of HOLES[0]
    assert out.shape == eqx.filter_eval_shape(layer, *arrays, HOLES[0], key=jax.random.key(0)).shape


def test_evaluation():
    def process_heads(query: Any, key: Any, value: Any) -> Any:
        return 2 * query, key + 1, -value

    theirs, ours = layers(dropout_p=0.4)
    expected = results(theirs, mask=HOLES[0] & CAUSAL, inference=True, process_heads=process_heads)
    options = {"mask": HOLES[0], "is_causal": True, "process_heads": process_heads}
    assert_close(results(eqx.nn.inference_mode(ours), **options), expected)


def test_parameters_are_those_of_equinox():
    theirs, ours = layers(dropout_p=0.4, inference=True)
    assert type(ours) is MultiheadAttention
    assert jax.tree.leaves(ours) == jax.tree.leaves(theirs)  # the arrays themselves, and the rate
    assert str(ours) == str(theirs)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, theirs)
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, MultiheadAttention(**SIZES, dropout_p=0.4, key=jax.random.key(3)))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(loaded), jax.tree.leaves(theirs))


def test_refusals():
    _, layer = layers(dropout_p=0.4)
    arrays = [x[0] for x in inputs()]
    with pytest.raises(ValueError, match="key must be a PRNG key if weights are dropped, got None: or pass inference"):
        layer(*arrays)
    with pytest.raises(NotImplementedError, match="bias must be None while weights are dropped"):
        layer(*arrays, key=jax.random.key(0), bias=jnp.zeros((T, S)))
    with pytest.raises(TypeError, match=r"dropout_rate must be left out .* dropout\.p = 0\.4 and key: .* inference"):
        layer(*arrays, key=jax.random.key(0), dropout_rate=0.1)
    with pytest.raises(ValueError, match=r"key_ must have shape \(length, features\), got .*: take jax.vmap of more"):
        layer(arrays[0], arrays[1][None], arrays[2], key=jax.random.key(0))
    with pytest.raises(ValueError, match="process_heads must keep the shapes"):
        layer(*arrays, process_heads=lambda query, key, value: (query, key, value[..., :1]))
