"""Explicit mesh axes: the sharding is part of the types, so the whole call is put into a `shard_map` over it."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from .._semantics.block_masks import make_ring
from .._semantics.call import Arrays, Settings
from .._semantics.operands import OPERANDS
from .types import axis_names, reshard


def over_explicit_axes(attention: Callable, settings: Settings, arrays: Arrays) -> Any:
    """Call `attention(settings, arrays)`; in a `shard_map` over the explicit mesh axes that shard query, if any.

    Of a query that is sharded along its rows, key and value are sharded likewise along theirs, and travel around a
    ring. `attention` returns out (B, T, N, D), and lse (B, T, N) and max_logits (B, N, T), which may be None.

    Raises:
      ValueError: query is sharded along its head dimension, or over more devices than divide key's heads or length.
    """
    query_type = jax.typeof(arrays.query)
    mesh, spec = query_type.sharding.mesh, (*query_type.sharding.spec, None, None, None, None)[:4]
    if AxisType.Explicit not in mesh.axis_types:
        return attention(settings, arrays)
    if spec[3] is not None:
        raise ValueError(
            f"query may be sharded over batch, sequence and heads, got {query_type.str_short(True)}: gather its head "
            "dimension with jax.sharding.reshard"
        )
    mesh_axes = {"B": spec[0], "T": spec[1], "N": spec[2], "K": spec[2]}
    T, S, blocks = arrays.query.shape[1], arrays.key.shape[1], _num_shards(mesh, spec[1])
    if blocks > 1:
        if settings.ring is not None or (settings.dropout is not None and settings.dropout.lengths is not None):
            raise ValueError(
                "query may not be sharded along the sequence over explicit axes inside context_parallel_attention, got "
                f"{query_type.str_short(True)}: name all axes of the sequence in axis_name"
            )
        if S % blocks:
            raise ValueError(
                f"key and value are sharded along the sequence as query is, over {blocks} devices, got {S} keys: pad "
                "them to a multiple, or gather query's sequence with jax.sharding.reshard"
            )
        ring = make_ring(settings, arrays, (T // blocks, S // blocks), spec[1], mesh.shape, blocks)
        settings = settings._replace(ring=ring)
    num_kv_heads = arrays.key.shape[2]
    head_shards = _num_shards(mesh, spec[2])
    if num_kv_heads % head_shards:
        if num_kv_heads > 1:
            raise ValueError(
                f"key has {num_kv_heads} heads, which do not divide over the {head_shards} shards of query's heads: "
                "shard the heads over fewer devices, or repeat key and value heads"
            )
        mesh_axes["K"] = None

    def spec_of(name: str, x: Any) -> PartitionSpec:
        letters = OPERANDS[name].axes[-x.ndim :] if x.ndim else ""
        if name in ("key", "value"):
            letters = letters.replace("S", "T")
        return PartitionSpec(*(mesh_axes.get(c) if n > 1 else None for c, n in zip(letters, x.shape, strict=True)))

    # An array that a call lacks is None, which has no leaf. What `score_mod` and `mask_mod` read is whole everywhere.
    given = {name: x for name, x in arrays._asdict().items() if x is not None}
    mod_args = given.pop("mod_args", None)
    specs = Arrays(**{name: spec_of(name, x) for name, x in given.items()})  # pyright: ignore
    if mod_args is not None:
        specs = specs._replace(mod_args={name: spec_of(name, x) for name, x in mod_args.items()})
    placed = jax.tree.map(lambda x, spec: reshard(x, mesh, spec), arrays, specs)
    out_specs = (
        PartitionSpec(spec[0], spec[1], spec[2], None),
        PartitionSpec(spec[0], spec[1], spec[2]) if settings.needs_lse else None,
        PartitionSpec(spec[0], spec[2], spec[1]) if settings.needs_max_logits else None,
    )
    manual = {name for axis in spec[:3] for name in axis_names(axis)}
    if not manual:
        return attention(settings, placed)
    # By default all axes that no `vmap` maps over: JAX before 0.10 does not like to be left with some explicit ones.
    some_axes: dict[str, Any] = {} if set(mesh.axis_types) == {AxisType.Explicit} else {"axis_names": manual}
    return jax.shard_map(
        lambda arrays: tuple(attention(settings, arrays)),
        mesh=mesh,
        **some_axes,
        in_specs=(specs,),
        out_specs=out_specs,
    )(placed)


def _num_shards(mesh: Any, mesh_axis: Any) -> int:
    return math.prod(mesh.shape[name] for name in axis_names(mesh_axis))
