"""The forward kernel in pure JAX: which of several equal forms of it runs.

Bounds of the logits. A softmax may subtract anything from its logits. Subtracting the largest one costs passes over
the logits, which XLA has to write for it. A bound needs none: by Cauchy and Schwarz
|scale * q_t . k_s| <= max |scale| |q_t| |k_s| =: b, which is the same whatever tile comes first: nothing is corrected.
On accelerators exp(z_ts - b) is rounded to bfloat16 inside the product that makes z, never written in float32.

It is as exact as long as nothing underflows: z_ts >= -b, so that the largest weight of a row is at least exp(-2 b),
and float32 and bfloat16 have normal numbers down to exp(-87). What lies 2^-24 below the largest weight counts for
nothing, and log(2^24) < 17: hence 2 b <= 70.

Whether that holds is known at run time. Then one of two kernels runs, but where the CPU takes several tiles of keys for
a row: it has one kernel, which takes the largest logits or does not.

Forms that assume that all is finite (CPU); if a result is not, the usual form runs. Products for all heads at once,
where rows are few: keys and values are read as they lie, but 0 * inf, which is NaN, reaches all heads, even from
padding. Masks as a minimum, where rows and keys are few: XLA fuses it with softmax and products, but NaN passes it.

Documents (CPU). A boolean mask that allows blocks along the diagonal wants tiles as small as those; any other wants
large tiles, in which products are twice as fast.
"""

import functools
import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax

from ..._semantics.call import Call
from ..._semantics.numerics import accumulation_dtype
from ..protocol import Forward, LinearPass, Pass, Target
from . import cotangent, forward, tangent
from .access import Index
from .forward import Bound
from .limits import Limits
from .plan import Plan, make_plan
from .tiles import Tiles

_LARGEST_BOUND = 35.0
_ROUNDING = 1.001  # of norms and products
_MOST_KEYS = 0.7  # between the first and the last that rows attend: then copying tiles of keys takes longer
_FEW_TILES = 0.3  # of small tiles with an allowed key: then they win


