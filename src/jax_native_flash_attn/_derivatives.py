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
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from . import _kernels
from ._logits import Config, Inputs, Tiles
from ._numerics import accumulation_dtype

Leaves = tuple[jax.Array, ...]
Flags = tuple[bool, ...]
Shape = jax.ShapeDtypeStruct

# Axes behind the batch axes.
_TRAILING_AXES = {"query": 4, "key": 3, "value": 3, "scale": 0, "bias": 4, "out": 4, "lse": 3}


class LinearKernel(Protocol):
    """A map linear in its `linear` operands, given residuals. Hashable: a parameter of `linear_kernel_p`."""

    @property
    def inputs(self) -> tuple[Shape, ...]: ...
    @property
    def outputs(self) -> tuple[Shape, ...]: ...
    def apply(self, residuals: Leaves, linear: Leaves, platform: str, differentiable: bool) -> Leaves: ...
    def transpose(self) -> "LinearKernel": ...
    def select(self, inputs: Flags, outputs: Flags) -> "LinearKernel":
        """The same map on some inputs (the others being zero), to some outputs."""
        ...

    def batched(self, size: int, is_batched: Flags) -> "LinearKernel":
        """With one more axis in front; where an input is not batched, of size 1 if the kernel can broadcast it."""
        ...


@dataclass(frozen=True)
class FirstDerivative:
    """The tangent kernel, or (flipped) the cotangent kernel; residuals are the leaves of `Inputs`, out and lse."""

    config: Config
    structure: Any
    tangents: tuple[tuple[str, Shape], ...]
    results: tuple[tuple[str, Shape], ...]
    flipped: bool = False

    @property
    def inputs(self) -> tuple[Shape, ...]:
        return tuple(shape for _, shape in (self.results if self.flipped else self.tangents))

    @property
    def outputs(self) -> tuple[Shape, ...]:
        return tuple(shape for _, shape in (self.tangents if self.flipped else self.results))

    def apply(self, residuals: Leaves, linear: Leaves, platform: str, differentiable: bool) -> Leaves:
        *leaves, out, lse = residuals
        inputs = jax.tree.unflatten(self.structure, leaves)
        given, wanted = self.tangents, self.results
        if self.flipped:
            given, wanted = wanted, given
        operands = {name: x for (name, _), x in zip(given, linear, strict=True)}
        leads = [x.shape[: x.ndim - _TRAILING_AXES[name]] for name, x in operands.items()]
        tiles = Tiles(self.config, inputs, platform, extra_batch=tuple(leads), differentiable=differentiable)
        kernel = _kernels.cotangent if self.flipped else _kernels.tangent
        results = kernel(tiles, out, lse, operands, dict(wanted))
        return tuple(results[name] for name, _ in wanted)

    def transpose(self) -> LinearKernel:
        return replace(self, flipped=not self.flipped)

    def select(self, inputs: Flags, outputs: Flags) -> LinearKernel:
        tangents, results = (outputs, inputs) if self.flipped else (inputs, outputs)
        return replace(self, tangents=_where(self.tangents, tangents), results=_where(self.results, results))

    def batched(self, size: int, is_batched: Flags) -> LinearKernel:
        given, wanted = self.tangents, self.results
        if self.flipped:
            given, wanted = wanted, given
        given = tuple(
            (name, _prepend(shape, size if flag else 1)) for (name, shape), flag in zip(given, is_batched, strict=True)
        )
        wanted = tuple((name, _prepend(shape, size)) for name, shape in wanted)
        if self.flipped:
            given, wanted = wanted, given
        return replace(self, tangents=given, results=wanted)


