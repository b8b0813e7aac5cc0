# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
# ]
# ///
# ruff: noqa: RUF012
"""This library, from the folder `src` beside this one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

import warnings

import jax
import jax.numpy as jnp
from frameworks import JaxLseAdapter, main

from jax_native_flash_attn import AttentionWarning, flash_attention, flash_attention_with_lse

warnings.simplefilter("ignore", AttentionWarning)  # causal with fewer queries than keys is what is asked


class Ours(JaxLseAdapter):
    name = "here"
    packages = ("jax", "numpy")
    functions = (flash_attention, flash_attention_with_lse)
    implementation = None
    windows = {"local_window_size=3": {"window": 3}, "(3, 0)": {"window": (3, 0)}}

    def native(self, query, key, value):
        return flash_attention(query, key, value, implementation=self.implementation)

    def apply(self, query, key, value, **options):
        causal, with_lse = options.pop("causal", False), options.pop("with_lse", False)
        segments = jnp.asarray(options.pop("segments")) if "segments" in options else None
        if segments is not None:
            segments = jnp.broadcast_to(segments, query.shape[:2])
        rate, seed = options.pop("dropout", (0.0, 0))
        if "raw_mask" in options:
            options["mask"] = options.pop("raw_mask")
        names = {"window": "local_window_size", "soft_cap": "logits_soft_cap", "lengths": "key_value_seq_lengths"}
        return (flash_attention_with_lse if with_lse else flash_attention)(
            query,
            key,
            value,
            is_causal=causal,
            query_segment_ids=segments,
            key_value_segment_ids=segments,
            dropout_rate=rate,
            dropout_rng=jax.random.key(seed) if rate else None,
            implementation=self.implementation,
            **{names.get(name, name): x for name, x in options.items()},
        )


if __name__ == "__main__":
    main(Ours())
