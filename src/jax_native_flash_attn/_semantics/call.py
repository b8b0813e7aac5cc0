"""The operands of a call as the kernels get them: the static part, the arrays, and the axes of each array."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .dropout import Dropout
from .masks import Band, MaskOperands
from .sizes import Sizes


@dataclass(frozen=True)
class Config:
    """The static part of a call.

    `implementation` is what the caller asked for. `rounds_out` asks for out in query's dtype; derivatives need it
    unrounded, in accumulation dtype, and with `adds_rounded` get it rounded too, behind the other results.
    """

    band: Band
    dropout: Dropout | None
    block_q: int | None
    block_kv: int | None
    precision: Any
    needs_lse: bool
    implementation: str | None = None
    rounds_out: bool = False
    adds_rounded: bool = False


class Inputs(NamedTuple):
    """The arrays of a call; any batch axis, and any axis of bias and mask, may have size 1 and then broadcasts.

    Attributes:
      query: (batch..., T, N, H).
      key, value: (batch..., S, K, H) and (batch..., S, K, D).
      scale: (batch...) multiplier of the products, in accumulation dtype.
      bias: (batch..., N, T, S) or None.
      mask: see `MaskOperands`.
      dropout_key: (batch..., 2) uint32, or None without dropout.
      head_index: (batch..., N) uint32, the number b * N + n of a head in the dropout mask, or None.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    scale: jax.Array
    bias: jax.Array | None
    mask: MaskOperands
    dropout_key: jax.Array | None
    head_index: jax.Array | None

    @property
    def sizes(self) -> Sizes:
        *_, T, N, H = self.query.shape
        *_, S, K, D = self.value.shape
        arrays = {name: x for name, x in _fields(self).items() if x is not None}
        return Sizes(batch_of(arrays), T, S, K, N // K, H, D)


# Axes behind the batch axes; also of results, which are laid out as the field of the same name.
LAYOUTS = {
    "query": "TNH",
    "key": "SKH",
    "value": "SKD",
    "scale": "",
    "bias": "NTS",
    "key_start": "NT",
    "key_stop": "NT",
    "allowed": "NTS",
    "dead": "NT",
    "key_value_length": "",
    "dropout_key": "W",
    "head_index": "N",
    "out": "TND",
    "lse": "NT",
}

FLOAT_FIELDS = ("query", "key", "value", "scale", "bias")


def _fields(inputs: Inputs) -> dict[str, Any]:
    fields = inputs._asdict()
    mask: MaskOperands = fields.pop("mask")
    return fields | mask._asdict()


def field_names(structure: Any) -> tuple[str, ...]:
    """Names of the leaves of `Inputs` with this tree structure, in order."""
    positions = _fields(jax.tree.unflatten(structure, range(structure.num_leaves)))
    names = {position: name for name, position in positions.items() if position is not None}
    return tuple(names[i] for i in range(structure.num_leaves))


def batch_of(arrays: Mapping[str, Any]) -> tuple[Any, ...]:
    """The batch axes that these arrays broadcast to."""
    return jnp.broadcast_shapes(*(x.shape[: x.ndim - len(LAYOUTS[name])] for name, x in arrays.items()))


def sum_to(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A result in its prescribed shape, summed over the axes that have size 1 there, and in its dtype."""
    axes = tuple(i for i, (n, m) in enumerate(zip(x.shape, like.shape, strict=True)) if n != m)
    return (x.sum(axes, keepdims=True) if axes else x).astype(like.dtype)
