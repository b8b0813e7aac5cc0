"""Auto mesh axes (plain `jit`), whose shardings XLA finds after tracing: batch rows and heads stay where they are.

Two ways, since XLA can split what it understands, but no custom call:

- pure JAX kernels are split by XLA itself. Left to itself it gathers what a loop slices along a sharded axis, once for
  each tile. So no loop runs over batch rows or heads (`Target.is_sharded`), and the axes that loops do slice are
  gathered beforehand, by a sharding constraint that leaves batch rows and heads open. Such a program is data like any
  other: it can be exported, cached, lowered without devices.
- Mosaic GPU kernels are units to XLA, by `custom_partitioning`: a function that XLA calls back while it compiles.

JAX gives a lowering rule the devices, which `custom_partitioning` needs, only if it finds such a primitive in the
program beforehand: hence the parameter `partitioning` of our primitives, a jaxpr that holds one where it is needed.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib.mlir.dialects import sdy

from .._semantics.call import Ring, mesh_order
from .._semantics.operands import LAYOUTS

# ---- what XLA splits


def uses_shardy() -> bool:
    """Whether XLA's current partitioner is on; the older one (GSPMD) knows neither rules nor open axes."""
    return jax.config.jax_use_shardy_partitioner  # pyright: ignore[reportAttributeAccessIssue]


def gather_sliced_axes(values: Sequence[Any], names: Sequence[str], shapes: Sequence[tuple]) -> list[Any]:
    """Values of the program under construction, with every axis gathered but batch rows and heads."""
    if not uses_shardy():
        return list(values)
    # An empty mesh stands for any.
    mesh = sdy.MeshAttr.get([])

    def gathered(value: Any, name: str, shape: tuple) -> Any:
        letters = ["B"] * (len(shape) - len(LAYOUTS[name])) + [*LAYOUTS[name]]
        axes = [sdy.DimensionShardingAttr.get([], is_closed=letter not in "BNK") for letter in letters]
        return sdy.ShardingConstraintOp(value, sdy.TensorShardingAttr.get(mesh, axes)).result

    return [gathered(*each) for each in zip(values, names, shapes, strict=True)]


# ---- units


@functools.lru_cache(maxsize=1)
def needs_devices() -> Any:
    """A jaxpr at the sight of which JAX gives lowering rules the devices."""

    @custom_partitioning
    def identity(x: jax.Array) -> jax.Array:
        return x

    identity.def_partition(lambda mesh, args, result: None, sharding_rule="i -> i")
    return jax.make_jaxpr(identity)(jax.ShapeDtypeStruct((1,), jnp.float32))


Axes = tuple[str | None, ...]
"""The factor of each axis of an array: a name that arrays share, or None for an axis that is not sharded."""


class _Unit(NamedTuple):
    """A kernel for one device, and how its operands and results are cut.

    Attributes:
      kernel: takes and gives arrays of a shard.
      of_ring: gives the same for a ring of devices that share the sequence, of rows and keys of a device; or None.
      operand_names, result_names: keys of `LAYOUTS`.
      factors: the `Axes` of the operands, then of the results.
      num_kv_heads, group: K and G.
      num_keys: S.
    """

    kernel: Callable
    of_ring: Callable[[Ring], Callable] | None
    operand_names: tuple[str, ...]
    result_names: tuple[str, ...]
    factors: tuple[Axes, ...]
    num_kv_heads: int
    group: int
    num_keys: int


