# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
# ]
# ///
# ruff: noqa: RUF012
"""`jax.nn.dot_product_attention`."""

import jax
from frameworks import JaxLseAdapter, main


class JaxNN(JaxLseAdapter):
    name = "jax.nn"
    packages = ("jax", "numpy")
    function = staticmethod(jax.nn.dot_product_attention)
    functions = (jax.nn.dot_product_attention,)
    implementation = None
    windows = {"local_window_size=3": {"window": 3}, "(3, 0)": {"window": (3, 0)}}

    def native(self, query, key, value):
        return self.function(query, key, value, implementation=self.implementation)

    def apply(
        self, query, key, value, *, causal=False, raw_mask=None, mask=None, window=None, with_lse=False, **options
    ):
        self.refuse(options, "soft_cap", "sinks", "segments", "dropout")
        mask = mask if raw_mask is None else raw_mask
        options |= {"key_value_seq_lengths": options.pop("lengths")} if "lengths" in options else {}
        options |= {"return_residual": True} if with_lse else {}
        return self.function(
            query,
            key,
            value,
            mask=mask,
            is_causal=causal,
            local_window_size=window,
            implementation=self.implementation,
            **options,
        )


if __name__ == "__main__":
    main(JaxNN())
