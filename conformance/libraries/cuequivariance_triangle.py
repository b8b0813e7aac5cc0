# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
#     "cuequivariance==0.13.0",
#     "cuequivariance-jax==0.13.0",
# ]
# ///
"""`cuequivariance_jax.triangle_attention`, its JAX implementation. The batch here is its second axis."""

import jax.numpy as jnp
from cuequivariance_jax import triangle_attention
from frameworks import JaxLseAdapter, main


class Triangle(JaxLseAdapter):
    name = "cuequivariance triangle"
    packages = ("cuequivariance-jax", "jax")
    functions = (triangle_attention,)
    row_masks = False
    mask_shapes = ("B N T S", "B 1 T S", "B 1 1 S", "B S")
    scale_is_required = True

    def native(self, query, key, value):
        T = query.shape[-2]
        bias = jnp.zeros((1, 1, query.shape[-3], T, T))
        return triangle_attention(
            *(jnp.asarray(x)[None] for x in (query, key, value)), bias, None, query.shape[-1] ** -0.5
        )[0][0]

    def apply(
        self,
        query,
        key,
        value,
        *,
        causal=False,
        raw_mask=None,
        mask=None,
        bias=None,
        scale=None,
        with_lse=False,
        **options,
    ):
        self.refuse(options)
        if causal:
            self.lacks("causal")
        T, S = query.shape[1], key.shape[1]
        if mask is not None:
            raw_mask = jnp.broadcast_to(mask[:, :, :1], (len(query), 1, 1, S))
        mask = None if raw_mask is None else jnp.asarray(raw_mask)[None]
        bias = jnp.zeros((1, query.shape[2], T, S), query.dtype) if bias is None else bias
        query, key, value = (jnp.swapaxes(x, 1, 2)[None] for x in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out, lse, _ = triangle_attention(query, key, value, jnp.asarray(bias)[None], mask, scale)
        out = jnp.swapaxes(out[0], 1, 2)
        return (out, lse[0, ..., 0]) if with_lse else out


if __name__ == "__main__":
    main(Triangle())