def as_unit(
    kernel: Callable,
    of_ring: Callable[[Ring], Callable] | None,
    operand_names: tuple[str, ...],
    result_names: tuple[str, ...],
    operands: Sequence[Any],
    results: Sequence[Any],
) -> Callable:
    """`kernel` as one unit for the partitioner.

    Key/value heads follow the query heads' sharding where they divide; otherwise a shard takes those that it needs.
    Keys follow the query rows' sharding, and travel, where they divide and there is `of_ring`; otherwise rows are
    gathered.
    """
    factors = _factors((*operand_names, *result_names), [x.shape for x in (*operands, *results)])
    query, key = (operands[operand_names.index(name)].shape for name in ("query", "key"))
    unit = _Unit(kernel, of_ring, operand_names, result_names, tuple(factors), key[-2], query[-2] // key[-2], key[-3])
    rule, fixed = _sharding_rule(factors, len(operands))
    # With *operands: a wrapped kernel needs a signature.
    partitioned = custom_partitioning(lambda *xs: tuple(kernel(*xs)))
    # Shardings are decoded here: JAX cannot name a part of a mesh axis.
    partitioned.def_partition(
        functools.partial(_partition, unit),
        sharding_rule=rule,
        need_replication_factors=fixed,
        decode_shardings=False,
    )
    return partitioned


def _factors(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[Axes]:
    """For each array, the factors of its axes; None for those that are not sharded, and for broadcast ones."""
    letters = [f"b{i}" for i in range(len(shapes[0]) - len(LAYOUTS[names[0]]))]
    # Keys are split with those that hold them alone: a row needs all of a mask or a bias.
    axes = [
        (*letters, *(LAYOUTS[name] if name in ("key", "value") else LAYOUTS[name].replace("S", "-"))) for name in names
    ]
    sizes: dict[str, int] = {}
    for labels, shape in zip(axes, shapes, strict=True):
        for label, n in zip(labels, shape, strict=True):
            sizes[label] = max(n, sizes.get(label, 1))
    shardable = {*letters, "N", "K", "T", "S"}
    return [
        tuple(
            label if label in shardable and n == sizes[label] and n > 1 else None
            for label, n in zip(labels, shape, strict=True)
        )
        for labels, shape in zip(axes, shapes, strict=True)
    ]


def _sharding_rule(factors: Sequence[Axes], num_operands: int) -> tuple[str, tuple[str, ...]]:
    """Shardy's rule for these arrays, and those of its factors that may not be sharded."""
    unnamed = itertools.count()
    fixed: list[str] = []

    def spell(axes: Axes) -> str:
        words = []
        for factor in axes:
            if factor is None:
                factor = f"x{next(unnamed)}"
                fixed.append(factor)
            words.append(factor.lower())
        return " ".join(words)

    words = [*map(spell, factors)]
    return ", ".join(words[:num_operands]) + " -> " + ", ".join(words[num_operands:]), tuple(fixed)


def _partition(unit: _Unit, mesh: Any, args: Sequence[Any], outs: Sequence[Any]) -> tuple:
    """The partitioner's callback: mesh, the kernel of a shard, and shardings of results and operands."""
    mesh = _split_into_primes(mesh, args[0])
    mesh_axes = _mesh_axes(unit, mesh, (*args, *outs))
    head_axes = mesh_axes["N"]
    head_shards = _num_shards(mesh, head_axes)
    # A shard has these query heads, and so many at a time share a key/value head.
    num_heads = unit.num_kv_heads * unit.group // head_shards
    shared = math.gcd(num_heads, unit.group)
    divides = unit.num_kv_heads % head_shards == 0
    mesh_axes |= {"K": head_axes if divides else ()}
    kernel = unit.kernel
    if (row_axes := mesh_axes["T"]) and unit.of_ring is not None:
        size = _num_shards(mesh, row_axes)
        in_mesh = mesh_order(row_axes, mesh.shape)
        kernel = unit.of_ring(Ring(row_axes, size, tuple(range(size)), in_mesh, has_whole_masks=True))

    def used(axes: Axes) -> set[str]:
        return {name for factor in axes if factor for name in mesh_axes.get(factor, ())}

    everywhere = set().union(*map(used, unit.factors))

    def on_shards(*shards: jax.Array) -> tuple[jax.Array, ...]:
        kv_heads = None
        if not divides:
            first = lax.axis_index(head_axes) * num_heads
            kv_heads = (first + shared * jnp.arange(num_heads // shared, dtype=jnp.int32)) // unit.group
            shards = tuple(
                jnp.take(x, kv_heads, axis=-2) if "K" in LAYOUTS[name] else x
                for name, x in zip(unit.operand_names, shards, strict=True)
            )
        sums = []
        results = zip(unit.result_names, unit.factors[len(args) :], kernel(*shards), strict=True)
        for name, axes, x in results:
            if kv_heads is not None and "K" in LAYOUTS[name]:
                whole = jnp.zeros((*x.shape[:-2], unit.num_kv_heads, x.shape[-1]), x.dtype)
                x = whole.at[..., kv_heads, :].add(x)
            missing = tuple(sorted(everywhere - used(axes)))
            sums.append(lax.psum(x, missing) if missing else x)
        return tuple(sums)

    shardings = [
        NamedSharding(mesh, PartitionSpec(*((mesh_axes.get(factor) if factor else None) or None for factor in axes)))
        for axes in unit.factors
    ]
    return mesh, on_shards, tuple(shardings[len(args) :]), tuple(shardings[: len(args)])


def _mesh_axes(unit: _Unit, mesh: Mesh, arrays: Sequence[Any]) -> dict[str, tuple[str, ...]]:
    """Which mesh axes shard each factor, as most arrays have it. They may disagree: query, the first, decides."""
    mesh_axes: dict[str, tuple[str, ...]] = {}
    for axes, x in zip(unit.factors, arrays, strict=True):
        for factor, n, names in zip(axes, x.shape, _decoded(x.sharding, x.ndim, mesh), strict=True):
            # K follows N in any case, and S follows T.
            others = {name for f in mesh_axes.keys() - {factor, "K", "S"} for name in mesh_axes[f]}
            is_free = factor not in mesh_axes and not others & set(names)
            if factor is not None and names and is_free and n % _num_shards(mesh, names) == 0:
                mesh_axes[factor] = names
    row_axes = mesh_axes.get("T", ())
    if unit.of_ring is None or unit.num_keys % _num_shards(mesh, row_axes):
        row_axes = ()
    mesh_axes |= {"T": row_axes, "S": row_axes}
    others = {name for f in mesh_axes.keys() - {"N", "K"} for name in mesh_axes[f]}
    head_axes = mesh_axes.get("N") or mesh_axes.get("K", ())
    num_heads = unit.num_kv_heads * unit.group
    is_free = not others & set(head_axes) and num_heads % _num_shards(mesh, head_axes) == 0
    return mesh_axes | {"N": head_axes if is_free else ()}


def _num_shards(mesh: Mesh, names: Sequence[str]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _split_into_primes(mesh: Any, x: Any) -> Mesh:
    """The same devices in the same order, with an axis for each prime factor: an array may be cut along a part of a
    mesh axis, where that has more devices than the array has heads.

    Without a mesh (an empty one) the devices of `x` are its only axis.
    """
    devices = list(_indices(x.sharding, x.ndim, len(x.sharding.device_set)))
    axes = mesh.devices.shape if mesh.size else (len(devices),)
    sizes = [n for axis in axes for n in _primes(axis)]
    return Mesh(np.array(devices).reshape(sizes), tuple(f"axis{i}" for i in range(len(sizes))))


def _primes(n: int) -> list[int]:
    """Prime factors in order."""
    for p in range(2, math.isqrt(n) + 1):
        if n % p == 0:
            return [p, *_primes(n // p)]
    return [n] if n > 1 else []


def _indices(sharding: Any, ndim: int, count: int) -> Mapping[Any, tuple[slice, ...]]:
    """What each of `count` devices has of an array whose shape every number of shards divides; in their order."""
    return sharding.devices_indices_map((count,) * ndim)


def _decoded(sharding: Any, ndim: int, mesh: Mesh) -> list[tuple[str, ...]]:
    """For each axis of an array with this sharding, the mesh axes that cut it, outermost first; () if none does so."""
    count = mesh.size
    slices = _indices(sharding, ndim, count)
    decoded = []
    for axis in range(ndim):
        starts = np.array([slices[device][axis].start or 0 for device in mesh.devices.flat])
        shard_size = min([n for n in starts if n], default=count)
        index = (starts // shard_size).reshape(mesh.devices.shape)
        strides = [int(index[tuple(int(i == j) for j in range(index.ndim))]) for i in range(index.ndim)]
        order = sorted((i for i, stride in enumerate(strides) if stride), key=lambda i: -strides[i])
        is_cut = (index == sum(stride * x for stride, x in zip(strides, np.indices(index.shape), strict=True))).all()
        widths = [index.shape[i] for i in order]
        is_cut &= all(strides[i] == math.prod(widths[k + 1 :]) for k, i in enumerate(order))
        decoded.append(tuple(mesh.axis_names[i] for i in order) if is_cut else ())
    return decoded
