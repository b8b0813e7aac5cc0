# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
#     "flax==0.12.12",
# ]
# ///
"""`flax.nnx.dot_product_attention`."""

import jax
from flax import nnx
from frameworks import JaxAdapter, main


class FlaxNNX(JaxAdapter):
    name = "flax.nnx"
    packages = ("flax", "jax")
    function = staticmethod(nnx.dot_product_attention)
    functions = (nnx.dot_product_attention,)

    def native(self, query, key, value):
        return self.function(query, key, value)

    def apply(self, query, key, value, *, causal=False, raw_mask=None, dropout=None, **options):
        self.refuse(options, "scale", "sinks", "lengths", "segments", "soft_cap")
        if raw_mask is not None:
            options["mask"] = raw_mask
        if causal:
            options["is_causal"] = True
        if dropout:
            options |= {"dropout_rate": dropout[0], "dropout_rng": jax.random.key(dropout[1])}
        return self.function(query, key, value, **options)


if __name__ == "__main__":
    main(FlaxNNX())
