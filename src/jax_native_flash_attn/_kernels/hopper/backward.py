"""Launches of the backward kernels."""

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from .addition_order import AdditionOrder
from .blocks import Blocks
from .device import dbias as dbias_kernel
from .device import dkey_dvalue as dkey_dvalue_kernel
from .device import dquery as dquery_kernel
from .device import fused as fused_kernel
from .device import turn as turn_kernel
from .host.backward import Backward
from .host.dbias_plan import DBiasPlan
from .host.dkey_dvalue_plan import KeyGradients, KeyPlan, group_parts
from .host.dquery_plan import DQueryOuts, DQueryPlan, Moments
from .host.fused_plan import BLOCKS, FusedGradients, FusedPlan
from .host.tf32 import BackwardProducts, Products, rounded
from .host.turn_plan import TurnOuts, TurnPlan
from .operands import TransposedOperands
from .pallas import launch, pad_axis, round_up


def turn(x: jax.Array, length: jax.Array | None = None, *, needs_columns: bool) -> TurnOuts:
    """Copies of float32 rows, (batch..., rows, heads, columns), without NaN from `length`, (batch...), on."""
    *batch, rows, heads, columns = x.shape
    plan = TurnPlan(tuple(batch), rows, heads, columns, needs_columns)
    results: TurnOuts = launch(
        functools.partial(turn_kernel.kernel, plan),
        (x, length),
        out_types=plan.out_types(),
        scratch=plan.buffers(),
        grid=plan.grid,
        warpgroups=1,
    )
    return results


def products(call: Backward, *, dquery: bool, dkey: bool, dvalue: bool) -> BackwardProducts:
    """Of float32; what the gradients that are named read transposed."""
    inputs, length = call.inputs, call.inputs.mask.key_value_length
    query, dout = turn(inputs.query, needs_columns=dkey), turn(call.dout, needs_columns=dvalue)
    keys = inputs.key
    if length is not None:  # keys that batch rows share may have padding of several lengths
        keys = jnp.broadcast_to(keys, (*jnp.broadcast_shapes(length.shape, keys.shape[:-3]), *keys.shape[-3:]))
    key = turn(keys, length, needs_columns=dquery)
    value = pad_axis(rounded(inputs.value, length), -3, round_up(call.sizes.S, 8))
    transposed = TransposedOperands(query.columns, key.columns, dout.columns)
    return BackwardProducts(Products(query.rows, key.rows, value), dout.rows, transposed)


def dquery(call: Backward, blocks: Blocks, out_dtype: Any, cores: int, *, with_scale: bool) -> DQueryOuts:
    """The gradient of query, (batch..., T, N, H), and, if `with_scale`, the moments of each row.

    `out_dtype` is that of query, or float32; `cores` are multiprocessors.
    """
    plan = DQueryPlan.make(call, blocks, out_dtype, cores, with_scale=with_scale)
    operands, T = plan.operands(call), call.sizes.T
    results: DQueryOuts = launch(
        functools.partial(dquery_kernel.kernel, plan),
        operands,
        out_types=plan.out_types(),
        scratch=plan.buffers(operands.forward),
        grid={"worker": plan.scheduler.workers},
        warpgroups=blocks.warpgroups + 1,
    )
    moments = None if results.moments is None else Moments(*(x[..., :T] for x in results.moments))
    return DQueryOuts(results.dquery[..., :T, :, :], moments)


def dkey_dvalue(call: Backward, blocks: Blocks, wanted: KeyGradients, cores: int) -> KeyGradients:
    """Of the gradients of key and value those that are `wanted`, (batch..., S, K, H), with the same batch axes in both.

    Axes of size 1 in `wanted` are summed over; keys and values must have size 1 in them. Of `blocks`, block_kv are the
    keys of one compute warpgroup, and block_q the query rows of one tile; `cores` are multiprocessors.
    """
    parts = group_parts(call, blocks, wanted, cores)
    if parts == 1:
        return _dkey_dvalue(call, blocks, wanted, cores)

    def of_parts(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*x.shape[:-2], x.shape[-2] * parts, x.shape[-1]), jnp.float32)

    def joined(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        return x.reshape(*x.shape[:-2], -1, parts, x.shape[-1]).sum(-2).astype(like.dtype)

    results = _dkey_dvalue(call.in_parts(parts), blocks, jax.tree.map(of_parts, wanted), cores)
    return jax.tree.map(joined, results, wanted)


def _dkey_dvalue(call: Backward, blocks: Blocks, wanted: KeyGradients, cores: int) -> KeyGradients:
    plan = KeyPlan.make(call, blocks, wanted, cores)
    operands = plan.operands(call)
    results: KeyGradients = launch(
        functools.partial(dkey_dvalue_kernel.kernel, plan),
        operands,
        out_types=plan.out_types(),
        scratch=plan.buffers(operands.forward),
        grid={"worker": plan.scheduler.workers},
        warpgroups=blocks.warpgroups + 1,
    )
    return jax.tree.map(lambda x: x[..., : call.sizes.S, :, :], results)


def fused(call: Backward, order: AdditionOrder, query_dtype: Any, key_dtype: Any) -> FusedGradients:
    """The gradients of query, and of key and value in `key_dtype`, (batch..., rows, heads, H)."""
    z, dtype = call.sizes, call.inputs.query.dtype
    assert z.G % order.group == 0, (order, z)
    assert order.heads * order.group == math.prod(z.batch) * z.N, (order, z)
    plan = FusedPlan(call.config, z, dtype, BLOCKS, order, is_wide=order.group < z.G or key_dtype != dtype)
    results: FusedGradients = launch(
        functools.partial(fused_kernel.kernel, plan),
        plan.operands(call),
        out_types=plan.out_types(),
        scratch=plan.buffers(),
        grid=plan.grid,
        warpgroups=BLOCKS.warpgroups + 1,
        has_barriers=False,
    )
    query = (results.query * call.inputs.scale[..., None, None, None]).astype(query_dtype)
    if not plan.is_wide:
        return replace(results, query=query)
    sums = (x.sum(-4)[..., : z.S, :, :].astype(key_dtype) for x in (results.key, results.value))
    return FusedGradients(query, *sums)


def dbias(call: Backward, blocks: Blocks, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Of a bias (batch..., N or 1, T or 1, S); axes of size 1, but for the last, are summed over."""
    plan, z = DBiasPlan.make(call, blocks, wanted), call.sizes
    operands = plan.operands(call)
    result: jax.Array = launch(
        functools.partial(dbias_kernel.kernel, plan),
        operands,
        out_types=plan.out_type(),
        scratch=plan.buffers(operands.forward),
        grid=plan.grid,
        warpgroups=blocks.warpgroups + 1,
    )
    result = result.sum(0)
    if plan.sums_rows:
        return result.sum(-2, keepdims=True)[..., : z.S]
    return result[..., : z.T, : z.S]
