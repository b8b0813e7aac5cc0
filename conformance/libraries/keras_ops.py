# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
#     "keras==3.15.1",
# ]
# ///
"""`keras.ops.dot_product_attention` on JAX."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
from frameworks import JaxAdapter, main


class KerasOps(JaxAdapter):
    name = "keras.ops"
    packages = ("keras", "jax")
    functions = (keras.ops.dot_product_attention,)

    def native(self, query, key, value):
        return keras.ops.dot_product_attention(query, key, value)

    def apply(self, query, key, value, *, causal=False, raw_mask=None, mask=None, soft_cap=None, **options):
        self.refuse(options, "sinks", "lengths", "segments", "dropout")
        mask = mask if raw_mask is None else raw_mask
        return keras.ops.dot_product_attention(
            query, key, value, mask=mask, is_causal=causal, attn_logits_soft_cap=soft_cap, **options
        )


if __name__ == "__main__":
    main(KerasOps())
