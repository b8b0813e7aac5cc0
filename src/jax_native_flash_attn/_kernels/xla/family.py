"""The forward kernel in pure JAX: which of several equal forms of it runs.

Bounds of the logits. A softmax may subtract anything from its logits. Subtracting the largest one costs passes over
the logits, which XLA has to write for it. A bound needs none: by Cauchy and Schwarz
|scale * q_t . k_s| <= |scale| |q_t| max_s |k_s| =: b_t, which is the same whatever tile comes first: nothing is
corrected. On accelerators exp(z_ts - b_t) is rounded to bfloat16 inside the product that makes z, never written in
float32.

It is as exact as long as nothing underflows: z_ts >= -b_t, so that the largest weight of a row is at least exp(-2 b_t),
and float32 and bfloat16 have normal numbers down to exp(-87). What lies 2^-24 below the largest weight counts for
nothing, and log(2^24) < 17: hence 2 b_t <= 70.

Forms that assume that all is finite (CPU); if a result is not, the usual form runs. Products for all heads at once,
where rows are few: keys and values are read as they lie, but 0 * inf, which is NaN, reaches all heads, even from
padding. Masks as a minimum, where rows and keys are few: XLA fuses it with softmax and products, but NaN passes it.

Documents (CPU). A boolean mask that allows blocks along the diagonal wants tiles as small as those; any other wants
large tiles, in which products are twice as fast.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ..._semantics.call import Config, Inputs
from ..protocol import Target
from . import kernels
from .tiles import Tiles

_LARGEST_BOUND = 35.0
_ROUNDING = 1.001  # of norms and products
_FEW_TILES = 0.3  # of small tiles with an allowed key: then they win


def forward(config: Config, inputs: Inputs, target: Target) -> tuple[jax.Array, ...]:
    """As `kernels.forward`."""
    tiles = Tiles(config, inputs, target)
    finite = Tiles(config, inputs, target, assumes_finite=True)
    if finite.nest.tile != tiles.nest.tile:
        results = kernels.forward(finite)
        is_finite = jnp.isfinite(results[0].sum())  # of a large array faster than isfinite of each
        return lax.cond(is_finite, lambda: results, lambda: kernels.forward(tiles))
    small = Tiles(config, inputs, target, has_documents=True)
    has_documents = None if small.nest.tile == tiles.nest.tile else small.nest.occupied_share <= _FEW_TILES

    def by_documents(tiles: Tiles, bounds: jax.Array | None = None) -> tuple[jax.Array, ...]:
        def large() -> tuple[jax.Array, ...]:
            return kernels.forward(tiles, bounds)

        if has_documents is None:
            return large()
        return lax.cond(has_documents, lambda: kernels.forward(small, bounds), large)

    if not tiles.may_be_bounded:
        return by_documents(tiles)
    bounded = Tiles(config, inputs, target, is_bounded=True)
    bounds = _bounds(inputs, bounded)
    is_bounded = (bounds <= _LARGEST_BOUND).all()
    return lax.cond(is_bounded, lambda: by_documents(bounded, bounds), lambda: by_documents(tiles))


def _bounds(inputs: Inputs, tiles: Tiles) -> jax.Array:
    """Of the absolute logits of each row, (batch..., N, T), in accumulation dtype; not finite if the inputs are not."""
    z, dtype = tiles.sizes, tiles.accumulate
    query, key = (jnp.square(x.astype(dtype)).sum(-1) for x in (inputs.query, inputs.key))
    if inputs.mask.key_value_length is not None:
        positions = jnp.arange(z.S, dtype=jnp.int32).reshape((1,) * (key.ndim - 2) + (-1, 1))
        key = jnp.where(positions < inputs.mask.key_value_length[..., None, None], key, 0)
    query, key = jnp.moveaxis(query, -1, -2), key.max(-2)[..., None]  # (batch..., N, T), (batch..., K, 1)
    key = jnp.repeat(key, z.G, -2)
    scale = jnp.abs(inputs.scale)[..., None, None]
    return jnp.broadcast_to(jnp.sqrt(query * key) * scale * _ROUNDING, (*z.batch, z.N, z.T))
