# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
#     "keras==3.15.1",
# ]
# ///
"""What Keras' tests ask of `keras.ops.dot_product_attention`, and of the layer in `adapters.keras`."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import functools
import math

import jax
import jax.numpy as jnp
import keras
import numpy as np
from harness import Peer, Test, cases, check, close, normal, raises

from jax_native_flash_attn import flash_attention
from jax_native_flash_attn.adapters.keras import GroupedQueryAttention, MultiHeadAttention

Own = keras.layers.MultiHeadAttention


def counted(*shape):
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


def product(bias, scale, masks, half):
    mask, causal = masks
    arrays = [counted(2, 3, 4, 8)] * 3
    bias = counted(2, 4, 3, 3) if bias else None
    if half:
        arrays = [(x * 0.1).astype(np.float16) for x in arrays]
        bias = None if bias is None else (bias * 0.1).astype(np.float16)
    mask = np.tile(np.tri(3, dtype=bool), (2, 4, 1, 1)) if mask else None
    check(arrays, bias, mask, scale=scale, is_causal=causal, out=(1e-3, 1e-3) if half else (1e-6, 1e-7), gradients=None)


def in_scan():
    def body(carry, x):
        return carry, flash_attention(*(y[None] for y in x), mask=jnp.ones((1, 4, 8), bool)[:, :1, :1][..., None])[0]

    assert jax.lax.scan(body, None, (jnp.ones((2, 1, 4, 8)),) * 3)[1].shape == (2, 1, 4, 8)


def two_dtypes(query, key):
    shape = (2, 3, 3, 8)
    out = flash_attention(jnp.ones(shape, query), jnp.ones(shape, key), jnp.ones(shape, key))
    assert out.dtype == jnp.result_type(jnp.dtype(query), jnp.dtype(key))


def grouped(K):
    assert flash_attention(jnp.ones((2, 16, 4, 32)), *(jnp.ones((2, 16, K, 32)),) * 2).shape == (2, 16, 4, 32)


def pair(*shapes, **options):
    """The two layers with the same weights."""
    theirs, ours = Own(**options), MultiHeadAttention(**options)
    for layer in (theirs, ours):
        layer.build(*shapes)
    ours.set_weights(theirs.get_weights())
    return theirs, ours


def high_dim(query, value, mask, axes):
    query, value = (3, *query, 8), (3, *value, 8)
    theirs, ours = pair(query, value, num_heads=2, key_dim=2, attention_axes=axes)
    mask = np.random.default_rng(1).random((3, *mask)) < 0.5 if mask else None
    arrays = normal(*query), normal(*value, seed=1)
    expected = np.asarray(theirs(*arrays, attention_mask=mask), float)
    close("out", ours(*arrays, attention_mask=mask), expected, (1e-5, 1e-5))


def wrong_shapes(query, value, key):
    layer = MultiHeadAttention(num_heads=4, key_dim=2, value_dim=2)
    raises(lambda: layer(np.ones(query), np.ones(value), np.ones(key)), "must be equal")


def masking(causal):
    query = np.array([[1, 2, 3, 0, 0], [3, 3, 1, 1, 2], [1, 0, 0, 0, 0]])
    value = np.array([[5, 4, 0], [3, 0, 0], [2, 1, 1]])
    layer = MultiHeadAttention(num_heads=2, key_dim=2)
    masked = [keras.layers.Embedding(n, 8, mask_zero=True)(x) for n, x in ((4, query), (6, value))]
    mask = (query > 0)[:, :, None] & (value > 0)[:, None]
    mask &= np.tri(5, 3, dtype=bool) if causal else True
    out = layer(query=masked[0], value=masked[1], use_causal_mask=causal)
    plain = [jnp.asarray(np.asarray(x)) for x in masked]
    close("out", out, np.asarray(layer(query=plain[0], value=plain[1], attention_mask=mask), float), (1e-6, 1e-6))


def mask_shapes():
    x, layer = normal(2, 5, 8), MultiHeadAttention(num_heads=2, key_dim=4)
    mask = np.tri(5)
    outs = [layer(x, x, attention_mask=m) for m in (mask, np.tile(mask, (2, 1, 1)), np.tile(mask, (2, 2, 1, 1)))]
    for out in outs[1:]:
        close("out", out, np.asarray(outs[0], float), (1e-6, 1e-6))


def sliding(causal):
    x = normal(1, 6, 8)
    theirs, ours = pair(x.shape, x.shape, num_heads=2, key_dim=4, sliding_window=3)
    expected = np.asarray(theirs(x, x, use_causal_mask=causal), float)
    close("out", ours(x, x, use_causal_mask=causal), expected, (1e-6, 1e-6))
    _, scores = ours(x, x, use_causal_mask=causal, return_attention_scores=True)
    distance = np.arange(6)[:, None] - np.arange(6)
    seen = (np.abs(distance) < 3) & ((distance >= 0) if causal else True)
    np.testing.assert_array_equal(np.asarray(scores)[0, 0] > 0, seen)


def causal_only(extra, dropout):
    x, layer = normal(2, 5, 8), MultiHeadAttention(num_heads=2, key_dim=4, dropout=dropout)
    mask = np.ones((2, 5, 5), bool)
    mask[:, 2, 3] = mask[:, 3, 1] = not extra
    first = layer(x, x, attention_mask=mask if extra else None, use_causal_mask=True, training=False)
    second = layer(x, x, attention_mask=mask & np.tri(5, dtype=bool), training=False)
    close("out", first, np.asarray(second, float), (1e-5, 0))


def causal_axes():
    x, layer = normal(1, 5, 3, 8), MultiHeadAttention(num_heads=2, key_dim=4, attention_axes=1)
    _, scores = layer(x, x, use_causal_mask=True, return_attention_scores=True)
    assert np.asarray(scores)[..., np.triu(np.ones((5, 5)), 1).astype(bool)].sum() < 1e-6


def window_wrong(window):
    raises(lambda: MultiHeadAttention(num_heads=2, key_dim=4, sliding_window=window), "sliding_window")


def window_config():
    config = MultiHeadAttention(num_heads=2, key_dim=4, sliding_window=5).get_config()
    assert MultiHeadAttention.from_config(config).get_config()["sliding_window"] == 5


def correctness():
    eye = np.identity(8, np.float32)[None]
    value = (np.arange(64).reshape(1, 8, 8) / 100.0).astype(np.float32)
    theirs, ours = pair(eye.shape, eye.shape, eye.shape, num_heads=8, key_dim=8, dtype="float16")
    kernel = np.repeat(np.identity(8)[:, None], 8, 1)
    weights = [kernel, np.zeros((8, 8))] * 3 + [kernel.transpose(1, 2, 0), np.zeros(8)]
    for layer in (theirs, ours):
        layer.set_weights([np.reshape(w, x.shape) for w, x in zip(weights, layer.get_weights(), strict=True)])
    close("out", ours(eye, value, eye), np.asarray(theirs(eye, value, eye), float), (1e-2, 1e-2))


def group_layer():
    x = normal(2, 6, 8)
    options = {"head_dim": 4, "num_query_heads": 4, "num_key_value_heads": 2}
    theirs, ours = keras.layers.GroupQueryAttention(**options), GroupedQueryAttention(**options)
    expected = theirs(x, x, use_causal_mask=True)
    ours.build(x.shape, x.shape)
    ours.set_weights(theirs.get_weights())
    close("out", ours(x, x, use_causal_mask=True), np.asarray(expected, float), (1e-5, 1e-5))


HIGH = [
    ((3, 4), (3, 2), (4, 2), (2,)), ((3, 4), (3, 2), (3, 4, 2), (2,)), ((3, 4), (3, 2), (3, 2, 4, 2), (2,)),
    ((3, 4), (3, 2), (3, 4, 3, 2), (1, 2)), ((5, 3, 4), (5, 3, 2), (3, 4, 3, 2), (2, 3)),
    ((5, 3, 4), (5, 3, 2), (5, 3, 4, 3, 2), (2, 3)),
]  # fmt: skip
WRONG = [
    ((2, 4, 8), (2, 2, 7), (2,)), ((2, 4, 8), (2, 2, 8), (2, 1, 7)),
    ((2, 4, 2, 3, 8), (2, 1, 1, 5, 8), (2, 1, 15, 5, 2)),
]  # fmt: skip
MASKS = [(False, False), (True, False), (False, True)]
FLOATS = ["bfloat16", "float16", "float32"]
ON = [False, True]

if __name__ == "__main__":
    Peer(
        "Keras",
        "keras-team/keras nn_test.py of ops and multi_head_attention_test.py, 3422977a5e38",
        ("jax", "keras"),
        [
            Test("ops: test_dot_product_attention", cases(product, bias=ON, scale=[None, 1.0], masks=MASKS, half=ON)),
            Test("ops: test_dot_product_attention_inside_scan", [in_scan]),
            Test(
                "ops: test_dot_product_attention (dtypes)",
                cases(two_dtypes, query=FLOATS, key=FLOATS),
                "query, key and value must have one dtype, as in jax.nn; the error names `astype`",
            ),
            Test("ops: grouped heads", cases(grouped, K=[1, 2])),
            Test("layer: test_high_dim_attention", [functools.partial(high_dim, *c) for c in HIGH]),
            Test("layer: test_shape_mismatch_error", [functools.partial(wrong_shapes, *c) for c in WRONG]),
            Test("layer: test_masking", cases(masking, causal=ON)),
            Test("layer: test_masking_with_different_shapes", [mask_shapes]),
            Test("layer: test_sliding_window", cases(sliding, causal=ON)),
            Test(
                "layer: the tests of causal masks alone and with others",
                cases(causal_only, extra=ON, dropout=[0.0, 0.1]),
            ),
            Test("layer: test_causal_only_masks_non_4d_inputs", [causal_axes]),
            Test(
                "layer: test_sliding_window_validation, _serialization",
                [*cases(window_wrong, window=[0, -3]), window_config],
            ),
            Test("layer: test_correctness", [correctness]),
            Test("GroupQueryAttention (its own layer)", [group_layer]),
        ],
        {
            "initializer, lora, dtype_policy_map, quantize_int8, compute_output_shape": "about the layer's weights",
            "test_flash_attention_with_errors, causal_only_skipped_for_subclass": "about their own code paths",
        },
    ).run()
