# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
#     "marin-haliax==0.2.227.dev40316220070",
# ]
# ///
"""`haliax.nn.attention.dot_product_attention` of named arrays."""

import haliax
import jax.numpy as jnp
from frameworks import JaxAdapter, main
from haliax.nn.attention import causal_mask, dot_product_attention


class Haliax(JaxAdapter):
    name = "haliax"
    packages = ("marin-haliax", "jax")
    functions = (dot_product_attention,)
    by = {  # noqa: RUF012
        "layout": "named axes, in any order",
        "heads": "an axis of N / K heads in the query",
        "causal": "`causal_mask`",
        "causal_more_queries": "`causal_mask`",
    }

    def native(self, query, key, value):
        assert (len(query), *query.shape[2:3]) == (2, 3)  # any order works if it is named
        return self.apply(*map(jnp.asarray, (query, key, value)))

    def apply(self, query, key, value, *, causal=False, raw_mask=None, mask=None, bias=None, **options):
        self.refuse(options)
        (B, T, N, H), K, D = query.shape, key.shape[2], value.shape[-1]
        keys = ("batch", "columns", "heads", "features")
        query = haliax.named(query.reshape(B, T, K, N // K, H), ("batch", "rows", "heads", "group", "features"))
        key, value = haliax.named(key, keys), haliax.named(value, (*keys[:3], "out"))
        names = ("batch", "heads", "rows", "columns")
        if causal:
            mask = causal_mask(query.resolve_axis("rows"), key.resolve_axis("columns"))
        elif mask is not None:
            mask = haliax.named(mask[0, 0], names[2:])
        elif raw_mask is not None:
            axes = [name for name, size in zip(names[-raw_mask.ndim :], raw_mask.shape, strict=True) if size != 1]
            mask = haliax.named(raw_mask.squeeze(), axes)
        if bias is not None:
            bias = haliax.named(bias[0], names[1:])
        out = dot_product_attention("columns", "features", query, key, value, mask=mask, bias=bias)
        return out.rearrange(("batch", "rows", "heads", "group", "out")).array.reshape(B, T, N, D)


if __name__ == "__main__":
    main(Haliax())
