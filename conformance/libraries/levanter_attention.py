# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.11.2",
#     "jaxlib==0.11.2",
#     "numpy==2.5.5",
#     "equinox==0.13.8",
#     "marin-levanter==0.2.227.dev40316220070",
# ]
#
# [tool.uv]
# prerelease = "if-necessary-or-explicit"
# ///
# ruff: noqa: RUF012
"""`levanter.layers.attention.dot_product_attention`, with the back end that it takes for short rows (VANILLA)."""

import haliax
import jax
import jax.numpy as jnp
from frameworks import JaxAdapter, main
from levanter.layers.attention import AttentionBackend, AttentionMask, dot_product_attention


class Levanter(JaxAdapter):
    name = "levanter (VANILLA)"
    packages = ("marin-levanter", "jax")
    functions = (dot_product_attention, AttentionMask.__init__, AttentionMask.causal)
    backend = {"attn_backend": AttentionBackend.VANILLA}
    windows = {"AttentionMask.causal(sliding_window=3)": {"window": 3}}
    by = {
        "layout": "named axes, in any order",
        "heads": "an axis of N / K heads in the query",
        "causal": "`AttentionMask.causal()`",
        "causal_more_queries": "`AttentionMask.causal()`",
    }

    def native(self, query, key, value):
        assert (len(query), *query.shape[2:3]) == (2, 3)  # any order works if it is named
        return self.apply(*map(jnp.asarray, (query, key, value)))

    def apply(
        self, query, key, value, *, causal=False, raw_mask=None, mask=None, bias=None, window=None, segments=None,
        soft_cap=None, scale=None, sinks=None, dropout=None, **options,
    ):  # fmt: skip
        self.refuse(options)
        (B, T, N, H), K, D = query.shape, key.shape[2], value.shape[-1]
        keys = ("batch", "columns", "heads", "features")
        query = haliax.named(query.reshape(B, T, K, N // K, H), ("batch", "rows", "heads", "group", "features"))
        key, value = haliax.named(key, keys), haliax.named(value, keys)
        names = ("batch", "heads", "rows", "columns")
        if causal:
            mask = AttentionMask.causal()
        elif window is not None:
            mask = AttentionMask.causal(sliding_window=window)
        elif segments is not None:
            mask = AttentionMask(is_causal=False).with_segment_ids(
                haliax.named(segments, "rows"), haliax.named(segments, "columns")
            )
        elif mask is not None:
            mask = haliax.named(mask[0, 0], names[2:])
        elif raw_mask is not None:
            axes = [name for name, size in zip(names[-raw_mask.ndim :], raw_mask.shape, strict=True) if size != 1]
            mask = haliax.named(raw_mask.squeeze(), axes)
        if bias is not None:
            bias = haliax.named(bias[0], names[1:])
        if sinks is not None:
            sinks = haliax.named(sinks.reshape(K, N // K), ("heads", "group"))
        rate, seed = dropout or (0.0, 0)
        out = dot_product_attention(
            "rows", "columns", query.resolve_axis("features"), query, key, value, mask=mask, bias=bias,
            logits_soft_cap=soft_cap, scaling_factor=scale, attn_sink=sinks, dropout=rate, inference=not rate,
            prng=jax.random.key(seed), **self.backend,
        )  # fmt: skip
        return out.rearrange(("batch", "rows", "heads", "group", "features")).array.reshape(B, T, N, D)


if __name__ == "__main__":
    main(Levanter())
