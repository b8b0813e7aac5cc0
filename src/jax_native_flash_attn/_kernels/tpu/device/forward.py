"""The forward kernel: query rows are resident, keys are streamed.

    step (batch row, head, query block, streamed block)
      first step   row vectors are spread over lanes; maximum, sum and output start
      each tile    S = Q K^T -> logits -> maximum of each row -> weights P -> output += P V
                   the sum of a row is kept in 128 parts, one for each lane: added up at the end
      or           likewise with weights exp2(logits), and no maximum: tried first, where `Blocks` says so
      last step    sinks; output / sum; log-sum-exp, gathered along the lanes

Pallas reads the streamed block of the next step while one is computed. What waits for what inside a step is one chain
for each tile: products, their maximum, weights, products. Two tiles stand side by side in a loop, so that the chain of
one fills the gaps of the other: see `visits.py`.

Without a maximum nothing waits, and nothing is rescaled. Weights are rounded relative to their size, so it is as
accurate if no row's sum leaves the range of float32. That is checked behind each step's tiles. Where it is not so, the
step is undone and done with maxima, and so are those behind it. But beside a maximum, the weight of a key that has
nearly all is 1, which no rounding changes. Without one, it is rounded for the product. So the output is divided by the
sum of rounded weights, and this error drops out.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...._semantics.call import Call
from ...._semantics.numerics import LN2, LOG2E
from ..blocks import Blocks
from ..host.operands import Operand, flat, with_heads_first
from ..pallas import LANES, gathered, lane_sums, pltpu, product, repeated
from .kernel import Attempt, Kernel, Step
from .logits import LOWEST, At

_HAS_KEY = LOWEST / 2  # the largest logit of a row that has met a key is above
_FAR = 2.0**60  # a sum of weights above this, or below its inverse, may have lost some


def forward(call: Call, blocks: Blocks, precision: Any, interpret: Any) -> dict[str, jax.Array]:
    """'out' (batch, N, T, D) in float32 or query's dtype, 'rounded', and 'lse', 'max_logits' (batch, N, 1, T)."""
    config, inputs = call
    z = inputs.sizes
    batch, dtype, rows = math.prod(z.batch), inputs.query.dtype, blocks.resident
    operands = {
        "query": with_heads_first(inputs.query, "bnt-"),
        "key": with_heads_first(inputs.key, "bks-"),
        "value": with_heads_first(inputs.value, "bks-"),
    }
    scalars: dict[str, Operand] = {}
    if inputs.sinks is not None:
        scalars["sinks"] = flat(inputs.sinks, "bn")

    def begin(step: Step) -> None:
        step.scratch["largest"][...] = jnp.full((rows, LANES), LOWEST if attempt is None else 0.0, jnp.float32)
        for name in sums:
            step.scratch[name][...] = jnp.zeros_like(step.scratch[name])

    def add(step: Step, at: At, weights: jax.Array, rescaling: jax.Array | None) -> None:
        scores, scratch = step.scores, step.scratch
        dropped = scores.drop(weights, scores.keep(at, weights.shape))
        value = scores.without_padding(step.refs["value"][at.tile, :], at, is_key=True)
        out = product(dropped.astype(value.dtype), value, "nn", precision)
        terms = {"sum": lane_sums(weights), "acc": out}
        if rescaling is None:
            # Of the weights as they are multiplied.
            terms["rounded sum"] = lane_sums(weights.astype(value.dtype).astype(jnp.float32))
        for name, term in terms.items():
            before = scratch[name][at.unit, :]
            before = before if rescaling is None else repeated(rescaling, before.shape[-1]) * before
            scratch[name][at.unit, :] = before + term

    def logits_of(step: Step, at: At) -> jax.Array:
        products = product(step.refs["query"][at.unit, :], step.refs["key"][at.tile, :], "nt", precision)
        return step.scores.logits(products, at).logits

    def tile(step: Step, at: At) -> None:
        logits, before = logits_of(step, at), step.scratch["largest"][at.unit, :]
        largest = jnp.maximum(before, lane_sums(logits, jnp.maximum).max(-1, keepdims=True))
        step.scratch["largest"][at.unit, :] = largest
        add(step, at, jnp.exp2(logits - repeated(largest, blocks.tile)), jnp.exp2(before - largest))

    def tile_without_maximum(step: Step, at: At) -> None:
        add(step, at, jnp.exp2(logits_of(step, at)), None)

    def end(step: Step) -> None:
        outs, largest = step.outs, step.scratch["largest"][...]
        total = _of_rows(step, "sum")
        # (Not every maximum of NaN is NaN, but every sum.)
        has_key = (largest > _HAS_KEY) & (total != 0) | jnp.isnan(total)
        if inputs.sinks is not None:
            heads = inputs.sinks.shape[-1]
            sink = step.scores.scalar("sinks", step.scores.place.head if heads > 1 else 0, heads) * LOG2E
            base = jnp.maximum(largest, sink)
            share = jnp.where(has_key, jnp.exp2(largest - base), 0.0)
            total = jnp.where(has_key, total * share, 0.0) + jnp.exp2(sink - base)
            lse = base * LN2 + jnp.log(total)
            share = share / total
        else:
            lse = jnp.where(has_key, largest * LN2 + jnp.log(total), 0.0)
            share = jnp.where(has_key, 1 / total, 0.0)
        # Where no key was met, what was summed up is of masked ones.
        out = jnp.where(repeated(has_key.astype(jnp.float32), z.D) != 0, step.scratch["acc"][...], 0.0)
        out = out * repeated(share, z.D)
        outs["out"][...] = out.astype(outs["out"].dtype)
        if "rounded" in outs:
            outs["rounded"][...] = out.astype(dtype)
        if "lse" in outs:
            outs["lse"][...] = gathered(lse)
        if "max_logits" in outs:
            outs["max_logits"][...] = gathered(jnp.where(has_key, largest * LN2, -jnp.inf))

    rows_type = jax.ShapeDtypeStruct((batch, z.N, 1, z.T), jnp.float32)

    def matrix_type(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, z.N, z.T, z.D), dtype)

    outputs = {"out": (matrix_type(dtype if config.rounds_out else jnp.float32), "bnt-")}
    outputs |= {"rounded": (matrix_type(dtype), "bnt-")} if config.adds_rounded else {}
    outputs |= {"lse": (rows_type, "bn-t")} if config.needs_lse else {}
    outputs |= {"max_logits": (rows_type, "bn-t")} if config.needs_max_logits else {}
    attempt = None
    sums = {"sum": pltpu.VMEM((rows, LANES), jnp.float32), "acc": pltpu.VMEM((rows, z.D), jnp.float32)}
    saved: dict[str, Any] = {}
    if blocks.tries_without_maximum and not config.needs_max_logits:
        attempt = Attempt(tile_without_maximum, _save, _holds, _undo, _finish)
        sums["rounded sum"] = sums["sum"]
        saved = {_saved(name): buffer for name, buffer in sums.items()}
    return Kernel(call, z.batch, blocks, operands, interpret, scalars=scalars).run(
        begin=begin,
        tile=tile,
        end=end,
        outputs=outputs,
        scratch={"largest": pltpu.VMEM((rows, LANES), jnp.float32), **sums, **saved},
        attempt=attempt,
    )


