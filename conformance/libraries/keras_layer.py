# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
#     "keras==3.15.1",
# ]
# ///
"""`keras.layers.MultiHeadAttention` on JAX, with projections that are the identity."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax.numpy as jnp
import keras
import numpy as np
from frameworks import JaxAdapter, main

Layer = keras.layers.MultiHeadAttention


class KerasLayer(JaxAdapter):
    name = "keras MultiHeadAttention"
    packages = ("keras", "jax")
    functions = (Layer.__init__, Layer.call)
    jit = False
    float16_modes = ("",)
    mask_shapes = ("B N T S", "B 1 T S", "B T S", "T S")
    windows = {"sliding_window=3": {"window": 3}}  # noqa: RUF012

    def native(self, query, key, value):
        return self.layer(3, query.shape[-1] // 3, query.shape[-1] // 3)(query, value, key)

    def layer(self, N, H, D, dtype="float32", **options):
        layer = Layer(N, H, D, use_bias=False, output_shape=N * D, dtype=dtype, **options)
        layer.build((1, 4, N * H), (1, 4, N * D), (1, 4, N * H))
        eyes = (np.eye(N * H).reshape(N * H, N, H),) * 2 + (np.eye(N * D).reshape(N * D, N, D),)
        layer.set_weights([*eyes, np.eye(N * D).reshape(N, D, N * D)])
        return layer

    def apply(self, query, key, value, *, causal=False, raw_mask=None, mask=None, window=None, dropout=None, **options):
        self.refuse(options, bias="att.*_bias", scale="^scale")
        (B, T, N, H), D = query.shape, value.shape[-1]
        if key.shape[2] != N:
            self.lacks("kv_heads|value_heads")
        more = {"dropout": dropout[0], "seed": dropout[1]} if dropout else {}
        layer = self.layer(N, H, D, query.dtype.name, sliding_window=window, **more)
        if mask is not None:
            raw_mask = jnp.broadcast_to(mask[:, 0], (B, *mask.shape[2:]))
        query, key, value = (x.reshape(*x.shape[:2], x.shape[2] * x.shape[3]) for x in (query, key, value))
        out = layer(query, value, key, attention_mask=raw_mask, use_causal_mask=causal, training=bool(dropout))
        return out.reshape(B, T, N, D)


if __name__ == "__main__":
    main(KerasLayer())
