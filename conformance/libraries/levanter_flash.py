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
"""`levanter.layers.attention.dot_product_attention`, with the back end that it takes on a CPU from 1024 tokens on."""

from frameworks import main
from levanter.layers.attention import AttentionBackend
from levanter_attention import Levanter


class LevanterFlash(Levanter):
    name = "levanter (JAX_FLASH)"
    backend = {"attn_backend": AttentionBackend.JAX_FLASH, "flash_block_size": 4}


if __name__ == "__main__":
    main(LevanterFlash())
