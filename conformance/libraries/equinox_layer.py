# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
#     "equinox==0.13.8",
# ]
# ///
"""`equinox.nn.MultiheadAttention` under `vmap`, with projections that are the identity."""

import equinox
import jax
import jax.numpy as jnp
from frameworks import JaxAdapter, main

Layer = equinox.nn.MultiheadAttention


class Equinox(JaxAdapter):
    name = "equinox"
    packages = ("equinox", "jax")
    functions = (Layer.__init__, Layer.__call__)
    mask_shapes = ("B N T S", "N T S", "1 T S", "T S")

    def native(self, query, key, value):
        N, H = (query.shape[1], query.shape[2]) if query.ndim == 3 else (3, query.shape[-1] // 3)
        return self.layer(N, H, H)(query, key, value)

    def layer(self, N, H, D, dtype=jnp.float32, rate=0.0):
        layer = Layer(
            N, N * H, value_size=N * D, output_size=N * D, vo_size=D, dropout_p=rate, dtype=dtype, key=jax.random.key(0)
        )
        projections = (layer.query_proj, layer.key_proj, layer.value_proj, layer.output_proj)
        eyes = [jnp.eye(len(x.weight), dtype=dtype) for x in projections]
        names = ("query_proj", "key_proj", "value_proj", "output_proj")
        return equinox.tree_at(lambda x: [getattr(x, name).weight for name in names], layer, eyes)

    def apply(self, query, key, value, *, causal=False, raw_mask=None, mask=None, dropout=None, **options):
        self.refuse(options, scale="^scale", bias="att.*bias")
        if causal:
            self.lacks("causal")
        (B, T, N, H), D = query.shape, value.shape[-1]
        if key.shape[2] != N:
            self.lacks("kv_heads|value_heads")
        rate, seed = dropout or (0.0, 0)
        layer = self.layer(N, H, D, query.dtype, rate)
        mask = raw_mask if mask is None else mask
        if mask is not None and mask.shape[:2] == (1, 1):
            mask = mask[0, 0]
        flat = [x.reshape(*x.shape[:2], x.shape[2] * x.shape[3]) for x in (query, key, value)]
        call = jax.vmap(lambda q, k, v, rng: layer(q, k, v, mask, key=rng, inference=not rate))
        return call(*flat, jax.random.split(jax.random.key(seed), B)).reshape(B, T, N, D)


if __name__ == "__main__":
    main(Equinox())
