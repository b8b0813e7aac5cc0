# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "ejkernel==0.0.80.3",
#     "jax==0.10.2",
#     "jaxlib==0.10.2",
# ]
# ///
# ruff: noqa: RUF012
"""`ejkernel.modules.flash_attention`, its XLA implementation."""

import jax.numpy as jnp
from ejkernel.modules import flash_attention
from ejkernel.types import MaskInfo
from frameworks import JaxAdapter, main


class EjKernel(JaxAdapter):
    name = "ejkernel (XLA)"
    packages = ("ejkernel", "jax")
    functions = (flash_attention,)
    windows = {"sliding_window=3": {"window": 3}, "(3, 0)": {"window": (3, 0)}}
    by = {"segments": "`MaskInfo.from_segments`"} | {
        name: "`MaskInfo.from_attention_mask`"
        for name in ("mask_types", "mask_shapes", "row_without_keys", "nan_in_padding")
    }

    def native(self, query, key, value):
        return flash_attention(*map(jnp.asarray, (query, key, value)), platform="xla")

    def apply(
        self, query, key, value, *, causal=False, raw_mask=None, mask=None, bias=None, window=None, segments=None,
        soft_cap=None, scale=None, sinks=None, dropout=None, **options,
    ):  # fmt: skip
        self.refuse(options, lengths="^.*(seq|value)_lengths")
        if mask is not None:
            raw_mask = jnp.broadcast_to(mask, (len(query), *mask.shape[1:]))
        if segments is not None:
            ids = jnp.broadcast_to(segments, query.shape[:2])
            mask_info = MaskInfo.from_segments(ids, ids)
        else:
            mask_info = None if raw_mask is None else MaskInfo.from_attention_mask(raw_mask)
        rate, seed = dropout or (0.0, None)
        return flash_attention(
            query, key, value, bias, None, None, sinks, mask_info=mask_info, causal=causal, sliding_window=window,
            logits_soft_cap=soft_cap, softmax_scale=scale, dropout_prob=rate, dropout_seed=seed, platform="xla",
        )  # fmt: skip

    def lse(self, query, key, value, **options):
        self.lacks("lse|residual|logsumexp")

    def lse_gradient(self, query, key, value):
        self.lacks("lse|residual|logsumexp")


if __name__ == "__main__":
    main(EjKernel())
