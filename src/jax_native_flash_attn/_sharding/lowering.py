"""Sharding over batch, heads and sequence: every kernel runs on each device's shard, without gathering.

How a kernel gets its shard depends on the kind of the mesh axes:

- auto axes (plain `jit`): `auto.py`;
- explicit axes: `explicit.py`;
- manual axes (inside `shard_map`): a kernel already sees its shard; only the types must say over which axes it varies
  (`types.py`).

Batch axes and heads shard, and query rows and keys together, around a ring (`passes.py`). A result that lacks such an
axis (the gradient of a bias shared by the batch, say) is summed over its mesh axes; nothing else is ever communicated.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType

from .._kernels.protocol import Target
from .._semantics.call import Ring
from .auto import as_unit, gather_sliced_axes, needs_devices, uses_shardy
from .types import axis_names, explicit_spec

_OF_ONE = Ring("", 1, (0,), has_whole_masks=True)

Layouts = tuple[tuple[str, ...], tuple[str, ...]]
"""Names (keys of `LAYOUTS`) of a primitive's operands and results."""


def lowering_rule(
    function: Callable,
    layouts: Callable[..., Layouts],
    is_opaque: Callable[..., bool],
    with_ring: Callable[..., dict[str, Any]] | None,
    platform: str,
) -> Callable:
    """Lower a primitive to `function(*operands, target=..., **params)`, on the mesh axes that its operands are on.

    Args:
      function: takes arrays of one device, or of all of them if `target.is_sharded`.
      layouts: names of operands and results, given `params`.
      is_opaque: whether XLA could not split what `function` gives for (operands' types, target, **params).
      with_ring: the `params` of the same in a ring, given it and them; None if there is no such thing.
      platform: what the rule is registered for.
    """

    def rule(ctx: Any, *values: Any, partitioning: Any, **params: Any) -> Any:
        module, (operand_names, result_names) = ctx.module_context, layouts(**params)
        # Kernels are written for one device: without the mesh axes in their operands' types.
        avals = [ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
        kinds = set(ctx.avals_in[0].sharding.mesh.axis_types)
        # A program for several platforms holds one kernel for each, and Mosaic GPU's can only be lowered alone.
        is_only = len(module.platforms) == 1
        has_several = getattr(module.axis_context, "num_devices", 1) > 1 or AxisType.Manual in kinds
        target = Target(
            platform if is_only or platform == "cpu" else "accelerator",
            # An exported program may not hold what fixes a layout.
            fixes_layouts=platform == "cuda" and is_only and not module.lowering_parameters.for_export,
            is_exported=module.lowering_parameters.for_export,
            has_several=has_several,
        )
        is_split = has_several and (not kinds or AxisType.Auto in kinds)
        # `custom_partitioning` cannot name the mesh axes that are left where some are of another kind.
        # Nor is there any in the compiler for TPUs.
        can_be_unit = is_split and kinds <= {AxisType.Auto} and partitioning is not None and platform != "tpu"
        is_unit = can_be_unit and is_opaque(avals, target, **params)
        target = target._replace(is_sharded=is_split and not is_unit)
        kernel = functools.partial(function, target=target, **params)
        spec = explicit_spec(ctx.avals_in)
        if is_unit:
            of_ring = None
            # Not all that kernels take alone do they take of a block: then rows are gathered.
            if with_ring is not None and is_opaque(avals, target, **with_ring(_OF_ONE, **params)):
                of_ring = _in_ring(function, target, with_ring, params)
            kernel = as_unit(kernel, of_ring, operand_names, result_names, avals, ctx.avals_out)
        elif any(spec):
            avals = [ShapedArray(x.shape, x.dtype, sharding=x.sharding) for x in ctx.avals_in]
            kernel = _over_explicit_batch(kernel, avals, ctx.avals_out, spec)
        if target.is_sharded:
            values = tuple(gather_sliced_axes(values, operand_names, [x.shape for x in avals]))
        # Nor with explicit axes in the types of what it makes of nothing, where no operand is sharded over them.
        is_outside = AxisType.Explicit in kinds and not any(spec)
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())) if is_outside else contextlib.nullcontext():
            results = _lower(kernel, ctx.replace(avals_in=avals), values)
        if target.is_sharded:
            results = gather_sliced_axes(results, result_names, [x.shape for x in ctx.avals_out])
        return results

    return rule


def _lower(kernel: Callable, ctx: Any, values: Sequence[Any]) -> Any:
    module = ctx.module_context
    if getattr(module.axis_context, "num_devices", 0) == 1:
        # Calls of cuDNN are units to the partitioner, which asks for the devices, or that all axes of a mesh be manual.
        alone = mlir.SPMDAxisContext(AbstractMesh((), ()))  # pyright: ignore[reportArgumentType]
        ctx = ctx.replace(module_context=module.replace(axis_context=alone))
    try:
        return mlir.lower_fun(kernel, multiple_results=True)(ctx, *values)
    except NameError as error:
        # An axis of `jax.vmap` has a size while a ring is traced, but is nothing in its program.
        unbound = re.search(r"unbound axis name: (\w+)", str(error))
        if unbound is None:
            raise
        raise ValueError(
            f"axis_name must be a mesh axis of the jax.shard_map around this call, got {unbound[1]!r}, an axis of "
            "jax.vmap: split the sequence with jax.shard_map, or take strategy='all_gather'"
        ) from None


def _in_ring(
    function: Callable, target: Target, with_ring: Callable[..., dict[str, Any]], params: dict[str, Any]
) -> Callable[[Ring], Callable]:
    return lambda ring: functools.partial(function, target=target, **with_ring(ring, **params))


def partitioning(is_opaque: Callable[..., bool], operands: Sequence[Any], **params: Any) -> Any:
    """Parameter of the primitives, see `auto.py`: not None where a unit may be lowered for several devices."""
    if jax.device_count() == 1 or not uses_shardy():
        return None
    return needs_devices() if is_opaque(operands, Target("cuda"), **params) else None


def _over_explicit_batch(kernel: Callable, operands: Sequence[Any], results: Sequence[Any], spec: Sequence) -> Callable:
    """`kernel` on the shards of the axes that `vmap` added."""
    return jax.shard_map(
        lambda *shards: tuple(kernel(*shards)),
        mesh=operands[0].sharding.mesh,
        axis_names={name for axis in spec for name in axis_names(axis)},
        in_specs=tuple(x.sharding.spec for x in operands),
        out_specs=tuple(x.sharding.spec for x in results),
        check_vma=False,
    )
