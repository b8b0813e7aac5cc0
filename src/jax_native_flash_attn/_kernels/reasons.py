"""Reasons that several families have not to take a call."""

import jax

from .._semantics.call import Call
from .protocol import Target


def why_not_differentiated(target: Target) -> str | None:
    """Of kernels that JAX cannot differentiate."""
    if target.differentiated is None:
        return None
    return "JAX cannot differentiate its kernels: derivatives of derivatives are pure JAX's, asked for or not"


def why_not_on_nvidia(target: Target) -> str | None:
    """Of kernels for NVIDIA GPUs that XLA cannot split."""
    if target.platform != "cuda":
        return f"the call is compiled for {target.platform}, not for an NVIDIA GPU alone"
    if target.is_sharded:
        return "XLA partitions this call (symbolic shapes, or manual and automatic mesh axes at once)"
    return None


def why_not_functions(call: Call) -> str | None:
    """Of kernels that evaluate no functions of scores and indices."""
    given = (name for name in ("score_mod", "mask_mod") if getattr(call.config, name) is not None)
    return next((f"{name} is a function, which these kernels do not evaluate" for name in given), None)


def why_pure_jax_alone(call: Call) -> str | None:
    """What of a call no other kernels take."""
    config = call.config
    if not all(isinstance(n, int) for x in jax.tree.leaves(call.inputs) for n in x.shape):
        return "its shapes are symbolic"
    if config.block_q is not None or config.block_kv is not None:
        return "block_q and block_kv are for the pure JAX kernels"
    if isinstance(config.precision, jax.lax.DotAlgorithm | jax.lax.DotAlgorithmPreset):
        return f"precision {config.precision} names an algorithm"
    return None
