"""attention_fn in Flax' layers, nnx and linen, against Flax' own."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed")

import flax.linen as linen
from flax import nnx

import jax_native_flash_attn.adapters.flax as adapter
from jax_native_flash_attn.adapters.flax import attention_fn
from tests.adapters.comparison import assert_close, compiled
from tests.support.environment import lenient_promotion
from tests.support.grids import thinned

B, T, FEATURES, HEADS = 2, 9, 16, 4
KV_HEADS = {"num_kv_heads": 2} if "num_kv_heads" in inspect.signature(nnx.MultiHeadAttention).parameters else {}


@pytest.fixture(autouse=True)
def flax_promotion():
    """Flax mixes ranks and dtypes in its own layers."""
    with lenient_promotion():
        yield


def array(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def holes(*shape: int) -> np.ndarray:
    """With rows without keys."""
    mask = np.random.default_rng(0).random(shape) > 0.3
    mask[..., 3, :] = False
    return mask


def nnx_layers(**options: Any) -> list[nnx.MultiHeadAttention]:
    """Flax' own, and ours."""
    make = functools.partial(nnx.MultiHeadAttention, HEADS, FEATURES, **{"decode": False} | options)
    return [make(rngs=nnx.Rngs(0)), make(rngs=nnx.Rngs(0), attention_fn=attention_fn)]


@pytest.mark.parametrize("deterministic", thinned([False, True], 2))
def test_nnx(deterministic: bool):
    """A float mask, dropout and its absence, and grouped heads."""
    mask = nnx.make_causal_mask(jnp.ones((B, T)))

    def results(layer: nnx.MultiHeadAttention) -> Any:
        definition, parameters, rest = nnx.split(layer, nnx.Param, ...)

        def loss(parameters: Any, x: jax.Array) -> Any:
            rngs = None if deterministic else nnx.Rngs(dropout=5)
            out = nnx.merge(definition, parameters, rest)(x, mask=mask, rngs=rngs)
            return (out**2).sum(), out

        return compiled(jax.grad(loss, (0, 1), has_aux=True))(parameters, array(1, B, T, FEATURES))

    theirs, ours = nnx_layers(dropout_rate=0.3, deterministic=deterministic, **KV_HEADS)
    assert_close(results(ours), results(theirs))


def test_linen():
    """A float mask, gradients with dropout, and evaluation without."""
    x, mask = array(1, B, T, FEATURES), linen.make_causal_mask(jnp.ones((B, T)))
    make = functools.partial(linen.MultiHeadDotProductAttention, HEADS, dropout_rate=0.3)
    parameters = jax.jit(functools.partial(make().init, deterministic=True))(jax.random.key(0), x)

    def results(layer: linen.Module) -> Any:
        def loss(parameters: Any) -> Any:
            rngs = {"dropout": jax.random.key(3)}
            out: Any = layer.apply(parameters, x, mask=mask, deterministic=False, rngs=rngs)
            return (out**2).sum(), out

        evaluated = compiled(functools.partial(layer.apply, deterministic=True))(parameters, x)
        return compiled(jax.grad(loss, has_aux=True))(parameters), evaluated

    assert_close(results(make(attention_fn=attention_fn)), results(make()))


