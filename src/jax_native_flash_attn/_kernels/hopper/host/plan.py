"""What the plans of all kernels have."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from ...._semantics.call import Config
from ...._semantics.sizes import Sizes
from ..blocks import Blocks
from ..pallas import TmaLoad


@dataclass(frozen=True)
class KernelPlan:
    """`dtype` is that of query."""

    config: Config
    sizes: Sizes
    dtype: Any
    blocks: Blocks

    @property
    def is_float32(self) -> bool:
        """Whether products are in TensorFloat-32, and some operands so come transposed."""
        return self.dtype == jnp.float32

    @property
    def tma(self) -> TmaLoad:
        """Of query and key."""
        return TmaLoad(self.sizes.H, self.dtype)

    @property
    def value_tma(self) -> TmaLoad:
        """Of value and dout."""
        return TmaLoad(self.sizes.D, self.dtype)
