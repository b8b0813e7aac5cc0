"""Passes of attention over keys that are on one device, or split over the devices of a ring.

Around a ring, query rows and all that is theirs stay, and the blocks of key and value travel:

    forward     out and log-sum-exp of the blocks are merged
    cotangent   weights are made of the log-sum-exp of all keys, so that each block gives its part of every sum; the
                gradients of key and value travel with their block, one place behind it, and in the end home
    tangent     likewise, with the tangents of key and value
"""

import functools
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._kernels import select
from .._kernels.protocol import Forward, LinearPass, Pass, Target
from .._semantics.block_masks import split_masks
from .._semantics.call import Call, Inputs, batch_of, sum_to
from .._semantics.merging import merge
from .._semantics.numerics import accumulation_dtype
from .collectives import axis_index, shift
from .halves import Halves, in_halves
from .ring import Visit, add_to_last_keys, go_around

Shape = jax.ShapeDtypeStruct


def types_of_step(call: Call, which: Pass, target: Target) -> Call:
    """The call that a kernel gets, of types in place of arrays; in a ring, for a block that is not the device's own."""
    if call.config.ring is None:
        return call

    def step(inputs: Inputs) -> Inputs:
        part = visit = Visit(0, 0, {"key": inputs.key, "value": inputs.value})
        whole = call._replace(inputs=inputs)
        if which is Pass.COTANGENT:
            z, wanted = call.sizes, {name: getattr(inputs, name) for name in ("query", "key", "value")}
            out, lse = jnp.zeros((*z.batch, z.T, z.N, z.D)), jnp.zeros((*z.batch, z.N, z.T))
            part = _part_of(whole, LinearPass(out, lse, {"out": out}, wanted), wanted, visit, target)
        return part.call(whole).inputs

    return Call(Visit(0, 0, {}).config(call), jax.eval_shape(step, call.inputs))


def is_opaque(call: Call, which: Pass, target: Target) -> bool:
    """See `select.is_opaque`."""
    return select.is_opaque(types_of_step(call, which, target), which, target)


def forward(call: Call, target: Target) -> Forward:
    """See `select.forward`."""
    if call.config.ring is None:
        return select.forward(call, target)
    config, inputs = split_masks(call, axis_index(call.config.ring))
    ring, dtype = config.ring, inputs.query.dtype
    assert ring is not None
    # Rows without a key in one block, which sinks make of others, are empty there. Sinks themselves come in the end.
    of_blocks = Call(replace(config, needs_lse=True, rounds_out=False, adds_rounded=False), inputs._replace(sinks=None))
    # Rows that no other block adds to are rounded where they are computed, and not read again.
    shared_rows = ring.most_rows_met(inputs.sizes.T)
    rounds_own = config.rounds_out and inputs.sinks is None and shared_rows < inputs.sizes.T

    def visit(merged: Forward | None, at: Visit) -> Forward:
        step = at.call(of_blocks)
        if at.is_own and rounds_own:
            step = Call(replace(step.config, adds_rounded=True), step.inputs)
        found = select.forward(step, target)
        mask, lse = step.inputs.mask, found.lse
        if lse is not None and mask.key_start is not None and mask.key_stop is not None:
            lse = jnp.where(mask.key_start < mask.key_stop, lse, -jnp.inf)
        found = found._replace(lse=lse)
        return found if merged is None else _joined(merged, found, at)

    merged = go_around(ring, {"key": inputs.key, "value": inputs.value}, None, visit)
    assert merged is not None
    assert merged.lse is not None
    if inputs.sinks is not None:
        sinks = jnp.broadcast_to(inputs.sinks[..., None], merged.lse.shape)
        merged = _merged(merged, Forward(jnp.zeros_like(merged.out), sinks, merged.max_logits))
    out, lse, max_logits, rounded = merged
    assert lse is not None
    if rounded is not None:
        shared = lax.slice_in_dim(out, 0, shared_rows, axis=-3).astype(dtype)
        out = lax.dynamic_update_slice_in_dim(rounded, shared, 0, -3)
    return Forward(
        out.astype(dtype) if config.rounds_out else out,
        jnp.where(jnp.isneginf(lse), 0, lse) if config.needs_lse else None,  # -inf: of padded rows
        max_logits,
        out.astype(dtype) if config.adds_rounded else None,
    )


_NO_KEYS = {"out": 0.0, "lse": -jnp.inf, "max_logits": -jnp.inf}  # results by name, of rows without any


