# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
# ]
# ///
# ruff: noqa: RUF012
"""Splash attention of JAX, the Pallas kernel for TPUs, in interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
from frameworks import JaxLseAdapter, main
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks


class Splash(JaxLseAdapter):
    name = "splash (interpreted)"
    packages = ("jax", "numpy")
    functions = (kernel.make_splash_mha, kernel._splash_attention, masks.CausalMask, masks.LocalMask)
    lengths = (128, 256)
    head_dim = 128
    scale = 1.0
    mask_shapes = ("N T S", "T S")
    arrays = False
    jit = False
    float16_modes = ("",)
    windows = {"LocalMask(.., (3, 3), 0)": {"window": (3, 3)}, "(3, 0)": {"window": (3, 0)}}
    by = {"row_without_keys": "`NumpyMask`"}

    def native(self, query, key, value):
        heads, length = query.shape[0], query.shape[1]
        return self.make(masks.MultiHeadMask([masks.FullMask((length, key.shape[1]))] * heads))(query, key, value)

    def make(self, mask, **options):
        blocks = kernel.BlockSizes(
            **{name: 128 for name in ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")},
            **{name: 128 for name in ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq")},
        )
        options |= {"head_shards": 1, "q_seq_shards": 1, "block_sizes": blocks, "interpret": True}
        return kernel.make_splash_mha(mask, **options)

    def apply(
        self, query, key, value, *, causal=False, raw_mask=None, mask=None, window=None, with_lse=False, scale=None,
        soft_cap=None, sinks=None, segments=None, **options,
    ):  # fmt: skip
        self.refuse(options, "bias", "dropout", "lengths")
        shape = query.shape[1], key.shape[1]
        if raw_mask is not None:  # an array (N, T, S), as make_splash_mha takes it
            raw_mask = raw_mask[0] if raw_mask.ndim == 4 else raw_mask
        elif mask is not None:
            raw_mask = np.broadcast_to(mask[0], (query.shape[2], *shape))
        else:
            one = masks.CausalMask(shape) if causal else masks.FullMask(shape)
            one = masks.LocalMask(shape, window, 0) if window else one
            raw_mask = masks.MultiHeadMask([one] * query.shape[2])
        attention = self.make(raw_mask, save_residuals=with_lse, attn_logits_soft_cap=soft_cap)
        if segments is not None:
            segments = kernel.SegmentIds(jnp.asarray(segments), jnp.asarray(segments))
        if scale is not None:  # there is no argument: the caller multiplies the query
            query = query * jnp.asarray(scale, query.dtype)
        swap = lambda x: x.swapaxes(1, 2)  # noqa: E731
        out = jax.vmap(lambda *arrays: attention(*arrays, segments, sinks))(*map(swap, (query, key, value)))
        return (swap(out[0]), out[1][0]) if with_lse else swap(out)


if __name__ == "__main__":
    main(Splash())
