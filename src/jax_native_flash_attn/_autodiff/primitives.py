"""Derivative, batching and lowering rules: two primitives around the passes of a kernel family.

`flash_attention_p` computes (out, lse). Its JVP binds `linear_kernel_p`, which applies a `LinearKernel`: a map that is
linear in some operands, given others (the residuals), and that knows its transpose. Hence

- transposing swaps a kernel for its transpose (tangent for cotangent);
- the JVP uses linearity for the linear operands; the derivative with respect to the residuals is again a linear map,
  `DirectionalDerivative`, bound the same way. So any order and any mix of modes works by recursion;
- batching puts one more axis in front of the kernels' batch axes, of size 1 where an operand is not batched: nothing
  shared is copied, and a `vmap` costs what a batch costs.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad

from .._kernels.protocol import Pass, Target
from .._semantics.call import Call, Config, Inputs, Ring, field_names
from .._semantics.numerics import accumulation_dtype
from .._semantics.operands import OPERANDS
from .._semantics.varying import vary_alike
from .._sharding import lowering, passes, types
from .linear import DirectionalDerivative, FirstDerivative, Flags, Leaves, LinearKernel, Slot, operand_shapes, pick
from .registration import batch_operands, register


def _is_zero(tangent: Any) -> bool:
    return type(tangent) is ad.Zero or tangent.dtype == jax.dtypes.float0


# ---- out, lse


flash_attention_p = Primitive("flash_attention")
flash_attention_p.multiple_results = True


def _apply_forward(*leaves: Any, config: Config, structure: Any) -> Any:
    params = {"config": config, "structure": structure}
    return flash_attention_p.bind(
        *leaves, **params, partitioning=lowering.partitioning(_forward_is_opaque, leaves, **params)
    )


def _forward(*leaves: jax.Array, config: Config, structure: Any, target: Target) -> Leaves:
    results = passes.forward(Call(config, jax.tree.unflatten(structure, leaves)), target)
    return tuple(x for x in results if x is not None)


def _forward_abstract_eval(*leaves: Any, config: Config, structure: Any, **unused: Any) -> list[Any]:
    inputs: Inputs = jax.tree.unflatten(structure, leaves)
    z, dtype = inputs.sizes, accumulation_dtype(inputs.query.dtype)
    out_dtype = inputs.query.dtype if config.rounds_out else dtype
    results = [types.result_aval(leaves, (*z.batch, z.T, z.N, z.D), out_dtype)]
    if config.needs_lse:
        results.append(types.result_aval(leaves, (*z.batch, z.N, z.T), dtype))
    if config.needs_max_logits:
        results.append(types.result_aval(leaves, (*z.batch, z.N, z.T), dtype))
    if config.adds_rounded:
        results.append(types.result_aval(leaves, (*z.batch, z.T, z.N, z.D), inputs.query.dtype))
    return results


def _forward_jvp(primals: Any, tangents: Any, *, config: Config, structure: Any, **unused: Any) -> tuple:
    asked, query_dtype = config, jax.tree.unflatten(structure, primals).query.dtype
    # Both from one kernel, so that what follows need not read the unrounded one.
    wants_rounded = asked.rounds_out or asked.adds_rounded
    adds_rounded = wants_rounded and query_dtype != accumulation_dtype(query_dtype)
    config = replace(config, needs_lse=True, rounds_out=False, adds_rounded=adds_rounded)
    # Named, so that a `jax.checkpoint` policy can save them and not run the forward kernel again.
    named = zip(_result_names(config), _apply_forward(*primals, config=config, structure=structure), strict=True)
    out, lse, *others = (checkpoint_name(x, f"flash_attention_{name}") for name, x in named)
    max_logits = others.pop(0) if config.needs_max_logits else None
    rounded = others[0] if others else out
    names = field_names(structure)
    varying = [i for i, t in enumerate(tangents) if OPERANDS[names[i]].is_differentiable and not _is_zero(t)]
    residuals = (*primals, out, lse)
    slots = (Slot(len(primals)), Slot(len(primals) + 1))[: 2 if asked.needs_lse else 1]
    config = replace(config, needs_max_logits=False, rounds_out=asked.rounds_out)
    kernel = FirstDerivative(config, structure, tuple(map(Slot, varying)), slots)
    dout, *dlse = _apply_linear(*residuals, *(tangents[i] for i in varying), kernel=kernel)
    results = [(rounded if asked.rounds_out else out, dout), *([(lse, *dlse)] if dlse else [])]
    results += [] if max_logits is None else [(max_logits, jnp.zeros_like(max_logits))]
    results += [(rounded, dout)] if asked.adds_rounded else []
    return [x for x, _ in results], [dx.astype(x.dtype) for x, dx in results]


def _forward_transpose(cotangents: Any, *leaves: Any, config: Config, structure: Any, **unused: Any) -> list:
    """Attention is linear in value alone (and lse does not depend on it): for `jax.linear_transpose`."""
    names = field_names(structure)
    undefined = [names[i] for i, x in enumerate(leaves) if ad.is_undefined_primal(x)]
    if undefined != ["value"]:
        raise NotImplementedError(f"flash_attention is linear in value alone, not in {', '.join(undefined)}")
    position = names.index("value")
    value = leaves[position].aval
    if type(cotangents[0]) is ad.Zero:
        return [None] * len(leaves)
    known = [jnp.zeros(value.shape, value.dtype) if i == position else x for i, x in enumerate(leaves)]
    config = replace(config, needs_lse=True, needs_max_logits=False, rounds_out=False)
    out, lse = _apply_forward(*known, config=config, structure=structure)
    kernel = FirstDerivative(config, structure, (Slot(position),), (Slot(len(leaves)),), flipped=True)
    (dvalue,) = _apply_linear(*known, out, lse, cotangents[0].astype(out.dtype), kernel=kernel)
    return [dvalue if i == position else None for i in range(len(leaves))]


def _forward_batch(args: Any, dims: Any, *, config: Config, structure: Any, **unused: Any) -> tuple:
    results = _apply_forward(*batch_operands(args, dims), config=config, structure=structure)
    return results, [0] * len(results)


def _forward_is_opaque(leaves: Sequence[Any], target: Target, *, config: Config, structure: Any) -> bool:
    return passes.is_opaque(Call(config, jax.tree.unflatten(structure, leaves)), Pass.FORWARD, target)


def _forward_layouts(*, config: Config, structure: Any) -> lowering.Layouts:
    return field_names(structure), _result_names(config)


def _forward_with_ring(ring: Ring, *, config: Config, structure: Any) -> dict[str, Any]:
    return {"config": replace(config, ring=ring), "structure": structure}


def _result_names(config: Config) -> tuple[str, ...]:
    flags = (True, config.needs_lse, config.needs_max_logits, config.adds_rounded)
    return pick(("out", "lse", "max_logits", "out"), flags)


# ---- derivatives


linear_kernel_p = Primitive("flash_attention_linear_kernel")
linear_kernel_p.multiple_results = True


def _apply_linear(*args: Any, kernel: LinearKernel) -> Any:
    partitioning = lowering.partitioning(_linear_is_opaque, args, kernel=kernel)
    return linear_kernel_p.bind(*args, kernel=kernel, partitioning=partitioning)


def _linear(*args: jax.Array, kernel: LinearKernel, target: Target) -> Leaves:
    residuals, linear = _split(args, kernel)
    return kernel.apply(residuals, linear, target)


def _split(args: Sequence[Any], kernel: LinearKernel) -> tuple[tuple, tuple]:
    n = len(kernel.residual_names)
    return tuple(args[:n]), tuple(args[n:])


def _linear_abstract_eval(*args: Any, kernel: LinearKernel, **unused: Any) -> list[Any]:
    shapes = operand_shapes(kernel.outputs, *_split(args, kernel))
    return [types.result_aval(args, x.shape, x.dtype) for x in shapes]


def _linear_jvp(primals: Any, tangents: Any, *, kernel: LinearKernel, **unused: Any) -> tuple:
    results = _apply_linear(*primals, kernel=kernel)
    residuals, _ = _split(primals, kernel)
    dresiduals, dlinear = _split(tangents, kernel)
    flags = tuple(not _is_zero(t) for t in tangents)
    if any(not _is_zero(t) for t in dresiduals):
        # A tangent has the primal's own shape, with nothing broadcast.
        depth = len(kernel.outputs[0].batched)
        slots = tuple(Slot(i, _added_flags(primals[i], primals, depth)) for i, flag in enumerate(flags) if flag)
        derivative = DirectionalDerivative(kernel, slots)
        return results, _apply_linear(*primals, *pick(tuple(tangents), flags), kernel=derivative)
    flags = flags[len(residuals) :]
    linear_part = kernel.select(flags, (True,) * len(kernel.outputs))
    return results, _apply_linear(*residuals, *pick(dlinear, flags), kernel=linear_part)


def _added_flags(x: Any, operands: Any, depth: int) -> Flags:
    return tuple(x.shape[i] == max(y.shape[i] for y in operands) for i in range(depth))


def _linear_transpose(cotangents: Any, *args: Any, kernel: LinearKernel, **unused: Any) -> list:
    residuals, linear = _split(args, kernel)
    wanted = tuple(ad.is_undefined_primal(x) for x in linear)
    given = tuple(type(c) is not ad.Zero for c in cotangents)
    transposed = kernel.select(wanted, given).transpose()
    results = iter(_apply_linear(*residuals, *pick(tuple(cotangents), given), kernel=transposed))
    return [None] * len(residuals) + [next(results) if flag else None for flag in wanted]


def _linear_batch(args: Any, dims: Any, *, kernel: LinearKernel, **unused: Any) -> tuple:
    flags = tuple(dim is not None for dim in dims)
    kernel = kernel.batched(*_split(flags, kernel))
    residuals, linear = _split(batch_operands(args, dims), kernel)
    shapes = operand_shapes(kernel.inputs, residuals, linear)
    linear = [jnp.broadcast_to(x, like.shape) for x, like in zip(linear, shapes, strict=True)]
    results = _apply_linear(*types.shard_alike([*residuals, *linear]), kernel=kernel)
    return results, [0] * len(results)


def _linear_is_opaque(args: Sequence[Any], target: Target, *, kernel: LinearKernel) -> bool:
    return kernel.is_opaque(_split(args, kernel)[0], target)


def _linear_layouts(*, kernel: LinearKernel) -> lowering.Layouts:
    names = kernel.residual_names
    return (
        (*names, *(names[slot.like] for slot in kernel.inputs)),
        tuple(names[slot.like] for slot in kernel.outputs),
    )


def _linear_with_ring(ring: Ring, *, kernel: LinearKernel) -> dict[str, Any]:
    assert isinstance(kernel, FirstDerivative)  # no other is opaque
    return {"kernel": kernel.with_ring(ring)}


register(
    flash_attention_p,
    _forward,
    _forward_abstract_eval,
    _forward_is_opaque,
    _forward_layouts,
    _forward_jvp,
    _forward_batch,
    _forward_with_ring,
)
register(
    linear_kernel_p,
    _linear,
    _linear_abstract_eval,
    _linear_is_opaque,
    _linear_layouts,
    _linear_jvp,
    _linear_batch,
    _linear_with_ring,
)
ad.primitive_transposes[flash_attention_p] = _forward_transpose
ad.primitive_transposes[linear_kernel_p] = _linear_transpose


def flash_attention_core(config: Config, inputs: Inputs) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """out (batch..., T, N, D), and, if needed, lse and max_logits (batch..., N, T), in accumulation dtype.

    out and lse are differentiable; max_logits has no gradient.
    """
    leaves, structure = jax.tree.flatten(inputs)
    out, *others = _apply_forward(*vary_alike(leaves), config=config, structure=structure)
    lse = others.pop(0) if config.needs_lse else None
    return out, lse, others[0] if config.needs_max_logits else None
