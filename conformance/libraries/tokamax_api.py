# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
#     "tokamax==0.0.17",
# ]
# ///
# ruff: noqa: RUF012
"""`tokamax.dot_product_attention`. On a CPU it takes its XLA implementation."""

import jax.numpy as jnp
import tokamax
from frameworks import JaxAdapter, main


class Tokamax(JaxAdapter):
    name = "tokamax"
    packages = ("tokamax", "jax")
    functions = (tokamax.dot_product_attention,)
    implementation = None
    windows = {"local_window_size=3": {"window": 3}, "(3, 0)": {"window": (3, 0)}}

    def native(self, query, key, value):
        arrays = map(jnp.asarray, (query, key, value))
        return tokamax.dot_product_attention(*arrays, implementation=self.implementation)

    def apply(
        self, query, key, value, *, causal=False, raw_mask=None, mask=None, window=None, soft_cap=None, **options
    ):
        self.refuse(options, "sinks", "segments", "dropout")
        mask = mask if raw_mask is None else raw_mask
        options |= {"key_value_seq_lengths": options.pop("lengths")} if "lengths" in options else {}
        return tokamax.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            is_causal=causal,
            local_window_size=window,
            logits_soft_cap=soft_cap,
            implementation=self.implementation,
            **options,
        )


if __name__ == "__main__":
    main(Tokamax())
