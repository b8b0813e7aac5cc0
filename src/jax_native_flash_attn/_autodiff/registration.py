"""What all primitives share: their evaluation, lowering and batching."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .._kernels.protocol import Target
from .._sharding import lowering, types


def batch_operands(args: Sequence[jax.Array], dims: Sequence[int | None]) -> list[jax.Array]:
    """Batch axes to the front; operands that are not batched get one of size 1 and broadcast inside the kernels."""
    pairs = zip(args, dims, strict=True)
    return types.shard_alike([x[None] if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in pairs])


def register(
    primitive: Primitive,
    function: Any,
    abstract_eval: Any,
    is_opaque: Any,
    layouts: Any,
    jvp: Any,
    batch: Any,
    with_ring: Any = None,
) -> None:
    """The rules of a primitive; `function(*operands, target=..., **params)` is what it computes."""

    @functools.lru_cache(maxsize=1024)
    def jitted(params: tuple[tuple[str, Any], ...]) -> Any:
        return jax.jit(lambda *args: primitive.bind(*args, **dict(params)))

    def evaluate(*args: jax.Array, **params: Any) -> Any:
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            del params["partitioning"]
            return function(*args, target=Target(jax.default_backend()), **params)
        return jitted(tuple(params.items()))(*args)

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(abstract_eval)
    if jvp is not None:
        ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    for platform in ("cpu", "cuda", "tpu", None):
        rule = lowering.lowering_rule(function, layouts, is_opaque, with_ring, platform or "accelerator")
        mlir.register_lowering(primitive, rule, platform=platform)
