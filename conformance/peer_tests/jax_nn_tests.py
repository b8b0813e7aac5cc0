# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
# ]
# ///
"""What tests/nn_test.py of JAX asks of `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp
import numpy as np
from harness import Peer, Test, cases, check, inputs, normal

from jax_native_flash_attn import flash_attention

T = 128
LOOSE = {"out": (0.01, 0.01), "gradients": (0.02, 0.02)}


def heads(dtype, group, vmap):
    arrays = inputs((2, T, 4, 32), (2, T, 4 // group, 32), dtype=dtype)
    check(arrays, attend=(lambda q, k, v, _: jax.vmap(flash_attention)(q, k, v)) if vmap else None, **LOOSE)


def masks(kinds):
    arrays = inputs((2, T, 4, 32), dtype="bfloat16")
    options = {"is_causal": "causal" in kinds}
    if "padding" in kinds:
        options["query_seq_lengths"] = np.array([T // 2, T // 4])
        options["key_value_seq_lengths"] = np.array([T // 4, T // 2])
    if "window" in kinds:
        options["local_window_size"] = (3, 2)
    mask = np.tri(T, dtype=bool)[None, None] if "custom" in kinds else None
    bias = normal(1, 4, T, T, seed=4, dtype="bfloat16") if "bias" in kinds else None
    check(arrays, bias, mask, **LOOSE, **options)


def bias_gradient(batch, vmap):
    x = normal(batch, T, 4, 32, dtype="bfloat16")
    bias, mask = normal(batch, 4, T, T, seed=4, dtype="bfloat16"), np.ones((1, 1, T), bool)
    call = lambda q, k, v, b: flash_attention(q, k, v, b, mask)  # noqa: E731
    check([x] * 3, bias, mask, out=(0.01, 0.01), gradients=(0.1, 0.1), attend=jax.vmap(call) if vmap else call)


def residual(causal):
    arrays = inputs((2, T, 4, 32))
    _, lse = flash_attention(*arrays, is_causal=causal, return_residual=True)
    x = jnp.einsum("btnh,bsnh->btns", *arrays[:2]) / np.sqrt(32)
    x = jnp.where(np.tri(T, dtype=bool)[:, None], x, -jnp.inf) if causal else x
    np.testing.assert_allclose(lse, jax.nn.logsumexp(x, -1), rtol=1e-5, atol=1e-5)


KINDS = ["bias", "causal", "padding", "custom", "causal padding", "custom padding", "bias causal", "causal window"]

if __name__ == "__main__":
    Peer(
        "JAX",
        "jax-ml/jax tests/nn_test.py, 000f87c09ffa",
        ("jax",),
        [
            Test("testDotProductAttention", cases(heads, dtype=["bfloat16", "float16"], group=[1, 2, 4], vmap=[0, 1])),
            Test("testDotProductAttentionMask", cases(masks, kinds=KINDS)),
            Test("testDotProductAttentionBiasGradient", cases(bias_gradient, batch=[1, 16], vmap=[0, 1])),
            Test("(residual, of its documentation)", cases(residual, causal=[False, True])),
        ],
        {},
    ).run()
