# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
#     "flash-attention-jax==0.3.1",
# ]
# ///
"""`flash_attention` and `causal_flash_attention` of flash-attention-jax."""

import jax.numpy as jnp
from flash_attention_jax import causal_flash_attention, flash_attention
from frameworks import JaxAdapter, main


class FlashAttentionJax(JaxAdapter):
    name = "flash-attention-jax"
    packages = ("flash-attention-jax", "jax")
    functions = (lambda q, k, v, key_mask: None,)  # both are objects of custom_vjp
    row_masks = False
    mask_shapes = ("B N T S", "B 1 T S", "B 1 1 S", "B S")
    by = {name: "`causal_flash_attention`" for name in ("causal", "causal_more_queries")}  # noqa: RUF012

    def native(self, query, key, value):
        query, key, value = map(jnp.asarray, (query, key, value))
        return flash_attention(query, key, value, jnp.ones((key.shape[0], key.shape[-2]), bool))

    def apply(self, query, key, value, *, causal=False, raw_mask=None, mask=None, **options):
        self.refuse(options)
        if key.shape[2] != query.shape[2]:
            self.lacks("heads")
        (B, S), query, key, value = key.shape[:2], *(jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        if mask is not None:
            raw_mask = jnp.broadcast_to(mask[:, 0, 0], (B, S))
        raw_mask = jnp.ones((B, S), bool) if raw_mask is None else raw_mask
        out = causal_flash_attention(query, key, value) if causal else flash_attention(query, key, value, raw_mask)
        return jnp.swapaxes(out, 1, 2)


if __name__ == "__main__":
    main(FlashAttentionJax())
