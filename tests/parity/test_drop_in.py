"""flash_attention in place of jax.nn.dot_product_attention inside real Flax layers."""

import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed")

import flax.linen as linen
from flax import nnx

from jax_native_flash_attn import flash_attention, flash_attention_with_lse
from tests.adapters.comparison import assert_close
from tests.support.environment import lenient_promotion
from tests.support.grids import rotated, thinned

B, T, FEATURES, HEADS = 2, 19, 24, 4


@pytest.fixture(autouse=True)
def flax_promotion():
    """Flax mixes ranks and dtypes in its own layers."""
    with lenient_promotion():
        yield


def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (B, T, FEATURES))


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch):
    """Puts a counting flash_attention in place of the reference; gives the list of its calls."""
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return flash_attention(*arguments, **options)

    def patch():
        monkeypatch.setattr(jax.nn, "dot_product_attention", counted)
        return calls

    return patch


def nnx_layer(**options: Any) -> nnx.MultiHeadAttention:
    return nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=nnx.Rngs(0), **options)


def nnx_results(layer: nnx.MultiHeadAttention, call: dict[str, Any]) -> Any:
    """Output and parameter gradients."""

    def loss(layer):
        out = layer(inputs(), **call)
        return (out**2).sum(), out

    gradients, out = nnx.jit(nnx.grad(loss, has_aux=True))(layer)
    return out, nnx.to_pure_dict(nnx.state(gradients))


CAUSAL_MASK = np.tril(np.ones((B, 1, T, T), bool))
NNX_CALLS = {
    "plain": {},
    "mask": {"mask": CAUSAL_MASK},
    "float mask": {"mask": CAUSAL_MASK.astype(np.float32)},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize(("name", "kv_heads"), thinned(rotated(NNX_CALLS, [None, 2]), 2))
def test_nnx_layer_with_the_function_replaced(name: str, kv_heads: int | None, patched):
    options = {} if kv_heads is None else {"num_kv_heads": kv_heads}
    try:
        layer = nnx_layer(**options)
    except TypeError:
        pytest.skip("this Flax has no num_kv_heads")
    call = {k: jnp.asarray(v) if k == "mask" else v for k, v in NNX_CALLS[name].items()}
    expected = nnx_results(layer, call)
    calls = patched()
    actual = nnx_results(layer, call)
    assert calls, "Flax did not call jax.nn.dot_product_attention"
    assert_close(actual, expected)


def test_nnx_function_with_bias(patched):
    shape = B, T, HEADS, FEATURES // HEADS
    query, key, value = (jax.random.normal(k, shape) for k in jax.random.split(jax.random.key(1), 3))
    bias = jax.random.normal(jax.random.key(2), (1, HEADS, T, T))

    def results():
        def loss(*arrays):
            return (nnx.dot_product_attention(*arrays) ** 2).sum()

        return jax.value_and_grad(loss, (0, 1, 2, 3))(query, key, value, bias)

    expected = results()
    calls = patched()
    actual = results()
    assert calls
    assert_close(actual, expected)


def test_nnx_extra_batch_dimensions(patched):
    shape = 2, 3, T, HEADS, 8
    query, key, value = (jax.random.normal(k, shape) for k in jax.random.split(jax.random.key(1), 3))
    expected = nnx.dot_product_attention(query, key, value)
    patched()
    assert_close(nnx.dot_product_attention(query, key, value), expected)


@pytest.mark.parametrize(("rate", "broadcast_dropout"), [(0.0, True), (0.3, False), (0.3, True)])
def test_linen_evaluates_and_trains_with_flash_attention_itself(rate: float, broadcast_dropout: bool):
    def layer(**options):
        return linen.MultiHeadDotProductAttention(
            num_heads=HEADS, dropout_rate=rate, broadcast_dropout=broadcast_dropout, **options
        )

    reference, ours = layer(), layer(attention_fn=flash_attention)
    parameters = ours.init(jax.random.key(0), inputs(), deterministic=True)
    for options in ({"deterministic": True}, {"deterministic": False, "rngs": {"dropout": jax.random.key(3)}}):

        def results(layer, options=options):
            def loss(parameters):
                out = layer.apply(parameters, inputs(), **options)
                return jnp.square(out).sum(), out

            return jax.jit(jax.grad(loss, has_aux=True))(parameters)

        assert_close(results(ours), results(reference))


@pytest.mark.parametrize("attention", [flash_attention, flash_attention_with_lse])
def test_deterministic_needs_no_dropout_rng(attention: Any):
    x = jax.random.normal(jax.random.key(0), (B, T, HEADS, 8))
    for rate in (0.0, 0.3, 1.0):
        actual = attention(x, x, x, dropout_rate=rate, deterministic=True)
        jax.tree.map(np.testing.assert_array_equal, actual, attention(x, x, x))


def test_linen_self_attention_with_flash_attention_itself():
    # linen keeps only those keywords that the signature of attention_fn names, so no adapter is needed.
    def results(**options):
        layer = linen.MultiHeadDotProductAttention(num_heads=HEADS, **options)
        parameters = layer.init(jax.random.key(0), inputs())
        return layer.apply(parameters, inputs())

    assert_close(results(attention_fn=flash_attention), results())


@pytest.mark.parametrize("imported_again", ["never", "reloaded", "anew"])
def test_cudnn_is_the_original_where_ours_replaces_it(imported_again: str, monkeypatch: pytest.MonkeyPatch):
    x = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    with pytest.raises(Exception) as expected:  # cuDNN refuses on a CPU  # noqa: PT011
        jax.nn.dot_product_attention(x, x, x, implementation="cudnn")
    monkeypatch.setattr(jax.nn, "dot_product_attention", flash_attention)
    if imported_again != "never":
        for name in [n for n in sys.modules if n.startswith("jax_native_flash_attn")]:
            module = sys.modules[name]
            if imported_again == "anew":
                monkeypatch.delitem(sys.modules, name)
            elif name.endswith("._api"):
                before = dict(vars(module))
                importlib.reload(module)
                again = module.flash_attention
                vars(module).update(before)
        if imported_again == "anew":
            again = importlib.import_module("jax_native_flash_attn._api").flash_attention
        assert again is not flash_attention
        monkeypatch.setattr(jax.nn, "dot_product_attention", again)
    with pytest.raises(type(expected.value)) as actual:
        jax.nn.dot_product_attention(x, x, x, implementation="cudnn")
    assert str(actual.value) == str(expected.value)
