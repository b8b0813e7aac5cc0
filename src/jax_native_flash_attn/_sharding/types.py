"""What the types of arrays say of mesh axes: over which manual ones they vary, which explicit ones shard them."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.core import ShapedArray
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike


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
    spec = [axis if n != 1 else None for axis, n in zip(explicit_spec(operands), shape, strict=False)]
    sharding = NamedSharding(widest.sharding.mesh, PartitionSpec(*spec, *(None,) * (len(shape) - len(spec))))
    return ShapedArray(shape, dtype, sharding=sharding, **{key: getattr(widest, key)})


def explicit_spec(avals: Sequence[Any]) -> list[Any]:
    """For each leading axis, the explicit mesh axes over which any of these arrays is sharded."""
    columns = itertools.zip_longest(*(aval.sharding.spec for aval in avals))
    return [next((axis for axis in column if axis is not None), None) for column in columns]


def shard_alike(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Shard the leading axes of all operands as that of any is (those of size 1 excepted)."""
    wanted = explicit_spec([jax.typeof(x) for x in operands])
    if not any(wanted):
        return list(operands)
    specs = [[axis if n != 1 else None for axis, n in zip(wanted, x.shape, strict=False)] for x in operands]
    mesh = next(jax.typeof(x).sharding.mesh for x in operands if any(jax.typeof(x).sharding.spec))
    return [reshard(x, mesh, PartitionSpec(*spec)) for x, spec in zip(operands, specs, strict=True)]


def reshard(x: jax.Array, mesh: Any, spec: PartitionSpec) -> jax.Array:
    """As `jax.sharding.reshard`, without `jax.set_mesh` too: an array of no mesh that is not to be sharded stays so."""
    is_needed = any(spec) or not jax.typeof(x).sharding.mesh.empty
    return jax.sharding.reshard(x, NamedSharding(mesh, spec)) if is_needed else x


def axis_names(mesh_axis: Any) -> tuple[str, ...]:
    """An entry of a `PartitionSpec` as a tuple."""
    return mesh_axis if isinstance(mesh_axis, tuple) else () if mesh_axis is None else (mesh_axis,)
