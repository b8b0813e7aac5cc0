"""What the plans of all kernels have."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from ...._semantics.call import Config
from ...._semantics.sizes import Sizes
from ..blocks import Blocks
from ..operands import Operands
from ..pallas import TmaLoad
from .backward import Backward
from .operands import prepare


@dataclass(frozen=True)
class KernelPlan:
    """`dtype` is that of query."""

    config: Config
    sizes: Sizes
    dtype: Any
    blocks: Blocks

    def prepare(self, call: Backward, block_rows: int, block_kv: int, **options: bool) -> Operands:
        """`options` as of `operands.prepare`."""
        products = None if call.products is None else call.products.forward
        tma, value_tma = self.tma, self.value_tma
        options |= {"needs_slope": True}
        return prepare(call.config, call.inputs, block_rows, block_kv, tma, value_tma, products=products, **options)

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