@dataclass(frozen=True)
class DirectionalDerivative:
    """Derivative of another kernel with respect to its residuals; flipped, the transpose of that.

    Residuals are the inner kernel's residuals and linear operands.

    Attributes:
      inner: the kernel.
      wrt: which of its residuals vary.
      tangents: shapes of their tangents.
    """

    inner: LinearKernel
    wrt: tuple[int, ...]
    tangents: tuple[Shape, ...]
    flipped: bool = False

    @property
    def inputs(self) -> tuple[Shape, ...]:
        return self.inner.outputs if self.flipped else self.tangents

    @property
    def outputs(self) -> tuple[Shape, ...]:
        return self.tangents if self.flipped else self.inner.outputs

    def apply(self, residuals: Leaves, linear: Leaves, platform: str, differentiable: bool) -> Leaves:
        num_residuals = len(residuals) - len(self.inner.inputs)
        residuals, inner_linear = residuals[:num_residuals], residuals[num_residuals:]
        # Batching may have left either a residual or its tangent with an axis of size 1.
        shapes = [
            np.broadcast_shapes(residuals[i].shape, tangent.shape)
            for i, tangent in zip(self.wrt, self.tangents, strict=True)
        ]

        def inner(*varying: jax.Array) -> Leaves:
            leaves = list(residuals)
            for i, x in zip(self.wrt, varying, strict=True):
                leaves[i] = x
            return self.inner.apply(tuple(leaves), inner_linear, platform, differentiable or self.flipped)

        primals = tuple(jnp.broadcast_to(residuals[i], shape) for i, shape in zip(self.wrt, shapes, strict=True))
        if not self.flipped:
            tangents = tuple(jnp.broadcast_to(t, s) for t, s in zip(linear, shapes, strict=True))
            return jax.jvp(inner, primals, tangents)[1]
        cotangents = jax.vjp(inner, *primals)[1](linear)
        return tuple(_sum_to(x, like.shape) for x, like in zip(cotangents, self.tangents, strict=True))

    def transpose(self) -> LinearKernel:
        return replace(self, flipped=not self.flipped)

    def select(self, inputs: Flags, outputs: Flags) -> LinearKernel:
        varying, results = (outputs, inputs) if self.flipped else (inputs, outputs)
        return replace(
            self,
            inner=self.inner.select((True,) * len(self.inner.inputs), results),
            wrt=_where(self.wrt, varying),
            tangents=_where(self.tangents, varying),
        )

    def batched(self, size: int, is_batched: Flags) -> LinearKernel:
        flags = (True,) * len(self.tangents) if self.flipped else is_batched
        return replace(
            self,
            inner=self.inner.batched(size, (True,) * len(self.inner.inputs)),
            tangents=tuple(_prepend(x, size if flag else 1) for x, flag in zip(self.tangents, flags, strict=True)),
        )


def _prepend(shape: Shape, size: int) -> Shape:
    return Shape((size, *shape.shape), shape.dtype)


def _where(items: tuple, flags: Flags) -> tuple:
    return tuple(item for item, flag in zip(items, flags, strict=True) if flag)


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    axes = tuple(i for i, (n, m) in enumerate(zip(x.shape, shape, strict=True)) if n != m)
    return x.sum(axes, keepdims=True) if axes else x


def _is_zero(tangent: Any) -> bool:
    return type(tangent) is ad.Zero or tangent.dtype == jax.dtypes.float0


def _shape_of(x: Any) -> Shape:
    return Shape(x.shape, x.dtype)


def _batch_operands(args: Sequence[jax.Array], dims: Sequence[int | None]) -> list[jax.Array]:
    """Batch axes to the front; operands that are not batched get one of size 1 and broadcast inside the kernels."""
    return [
        jnp.expand_dims(x, 0) if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(args, dims, strict=True)
    ]


# ---- out, lse


flash_attention_p = Primitive("flash_attention")
flash_attention_p.multiple_results = True


def _forward(*leaves: jax.Array, config: Config, structure: Any, platform: str) -> Leaves:
    return _kernels.forward(Tiles(config, jax.tree.unflatten(structure, leaves), platform))


def _forward_abstract_eval(*leaves: Any, config: Config, structure: Any) -> list[ShapedArray]:
    inputs: Inputs = jax.tree.unflatten(structure, leaves)
    z, dtype = inputs.sizes, inputs.query.dtype
    return [
        ShapedArray((*z.batch, z.T, z.K, z.G, z.D), dtype),
        ShapedArray((*z.batch, z.K, z.G, z.T), accumulation_dtype(dtype)),
    ]


def _forward_jvp(primals: Any, tangents: Any, *, config: Config, structure: Any) -> tuple:
    out, lse = flash_attention_p.bind(*primals, config=config, structure=structure)
    # Named, so that a `jax.checkpoint` policy can save both and not run the forward kernel again.
    out, lse = (
        checkpoint_name(out, "flash_attention_out"),
        checkpoint_name(lse, "flash_attention_lse"),
    )
    inputs: Inputs = jax.tree.unflatten(structure, tangents)
    varying = {
        name: tangent
        for name in ("query", "key", "value", "scale", "bias")
        if (tangent := getattr(inputs, name)) is not None and not _is_zero(tangent)
    }
    kernel = FirstDerivative(
        config,
        structure,
        tuple((name, _shape_of(tangent)) for name, tangent in varying.items()),
        (("out", _shape_of(out)), ("lse", _shape_of(lse))),
    )
    residuals = (*primals, out, lse)
    return [out, lse], linear_kernel_p.bind(*residuals, *varying.values(), kernel=kernel, num_residuals=len(residuals))


