# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
#     "flax==0.12.12",
# ]
# ///
"""What Flax' tests of attention ask of `dot_product_attention`, and of the layers with `adapters.flax.attention_fn`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from harness import Peer, Test, cases, check, close, inputs, normal, raises

from jax_native_flash_attn import flash_attention
from jax_native_flash_attn.adapters.flax import attention_fn

Linen = functools.partial(nn.MultiHeadDotProductAttention, attention_fn=attention_fn)


def layer(**options):
    return nnx.MultiHeadAttention(rngs=nnx.Rngs(0), attention_fn=attention_fn, **options)


def basic():
    module = layer(num_heads=2, in_features=3, qkv_features=6, out_features=6)
    assert module(jnp.ones((1, 7, 3)), decode=False).shape == (1, 7, 6)


def sow():
    own = nnx.MultiHeadAttention(8, 8, rngs=nnx.Rngs(0), decode=False, attention_fn=attention_fn)
    _, found = nnx.capture(own, nnx.Intermediate)(jnp.ones((4, 6, 8)), sow_weights=True)
    assert found["attention_weights"][0].shape == (4, 8, 6, 6)
    assert not nnx.capture(own, nnx.Intermediate)(jnp.ones((4, 6, 8)))[1]


def decode_x64():
    with jax.enable_x64(True):
        module = layer(num_heads=2, in_features=4, qkv_features=4, decode=True)
        module.init_cache((1, 4, 4), dtype=float)
        for i in range(2):
            assert module(jnp.ones((1, 4, 4))[:, i : i + 1]).shape == (1, 1, 4)


def causal_and_padding(padding, cross):
    S = 4 if cross else 2
    query, key, value = inputs((1, 1, 2, 2, 4), (1, 1, S, 2, 4))
    mask = np.ones((1, 1, 1, 2, S), bool)
    mask[..., -2:] = not padding
    causal = np.tri(2, S, dtype=bool)
    first = attention_fn(query, key, value, mask=mask, is_causal=True, deterministic=True)
    second = attention_fn(query, key, value, mask=jnp.asarray(mask & causal, jnp.float32), deterministic=True)
    close("out", first, np.asarray(second, float), (1e-6, 0))
    own = nnx.dot_product_attention(query, key, value, mask=mask & causal, deterministic=True)
    close("flax", first, np.asarray(own, float), (1e-6, 0))


def same_as_linen(use_bias, dtype, param_dtype, precision, decode, normalize):
    options = {"num_heads": 2, "qkv_features": 6, "out_features": 6, "use_bias": use_bias, "dtype": dtype,
               "param_dtype": param_dtype, "precision": precision, "decode": decode}  # fmt: skip
    ours = layer(in_features=3, normalize_qk=normalize, **options)
    theirs = nnx.MultiHeadAttention(in_features=3, normalize_qk=normalize, rngs=nnx.Rngs(0), **options)
    x = normal(1, 3)
    if decode:
        ours.init_cache(x.shape, dtype=dtype)
        theirs.init_cache(x.shape, dtype=dtype)
    close("out", ours(x), np.asarray(theirs(x), float), (0, 0))


def kv_features():
    module = layer(num_heads=2, in_features=3, in_kv_features=4, qkv_features=6, out_features=6, decode=False)
    assert module(jnp.ones((1, 3)), normal(1, 4)).shape == (1, 6)


def gqa_shapes():
    assert flash_attention(*inputs((2, 4, 6, 8), (2, 5, 3, 8))).shape == (2, 4, 6, 8)


def gqa_wrong():
    raises(lambda: flash_attention(*inputs((1, 4, 5, 8), (1, 4, 2, 8))), "multiple")


def gqa_layer():
    module = layer(num_heads=32, in_features=128, qkv_features=2048, num_kv_heads=8)
    assert module(jnp.ones((1, 10, 128)), decode=False).shape == (1, 10, 128)
    module.init_cache((1, 10, 128))
    assert module(jnp.ones((1, 1, 128)), decode=True).shape == (1, 1, 128)
    assert module.cache_index == 1


def gqa_as_jax():
    check(inputs((2, 8, 4, 16), (2, 8, 2, 16)), out=(1e-3, 1e-3))


def wrong_shapes(shapes):
    rng = jax.random.key(0)
    raises(lambda: flash_attention(*(jnp.ones(shape) for shape in shapes), dropout_rate=0.1, dropout_rng=rng))


def linen_shapes():
    x = jnp.ones((4, 2, 3, 5))
    y, _ = Linen(num_heads=8, qkv_features=16, deterministic=False).init_with_output(jax.random.key(0), x)
    assert y.shape == x.shape
    query, key = jnp.ones((4, 2, 3, 5)), jnp.ones((4, 2, 3, 5))
    y, _ = Linen(num_heads=8, qkv_features=16, deterministic=False).init_with_output(jax.random.key(0), query, key)
    assert y.shape == query.shape


def linen_dropout():
    module = Linen(num_heads=8, qkv_features=16, dropout_rate=0.5, deterministic=False)
    x, keys = normal(4, 2, 3, 5), jax.random.split(jax.random.key(0), 3)
    variables = module.init({"params": keys[0], "dropout": keys[1]}, x)
    first, again, other = (module.apply(variables, x, rngs={"dropout": key}) for key in (keys[1], keys[1], keys[2]))
    np.testing.assert_array_equal(first, again)
    assert not (np.asarray(first) == np.asarray(other)).all()


def linen_no_dropout(rate):
    module = Linen(num_heads=8, qkv_features=16, dropout_rate=rate)
    x, keys = normal(4, 2, 3, 5), jax.random.split(jax.random.key(0), 3)
    variables = module.init({"params": keys[0]}, x, deterministic=True)
    a, b = (module.apply(variables, x, deterministic=True, rngs={"dropout": key}) for key in keys[1:])
    np.testing.assert_array_equal(a, b)


def receptive_field():
    x, module = normal(1, 10, 1), Linen(num_heads=1, kernel_init=nn.initializers.ones, deterministic=False)
    variables, mask = module.init(jax.random.key(0), x), nn.make_causal_mask(jnp.ones((1, 10)))
    jacobian = jax.jacobian(lambda x: module.apply(variables, x, mask=mask)[0, :, 0])(x)[:, 0, :, 0]
    np.testing.assert_array_equal(np.abs(jacobian) > 1e-5, np.tri(10, dtype=bool))


def decoding(spatial):
    x = normal(2, *spatial, 12)  # the last of `spatial` is attended
    module = Linen(num_heads=3, qkv_features=12, deterministic=False)
    decode = module.clone(decode=True)
    variables = decode.init(jax.random.key(0), x)
    params, state = {"params": variables["params"]}, {"cache": variables["cache"]}
    expected = module.apply(params, x, mask=nn.make_causal_mask(jnp.ones((2, *spatial))))
    outs = []
    for i in range(spatial[-1]):
        y, state = decode.apply({**params, **state}, x[..., i : i + 1, :], mutable=["cache"])
        outs.append(y)
    close("out", jnp.concatenate(outs, -2), np.asarray(expected, float), (1e-5, 1e-7))


def mixed_precision(force):
    module = Linen(num_heads=2, qkv_features=4, force_fp32_for_softmax=force, dtype=jnp.bfloat16, deterministic=True)
    x = normal(2, 4)
    out = module.apply(module.init(jax.random.key(0), x), x)
    assert out.dtype == jnp.bfloat16


def einsums(options):
    raises(lambda: attention_fn(*(jnp.ones((1, 4, 2)),) * 3, **options))


WRONG = [
    [(2, 16, 4, 8), (16, 4, 8), (16, 4, 8)], [(2, 16, 4, 8), (3, 16, 4, 8), (3, 16, 4, 8)],
    [(2, 16, 4, 8), (2, 16, 4, 8), (2, 15, 4, 8)], [(2, 16, 4, 8), (2, 16, 4, 7), (2, 16, 4, 8)],
]  # fmt: skip
EINSUMS = ["qk_attn_weights_einsum", "attn_weights_value_einsum"]
ON = [True, False]
P = jax.lax.Precision

if __name__ == "__main__":
    Peer(
        "Flax",
        "google/flax tests/nnx/nn/attention_test.py and tests/linen/linen_attention_test.py, 18f8f311c275",
        ("jax", "flax"),
        [
            Test("nnx: test_basic", [basic]),
            Test("nnx: test_multihead_sow_attention_weights", [sow]),
            Test("nnx: test_autoregressive_decode_with_x64", [decode_x64]),
            Test("nnx: test_causal_mask_equivalence", cases(causal_and_padding, padding=ON, cross=ON)),
            Test(
                "nnx: test_nnx_attention_equivalence",
                cases(
                    same_as_linen,
                    use_bias=ON,
                    dtype=["float32", "float16"],
                    param_dtype=["float32", "float16"],
                    precision=[P.DEFAULT, P.HIGH, P.HIGHEST],
                    decode=ON,
                    normalize=ON,
                ),
            ),
            Test("nnx: test_varying_num_features", [kv_features]),
            Test("nnx: TestGQADotProductAttention", [gqa_shapes, gqa_wrong, gqa_layer, gqa_as_jax]),
            Test("nnx: test_invalid_shapes", cases(wrong_shapes, shapes=WRONG)),
            Test("linen: self and encoder-decoder attention", [linen_shapes]),
            Test("linen: explicit dropout", [linen_dropout]),
            Test("linen: dropout disabled", cases(linen_no_dropout, rate=[0.0, 0.5])),
            Test("linen: test_autoregressive_receptive_field_1d", [receptive_field]),
            Test("linen: test_decoding", cases(decoding, spatial=[(5,), (6, 5)])),
            Test("linen: test_mixed_precision_multihead_attention", cases(mixed_precision, force=ON)),
            Test(
                "linen: test_dot_product_attention_specify_einsums",
                cases(einsums, options=[{name: lambda: None} for name in EINSUMS]),
            ),
        ],
        {
            "keep_rngs, initialisers, aliases, mask_warning, dtype_infer": "about the layers' own bookkeeping",
            "test_causal_mask_1d, combine_masks": "about functions that make masks",
        },
    ).run()
