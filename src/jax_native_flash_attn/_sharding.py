"""Sharding over batch and heads: every kernel runs on each device's shard, without gathering.

Left to itself, XLA gathers operands that a loop slices along a sharded axis. The kernels are therefore handed to it as
units, by whichever means fits the mesh axes:

- auto axes (plain `jit`): `custom_partitioning` around the lowered kernel, with a Shardy rule that names the axes;
- explicit axes: the sharding is part of the types, so the whole call is put into a `shard_map` over it;
- manual axes (inside `shard_map`): a kernel already sees its shard; only the types must say over which axes it varies.

Batch axes, key/value heads (K) and groups of query heads (G) shard. A result that lacks such an axis (the gradient of
a bias shared by the batch, say) is summed over its mesh axes; nothing else is ever communicated.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from ._logits import LAYOUTS

Layouts = tuple[tuple[str, ...], tuple[str, ...]]
"""Names (keys of `LAYOUTS`) of a primitive's operands and results."""

_SHARDABLE = "KG"  # besides all batch axes


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
    """Type of a result, given those of the operands: it varies over the manual axes that any of them does."""
    widest = max(operands, key=lambda aval: len(_varying_axes(aval)))
    key = "vma" if hasattr(widest, "vma") else "manual_axis_type"
    sharding = NamedSharding(widest.sharding.mesh, PartitionSpec(*(None,) * len(shape)))
    return ShapedArray(shape, dtype, sharding=sharding, **{key: getattr(widest, key)})


# ---- auto axes


def lowering_rule(function: Callable, layouts: Callable[..., Layouts]) -> Callable:
    """Lower a primitive to `function(*operands, **params)`, partitioned as `layouts(**params)` allows."""

    def rule(ctx: Any, *values: Any, partitioning: Any, **params: Any) -> Any:
        # Kernels are written for one device: without the mesh axes in their operands' types.
        avals = [ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
        kernel = functools.partial(function, **params)
        if partitioning is not None:
            kernel = _partitioned(kernel, *layouts(**params), avals, ctx.avals_out)
        return mlir.lower_fun(kernel, multiple_results=True)(ctx.replace(avals_in=avals), *values)

    return rule


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
    factors = _factors([*operand_names, *result_names], [x.shape for x in (*operands, *results)])
    operand_factors, result_factors = factors[: len(operands)], factors[len(operands) :]
    all_factors = {factor for axes in factors for factor in axes if factor is not None}

    def partition(mesh: Any, args: Sequence[Any], outs: Sequence[Any]) -> tuple:
        mesh_axes: dict[str, Any] = {}
        for axes, x in zip(factors, (*args, *outs), strict=True):
            for factor, mesh_axis in zip(axes, x.sharding.spec, strict=False):
                if factor is not None and mesh_axis is not None:
                    mesh_axes.setdefault(factor, mesh_axis)

        def sharding(axes: tuple) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(mesh_axes.get(factor) for factor in axes)))

        def on_shards(*shards: jax.Array) -> tuple[jax.Array, ...]:
            sums = []
            for axes, x in zip(result_factors, kernel(*shards), strict=True):
                missing = [mesh_axes[f] for f in sorted(all_factors - set(axes)) if f in mesh_axes]
                names = [name for m in missing for name in (m if isinstance(m, tuple) else (m,))]
                sums.append(lax.psum(x, tuple(names)) if names else x)
            return tuple(sums)

        return mesh, on_shards, tuple(map(sharding, result_factors)), tuple(map(sharding, operand_factors))

    names = iter(range(1 << 30))
    fixed: list[str] = []

    def spell(axes: tuple) -> str:
        words = []
        for factor in axes:
            if factor is None:
                factor = f"x{next(names)}"
                fixed.append(factor)
            words.append(factor)
        return " ".join(words)

    rule = ", ".join(map(spell, operand_factors)) + " -> " + ", ".join(map(spell, result_factors))
    # With *operands: a wrapped kernel needs a signature.
    partitioned = custom_partitioning(lambda *xs: tuple(kernel(*xs)))
    partitioned.def_partition(partition, sharding_rule=rule, need_replication_factors=tuple(fixed))
    return partitioned


def _factors(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[tuple[str | None, ...]]:
    """For each array, the name of each axis that may be sharded; None for the others and for broadcast ones."""
    num_batch = len(shapes[0]) - len(LAYOUTS[names[0]])
    letters = [f"b{i}" for i in range(num_batch)]
    axes = [(*letters, *LAYOUTS[name]) for name in names]
    sizes: dict[str, int] = {}
    for labels, shape in zip(axes, shapes, strict=True):
        for label, n in zip(labels, shape, strict=True):
            sizes[label] = max(n, sizes.get(label, 1))
    shardable = {*letters, *_SHARDABLE}
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
    """Call `attention(**operands)`; in a `shard_map` over the mesh axes that are explicit in query's type, if any.

    Args:
      attention: returns out (B, T, N, H) and, if needed, lse (B, T, N).
      operands: arrays by name, or None.
      layouts: the axis letters of each, of B, T, S, N, K, H and others.
    """
    query_type = jax.typeof(operands["query"])
    mesh, spec = query_type.sharding.mesh, (*query_type.sharding.spec, None, None, None, None)[:4]
    if mesh.empty or not mesh._any_axis_explicit:
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
    return jax.shard_map(
        lambda arrays: attention(**arrays, **absent),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=out_specs[: 2 if needs_lse else 1],
    )(placed)


def _num_shards(mesh: Any, mesh_axis: Any) -> int:
    names = mesh_axis if isinstance(mesh_axis, tuple) else () if mesh_axis is None else (mesh_axis,)
    return math.prod(mesh.shape[name] for name in names)
