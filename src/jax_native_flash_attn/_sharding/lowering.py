"""Sharding over batch and heads: every kernel runs on each device's shard, without gathering.

How a kernel gets its shard depends on the kind of the mesh axes:

- auto axes (plain `jit`): `_partitioning.py`;
- explicit axes: the sharding is part of the types, so the whole call is put into a `shard_map` over it;
- manual axes (inside `shard_map`): a kernel already sees its shard; only the types must say over which axes it varies.

Batch axes and heads shard. A result that lacks such an axis (the gradient of
a bias shared by the batch, say) is summed over its mesh axes; nothing else is ever communicated.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.core import ShapedArray
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from .._kernels.protocol import Target
from .auto import as_unit, gather_sliced_axes, needs_devices, uses_shardy

Layouts = tuple[tuple[str, ...], tuple[str, ...]]
"""Names (keys of `LAYOUTS`) of a primitive's operands and results."""

# ---- manual axes


def _varying_axes(aval: Any) -> frozenset:
    """The manual mesh axes over which values of this type differ."""
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying


def vary_alike(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Make all operands vary over the manual axes that any of them does; the transpose of this is a `psum`."""
    axes = frozenset().union(*(_varying_axes(jax.typeof(x)) for x in operands))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(axes - _varying_axes(jax.typeof(x)))
        if not missing:
            return x
        if hasattr(lax, "pcast"):
            return lax.pcast(x, missing, to="varying")
        return lax.pvary(x, missing)  # pyright: ignore[reportAttributeAccessIssue]

    return [cast(x) for x in operands]


def result_aval(operands: Sequence[Any], shape: tuple[int, ...], dtype: DTypeLike) -> ShapedArray:
    """Type of a result, given those of the operands: it varies over the manual axes that any of them does.

    Over explicit axes only its leading axes are sharded, those that `vmap` added, and like the operands'.
    """
    widest = max(operands, key=lambda aval: len(_varying_axes(aval)))
    key = "vma" if hasattr(widest, "vma") else "manual_axis_type"
    spec = [axis if n != 1 else None for axis, n in zip(_explicit_spec(operands), shape, strict=False)]
    sharding = NamedSharding(widest.sharding.mesh, PartitionSpec(*spec, *(None,) * (len(shape) - len(spec))))
    return ShapedArray(shape, dtype, sharding=sharding, **{key: getattr(widest, key)})


def _explicit_spec(avals: Sequence[Any]) -> list[Any]:
    """For each leading axis, the explicit mesh axes over which any of these arrays is sharded."""
    columns = itertools.zip_longest(*(aval.sharding.spec for aval in avals))
    return [next((axis for axis in column if axis is not None), None) for column in columns]


def shard_alike(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Shard the leading axes of all operands as that of any is (those of size 1 excepted)."""
    wanted = _explicit_spec([jax.typeof(x) for x in operands])
    if not any(wanted):
        return list(operands)
    specs = [[axis if n != 1 else None for axis, n in zip(wanted, x.shape, strict=False)] for x in operands]
    return [jax.sharding.reshard(x, PartitionSpec(*spec)) for x, spec in zip(operands, specs, strict=True)]


# ---- lowering


def lowering_rule(
    function: Callable, layouts: Callable[..., Layouts], is_opaque: Callable[..., bool], platform: str
) -> Callable:
    """Lower a primitive to `function(*operands, target=..., **params)`, on the mesh axes that its operands are on.

    Args:
      function: takes arrays of one device, or of all of them if `target.is_sharded`.
      layouts: names of operands and results, given `params`.
      is_opaque: whether XLA could not split what `function` gives for (operands' types, target, **params).
      platform: what the rule is registered for.
    """

    def rule(ctx: Any, *values: Any, partitioning: Any, **params: Any) -> Any:
        module, (operand_names, result_names) = ctx.module_context, layouts(**params)
        # Kernels are written for one device: without the mesh axes in their operands' types.
        avals = [ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
        kinds = set(ctx.avals_in[0].sharding.mesh.axis_types)
        # A program for several platforms holds one kernel for each, and Mosaic GPU's can only be lowered alone.
        is_only = len(module.platforms) == 1
        target = Target(
            platform if is_only or platform == "cpu" else "accelerator",
            # An exported program may not hold what fixes a layout.
            fixes_layouts=platform == "cuda" and is_only and not module.lowering_parameters.for_export,
        )
        has_several = getattr(module.axis_context, "num_devices", 1) > 1 or AxisType.Manual in kinds
        is_split = has_several and (not kinds or AxisType.Auto in kinds)
        # `custom_partitioning` cannot name the mesh axes that are left where some are of another kind.
        can_be_unit = is_split and kinds <= {AxisType.Auto} and partitioning is not None
        is_unit = can_be_unit and is_opaque(avals, target, **params)
        target = target._replace(is_sharded=is_split and not is_unit)
        kernel = functools.partial(function, target=target, **params)
        spec = _explicit_spec(ctx.avals_in)
        if is_unit:
            kernel = as_unit(kernel, operand_names, result_names, avals, ctx.avals_out)
        elif any(spec):
            avals = [ShapedArray(x.shape, x.dtype, sharding=x.sharding) for x in ctx.avals_in]
            kernel = _over_explicit_batch(kernel, avals, ctx.avals_out, spec)
        if target.is_sharded:
            values = tuple(gather_sliced_axes(values, operand_names, [x.shape for x in avals]))
        # Nor with explicit axes in the types of what it makes of nothing, where no operand is sharded over them.
        is_outside = AxisType.Explicit in kinds and not any(spec)
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())) if is_outside else contextlib.nullcontext():
            results = mlir.lower_fun(kernel, multiple_results=True)(ctx.replace(avals_in=avals), *values)
        if target.is_sharded:
            results = gather_sliced_axes(results, result_names, [x.shape for x in ctx.avals_out])
        return results

    return rule