def _forward_batch(args: Any, dims: Any, **params: Any) -> tuple:
    return flash_attention_p.bind(*_batch_operands(args, dims), **params), [0, 0]


# ---- derivatives


linear_kernel_p = Primitive("flash_attention_linear_kernel")
linear_kernel_p.multiple_results = True


def _linear(*args: jax.Array, kernel: LinearKernel, num_residuals: int, platform: str) -> Leaves:
    return kernel.apply(args[:num_residuals], args[num_residuals:], platform, False)


def _linear_abstract_eval(*_: Any, kernel: LinearKernel, num_residuals: int) -> list[ShapedArray]:
    del num_residuals
    return [ShapedArray(x.shape, x.dtype) for x in kernel.outputs]


def _linear_jvp(primals: Any, tangents: Any, *, kernel: LinearKernel, num_residuals: int) -> tuple:
    results = linear_kernel_p.bind(*primals, kernel=kernel, num_residuals=num_residuals)
    residuals = primals[:num_residuals]
    flags = tuple(not _is_zero(t) for t in tangents)
    terms = []
    if any(flags[num_residuals:]):
        all_outputs = (True,) * len(kernel.outputs)
        terms.append(
            linear_kernel_p.bind(
                *residuals,
                *_where(tangents[num_residuals:], flags[num_residuals:]),
                kernel=kernel.select(flags[num_residuals:], all_outputs),
                num_residuals=num_residuals,
            )
        )
    if any(flags[:num_residuals]):
        varying = _where(tangents[:num_residuals], flags[:num_residuals])
        indices = tuple(i for i in range(num_residuals) if flags[i])
        derivative = DirectionalDerivative(kernel, indices, tuple(map(_shape_of, varying)))
        terms.append(linear_kernel_p.bind(*primals, *varying, kernel=derivative, num_residuals=len(primals)))
    return results, [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]


def _linear_transpose(cotangents: Any, *args: Any, kernel: LinearKernel, num_residuals: int) -> list:
    residuals, linear = args[:num_residuals], args[num_residuals:]
    wanted = tuple(ad.is_undefined_primal(x) for x in linear)
    given = tuple(type(c) is not ad.Zero for c in cotangents)
    transposed = kernel.select(wanted, given).transpose()
    results = iter(
        linear_kernel_p.bind(
            *residuals,
            *_where(tuple(cotangents), given),
            kernel=transposed,
            num_residuals=num_residuals,
        )
    )
    return [None] * num_residuals + [next(results) if flag else None for flag in wanted]


def _linear_batch(args: Any, dims: Any, *, kernel: LinearKernel, num_residuals: int) -> tuple:
    size = next(x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None)
    is_batched = tuple(dim is not None for dim in dims[num_residuals:])
    kernel = kernel.batched(size, is_batched)
    operands = _batch_operands(args, dims)
    residuals, linear = operands[:num_residuals], operands[num_residuals:]
    linear = [jnp.broadcast_to(x, like.shape) for x, like in zip(linear, kernel.inputs, strict=True)]
    results = linear_kernel_p.bind(*residuals, *linear, kernel=kernel, num_residuals=num_residuals)
    return results, [0] * len(results)


# ---- registration


def _register(primitive: Primitive, function: Any, abstract_eval: Any, jvp: Any, batch: Any) -> None:
    @functools.lru_cache(maxsize=1024)
    def jitted(params: tuple[tuple[str, Any], ...]) -> Any:
        return jax.jit(lambda *args: primitive.bind(*args, **dict(params)))

    def evaluate(*args: jax.Array, **params: Any) -> Any:
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return function(*args, platform=jax.default_backend(), **params)
        return jitted(tuple(params.items()))(*args)

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(abstract_eval)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    for platform in ("cpu", None):
        lowered = functools.partial(function, platform=platform or "accelerator")
        mlir.register_lowering(primitive, mlir.lower_fun(lowered, multiple_results=True), platform=platform)


_register(flash_attention_p, _forward, _forward_abstract_eval, _forward_jvp, _forward_batch)
_register(linear_kernel_p, _linear, _linear_abstract_eval, _linear_jvp, _linear_batch)
ad.primitive_transposes[linear_kernel_p] = _linear_transpose


def flash_attention_core(config: Config, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """out (batch..., T, K, G, D) and natural-log lse (batch..., K, G, T), differentiable in every mode."""
    leaves, structure = jax.tree.flatten(inputs)
    return flash_attention_p.bind(*leaves, config=config, structure=structure)
