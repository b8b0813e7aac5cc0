"""Sharding over batch and heads: every kernel runs on each device's shard, without gathering.

Left to itself, XLA gathers operands that a loop slices along a sharded axis. The kernels are therefore handed to it as
units, by whichever means fits the mesh axes:

- auto axes (plain `jit`): `custom_partitioning` around the lowered kernel, with a Shardy rule that names the axes;
- explicit axes: the sharding is part of the types, so the whole call is put into a `shard_map` over it;
- manual axes (inside `shard_map`): a kernel already sees its shard; only the types must say over which axes it varies.

Batch axes and heads shard. A result that lacks such an axis (the gradient of
a bias shared by the batch, say) is summed over its mesh axes; nothing else is ever communicated.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from ._operands import LAYOUTS
from ._tiles import Target

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


# ---- auto axes


def lowering_rule(function: Callable, layouts: Callable[..., Layouts], platform: str) -> Callable:
    """Lower a primitive to `function(*operands, target=..., **params)`, partitioned as `layouts(**params)` allows."""

    def rule(ctx: Any, *values: Any, partitioning: Any, **params: Any) -> Any:
        # Kernels are written for one device: without the mesh axes in their operands' types.
        avals = [ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
        kinds = set(ctx.avals_in[0].sharding.mesh.axis_types)
        # `custom_partitioning` cannot name the mesh axes that are left where some are manual.
        is_nameless = {AxisType.Manual, AxisType.Auto} <= kinds
        # Nor does it take symbolic shapes.
        is_symbolic = not all(isinstance(n, int) for x in avals for n in x.shape)
        has_auto_axes = partitioning is not None and kinds <= {AxisType.Auto}
        # A program for several platforms holds one kernel for each, and Mosaic GPU's can only be lowered alone.
        is_only = len(ctx.module_context.platforms) == 1
        target = Target(
            platform if is_only or platform == "cpu" else "accelerator",
            is_sharded=is_nameless or (has_auto_axes and is_symbolic),
            # An exported program may not hold what fixes a layout.
            fixes_layouts=platform == "cuda" and is_only and not ctx.module_context.lowering_parameters.for_export,
        )
        kernel = functools.partial(function, target=target, **params)
        spec = _explicit_spec(ctx.avals_in)
        # A program for one device, though there are others, needs no partitioner.
        is_for_one = getattr(ctx.module_context.axis_context, "num_devices", None) == 1
        if has_auto_axes and not is_symbolic and not is_for_one:
            kernel = _partitioned(kernel, *layouts(**params), avals, ctx.avals_out)
        elif any(spec):
            avals = [ShapedArray(x.shape, x.dtype, sharding=x.sharding) for x in ctx.avals_in]
            kernel = _over_explicit_batch(kernel, avals, ctx.avals_out, spec)
        return mlir.lower_fun(kernel, multiple_results=True)(ctx.replace(avals_in=avals), *values)

    return rule


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


@functools.lru_cache(maxsize=1)
def _needs_devices() -> Any:
    @custom_partitioning
    def identity(x: jax.Array) -> jax.Array:
        return x

    identity.def_partition(lambda mesh, args, result: None, sharding_rule="i -> i")
    return jax.make_jaxpr(identity)(jax.ShapeDtypeStruct((1,), jnp.float32))


def partitioning() -> Any:
    """Parameter of the primitives: a jaxpr with a `custom_partitioning` in it, or None where there is one device.

    JAX tells a lowering rule the devices only if it finds such a primitive in the program beforehand.
    """
    return _needs_devices() if jax.device_count() > 1 else None


def _partitioned(
    kernel: Callable,
    operand_names: tuple[str, ...],
    result_names: tuple[str, ...],
    operands: Sequence[Any],
    results: Sequence[Any],
) -> Callable:
    """`kernel` as one unit for the partitioner.

    Key/value heads follow the query heads' sharding where they divide; otherwise a shard takes those that it needs.
    """
    num_operands = len(operands)
    factors = _factors((*operand_names, *result_names), [x.shape for x in (*operands, *results)])
    query, key = (operands[operand_names.index(name)].shape for name in ("query", "key"))
    num_kv_heads, group = key[-2], query[-2] // key[-2]

    def partition(mesh: Any, args: Sequence[Any], outs: Sequence[Any]) -> tuple:
        mesh_axes: dict[str, tuple[str, ...]] = {}
        for axes, x in zip(factors, (*args, *outs), strict=True):
            for factor, n, mesh_axis in zip(axes, x.shape, x.sharding.spec, strict=False):
                names = _axis_names(mesh_axis)
                # Operands may disagree; query, the first, decides. K follows N in any case.
                others = {name for f in mesh_axes.keys() - {factor, "K"} for name in mesh_axes[f]}
                is_free = factor not in mesh_axes and not others & set(names)
                if factor is not None and names and is_free and n % _num_shards(mesh, names) == 0:
                    mesh_axes[factor] = names
        others = {name for f in mesh_axes.keys() - {"N", "K"} for name in mesh_axes[f]}
        head_axes = mesh_axes.get("N") or mesh_axes.get("K", ())
        head_axes = () if others & set(head_axes) else head_axes
        head_shards = _num_shards(mesh, head_axes)
        # A shard has these query heads, and so many at a time share a key/value head.
        num_heads = num_kv_heads * group // head_shards
        shared = math.gcd(num_heads, group)
        divides = num_kv_heads % head_shards == 0
        mesh_axes |= {"N": head_axes, "K": head_axes if divides else ()}

        def spec(axes: tuple) -> PartitionSpec:
            return PartitionSpec(*(mesh_axes.get(factor) or None for factor in axes))

        def used(axes: tuple) -> set[str]:
            return {name for factor in axes for name in mesh_axes.get(factor, ())}

        everywhere = set().union(*map(used, factors))

        def on_shards(*shards: jax.Array) -> tuple[jax.Array, ...]:
            kv_heads = None
            if not divides:
                first = lax.axis_index(head_axes) * num_heads
                kv_heads = (first + shared * jnp.arange(num_heads // shared, dtype=jnp.int32)) // group
                shards = tuple(
                    jnp.take(x, kv_heads, axis=-2) if "K" in LAYOUTS[name] else x
                    for name, x in zip(operand_names, shards, strict=True)
                )
            sums = []
            for name, axes, x in zip(result_names, factors[num_operands:], kernel(*shards), strict=True):
                if kv_heads is not None and "K" in LAYOUTS[name]:
                    whole = jnp.zeros((*x.shape[:-2], num_kv_heads, x.shape[-1]), x.dtype)
                    x = whole.at[..., kv_heads, :].add(x)
                missing = tuple(sorted(everywhere - used(axes)))
                sums.append(lax.psum(x, missing) if missing else x)
            return tuple(sums)

        shardings = [NamedSharding(mesh, spec(axes)) for axes in factors]
        return mesh, on_shards, tuple(shardings[num_operands:]), tuple(shardings[:num_operands])

    unnamed = itertools.count()
    fixed: list[str] = []

    def spell(axes: tuple) -> str:
        words = []
        for factor in axes:
            if factor is None:
                factor = f"x{next(unnamed)}"
                fixed.append(factor)
            words.append(factor.lower())
        return " ".join(words)

    rule = ", ".join(map(spell, factors[:num_operands])) + " -> " + ", ".join(map(spell, factors[num_operands:]))
    # With *operands: a wrapped kernel needs a signature.
    partitioned = custom_partitioning(lambda *xs: tuple(kernel(*xs)))
    partitioned.def_partition(partition, sharding_rule=rule, need_replication_factors=tuple(fixed))
    return partitioned


def _factors(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[tuple[str | None, ...]]:
    """For each array, the name of each axis that may be sharded; None for the others and for broadcast ones."""
    letters = [f"b{i}" for i in range(len(shapes[0]) - len(LAYOUTS[names[0]]))]
    axes = [(*letters, *LAYOUTS[name]) for name in names]
    sizes: dict[str, int] = {}
    for labels, shape in zip(axes, shapes, strict=True):
        for label, n in zip(labels, shape, strict=True):
            sizes[label] = max(n, sizes.get(label, 1))
    shardable = {*letters, "N", "K"}
    return [
        tuple(
            label if label in shardable and n == sizes[label] and n > 1 else None
            for label, n in zip(labels, shape, strict=True)
        )
        for labels, shape in zip(axes, shapes, strict=True)
    ]


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
