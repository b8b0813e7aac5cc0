# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
#     "flax==0.12.12",
# ]
# ///
"""`flax.linen.dot_product_attention`."""

import flax.linen
import jax
from flax_nnx import FlaxNNX
from frameworks import main


class FlaxLinen(FlaxNNX):
    name = "flax.linen"
    function = staticmethod(flax.linen.dot_product_attention)
    functions = (flax.linen.dot_product_attention,)

    def apply(self, query, key, value, *, causal=False, **options):
        if causal:  # no argument: the library's own mask
            self.by = {"causal": "`make_causal_mask`", "causal_more_queries": "`make_causal_mask`"}
            rows, columns = query.shape[1], key.shape[1]
            whole = flax.linen.make_causal_mask(jax.numpy.ones((1, max(rows, columns))))
            options["mask"] = whole[..., :rows, :columns]
        return super().apply(query, key, value, **options)


if __name__ == "__main__":
    main(FlaxLinen())