def test_batch_axes_bias_and_mixed_dtypes():
    """A bias for all batch rows; a mask for each of the first batch axis."""
    batch = (2, 3)
    key, value = (array(i, *batch, 7, HEADS, d) for i, d in ((1, 4), (2, 5)))
    query, bias = array(0, *batch, T, HEADS, 4).astype(jnp.bfloat16), array(3, 1, 1, HEADS, T, 7)
    options = {"broadcast_dropout": False, "dropout_rate": 0.3, "dropout_rng": jax.random.key(1), "dtype": jnp.float32}

    def results(function: Any) -> Any:
        def loss(*arrays: jax.Array) -> Any:
            out = function(*arrays, mask=holes(2, 1, 1, T, 7), **options)
            return (out**2).sum(), out

        return compiled(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(query, key, value, bias)

    actual, expected = results(attention_fn), results(nnx.dot_product_attention)
    assert_close(actual, expected)
    assert actual[1].dtype == expected[1].dtype


def test_decoding_with_the_cache_of_nnx():
    x = array(1, B, 3, FEATURES)
    outs = []
    for layer in nnx_layers(decode=True, **KV_HEADS):
        layer.init_cache((B, 4, FEATURES))
        outs.append(jnp.concatenate([layer(x[:, t : t + 1]) for t in range(x.shape[1])], 1))
    assert_close(outs[1], outs[0])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What attention is asked for; query comes out."""
    calls: list[dict[str, Any]] = []

    def record(query: Any, key: Any, value: Any, bias: Any, mask: Any, **options: Any) -> Any:
        calls.append(options)
        return query

    monkeypatch.setattr(adapter, "attend", record)
    return calls


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_weights_are_flaxs(calls: list[dict[str, Any]]):
    x, mask = array(1, B, T, FEATURES), holes(B, 1, T, T)
    outs = []
    for layer in nnx_layers(dropout_rate=0.3, deterministic=False):
        out = layer(x, mask=mask, sow_weights=True, rngs=nnx.Rngs(dropout=5))
        outs.append((out, nnx.to_pure_dict(nnx.pop(layer, nnx.Intermediate))))
    assert outs[0][1]
    jax.tree.map(np.testing.assert_array_equal, *outs)
    outs, parameters = [], None
    for options in {}, {"attention_fn": attention_fn}:
        layer = linen.MultiHeadDotProductAttention(HEADS, dtype=jnp.bfloat16, force_fp32_for_softmax=True, **options)
        parameters = parameters or layer.init(jax.random.key(0), x)
        outs.append(layer.apply(parameters, x, mask=mask, sow_weights=True, mutable="intermediates"))
    assert outs[0][1]
    jax.tree.map(np.testing.assert_array_equal, *outs)
    assert not calls


def test_what_is_handed_on(calls: list[dict[str, Any]]):
    layer = nnx.MultiHeadAttention(
        HEADS,
        FEATURES,
        decode=False,
        precision="highest",
        rngs=nnx.Rngs(0),
        attention_fn=functools.partial(attention_fn, local_window_size=(2, 0)),
    )
    layer(array(1, B, T, FEATURES), **({"is_causal": True} if KV_HEADS else {}))
    assert calls[0]["precision"] == "highest"
    assert calls[0]["local_window_size"] == (2, 0)
    assert calls[0]["is_causal"] == bool(KV_HEADS)


def test_signature_names_what_flax_passes():
    # linen drops keywords that the signature does not name, so what it names must be all.
    of_functions_alone = {"einsum_dot_general", "promote_dtype"}
    for function in linen.dot_product_attention, nnx.dot_product_attention:
        assert set(inspect.signature(function).parameters) - of_functions_alone <= set(
            inspect.signature(attention_fn).parameters
        )


def test_refusals():
    x = array(0, B, T, HEADS, 4)
    layer = linen.MultiHeadDotProductAttention(
        HEADS,
        attention_fn=attention_fn,
        qk_attn_weights_einsum_cls=lambda: jnp.einsum,
        attn_weights_value_einsum_cls=lambda: jnp.einsum,
    )
    with pytest.raises(
        NotImplementedError, match=r"attn_weights_value_einsum must be None: .* Build the layer without"
    ):
        layer.init(jax.random.key(0), array(1, B, T, FEATURES))
    with pytest.raises(NotImplementedError, match=r"input_positions must be None: .* function of yours that rotates"):
        attention_fn(x, x, x, input_positions=jnp.arange(T))
    with pytest.raises(NotImplementedError, match="does not take local_window_size: leave out one of them"):
        attention_fn(x, x, x, module=layer, local_window_size=3)
    with pytest.raises(TypeError, match="attn_mask"):
        attention_fn(x, x, x, attn_mask=None)