@dataclass(frozen=True)
class XlaKernels:
    """See `Kernels`. It supports every call.

    Attributes:
      limits: what every plan is made by.
    """

    limits: Limits = field(default_factory=Limits)
    name = "pure_jax"
    is_opaque = False

    def supports(self, call: Call, which: Pass, target: Target) -> str | None:
        return None

    def plan(self, call: Call, which: Pass, target: Target) -> Plan:
        """Of the usual form; derivatives of query, key and value."""
        if which is Pass.FORWARD:
            return make_plan(call, target, self.limits)
        return make_plan(call, target, self.limits, further=())

    def forward(self, call: Call, target: Target) -> Forward:
        # Of the forms, JAX differentiates the usual one alone.
        kernel = _forward if target.differentiated is None else _usual_forward
        out, *others = kernel(call, target, self.limits)
        lse = others.pop(0) if call.config.needs_lse else None
        max_logits = others.pop(0) if call.config.needs_max_logits else None
        dtype = call.inputs.query.dtype
        out_dtype = dtype if call.config.rounds_out else accumulation_dtype(dtype)
        return Forward(out.astype(out_dtype), lse, max_logits, out.astype(dtype) if call.config.adds_rounded else None)

    def cotangent(self, call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
        wanted = given.wanted
        plan = make_plan(
            call,
            target,
            self.limits,
            further=given.batch,
            summed_over_batch="bias" in wanted and math.prod(wanted["bias"].shape[-2:]) > 1,
            rounds_weights="scale" not in wanted,
        )
        return cotangent.cotangent(Tiles(call, plan), given.out, given.lse, given.operands, wanted)

    def makes_gradients_together(self, call: Call, given: LinearPass, target: Target) -> bool:
        return True

    def tangent(self, call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
        plan = make_plan(call, target, self.limits, further=given.batch)
        return tangent.tangent(Tiles(call, plan), given.out, given.lse, given.operands, given.wanted)


def _usual_forward(call: Call, target: Target, limits: Limits) -> tuple[jax.Array, ...]:
    return forward.forward(Tiles(call, make_plan(call, target, limits)))


def _forward(call: Call, target: Target, limits: Limits) -> tuple[jax.Array, ...]:
    """As `forward.forward`."""
    usual = make_plan(call, target, limits)
    tiles = Tiles(call, usual)
    finite = make_plan(call, target, limits, assumes_finite=True)
    if finite.tile != usual.tile:
        whole = make_plan(call, target, limits, assumes_finite=True, has_all_keys=True)
        forms = [Tiles(call, finite)] if whole.tile == finite.tile else [Tiles(call, finite), Tiles(call, whole)]
        if whole.tile.joins_heads and whole.tile.block_kv == whole.sizes.S:
            choice = 0 if len(forms) == 1 else jnp.where(_visible_share(forms[0]) > _MOST_KEYS, 1, 0)
            return _first_finite(choice, [*forms, tiles])
        results = forward.forward(forms[0])
        return lax.cond(_is_finite(results), lambda: results, lambda: forward.forward(tiles))
    small = Tiles(call, make_plan(call, target, limits, has_documents=True))
    has_documents = None if small.plan.tile == usual.tile else small.nest.occupied_share <= _FEW_TILES

    def by_documents(tiles: Tiles, bound: Bound | None = None) -> tuple[jax.Array, ...]:
        def large() -> tuple[jax.Array, ...]:
            return forward.forward(tiles, bound)

        if has_documents is None:
            return large()
        return lax.cond(has_documents, lambda: forward.forward(small, bound), large)

    if not usual.may_be_bounded or call.config.needs_max_logits:
        return by_documents(tiles)
    bounded = Tiles(call, make_plan(call, target, limits, is_bounded=True))
    bound = _bound(call, bounded.plan)
    is_bounded = bound <= _LARGEST_BOUND
    if usual.platform == "cpu" and not tiles.nest.visits_one_key_tile:
        return by_documents(tiles, Bound(bound, is_bounded))
    return lax.cond(is_bounded, lambda: by_documents(bounded, Bound(bound)), lambda: by_documents(tiles))


def _first_finite(choice: Index, tiles: list[Tiles]) -> tuple[jax.Array, ...]:
    """The results of the form chosen, or of the last one where they are not finite.

    In a loop, of one trip or two: XLA:CPU fuses nothing from outside into it. Else an update of a cache would become a
    part of all that reads the cache as a whole, and each of them would need a copy.
    """
    last = len(tiles) - 1
    forms = [functools.partial(forward.forward, x) for x in tiles]

    def step(state: tuple[jax.Array, tuple[jax.Array, ...]]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        results = lax.switch(state[0], forms)
        is_done = _is_finite(results) | (state[0] == last)
        return jnp.where(is_done, last + 1, last), results

    start = jnp.asarray(choice, jnp.int32), forward.zeros(tiles[last])
    return lax.while_loop(lambda state: state[0] <= last, step, start)[1]


def _visible_share(tiles: Tiles) -> jax.Array | float:
    """The share of the keys that lie between the first and the last one of a row, or in tiles that are visited."""
    nest, mask, S = tiles.nest, tiles.nest.mask, tiles.sizes.S
    if mask.allowed is not None:
        return nest.occupied_share
    if mask.key_start is None or mask.key_stop is None:
        start, stop = nest.band.intervals(tiles.sizes.T, S)
        return float((stop - start).mean()) / S
    return (mask.key_stop - mask.key_start).mean(dtype=jnp.float32) / S


def _is_finite(results: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.isfinite(results[0].sum())  # of a large array faster than isfinite of each


def _bound(call: Call, plan: Plan) -> jax.Array:
    """Of the absolute value of all logits, a scalar in accumulation dtype; not finite if the inputs are not."""
    z, dtype, inputs = plan.sizes, plan.accumulate, call.inputs
    query, key = (jnp.square(x.astype(dtype)).sum(-1) for x in (inputs.query, inputs.key))
    if inputs.mask.key_value_length is not None:
        positions = jnp.arange(z.S, dtype=jnp.int32).reshape((1,) * (key.ndim - 2) + (-1, 1))
        key = jnp.where(positions < inputs.mask.key_value_length[..., None, None], key, 0)
    query, key = query.max(-2), key.max(-2)  # (batch..., N), (batch..., K)
    query = query.reshape(*query.shape[:-1], z.K, z.G).max(-1)
    return (jnp.sqrt(query * key) * jnp.abs(inputs.scale)[..., None] * _ROUNDING).max()