def partitioning(is_opaque: Callable[..., bool], operands: Sequence[Any], **params: Any) -> Any:
    """Parameter of the primitives, see `_partitioning.py`: not None where a unit may be lowered for several devices."""
    if jax.device_count() == 1 or not uses_shardy():
        return None
    return needs_devices() if is_opaque(operands, Target("cuda"), **params) else None


def _over_explicit_batch(kernel: Callable, operands: Sequence[Any], results: Sequence[Any], spec: Sequence) -> Callable:
    """`kernel` on the shards of the axes that `vmap` added."""
    return jax.shard_map(
        lambda *shards: tuple(kernel(*shards)),
        mesh=operands[0].sharding.mesh,
        axis_names={name for axis in spec for name in _axis_names(axis)},
        in_specs=tuple(x.sharding.spec for x in operands),
        out_specs=tuple(x.sharding.spec for x in results),
        check_vma=False,
    )


# ---- explicit axes


def over_explicit_axes(
    attention: Callable, operands: dict[str, Any], layouts: dict[str, str], *, needs_lse: bool
) -> Any:
    """Call `attention(**operands)`; in a `shard_map` over the explicit mesh axes that shard query, if any.

    Args:
      attention: returns out (B, T, N, H) and, if needed, lse (B, T, N).
      operands: arrays by name, or None.
      layouts: the axis letters of each, of B, T, S, N, K, H and others.
    """
    query_type = jax.typeof(operands["query"])
    mesh, spec = query_type.sharding.mesh, (*query_type.sharding.spec, None, None, None, None)[:4]
    if AxisType.Explicit not in mesh.axis_types:
        return attention(**operands)
    present = {name: x for name, x in operands.items() if x is not None}
    if spec[1] is not None or spec[3] is not None:
        raise ValueError(
            f"query may be sharded over batch and heads, got {query_type.str_short(True)}: gather its other axes with "
            "jax.sharding.reshard, or shard the sequence with shard_map and merge partial attentions"
        )
    mesh_axes = {"B": spec[0], "N": spec[2], "K": spec[2]}
    num_kv_heads = present["key"].shape[2]
    head_shards = _num_shards(mesh, spec[2])
    if num_kv_heads % head_shards:
        if num_kv_heads > 1:
            raise ValueError(
                f"key has {num_kv_heads} heads, which do not divide over the {head_shards} shards of query's heads: "
                "shard the heads over fewer devices, or repeat key and value heads"
            )
        mesh_axes["K"] = None

    def spec_of(name: str, x: Any) -> PartitionSpec:
        letters = layouts[name][-x.ndim :] if x.ndim else ""
        return PartitionSpec(*(mesh_axes.get(c) if n > 1 else None for c, n in zip(letters, x.shape, strict=True)))

    specs = {name: spec_of(name, x) for name, x in present.items()}
    placed = {name: jax.sharding.reshard(x, specs[name]) for name, x in present.items()}
    out_specs = PartitionSpec(spec[0], None, spec[2], None), PartitionSpec(spec[0], None, spec[2])
    absent = dict.fromkeys(operands.keys() - present.keys())
    manual = {*_axis_names(spec[0]), *_axis_names(spec[2])}
    if not manual:
        return attention(**placed, **absent)
    # By default all axes that no `vmap` maps over: JAX before 0.10 does not like to be left with some explicit ones.
    axis_names: dict[str, Any] = {} if set(mesh.axis_types) == {AxisType.Explicit} else {"axis_names": manual}
    return jax.shard_map(
        lambda arrays: attention(**arrays, **absent),
        mesh=mesh,
        **axis_names,
        in_specs=(specs,),
        out_specs=out_specs[: 2 if needs_lse else 1],
    )(placed)


def _axis_names(mesh_axis: Any) -> tuple[str, ...]:
    """An entry of a `PartitionSpec` as a tuple."""
    return mesh_axis if isinstance(mesh_axis, tuple) else () if mesh_axis is None else (mesh_axis,)


def _num_shards(mesh: Any, mesh_axis: Any) -> int:
    return math.prod(mesh.shape[name] for name in _axis_names(mesh_axis))
