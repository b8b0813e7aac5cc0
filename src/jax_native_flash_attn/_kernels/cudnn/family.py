"""The family of cuDNN's kernels: what `jax.nn` gives, made into what this library promises.

Rows without a key. cuDNN leaves open what becomes of them, and of rows past their length. Here the former are the mean
of all values, with no gradient but that of values, and the latter are 0. So the kernels' results for these rows are
replaced, and in the backward pass their cotangents and weights are zero.

Rows whose keys all have a bias of -inf or thereabouts. Every logit is then the same number, out is the mean of the
values, and the log-sum-exp, in float32, does not tell one key from many. So in the backward pass these are as rows
without a key.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..._semantics.call import Call, sum_to
from ..protocol import Forward, LinearPass, Pass, Target
from . import public, support
from .operands import LOWEST_BIAS, Batch, fold, prepare, request_of
from .public import Operands, Request

_NO_WEIGHT = 1e30  # log-sum-exp of a row whose weights shall be 0


@dataclass(frozen=True)
class CudnnPlan:
    """How a pass is asked of `jax.nn`: its static arguments, its arrays beside query, key and value, and batch rows."""

    request: Request
    arrays: tuple[str, ...]
    batch: int


@dataclass(frozen=True)
class CudnnKernels:
    """See `Kernels`."""

    name = support.NAME
    is_opaque = True

    def supports(self, call: Call, which: Pass, target: Target) -> str | None:
        return support.why_not(call, which, target)

    def plan(self, call: Call, which: Pass, target: Target) -> CudnnPlan:
        def prepared(inputs: object) -> Operands:
            return prepare(call._replace(inputs=inputs), call.sizes.batch)

        operands = jax.eval_shape(prepared, call.inputs)
        names = tuple(name for name, x in operands._asdict().items() if x is not None)
        return CudnnPlan(request_of(call), names[3:], operands.query.shape[0])

    def forward(self, call: Call, target: Target) -> Forward:
        config, z = call.config, call.sizes
        request, operands = request_of(call), prepare(call, z.batch)
        if config.needs_lse:
            out, lse = public.attention_and_lse(request, operands)
        else:
            out, lse = public.attention(request, operands), None
        if (rows := _replaced_rows(call, z.batch)) is not None:
            mean = jnp.repeat(operands.value.astype(jnp.float32).mean(1, keepdims=True), z.G, 2)
            mean = jnp.where(_beside_heads(rows.dead), mean, 0)
            out = jnp.where(_beside_heads(rows.dead | rows.padded), mean, out.astype(jnp.float32))
            if lse is not None:
                lse = jnp.where(rows.dead, math.log(z.S), jnp.where(rows.padded, 0, lse))
        out = out.reshape(*z.batch, z.T, z.N, z.D)
        dtype = call.inputs.query.dtype
        return Forward(
            out.astype(dtype if config.rounds_out else jnp.float32),
            None if lse is None else lse.reshape(*z.batch, z.N, z.T),
            rounded=out.astype(dtype) if config.adds_rounded else None,
        )

    def cotangent(self, call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
        z, inputs, dout, wanted = call.sizes, call.inputs, given.operands["out"], given.wanted
        batch = jnp.broadcast_shapes(z.batch, dout.shape[:-3], given.out.shape[:-3], given.lse.shape[:-2])
        operands = prepare(call, batch, wanted["bias"].shape[:-3] if "bias" in wanted else None)
        dtype = inputs.query.dtype
        out, dout = (fold(x, batch, 3).astype(dtype) for x in (given.out, dout))
        lse, rows, of_mean = fold(given.lse, batch, 2), _replaced_rows(call, batch), None
        if inputs.bias is not None:
            is_low = lse < LOWEST_BIAS / 4
            rows = _Rows(is_low, jnp.zeros_like(is_low)) if rows is None else rows._replace(dead=rows.dead | is_low)
        if rows is not None:
            is_replaced = rows.dead | rows.padded
            of_mean = jnp.where(_beside_heads(rows.dead), dout.astype(jnp.float32), 0).sum(1, keepdims=True) / z.S
            dout, lse = jnp.where(_beside_heads(is_replaced), 0, dout), jnp.where(is_replaced, _NO_WEIGHT, lse)
        found = public.gradients(request_of(call), operands, out, lse, dout)
        if of_mean is not None:
            of_mean = of_mean.reshape(-1, 1, z.K, z.G, z.D).sum(3)
            found = found._replace(value=found.value.astype(jnp.float32) + of_mean)
        return {name: _unfolded(getattr(found, name), batch, like) for name, like in wanted.items()}

    def makes_gradients_together(self, call: Call, given: LinearPass, target: Target) -> bool:
        return True

    def tangent(self, call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
        raise NotImplementedError(support.why_not(call, Pass.TANGENT, target))


class _Rows(NamedTuple):
    """Those whose results are replaced: (B, N or 1, T) each."""

    dead: jax.Array
    padded: jax.Array


def _replaced_rows(call: Call, batch: Batch) -> _Rows | None:
    mask = call.inputs.mask
    if mask.dead is None or mask.key_start is None or mask.key_stop is None:
        return None
    return _Rows(fold(mask.dead, batch, 2), fold(mask.key_start >= mask.key_stop, batch, 2))


def _beside_heads(rows: jax.Array) -> jax.Array:
    """(B, N or 1, T) -> (B, T, N or 1, 1)"""
    return jnp.swapaxes(rows, -1, -2)[..., None]


def _unfolded(x: jax.Array, batch: Batch, like: jax.ShapeDtypeStruct) -> jax.Array:
    """(B or 1, ...) -> the shape and dtype of `like`, summed unrounded where that has size 1."""
    lead = batch if x.shape[0] == math.prod(batch) else (1,) * len(batch)
    x = x.reshape(*lead, *x.shape[1:])
    return sum_to(x if x.shape == like.shape else x.astype(jnp.float32), like)
