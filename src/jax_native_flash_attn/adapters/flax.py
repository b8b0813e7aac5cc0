"""For Flax: the `attention_fn` of the attention layers of `flax.nnx` and `flax.linen`."""

from typing import Any

import jax
import jax.numpy as jnp

from ._attend import attend


def attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    is_causal: bool = False,
    input_positions: Any = None,
    **options: Any,
) -> jax.Array:
    """What `nnx.MultiHeadAttention` and `linen.MultiHeadDotProductAttention` take as `attention_fn`.

    The result, its gradients and its dropout are those of `flax.nnx.dot_product_attention` and
    `flax.linen.dot_product_attention`, in memory linear in T and S.

    Example::

        from flax import nnx
        from jax_native_flash_attn.adapters.flax import attention_fn

        layer = nnx.MultiHeadAttention(8, 512, decode=False, rngs=nnx.Rngs(0), attention_fn=attention_fn)
        out = layer(x, is_causal=True)  # (B, T, 512)

    For more than Flax passes, wrap it: `functools.partial(attention_fn, local_window_size=(1023, 0))`.

    Args:
      query: (..., T, N, H), with any number of batch axes, or none.
      key: (..., S, K, H); N is a multiple of K.
      value: (..., S, K, D).
      bias: real, added to the logits; broadcastable to (..., N, T, S).
      mask: of any dtype; a query may attend where it is not 0; broadcastable to (..., N, T, S).
      broadcast_dropout: True to drop the same weights in all batch rows and heads.
      dropout_rng: PRNG key; needed if weights are dropped.
      dropout_rate: probability, in [0, 1], of dropping an attention weight.
      deterministic: True for no dropout, and no need of `dropout_rng`.
      dtype: of the computation and the result; by default the one that query, key and value promote to.
      precision: of the matrix products.
      module: a layer that is to keep the attention weights, which `sow_weights=True` asks for. They are T x S, so
        Flax's own function computes this call.
      force_fp32_for_softmax: no matter here, as the softmax is float32 or wider in any case.
      qk_attn_weights_einsum, attn_weights_value_einsum: None.
      is_causal: query t attends keys up to t (aligned at the top left if T != S).
      input_positions: None.
      options: what else `flash_attention` takes, by its names. There, B is the product of all batch axes.

    Returns:
      (..., T, N, D).

    Raises:
      NotImplementedError: an einsum of one's own, `input_positions`, or `module` together with `options`.
      ValueError, TypeError: as `flash_attention`.
    """
    if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
        raise NotImplementedError(
            "qk_attn_weights_einsum and attn_weights_value_einsum must be None: attention weights are never a whole "
            "array here. Build the layer without qk_attn_weights_einsum_cls and attn_weights_value_einsum_cls, or "
            "without this attention_fn"
        )
    if input_positions is not None:
        raise NotImplementedError(
            "input_positions must be None: attention itself has no rotary embedding. As attention_fn pass a function "
            "of yours that rotates query and key and then calls this one"
        )
    if module is not None:
        if options:
            raise NotImplementedError(
                f"sow_weights=True makes Flax's own function compute the weights, which does not take "
                f"{', '.join(options)}: leave out one of them"
            )
        return _with_weights(
            module,
            is_causal,
            force_fp32_for_softmax,
            query=query,
            key=key,
            value=value,
            bias=bias,
            mask=mask,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            dtype=dtype,
            precision=precision,
        )
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    return attend(
        query,
        key,
        value,
        bias,
        mask,
        is_causal=is_causal,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        deterministic=deterministic,
        broadcast_dropout=broadcast_dropout,
        precision=precision,
        **options,
    )


def _with_weights(module: Any, is_causal: bool, force_fp32_for_softmax: bool, **call: Any) -> jax.Array:
    """Flax's own attention, which hands the weights to `module`."""
    from flax import linen, nnx

    if isinstance(module, linen.Module):
        return linen.dot_product_attention(**call, module=module, force_fp32_for_softmax=force_fp32_for_softmax)
    if is_causal:  # Flax before 0.12 does not know it.
        call["is_causal"] = True
    return nnx.dot_product_attention(**call, module=module)
