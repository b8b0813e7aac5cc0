"""The public function of `jax.nn` that calls cuDNN: its value, its log-sum-exp in float32, and its gradients.

`return_residual=True` gives a log-sum-exp that is rounded to 16 bits. But what `jax.vjp` returns is a pytree of what
the backward kernel needs, and among its leaves are cuDNN's own float32 log-sum-exp and the output itself. So

- the forward pass takes the log-sum-exp from there;
- the backward pass puts saved results in their place. The forward call that was traced for it is then dead, and XLA
  drops it: under `jax.checkpoint` and in scans, too, where XLA could not merge two forward calls.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..jax_nn import jax_attention


class Request(NamedTuple):
    """What is static in a call of `jax.nn`. `window`: how many keys before its own a row attends; None: all."""

    scale: float
    is_causal: bool = False
    window: int | None = None


class Operands(NamedTuple):
    """Arrays of a call of `jax.nn`.

    query (B, T, N, H), key and value (B, S, K, H), bias and mask (B or 1, N or 1, T, S), lengths (B,) int32.
    """

    query: Any
    key: Any
    value: Any
    bias: Any = None
    mask: Any = None
    query_lengths: Any = None
    key_lengths: Any = None


def attention(request: Request, operands: Operands) -> jax.Array:
    """(B, T, N, H)"""
    query, key, value, bias, mask, query_lengths, key_lengths = operands
    return jax_attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=request.scale,
        is_causal=request.is_causal,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        local_window_size=None if request.window is None else (request.window, 0),
        implementation="cudnn",
    )


def attention_and_lse(request: Request, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """(B, T, N, H), and (B, N, T) in float32.

    Raises:
      LookupError: what `jax.vjp` returns in this version of JAX does not show the log-sum-exp.
    """
    out, pullback = _vjp(request, operands)
    leaves, _, (_, lse) = _flattened(pullback, out)
    return out, leaves[lse]


def gradients(request: Request, operands: Operands, out: jax.Array, lse: jax.Array, dout: jax.Array) -> Operands:
    """Of query, key, value and bias, from results that `attention_and_lse` gave; all of the operands' dtypes.

    Raises:
      LookupError: as `attention_and_lse`.
    """
    made, pullback = _vjp(request, operands)
    leaves, structure, (at_out, at_lse) = _flattened(pullback, made)
    leaves[at_out], leaves[at_lse] = out, lse
    return Operands(*jax.tree.unflatten(structure, leaves)(dout))


def _vjp(request: Request, operands: Operands) -> tuple[jax.Array, Any]:
    count = 3 if operands.bias is None else 4
    return jax.vjp(lambda *floats: attention(request, Operands(*floats, *operands[count:])), *operands[:count])


def _flattened(pullback: Any, out: jax.Array) -> tuple[list[Any], Any, tuple[int, int]]:
    """What `jax.vjp` returned as leaves and their structure, and the places of output and log-sum-exp among them."""
    leaves, structure = jax.tree.flatten(pullback)
    B, T, N, _ = out.shape
    outs = [i for i, x in enumerate(leaves) if x is out]
    lses = [
        i
        for i, x in enumerate(leaves)
        if getattr(x, "shape", None) == (B, N, T) and getattr(x, "dtype", None) == jnp.float32
    ]
    if len(outs) != 1 or len(lses) != 1:
        raise LookupError(
            f"jax.vjp of jax.nn's cuDNN call shows {len(outs)} outputs and {len(lses)} log-sum-exps in JAX "
            f"{jax.__version__}"
        )
    return leaves, structure, (outs[0], lses[0])