def _joined(merged: Forward, found: Forward, at: Visit) -> Forward:
    """Results with what one more visit found, of the rows that it is of."""
    whole, more = (
        {name: x for name in _NO_KEYS if (x := getattr(forward, name)) is not None} for forward in (merged, found)
    )
    rows = Forward(**{name: at.rows(name, x) for name, x in whole.items()})
    both = _merged(rows, Forward(**{name: at.known(x, _NO_KEYS[name]) for name, x in more.items()}))
    results = {name: at.with_rows(name, x, getattr(both, name)) for name, x in whole.items()}
    return Forward(**results, rounded=merged.rounded)


def _merged(a: Forward, b: Forward) -> Forward:
    assert a.lse is not None
    assert b.lse is not None
    out, lse = merge((a.out, b.out), [jnp.swapaxes(x, -1, -2) for x in (a.lse, b.lse)])
    max_logits = [x.max_logits for x in (a, b) if x.max_logits is not None]
    return Forward(out, jnp.swapaxes(lse, -1, -2), functools.reduce(jnp.maximum, max_logits) if max_logits else None)


class Sums(NamedTuple):
    """Of a cotangent: what stays on a device, and what travels with the blocks of key and value, and then home."""

    resting: dict[str, jax.Array]
    moving: dict[str, jax.Array]


