"""`_semantics.visible.find_visible` as a primitive: where it is lowered, it knows whether it may branch.

A branch for all batch rows of several devices would make these agree; and `vmap` would turn it into both of its sides.
A kernel family may have a kernel for it.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Primitive

from .._kernels import select
from .._kernels.protocol import Target
from .._semantics import visible
from .._semantics.masks import Band, MaskOperands
from .._semantics.varying import vary_alike
from .._semantics.visible import Visible
from .._sharding import lowering, types
from .registration import batch_operands, register

_visible_p = Primitive("flash_attention_visible")
_visible_p.multiple_results = True


def find_visible(
    mask: MaskOperands,
    T: int,
    S: int,
    padded: jax.Array | None = None,
    has_dead_rows: bool | None = None,
    band: Band | None = None,
    *,
    implementation: str | None = None,
) -> Visible:
    """See `_semantics.visible.find_visible`. `implementation`: what the call asks for."""
    leaves, structure = jax.tree.flatten((mask, padded))
    params = {"structure": structure, "T": T, "S": S, "has_dead_rows": has_dead_rows, "band": band}
    return Visible(*_apply(vary_alike(leaves), **params, implementation=implementation))


def _apply(leaves: Sequence[Any], **params: Any) -> Any:
    return _visible_p.bind(*leaves, **params, partitioning=None)


def _visible(
    *leaves: jax.Array,
    structure: Any,
    T: int,
    S: int,
    has_dead_rows: bool | None,
    band: Band | None,
    implementation: str | None,
    target: Target,
) -> tuple[jax.Array, ...]:
    mask, padded = jax.tree.unflatten(structure, leaves)
    found = select.find_visible(mask, T, S, padded, has_dead_rows, band, target, implementation)
    return tuple(x for x in found if x is not None)


def _abstract_eval(
    *leaves: Any, structure: Any, T: int, S: int, has_dead_rows: bool | None, band: Band | None, **unused: Any
) -> list[Any]:
    shapes = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves])
    results = jax.eval_shape(
        lambda mask, padded: visible.find_visible(mask, T, S, padded, has_dead_rows, band, may_branch=False), *shapes
    )
    return [types.result_aval(leaves, x.shape, x.dtype) for x in results if x is not None]


def _batch(args: Any, dims: Any, **params: Any) -> tuple:
    """Of a result that is alike for all elements, as none of what it is made of is batched, there is one."""
    del params["partitioning"]
    size = next(x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None)
    results = _apply(batch_operands(args, dims), **params)
    is_batched = [x.shape[0] == size for x in results]
    results = [x if batched else x[0] for x, batched in zip(results, is_batched, strict=True)]
    return results, [0 if batched else None for batched in is_batched]


def _layouts(*, structure: Any, has_dead_rows: bool | None, **unused: Any) -> lowering.Layouts:
    mask, padded = jax.tree.unflatten(structure, range(structure.num_leaves))
    operands = [name for name, x in mask._asdict().items() if x is not None] + ["dead"] * (padded is not None)
    of_rows = () if has_dead_rows is None else ("row_start", "row_stop", "row_bounds")
    return tuple(operands), ("key_start", "key_stop", "dead", "is_exact", *of_rows)


register(_visible_p, _visible, _abstract_eval, lambda *args, **params: False, _layouts, None, _batch)
