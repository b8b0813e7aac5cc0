"""What a kernel is lowered for."""

from typing import Any, Literal, NamedTuple

import numpy as np


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
    """

    platform: str
    is_sharded: bool = False
    fixes_layouts: bool = False
    differentiated: Literal["forward", "reverse"] | None = None
    has_rounded_out: bool = False

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
