"""Linear maps with a known transpose: what `linear_kernel_p` of `primitives.py` applies.

`FirstDerivative` is the pair of tangent and cotangent kernels; `DirectionalDerivative` is the derivative of any such
map with respect to its residuals, which is linear again. Together they give derivatives of every order.

A directional derivative is JAX's own, forward or, transposed, in reverse mode through the inner kernel.
`Target.differentiated` says so to all that is chosen inside: no kernel is taken that JAX cannot differentiate so, such
as Mosaic GPU's, or, in reverse, a loop with a run-time trip count.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from .._kernels.protocol import LinearPass, Pass, Target
from .._semantics.call import Call, Config, Inputs, Ring, field_names, sum_to
from .._semantics.numerics import accumulation_dtype
from .._sharding import passes
from . import rows

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

    def apply(self, residuals: Leaves, linear: Leaves, target: Target) -> Leaves: ...
    def is_opaque(self, residuals: Sequence[Any], target: Target) -> bool:
        """Whether `apply` takes kernels that XLA cannot split over devices; of residuals the types suffice."""
        ...

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

    @property
    def _config(self) -> Config:
        names = self.residual_names
        return replace(
            self.config,
            differentiates_lse=any(names[slot.like] == "lse" for slot in self.results),
            differentiates_args=any(names[slot.like].startswith("score_mod_args.") for slot in self.tangents),
        )

    def apply(self, residuals: Leaves, linear: Leaves, target: Target) -> Leaves:
        *leaves, out, lse = residuals
        names = self.residual_names
        operands = {names[slot.like]: x for slot, x in zip(self.inputs, linear, strict=True)}
        shapes = operand_shapes(self.outputs, residuals, linear)
        wanted = {names[slot.like]: shape for slot, shape in zip(self.outputs, shapes, strict=True)}
        inputs = jax.tree.unflatten(self.structure, leaves)
        if target.has_rounded_out:
            if rows.is_shift(Call(self.config, inputs)):
                # It changes nothing here that is differentiated.
                assert inputs.bias is not None
                inputs = inputs._replace(bias=jax.lax.stop_gradient(inputs.bias))
            out, lse = self._forward(inputs, target)
        given = LinearPass(out, lse, operands, wanted)
        run = rows.cotangent if self.flipped else rows.tangent
        results = run(Call(self._config, inputs), given, target)
        return tuple(results[name] for name in wanted)

    def _forward(self, inputs: Inputs, target: Target) -> Leaves:
        """out and lse once more, of unrounded weights.

        What rounding does to out is, in delta, the same for a whole row, and leaves a sum of dz where there should be
        none. To a gradient that is one rounding more; but in derivatives of it, many times larger terms cancel.
        """
        config = replace(self.config, needs_lse=True, needs_max_logits=False, rounds_out=False, adds_rounded=False)
        results = passes.forward(Call(config, inputs), target)
        assert results.lse is not None
        return results.out, results.lse

    def is_opaque(self, residuals: Sequence[Any], target: Target) -> bool:
        call = Call(self._config, jax.tree.unflatten(self.structure, residuals[:-2]))
        return passes.is_opaque(call, Pass.COTANGENT if self.flipped else Pass.TANGENT, target)

    def transpose(self) -> LinearKernel:
        return replace(self, flipped=not self.flipped)

    def select(self, inputs: Flags, outputs: Flags) -> LinearKernel:
        tangents, results = (outputs, inputs) if self.flipped else (inputs, outputs)
        return replace(self, tangents=pick(self.tangents, tangents), results=pick(self.results, results))

    def batched(self, residuals: Flags, inputs: Flags) -> LinearKernel:
        given = tuple(slot.with_axis(flag) for slot, flag in zip(self.inputs, inputs, strict=True))
        wanted = tuple(slot.with_axis(True) for slot in self.outputs)
        tangents, results = (wanted, given) if self.flipped else (given, wanted)
        return replace(self, tangents=tangents, results=results)

    def with_ring(self, ring: Ring) -> "FirstDerivative":
        """The same of rows and keys that the devices of a ring share."""
        return replace(self, config=replace(self.config, ring=ring))


@dataclass(frozen=True)
class DirectionalDerivative:
    """Derivative of another kernel with respect to some of its operands; flipped, the transpose of that.

    Its residuals are the inner kernel's residuals, then the inner kernel's linear operands. (With respect to the latter
    alone it would be the inner kernel; with respect to both, one kernel shares what the two have in common.)
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

    def apply(self, residuals: Leaves, linear: Leaves, target: Target) -> Leaves:
        num_residuals = len(self.inner.residual_names)
        wanted = operand_shapes(self.outputs, residuals, linear)
        query = residuals[self.residual_names.index("query")]
        residuals, linear = tuple(map(_widened, residuals)), tuple(map(_widened, linear))
        likes = [slot.like for slot in self.tangents]
        shapes = [x.shape for x in operand_shapes(self.tangents, residuals, linear)]
        # `vmap` may have left either a residual or its tangent with an axis of size 1.
        full = [jnp.broadcast_shapes(residuals[i].shape, shape) for i, shape in zip(likes, shapes, strict=True)]
        inner_target = target.under("reverse" if self.flipped else "forward", query.dtype)

        def inner(*varying: jax.Array) -> Leaves:
            leaves = list(residuals)
            for i, x in zip(likes, varying, strict=True):
                leaves[i] = x
            inner_residuals, inner_linear = tuple(leaves[:num_residuals]), tuple(leaves[num_residuals:])
            return self.inner.apply(inner_residuals, inner_linear, inner_target)

        primals = tuple(jnp.broadcast_to(residuals[i], shape) for i, shape in zip(likes, full, strict=True))
        # TensorFloat-32, which float32 is multiplied in by default, has no more digits than float16.
        is_half = query.dtype == jnp.float16
        with jax.default_matmul_precision("highest") if is_half else contextlib.nullcontext():
            if not self.flipped:
                tangents = tuple(jnp.broadcast_to(t, shape) for t, shape in zip(linear, full, strict=True))
                results = jax.jvp(inner, primals, tangents)[1]
            else:
                results = jax.vjp(inner, *primals)[1](linear)
        return tuple(sum_to(x, like) for x, like in zip(results, wanted, strict=True))

    def is_opaque(self, residuals: Sequence[Any], target: Target) -> bool:
        return False

    def transpose(self) -> LinearKernel:
        return replace(self, flipped=not self.flipped)

    def select(self, inputs: Flags, outputs: Flags) -> LinearKernel:
        varying, results = (outputs, inputs) if self.flipped else (inputs, outputs)
        inner = self.inner.select((True,) * len(self.inner.inputs), results)
        return replace(self, inner=inner, tangents=pick(self.tangents, varying))

    def batched(self, residuals: Flags, inputs: Flags) -> LinearKernel:
        num_residuals = len(self.inner.residual_names)
        inner = self.inner.batched(residuals[:num_residuals], residuals[num_residuals:])
        flags = (True,) * len(self.tangents) if self.flipped else inputs
        tangents = tuple(slot.with_axis(flag) for slot, flag in zip(self.tangents, flags, strict=True))
        return replace(self, inner=inner, tangents=tangents)


def operand_shapes(slots: Slots, residuals: Sequence[Any], linear: Sequence[Any]) -> list[Shape]:
    """Shapes of inputs or outputs; added axes have the size of the operands that have them in full."""
    num_added = len(slots[0].batched) if slots else 0
    added = tuple(max(x.shape[i] for x in (*residuals, *linear)) for i in range(num_added))
    return [slot.shape(tuple(residuals), added) for slot in slots]


def pick(items: tuple, flags: Flags) -> tuple:
    return tuple(item for item, flag in zip(items, flags, strict=True) if flag)


def _widened(x: jax.Array) -> jax.Array:
    """Derivatives of 16-bit numbers are sums of large terms that cancel, so that none of them may be rounded."""
    return x.astype(accumulation_dtype(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x
