"""For Haiku: `MultiHeadAttention` with the parameters of Haiku's own."""

# Pyright takes this file for the library where that is not installed.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from ._attend import attend


class MultiHeadAttention(hk.MultiHeadAttention):
    """`haiku.MultiHeadAttention` in memory linear in the lengths.

    Arguments, parameters and their names are those of `haiku.MultiHeadAttention`, so parameters trained with one load
    into the other.

    Example::

        import haiku as hk
        from jax_native_flash_attn.adapters.haiku import MultiHeadAttention

        def layer(x):  # (B, T, 512)
            attention = MultiHeadAttention(num_heads=8, key_size=64, w_init=hk.initializers.VarianceScaling())
            return attention(x, x, x, is_causal=True)

        layer = hk.without_apply_rng(hk.transform(layer))
    """

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None, **options: Any
    ) -> jax.Array:
        """Attention of heads, between projections.

        Args:
          query: (..., T, D_q), with any number of batch axes, or none.
          key: (..., S, D_k); batch axes broadcastable to those of query.
          value: (..., S, D_v); as key.
          mask: of any dtype; a query may attend where it is not 0; broadcastable to (..., N, T, S), and of this rank.
            In place of a mask that is causal, a window or padding pass `is_causal`, `local_window_size`, or segment
            ids: no array of T x S elements is made then.
          options: what else `flash_attention` takes, by its names. There, B is the product of all batch axes.

        Returns:
          (..., T, model_size).

        Raises:
          ValueError: a mask of another rank; and as `flash_attention`.
        """
        batch = query.shape[:-2]
        if mask is not None and mask.ndim != query.ndim + 1:
            raise ValueError(
                f"mask must have rank {query.ndim + 1}, be broadcastable to (..., N, T, S), got shape {mask.shape}: "
                "add the axis of heads with mask[..., None, :, :]"
            )
        query_heads = self._heads(query, self.key_size, "query")
        key_heads, value_heads = (
            jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
            for x in (self._heads(key, self.key_size, "key"), self._heads(value, self.value_size, "value"))
        )
        out = attend(query_heads, key_heads, value_heads, None, mask, **options)
        return self._linear(self.model_size)(out.reshape(*batch, out.shape[-3], -1))

    @hk.transparent
    def _heads(self, x: jax.Array, head_size: int, name: str) -> jax.Array:
        """(..., length, features) to (..., length, N, head_size)."""
        return self._linear(self.num_heads * head_size, name)(x).reshape(*x.shape[:-1], self.num_heads, head_size)

    @hk.transparent
    def _linear(self, size: int, name: str | None = None) -> hk.Linear:
        return hk.Linear(size, w_init=self.w_init, with_bias=self.with_bias, b_init=self.b_init, name=name)
