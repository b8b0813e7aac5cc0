"""What `implementation=` may be, and calls that go to `jax.nn`."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ._kernels.jax_nn import jax_attention
from ._options import EXTENSIONS
from ._semantics.errors import describe

Implementation = Literal["xla", "pure_jax", "mosaic_gpu", "mosaic_tpu", "cudnn_gpu", "dense", "cudnn"]
_IMPLEMENTATIONS = (None, "xla", "pure_jax", "mosaic_gpu", "mosaic_tpu", "cudnn_gpu", "dense", "cudnn")


def own_implementation(implementation: Any) -> str | None:
    """What was asked for of our own kernels.

    Raises:
      ValueError: there is no such implementation.
      NotImplementedError: for 'cudnn'.
    """
    if not isinstance(implementation, str | None) or implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {_IMPLEMENTATIONS}, got {describe(implementation)}")
    if implementation == "cudnn":
        raise NotImplementedError("implementation='cudnn' passes a call to jax.nn, which does not take this one")
    return None if implementation == "xla" else implementation


def by_cudnn(arguments: dict[str, Any], return_residual: bool) -> Any:
    if arguments.pop("deterministic"):
        arguments["dropout_rate"] = 0.0
    for name, neutral in EXTENSIONS.items():
        given = arguments.pop(name)
        is_number = isinstance(given, bool | int | float | np.number | np.bool_)
        if not any(
            given is x or (is_number and given == x) or (isinstance(given, tuple) and given == x) for x in neutral
        ):
            raise NotImplementedError(f"{name} is not supported by implementation='cudnn', which is jax.nn's")
    del arguments["dropout_rng"]
    residual = {"return_residual": True} if return_residual else {}
    try:
        return jax_attention(**arguments, implementation="cudnn", **residual)
    except Exception as error:
        error.add_note("This error is jax.nn.dot_product_attention's: implementation='cudnn' passes the call to it.")
        raise
