"""haiku.MultiHeadAttention with flash_attention, against Haiku's own."""

from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("haiku", reason="haiku is not installed")

import haiku as hk

from jax_native_flash_attn.adapters.haiku import MultiHeadAttention
from tests.adapters.comparison import assert_close, compiled
from tests.support.environment import lenient_promotion

B, T, S, HEADS = 2, 9, 7, 3


@pytest.fixture(autouse=True)
def haiku_promotion():
    """Haiku mixes ranks and dtypes in its own layers."""
    with lenient_promotion():
        yield


def inputs(*batch: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (*batch, T, 6), (*batch[1:], S, 5), (*batch, S, 4)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def transformed(layer_class: Any, **options: Any) -> hk.Transformed:
    def call(*arrays: Any) -> Any:
        layer = layer_class(HEADS, 4, w_init=hk.initializers.VarianceScaling(), value_size=3, model_size=5)
        return layer(*arrays, **options)

    return hk.without_apply_rng(hk.transform(call))


def results(layer: hk.Transformed, parameters: Any, *arrays: jax.Array) -> Any:
    """Output, and gradients of parameters and inputs."""

    def loss(parameters: Any, *arrays: jax.Array) -> Any:
        out = layer.apply(parameters, *arrays)
        return (out**2).sum(), out

    gradients, out = compiled(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(parameters, *arrays)
    return out, gradients


CAUSAL = np.tril(np.ones((T, S), bool))


def test_same_as_own():
    """Key has fewer batch axes than query; a mask is one for all heads, and one for the second batch axis."""
    mask = np.random.default_rng(0).random((2, 1, 1, T, S)) > 0.3
    mask[..., 3, :] = False  # rows without keys
    arrays = inputs(2, 3)
    theirs = transformed(hk.MultiHeadAttention, mask=mask & CAUSAL)
    ours = transformed(MultiHeadAttention, mask=mask.astype(np.float32), is_causal=True)
    parameters = jax.jit(theirs.init)(jax.random.key(1), *arrays)
    assert_close(results(ours, parameters, *arrays), results(theirs, parameters, *arrays))


def test_parameters_are_those_of_haiku():
    arrays = inputs(2)
    shapes = [
        jax.eval_shape(transformed(layer_class).init, jax.random.key(1), *arrays)
        for layer_class in (MultiHeadAttention, hk.MultiHeadAttention)
    ]
    assert shapes[0] == shapes[1]


def test_mask_of_another_rank():
    layer = transformed(MultiHeadAttention, mask=np.ones((2, T, S)))
    with pytest.raises(ValueError, match=r"mask must have rank 4.*got shape \(2, 9, 7\): add the axis of heads"):
        jax.eval_shape(layer.init, jax.random.key(1), *inputs(2))
