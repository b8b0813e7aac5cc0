"""What the plans of all kernels have."""

from dataclasses import dataclass
from typing import Any

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
    def tma(self) -> TmaLoad:
        """Of query and key."""
        return TmaLoad(self.sizes.H, self.dtype)

    @property
    def value_tma(self) -> TmaLoad:
        """Of value and dout."""
        return TmaLoad(self.sizes.D, self.dtype)
