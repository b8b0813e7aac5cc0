"""What the types of arrays say of mesh axes: types of results, and which explicit axes shard an array."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from .._semantics.varying import varying_axes


def result_aval(operands: Sequence[Any], shape: tuple[int, ...], dtype: DTypeLike) -> ShapedArray:
    """Type of a result, given those of the operands: it varies over the manual axes that any of them does.

    Over explicit axes only its leading axes are sharded, those that `vmap` added, and like the operands'.
    """
    widest = max(operands, key=lambda aval: len(varying_axes(aval)))
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