def cotangent(call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
    """See `select.cotangent`."""
    if call.config.ring is None:
        return select.cotangent(call, given, target)
    rank = axis_index(call.config.ring)
    config, inputs = call = split_masks(call, rank)
    ring, dtype, S = config.ring, accumulation_dtype(inputs.query.dtype), call.sizes.S
    assert ring is not None
    given = given.with_products(dtype)  # of all visits
    of_blocks, blocks = Call(config, inputs._replace(sinks=None)), {"key": inputs.key, "value": inputs.value}
    own = Visit(rank, rank, blocks, is_own=True)
    # Sums over blocks, unrounded; but for a bias of keys, each block has its own.
    wanted = {name: Shape(x.shape, dtype) for name, x in given.wanted.items() if name != "scale"}
    split = {name for name, x in wanted.items() if name == "bias" and x.shape[-1] > 1}
    of_block = wanted | {name: Shape((*wanted[name].shape[:-1], S), dtype) for name in split}
    travelling = [name for name in ("key", "value") if name in wanted]

    def asked(at: Visit | Halves, names: Collection[str], lse: jax.Array) -> LinearPass:
        return _of_visit(given._replace(lse=lse), at, {name: of_block[name] for name in names})

    def found(sums: Sums, at: Visit | Halves, names: Collection[str], lse: jax.Array) -> dict[str, jax.Array]:
        if not names:
            return {}
        results = select.cotangent(at.call(of_blocks), asked(at, names, lse), target)
        if isinstance(at, Halves):
            return results
        results = {name: at.known(x) for name, x in results.items()}
        for name in split & results.keys():
            whole = sums.resting[name] if name in sums.resting else jnp.zeros(wanted[name].shape, dtype)
            results[name] = lax.dynamic_update_slice_in_dim(whole, results[name], at.first_key(S), -1)
        return results

    # While gradients of key and value travel home, the own block is visited; or the last one for the other gradients.
    other = _part_of(of_blocks, given, of_block, own._replace(is_own=False), target)
    meets_whole = len(ring.distances) > 1 and ring.meeting(ring.distances[-1], S) is None
    own_is_last = bool(travelling) and meets_whole and _is_together(of_blocks, given, of_block, other, target)

    def visit(sums: Sums, at: Visit) -> Sums:
        if at.is_own:
            return sums if own_is_last else Sums(found(sums, at, of_block, given.lse), {})
        part = _part_of(of_blocks, given, of_block, at, target)
        rest, lse = [name for name in of_block if name not in travelling], given.lse
        is_apart = at.is_last and not own_is_last and not _is_together(of_blocks, given, of_block, part, target)
        results = found(sums, part, travelling if is_apart else of_block, lse)
        moving = {name: results.pop(name) for name in travelling}
        if at.is_last and own_is_last:
            moving, lse = lax.optimization_barrier((moving, lse))
        moving = {name: part.of_keys(x) for name, x in moving.items()}
        if sums.moving:
            arrived = shift(sums.moving, ring, at.hop)
            moving = {name: add_to_last_keys(arrived[name], x) for name, x in moving.items()}
        if at.is_last:
            # Rounded, as the results are, but only on this way: rounding what others still add to would err more.
            moving = {name: x.astype(given.wanted[name].dtype) for name, x in moving.items()}
            if is_apart:
                moving, lse = lax.optimization_barrier((moving, lse))
            moving = shift(moving, ring, -ring.distances[-1])
        if is_apart:
            results = found(sums, part, rest, lse)
        resting = sums.resting
        if at.is_last and own_is_last:
            so_far = resting | {name: results.pop(name) for name in split & results.keys()}
            resting = found(Sums(so_far, {}), own, of_block, lse)
            resting |= {name: so_far[name] + resting[name] for name in so_far.keys() - split}
        for name in results.keys() - split:
            whole = resting[name] if name in resting else jnp.zeros(wanted[name].shape, dtype)
            results[name] = part.add_rows(name, whole, results[name])
        return Sums(resting | results, moving)

    results: dict[str, jax.Array] = {}
    if wanted:
        sums = go_around(ring, blocks, Sums({}, {}), visit)
        home = {name: add_to_last_keys(sums.resting[name], x.astype(dtype)) for name, x in sums.moving.items()}
        results = sums.resting | home
    if "scale" in given.wanted:
        results["scale"] = _of_scale(call, given, target)
    return {name: results[name].astype(like.dtype) for name, like in given.wanted.items()}


def _part_of(call: Call, given: LinearPass, wanted: Mapping[str, Shape], at: Visit, target: Target) -> Visit | Halves:
    """The visit in halves, if one kernel then makes gradients that need several else."""
    halves = in_halves(call, given, at)
    if halves is None or _is_together(call, given, wanted, at, target):
        return at
    return halves if _is_together(call, given, wanted, halves, target) else at


def _is_together(
    call: Call, given: LinearPass, wanted: Mapping[str, Shape], at: Visit | Halves, target: Target
) -> bool:
    """Whether one kernel makes all gradients of a visit."""
    return select.makes_gradients_together(at.call(call), _of_visit(given, at, wanted), target)


def _of_visit(given: LinearPass, at: Visit | Halves, wanted: Mapping[str, Any]) -> LinearPass:
    """What is asked of a visit, in its rows; bias and blocks are those of its keys already."""
    operands = {name: at.rows(name, x) for name, x in given.operands.items()}
    types = {name: at.type(name, x) for name, x in wanted.items()}
    products = None if given.products is None else at.rows("lse", given.products)
    return LinearPass(at.rows("out", given.out), at.rows("lse", given.lse), operands, types, products)


def _of_scale(call: Call, given: LinearPass, target: Target) -> jax.Array:
    """The gradient of scale, by its tangent: what kernels make it of are sums over all keys of a row, not over some."""
    like, batch = given.wanted["scale"], jnp.broadcast_shapes(call.sizes.batch, batch_of(given.operands))
    shapes = {name: Shape((*batch, *x.shape[len(batch) :]), like.dtype) for name, x in given.operands.items()}
    along = tangent(call, given._replace(operands={"scale": jnp.ones(batch, like.dtype)}, wanted=shapes), target)
    products = [along[name] * x.astype(like.dtype) for name, x in given.operands.items()]
    sums = [x.sum(tuple(range(len(batch), x.ndim))) for x in products]
    return sum_to(functools.reduce(jnp.add, sums), like)


def tangent(call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
    """See `select.tangent`."""
    if call.config.ring is None:
        return select.tangent(call, given, target)
    config, inputs = call = split_masks(call, axis_index(call.config.ring))
    ring, S = config.ring, call.sizes.S
    assert ring is not None
    of_blocks = Call(config, inputs._replace(sinks=None))
    resting = {name: x for name, x in given.operands.items() if name not in ("key", "value")}
    blocks = {"key": inputs.key, "value": inputs.value}
    blocks |= {f"d{name}": given.operands[name] for name in ("key", "value") if name in given.operands}
    wanted = {name: Shape(x.shape, accumulation_dtype(x.dtype)) for name, x in given.wanted.items()}
    if "lse" in wanted and inputs.query.dtype == wanted["lse"].dtype:
        wanted["share"] = wanted["lse"]  # beside 16-bit roundings, those of lse are small

    def visit(sums: dict[str, jax.Array], at: Visit) -> dict[str, jax.Array]:
        operands = {name: at.keys(x, S) if name == "bias" else x for name, x in resting.items()}
        operands |= {name: at.blocks[f"d{name}"] for name in ("key", "value") if f"d{name}" in at.blocks}
        found = select.tangent(at.call(of_blocks), _of_visit(given._replace(operands=operands), at, wanted), target)
        return {name: at.add_rows(name, sums[name], at.known(x)) if sums else x for name, x in found.items()}

    sums = go_around(ring, blocks, {}, visit)
    if "share" in sums:
        sink = 0 if inputs.sinks is None else jnp.exp(inputs.sinks[..., None] - given.lse)
        share = lax.stop_gradient(sums["share"] + sink)  # 1 but for roundings, or 0 of padded rows
        sums["lse"] /= jnp.where(share == 0, 1, share)
    return {name: sums[name].astype(like.dtype) for name, like in given.wanted.items()}
