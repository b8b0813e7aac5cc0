# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
#     "dm-haiku==0.0.17",
# ]
# ///
"""`haiku.MultiHeadAttention`, with projections that are the identity."""

import haiku
import jax
import jax.numpy as jnp
from frameworks import JaxAdapter, main

Layer = haiku.MultiHeadAttention


class Haiku(JaxAdapter):
    name = "haiku"
    packages = ("dm-haiku", "jax")
    functions = (Layer.__init__, Layer.__call__)

    def native(self, query, key, value):
        return self.layer(3, query.shape[-1] // 3, query.shape[-1] // 3, *map(jnp.asarray, (query, key, value)))

    def layer(self, N, H, D, *arrays):
        def run(*arrays):
            return Layer(N, H, w_init=lambda shape, dtype: jnp.eye(*shape, dtype=dtype), with_bias=False, value_size=D,
                         model_size=N * D)(*arrays)  # fmt: skip

        init, apply = haiku.without_apply_rng(haiku.transform(run))
        return apply(init(jax.random.key(0), *arrays), *arrays)

    def apply(self, query, key, value, *, causal=False, raw_mask=None, mask=None, **options):
        self.refuse(options, scale="^scale", bias="att.*bias")
        if causal:
            self.lacks("causal")
        (B, T, N, H), D = query.shape, value.shape[-1]
        if key.shape[2] != N:
            self.lacks("kv_heads|value_heads")
        flat = [x.reshape(*x.shape[:2], x.shape[2] * x.shape[3]) for x in (query, key, value)]
        return self.layer(N, H, D, *flat, raw_mask if mask is None else mask).reshape(B, T, N, D)


if __name__ == "__main__":
    main(Haiku())
