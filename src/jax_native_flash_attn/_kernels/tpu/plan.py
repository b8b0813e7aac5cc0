"""What a call takes: tile shapes of each kernel, and the precision of products."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..._semantics.call import Call
from .blocks import Blocks, choose_blocks
from .host.operands import term_bytes


class BackwardBlocks(NamedTuple):
    """Of the kernels for the gradients of query, of key and value, and of a bias, if there is one."""

    dquery: Blocks
    dkey_dvalue: Blocks
    dbias: Blocks | None


def forward_blocks(call: Call, generation: str) -> Blocks:
    return _blocks(call, "forward", generation)


def backward_blocks(call: Call, generation: str) -> BackwardBlocks:
    dbias = None if call.inputs.bias is None else _blocks(call, "dbias", generation)
    return BackwardBlocks(_blocks(call, "dquery", generation), _blocks(call, "dkey_dvalue", generation), dbias)


def _blocks(call: Call, which: str, generation: str) -> Blocks:
    itemsize = call.inputs.query.dtype.itemsize
    return choose_blocks(call.sizes, which, itemsize=itemsize, term_bytes=term_bytes(call), generation=generation)


def products_precision(call: Call) -> Any:
    """Of float32, as XLA multiplies it on a TPU: in one pass of bfloat16 unless more is asked for."""
    precision = call.config.precision
    asked = precision if type(precision) is tuple else (precision,)
    needs_all = any(x in (jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST) for x in asked)
    is_float32 = call.inputs.query.dtype == jnp.float32
    return jax.lax.Precision.HIGHEST if needs_all and is_float32 else jax.lax.Precision.DEFAULT
