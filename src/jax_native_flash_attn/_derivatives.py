"""Derivative, batching and lowering rules: two primitives around the kernels of `_kernels.py`.

`flash_attention_p` computes (out, lse). Its JVP binds `linear_kernel_p`, which applies a `LinearKernel`: a map that is
linear in some operands, given others (the residuals), and that knows its transpose. Hence

- transposing swaps a kernel for its transpose (tangent for cotangent);
- the JVP uses linearity for the linear operands; the derivative with respect to the residuals is again a linear map,
  `DirectionalDerivative`, bound the same way. So any order and any mix of modes works by recursion;
- batching puts one more axis in front of the kernels' batch axes, of size 1 where an operand is not batched: nothing
  shared is copied, and a `vmap` costs what a batch costs.

Kernels run in two forms. The one that is lowered loops with run-time trip counts, which JAX cannot reverse; the
transpose of a directional derivative is JAX's own reverse mode through the other (`differentiable=True`).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from . import _kernels, _sharding
from ._logits import FLOAT_FIELDS, Config, Inputs, Tiles, field_names
from ._numerics import accumulation_dtype

Leaves = tuple[jax.Array, ...]
Flags = tuple[bool, ...]
Shape = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Slot:
    """A linear input or an output of a kernel: shaped like one of the residuals, but for the axes that `vmap` added.

    Attributes:
      like: position of that residual.
      batched: for each added axis, whether this one has it in full (otherwise with size 1), outermost first.
    """

    like: int
    batched: Flags = ()

    def shape(self, residuals: Leaves, added: tuple[int, ...]) -> Shape:
        x = residuals[self.like]
        lead = tuple(size if flag else 1 for size, flag in zip(added, self.batched, strict=True))
        return Shape((*lead, *x.shape[len(lead) :]), x.dtype)

    def with_axis(self, is_batched: bool) -> "Slot":
        return Slot(self.like, (is_batched, *self.batched))


Slots = tuple[Slot, ...]


class LinearKernel(Protocol):
    """A map from `inputs` to `outputs`, linear given residuals. Hashable: it is a parameter of `linear_kernel_p`.

    It knows no sizes, so that it can be applied to the shards of its operands as well.
    """

    @property
    def inputs(self) -> Slots: ...
    @property
    def outputs(self) -> Slots: ...
    @property
    def residual_names(self) -> tuple[str, ...]:
        """Which field of `Inputs`, 'out' or 'lse' each residual is laid out as."""
        ...

    def apply(self, residuals: Leaves, linear: Leaves, platform: str, differentiable: bool) -> Leaves: ...
    def transpose(self) -> "LinearKernel": ...
    def select(self, inputs: Flags, outputs: Flags) -> "LinearKernel":
        """The same map on some inputs (the others being zero), to some outputs."""
        ...

    def batched(self, residuals: Flags, inputs: Flags) -> "LinearKernel":
        """With one more axis in front, of size 1 where an operand is not batched (flag False)."""
        ...


@dataclass(frozen=True)
class FirstDerivative:
    """The tangent kernel, or (flipped) the cotangent kernel; residuals are the leaves of `Inputs`, out and lse."""

    config: Config
    structure: Any
    tangents: Slots
    results: Slots
    flipped: bool = False

    @property
    def inputs(self) -> Slots:
        return self.results if self.flipped else self.tangents

    @property
    def outputs(self) -> Slots:
        return self.tangents if self.flipped else self.results

    @property
    def residual_names(self) -> tuple[str, ...]:
        return (*field_names(self.structure), "out", "lse")

    def apply(self, residuals: Leaves, linear: Leaves, platform: str, differentiable: bool) -> Leaves:
        *leaves, out, lse = residuals
        names = self.residual_names
        operands = {names[slot.like]: x for slot, x in zip(self.inputs, linear, strict=True)}
        shapes = _shapes(self.outputs, residuals, linear)
        wanted = {names[slot.like]: shape for slot, shape in zip(self.outputs, shapes, strict=True)}
        tiles = Tiles(
            self.config,
            jax.tree.unflatten(self.structure, leaves),
            platform,
            further={**operands, "lse": lse},
            differentiable=differentiable,
        )
        kernel = _kernels.cotangent if self.flipped else _kernels.tangent
        results = kernel(tiles, out, lse, operands, wanted)
        return tuple(results[name] for name in wanted)

    def transpose(self) -> LinearKernel:
        return replace(self, flipped=not self.flipped)

    def select(self, inputs: Flags, outputs: Flags) -> LinearKernel:
        tangents, results = (outputs, inputs) if self.flipped else (inputs, outputs)
        return replace(self, tangents=_where(self.tangents, tangents), results=_where(self.results, results))

    def batched(self, residuals: Flags, inputs: Flags) -> LinearKernel:
        given = tuple(slot.with_axis(flag) for slot, flag in zip(self.inputs, inputs, strict=True))
        wanted = tuple(slot.with_axis(True) for slot in self.outputs)
        tangents, results = (wanted, given) if self.flipped else (given, wanted)
        return replace(self, tangents=tangents, results=results)


@dataclass(frozen=True)
class DirectionalDerivative:
    """Derivative of another kernel with respect to some of its residuals; flipped, the transpose of that.

    Its residuals are the inner kernel's residuals, then the inner kernel's linear operands.
    """

    inner: LinearKernel
    tangents: Slots
    flipped: bool = False

    @property
    def inputs(self) -> Slots:
        return self.inner.outputs if self.flipped else self.tangents

    @property
    def outputs(self) -> Slots:
        return self.tangents if self.flipped else self.inner.outputs

    @property
    def residual_names(self) -> tuple[str, ...]:
        names = self.inner.residual_names
        return (*names, *(names[slot.like] for slot in self.inner.inputs))

    def apply(self, residuals: Leaves, linear: Leaves, platform: str, differentiable: bool) -> Leaves:
        num_residuals = len(self.inner.residual_names)
        inner_residuals, inner_linear = residuals[:num_residuals], residuals[num_residuals:]
        likes = [slot.like for slot in self.tangents]
        shapes = [x.shape for x in _shapes(self.tangents, residuals, linear)]
        # `vmap` may have left either a residual or its tangent with an axis of size 1.
        full = [np.broadcast_shapes(residuals[i].shape, shape) for i, shape in zip(likes, shapes, strict=True)]

        def inner(*varying: jax.Array) -> Leaves:
            leaves = list(inner_residuals)
            for i, x in zip(likes, varying, strict=True):
                leaves[i] = x
            return self.inner.apply(tuple(leaves), inner_linear, platform, differentiable or self.flipped)

        primals = tuple(jnp.broadcast_to(residuals[i], shape) for i, shape in zip(likes, full, strict=True))
        if not self.flipped:
            tangents = tuple(jnp.broadcast_to(t, shape) for t, shape in zip(linear, full, strict=True))
            return jax.jvp(inner, primals, tangents)[1]
        cotangents = jax.vjp(inner, *primals)[1](linear)
        return tuple(_sum_to(x, shape) for x, shape in zip(cotangents, shapes, strict=True))

    def transpose(self) -> LinearKernel:
        return replace(self, flipped=not self.flipped)

    def select(self, inputs: Flags, outputs: Flags) -> LinearKernel:
        varying, results = (outputs, inputs) if self.flipped else (inputs, outputs)
        inner = self.inner.select((True,) * len(self.inner.inputs), results)
        return replace(self, inner=inner, tangents=_where(self.tangents, varying))

    def batched(self, residuals: Flags, inputs: Flags) -> LinearKernel:
        num_residuals = len(self.inner.residual_names)
        inner = self.inner.batched(residuals[:num_residuals], residuals[num_residuals:])
        flags = (True,) * len(self.tangents) if self.flipped else inputs
        tangents = tuple(slot.with_axis(flag) for slot, flag in zip(self.tangents, flags, strict=True))
        return replace(self, inner=inner, tangents=tangents)


def _shapes(slots: Slots, residuals: Sequence[Any], linear: Sequence[Any]) -> list[Shape]:
    """Shapes of inputs or outputs; added axes have the size of the operands that have them in full."""
    num_added = len(slots[0].batched) if slots else 0
    added = tuple(max(x.shape[i] for x in (*residuals, *linear)) for i in range(num_added))
    return [slot.shape(tuple(residuals), added) for slot in slots]


def _where(items: tuple, flags: Flags) -> tuple:
    return tuple(item for item, flag in zip(items, flags, strict=True) if flag)


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    axes = tuple(i for i, (n, m) in enumerate(zip(x.shape, shape, strict=True)) if n != m)
    return x.sum(axes, keepdims=True) if axes else x


def _is_zero(tangent: Any) -> bool:
    return type(tangent) is ad.Zero or tangent.dtype == jax.dtypes.float0


def _batch_operands(args: Sequence[jax.Array], dims: Sequence[int | None]) -> list[jax.Array]:
    """Batch axes to the front; operands that are not batched get one of size 1 and broadcast inside the kernels."""
    return [
        jnp.expand_dims(x, 0) if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(args, dims, strict=True)
    ]


# ---- out, lse


flash_attention_p = Primitive("flash_attention")
flash_attention_p.multiple_results = True


def _apply_forward(*leaves: Any, config: Config, structure: Any) -> Any:
    partitioning = _sharding.partitioning()
    return flash_attention_p.bind(*leaves, config=config, structure=structure, partitioning=partitioning)


def _forward(*leaves: jax.Array, config: Config, structure: Any, platform: str) -> Leaves:
    return _kernels.forward(Tiles(config, jax.tree.unflatten(structure, leaves), platform))


def _forward_abstract_eval(*leaves: Any, config: Config, structure: Any, **_: Any) -> list[Any]:
    del config
    inputs: Inputs = jax.tree.unflatten(structure, leaves)
    z, dtype = inputs.sizes, inputs.query.dtype
    return [
        _sharding.result_aval(leaves, (*z.batch, z.T, z.K, z.G, z.D), dtype),
        _sharding.result_aval(leaves, (*z.batch, z.K, z.G, z.T), accumulation_dtype(dtype)),
    ]


def _forward_jvp(primals: Any, tangents: Any, *, config: Config, structure: Any, **_: Any) -> tuple:
    out, lse = _apply_forward(*primals, config=config, structure=structure)
    # Named, so that a `jax.checkpoint` policy can save both and not run the forward kernel again.
    out, lse = checkpoint_name(out, "flash_attention_out"), checkpoint_name(lse, "flash_attention_lse")
    names = field_names(structure)
    varying = [i for i, t in enumerate(tangents) if names[i] in FLOAT_FIELDS and not _is_zero(t)]
    residuals = (*primals, out, lse)
    slots = tuple(Slot(i) for i in varying), (Slot(len(primals)), Slot(len(primals) + 1))
    kernel = FirstDerivative(config, structure, *slots)
    dresults = _apply_linear(*residuals, *(tangents[i] for i in varying), kernel=kernel)
    return [out, lse], dresults


def _forward_batch(args: Any, dims: Any, *, config: Config, structure: Any, **_: Any) -> tuple:
    return _apply_forward(*_batch_operands(args, dims), config=config, structure=structure), [0, 0]


def _forward_layouts(*, config: Config, structure: Any) -> _sharding.Layouts:
    del config
    return field_names(structure), ("out", "lse")


# ---- derivatives


linear_kernel_p = Primitive("flash_attention_linear_kernel")
linear_kernel_p.multiple_results = True


def _apply_linear(*args: Any, kernel: LinearKernel) -> Any:
    return linear_kernel_p.bind(*args, kernel=kernel, partitioning=_sharding.partitioning())


def _linear(*args: jax.Array, kernel: LinearKernel, platform: str) -> Leaves:
    residuals, linear = _split(args, kernel)
    return kernel.apply(residuals, linear, platform, False)


def _split(args: Sequence[Any], kernel: LinearKernel) -> tuple[tuple, tuple]:
    n = len(kernel.residual_names)
    return tuple(args[:n]), tuple(args[n:])


def _linear_abstract_eval(*args: Any, kernel: LinearKernel, **_: Any) -> list[Any]:
    shapes = _shapes(kernel.outputs, *_split(args, kernel))
    return [_sharding.result_aval(args, x.shape, x.dtype) for x in shapes]


def _linear_jvp(primals: Any, tangents: Any, *, kernel: LinearKernel, **_: Any) -> tuple:
    results = _apply_linear(*primals, kernel=kernel)
    residuals, _ = _split(primals, kernel)
    dresiduals, dlinear = _split(tangents, kernel)
    terms = []
    flags = tuple(not _is_zero(t) for t in dlinear)
    if any(flags):
        linear_part = kernel.select(flags, (True,) * len(kernel.outputs))
        terms.append(_apply_linear(*residuals, *_where(dlinear, flags), kernel=linear_part))
    flags = tuple(not _is_zero(t) for t in dresiduals)
    if any(flags):
        # A residual's tangent has the residual's own shape, with nothing broadcast.
        depth = len(kernel.outputs[0].batched)
        slots = tuple(Slot(i, _added_flags(residuals[i], primals, depth)) for i, flag in enumerate(flags) if flag)
        derivative = DirectionalDerivative(kernel, slots)
        terms.append(_apply_linear(*primals, *_where(dresiduals, flags), kernel=derivative))
    return results, [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]


def _added_flags(x: Any, operands: Any, depth: int) -> Flags:
    return tuple(x.shape[i] == max(y.shape[i] for y in operands) for i in range(depth))


def _linear_transpose(cotangents: Any, *args: Any, kernel: LinearKernel, **_: Any) -> list:
    residuals, linear = _split(args, kernel)
    wanted = tuple(ad.is_undefined_primal(x) for x in linear)
    given = tuple(type(c) is not ad.Zero for c in cotangents)
    transposed = kernel.select(wanted, given).transpose()
    results = iter(_apply_linear(*residuals, *_where(tuple(cotangents), given), kernel=transposed))
    return [None] * len(residuals) + [next(results) if flag else None for flag in wanted]


def _linear_batch(args: Any, dims: Any, *, kernel: LinearKernel, **_: Any) -> tuple:
    flags = tuple(dim is not None for dim in dims)
    kernel = kernel.batched(*_split(flags, kernel))
    residuals, linear = _split(_batch_operands(args, dims), kernel)
    shapes = _shapes(kernel.inputs, residuals, linear)
    linear = [jnp.broadcast_to(x, like.shape) for x, like in zip(linear, shapes, strict=True)]
    results = _apply_linear(*residuals, *linear, kernel=kernel)
    return results, [0] * len(results)


def _linear_layouts(*, kernel: LinearKernel) -> _sharding.Layouts:
    names = kernel.residual_names
    return (
        (*names, *(names[slot.like] for slot in kernel.inputs)),
        tuple(names[slot.like] for slot in kernel.outputs),
    )


# ---- registration


def _register(primitive: Primitive, function: Any, abstract_eval: Any, layouts: Any, jvp: Any, batch: Any) -> None:
    @functools.lru_cache(maxsize=1024)
    def jitted(params: tuple[tuple[str, Any], ...]) -> Any:
        return jax.jit(lambda *args: primitive.bind(*args, **dict(params)))

    def evaluate(*args: jax.Array, **params: Any) -> Any:
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            del params["partitioning"]
            return function(*args, platform=jax.default_backend(), **params)
        return jitted(tuple(params.items()))(*args)

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(abstract_eval)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    for platform in ("cpu", None):
        kernel = functools.partial(function, platform=platform or "accelerator")
        mlir.register_lowering(primitive, _sharding.lowering_rule(kernel, layouts), platform=platform)


_register(flash_attention_p, _forward, _forward_abstract_eval, _forward_layouts, _forward_jvp, _forward_batch)
_register(linear_kernel_p, _linear, _linear_abstract_eval, _linear_layouts, _linear_jvp, _linear_batch)
ad.primitive_transposes[linear_kernel_p] = _linear_transpose


def flash_attention_core(config: Config, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """out (batch..., T, K, G, D) and natural-log lse (batch..., K, G, T), differentiable in every mode."""
    leaves, structure = jax.tree.flatten(inputs)
    return _apply_forward(*_sharding.vary_alike(leaves), config=config, structure=structure)