_SUMS = ("sum", "rounded sum", "acc")


def _saved(name: str) -> str:
    return f"{name} before"


def _of_rows(step: Step, name: str) -> jax.Array:
    """(rows, LANES), the same in all lanes."""
    total = step.scratch[name][...]
    return jnp.broadcast_to(total.sum(-1, keepdims=True), total.shape)


def _save(step: Step) -> None:
    for name in _SUMS:
        step.scratch[_saved(name)][...] = step.scratch[name][...]


def _holds(step: Step) -> Any:
    """Whether every row has a sum, and sums and outputs are far from the ends of float32's range."""
    total, out = step.scratch["sum"][...].sum(-1, keepdims=True), step.scratch["acc"][...]
    is_right = (total > 1 / _FAR) & (total < _FAR) & (jnp.abs(out) < _FAR**2)
    grid, T = step.scores.grid, step.scores.call.sizes.T
    if T % grid.blocks.resident:
        # Behind the last row may be anything.
        row = step.scores.place.row_block * grid.blocks.resident + lax.broadcasted_iota(jnp.int32, out.shape, 0)
        is_right = is_right | (row >= T)
    return jnp.min(jnp.where(is_right, 1.0, 0.0)) > 0


def _finish(step: Step) -> None:
    """The output as it is beside a maximum: the rounding of weights by which all of a row differ drops out."""
    total, rounded = _of_rows(step, "sum"), _of_rows(step, "rounded sum")
    acc = step.scratch["acc"]
    acc[...] = acc[...] * repeated(jnp.where(rounded > 0, total / rounded, 1.0), acc.shape[-1])


def _undo(step: Step, is_first: Any) -> None:
    for name in _SUMS:
        step.scratch[name][...] = step.scratch[_saved(name)][...]
    _finish(step)
    # A row that has met keys has its sum without a maximum: beside one of 0.
    step.scratch["largest"][...] = jnp.full_like(step.scratch["largest"], jnp.where(is_first, LOWEST, 0.0))
