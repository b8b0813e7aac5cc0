"""What a kernel family is: what it is asked for, what it answers, and what a kernel is lowered for."""

import enum
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from .._semantics.call import Call, batch_of


class Pass(enum.Enum):
    """What a kernel computes: attention, its tangent (JVP), or the transpose of its tangent (VJP)."""

    FORWARD = "forward"
    TANGENT = "tangent"
    COTANGENT = "cotangent"


class Target(NamedTuple):
    """What a kernel is lowered for.

    Attributes:
      platform: 'cpu' or anything else.
      is_sharded: whether XLA will split batch rows and heads over devices. A tile then holds all of them: a loop over
        a sharded axis would make XLA gather it.
      fixes_layouts: whether the kernel may say in which layout XLA keeps an array.
      differentiated: how JAX is about to differentiate the kernel, if it is. Kernels that it cannot differentiate are
        not taken then; and in reverse, through all of several derivatives, loops need static trip counts.
      has_rounded_out: whether the residual `out` was made of rounded weights; what is differentiated makes it anew.
      is_exported: whether the program is for `jax.export`.
      has_several: whether the program is for several devices, which may exchange data beside a kernel.
    """

    platform: str
    is_sharded: bool = False
    fixes_layouts: bool = False
    differentiated: Literal["forward", "reverse"] | None = None
    has_rounded_out: bool = False
    is_exported: bool = False
    has_several: bool = False

    @property
    def is_reversed(self) -> bool:
        return self.differentiated == "reverse"

    def under(self, mode: Literal["forward", "reverse"], dtype: Any) -> "Target":
        """This target for a kernel that JAX differentiates in `mode`, inside what it may differentiate already.

        `dtype` is that of its query; it may be wider than that of the call already.
        """
        rounds = self.platform != "cpu" or np.dtype(dtype).itemsize == 2
        return self._replace(
            differentiated="reverse" if self.is_reversed else mode, has_rounded_out=self.has_rounded_out or rounds
        )


class Forward(NamedTuple):
    """Results of the forward pass.

    Of rows with a negative id, out is 0, and lse, unless there are sinks: weights made of it are then 0.

    Attributes:
      out: (batch..., T, N, D), in query's dtype if `Config.rounds_out`, else in accumulation dtype.
      lse: (batch..., N, T), in accumulation dtype, or None if the call does not need it.
      max_logits: (batch..., N, T), the largest visible logit of each row, -inf if there is none; in accumulation dtype,
        or None if the call does not need it.
      rounded: out in query's dtype as well, or None if the call does not ask for it.
    """

    out: jax.Array
    lse: jax.Array | None = None
    max_logits: jax.Array | None = None
    rounded: jax.Array | None = None


class LinearPass(NamedTuple):
    """A tangent or a cotangent that is asked for.

    Attributes:
      out, lse: residuals, as the forward pass gave them.
      operands: tangents by name, of some of the differentiable operands; or cotangents, of 'out' and/or 'lse'.
      wanted: shapes and dtypes of the results by name; an axis of size 1 is summed over.
      products: of a cotangent, out times its cotangent, summed over D, if that is known: (batch..., N, T).
    """

    out: jax.Array
    lse: jax.Array
    operands: Mapping[str, jax.Array]
    wanted: Mapping[str, jax.ShapeDtypeStruct]
    products: jax.Array | None = None

    @property
    def batch(self) -> tuple[Any, ...]:
        """The batch axes that operands and log-sum-exp broadcast to; operands may have one of that name, too."""
        return jnp.broadcast_shapes(batch_of(self.operands), self.lse.shape[:-2])

    def with_products(self, dtype: Any) -> "LinearPass":
        """The same cotangent with its products, in this dtype; they are 0 where out has no cotangent."""
        if self.products is not None:
            return self
        if "out" not in self.operands:
            return self._replace(products=jnp.zeros(self.lse.shape, dtype))
        products = (self.operands["out"].astype(dtype) * self.out.astype(dtype)).sum(-1)
        return self._replace(products=jnp.swapaxes(products, -1, -2))

    def delta(self, dtype: Any) -> jax.Array:
        """What a cotangent subtracts from those of a row's weights: (batch..., N, T), see `xla/cotangent.py`."""
        products = self.with_products(dtype).products
        assert products is not None
        return products.astype(dtype) - self.operands["lse"].astype(dtype) if "lse" in self.operands else products


class Kernels(Protocol):
    """A kernel family.

    Attributes:
      name: what `implementation=` calls it.
      is_opaque: whether XLA cannot split its kernels over devices.
    """

    @property
    def name(self) -> str: ...
    @property
    def is_opaque(self) -> bool: ...
    def supports(self, call: Call, which: Pass, target: Target) -> str | None:
        """Why the family cannot do this pass of the call here, or None if it can; of arrays the types suffice."""
        ...

    def plan(self, call: Call, which: Pass, target: Target) -> Any:
        """What a pass takes (tile or block shapes, dtypes): a frozen value that prints well; of arrays the types do."""
        ...

    def forward(self, call: Call, target: Target) -> Forward: ...
    def cotangent(self, call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
        """Cotangents of some of the differentiable operands, by name."""
        ...

    def makes_gradients_together(self, call: Call, given: LinearPass, target: Target) -> bool:
        """Whether one `cotangent` takes less time than one for some of what is wanted, and one for the rest."""
        ...

    def tangent(self, call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
        """Tangents of 'out' and/or 'lse', by name."""
        ...
