"""`_semantics.visible.find_visible` as a primitive: where it is lowered, it knows whether it may branch.

A branch for all batch rows of several devices would make these agree; and `vmap` would turn it into both of its sides.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Primitive

from .._kernels.protocol import Target
from .._semantics import visible
from .._semantics.masks import MaskOperands
from .._semantics.varying import vary_alike
from .._semantics.visible import Visible
from .._sharding import lowering, types
from .registration import batch_operands, register

_visible_p = Primitive("flash_attention_visible")
_visible_p.multiple_results = True


def find_visible(mask: MaskOperands, T: int, S: int) -> Visible:
    """See `_semantics.visible.find_visible`."""
    leaves, structure = jax.tree.flatten(mask)
    return Visible(*_apply(vary_alike(leaves), structure, T, S))


def _apply(leaves: Sequence[Any], structure: Any, T: int, S: int) -> Any:
    return _visible_p.bind(*leaves, structure=structure, T=T, S=S, partitioning=None)


def _visible(*leaves: jax.Array, structure: Any, T: int, S: int, target: Target) -> tuple[jax.Array, ...]:
    mask = jax.tree.unflatten(structure, leaves)
    block_scores = 1 << (20 if target.platform == "cpu" else 26)
    return tuple(visible.find_visible(mask, T, S, may_branch=not target.is_sharded, block_scores=block_scores))


def _abstract_eval(*leaves: Any, structure: Any, T: int, S: int, **unused: Any) -> list[Any]:
    mask = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves])
    results = jax.eval_shape(lambda mask: visible.find_visible(mask, T, S, may_branch=False), mask)
    return [types.result_aval(leaves, x.shape, x.dtype) for x in results]


def _batch(args: Any, dims: Any, *, structure: Any, T: int, S: int, **unused: Any) -> tuple:
    """Of a result that is alike for all elements, as none of what it is made of is batched, there is one."""
    size = next(x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None)
    results = _apply(batch_operands(args, dims), structure, T, S)
    is_batched = [x.shape[0] == size for x in results]
    results = [x if batched else x[0] for x, batched in zip(results, is_batched, strict=True)]
    return results, [0 if batched else None for batched in is_batched]


def _layouts(*, structure: Any, T: int, S: int) -> lowering.Layouts:
    fields = jax.tree.unflatten(structure, range(structure.num_leaves))._asdict()
    return tuple(name for name, x in fields.items() if x is not None), ("key_start", "key_stop", "dead", "is_exact")


register(_visible_p, _visible, _abstract_eval, lambda *args, **params: False, _layouts, None, _batch)
