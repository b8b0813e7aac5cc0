"""For Equinox: `MultiheadAttention` with the parameters of Equinox's own."""

# Pyright takes this file for the library where that is not installed.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from .._api import flash_attention
from ._attend import as_bool


class MultiheadAttention(eqx.nn.MultiheadAttention):
    """`equinox.nn.MultiheadAttention` in memory linear in the lengths.

    Arguments and fields are those of `equinox.nn.MultiheadAttention`, of which this is a subclass. `from_layer` takes
    over a layer that there is; saved leaves load into either.

    Example::

        import equinox as eqx
        import jax
        from jax_native_flash_attn.adapters.equinox import MultiheadAttention

        layer = MultiheadAttention(num_heads=8, query_size=512, key=jax.random.key(0))
        out = jax.vmap(lambda x: layer(x, x, x, is_causal=True))(batch)  # (B, T, 512)
    """

    @classmethod
    def from_layer(cls, layer: eqx.nn.MultiheadAttention) -> "MultiheadAttention":
        """The same layer, with the same arrays."""
        sizes = ("num_heads", "query_size", "key_size", "value_size", "output_size", "qk_size", "vo_size")
        biases = ("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias")
        given = {name: getattr(layer, name) for name in (*sizes, *biases)}
        like: Any = eqx.filter_eval_shape(cls, **given, key=jax.random.key(0))
        return eqx.tree_at(_parts, like, _parts(layer))

    def __call__(
        self,
        query: jax.Array,
        key_: jax.Array,
        value: jax.Array,
        mask: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
        inference: bool | None = None,
        process_heads: Callable[..., Any] | None = None,
        **options: Any,
    ) -> jax.Array:
        """Attention of heads, between projections; without a batch axis, as all layers of Equinox.

        Args:
          query: (T, query_size).
          key_: (S, key_size).
          value: (S, value_size).
          mask: (T, S) or (N, T, S) of any dtype; a query may attend where it is not 0. In place of a mask that is
            causal, a window or padding pass `is_causal`, `local_window_size`, or segment ids: no array of T x S
            elements is made then.
          key: PRNG key; needed if weights are dropped. Those that Equinox drops are dropped, which splits the key, one
            for each head.
          inference: True for no dropout; by default what the field `dropout.inference` says.
          process_heads: a function of query, key and value heads, (T, N, H), (S, N, H) and (S, N, D), that gives new
            ones of the same shapes; for rotary embeddings.
          options: what else `flash_attention` takes, by its names.

        Returns:
          (T, output_size).

        Raises:
          ValueError: an input of another rank; `process_heads` changes shapes; a missing `key`; and as
            `flash_attention`.
          TypeError: `dropout_rate` or `dropout_rng` while weights are dropped, by what the layer says.
          NotImplementedError: `bias` or `sinks` while weights are dropped.
        """
        for name, x in ("query", query), ("key_", key_), ("value", value):
            if x.ndim != 2:
                raise ValueError(f"{name} must have shape (length, features), got {x.shape}: take jax.vmap of more")
        given = [(self.query_proj, query), (self.key_proj, key_), (self.value_proj, value)]
        heads = [jax.vmap(project)(x).reshape(x.shape[0], self.num_heads, -1) for project, x in given]
        if process_heads is not None:
            shapes = [x.shape for x in heads]
            heads = list(process_heads(*heads))
            if [x.shape for x in heads] != shapes:
                raise ValueError(
                    f"process_heads must keep the shapes of query, key and value, got {[x.shape for x in heads]} from "
                    f"{shapes}"
                )
        mask = as_bool(mask)
        if inference is None:
            inference = self.dropout.inference
        if inference or (isinstance(self.dropout.p, int | float) and self.dropout.p == 0):
            out = flash_attention(*heads, mask=mask, **options)
        else:
            out = self._dropped(heads, mask, key, options)
        return jax.vmap(self.output_proj)(out.reshape(out.shape[0], -1))

    def _dropped(self, heads: list[jax.Array], mask: Any, rng: jax.Array | None, options: Any) -> jax.Array:
        """Each head with a key of its own, as Equinox splits them."""
        if rng is None:
            raise ValueError("key must be a PRNG key if weights are dropped, got None: or pass inference=True")
        if own := [name for name in ("dropout_rate", "dropout_rng") if name in options]:
            raise TypeError(
                f"{own[0]} must be left out while the layer drops weights itself, by its dropout.p = {self.dropout.p} "
                "and key: set the rate with dropout_p where the layer is built, or pass inference=True for none"
            )
        if refused := [name for name in ("bias", "sinks") if options.get(name) is not None]:
            raise NotImplementedError(
                f"{refused[0]} must be None while weights are dropped, as it has an axis of heads, over which dropout "
                "goes as Equinox's does: pass inference=True, build the layer without dropout_p, or call "
                "flash_attention in a layer of your own"
            )

        def head(heads: list[jax.Array], mask: Any, rng: jax.Array) -> jax.Array:
            query, key, value = (x[:, None] for x in heads)
            out = flash_attention(query, key, value, mask=mask, dropout_rate=self.dropout.p, dropout_rng=rng, **options)
            return out[:, 0]

        mask_axis = 0 if mask is not None and mask.ndim == 3 and mask.shape[0] > 1 else None
        return jax.vmap(head, (1, mask_axis, 0), 1)(heads, mask, jax.random.split(rng, self.num_heads))


def _parts(layer: eqx.nn.MultiheadAttention) -> Any:
    return layer.query_proj, layer.key_proj, layer.value_proj, layer.output_proj, layer.dropout
