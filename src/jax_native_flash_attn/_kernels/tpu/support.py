"""The family of kernels for TPUs, by Pallas' Mosaic TPU backend: what it supports, and where.

Without that backend, which this module does not import: see `pallas.py`.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..._semantics.call import Call
from ..protocol import Forward, LinearPass, Pass, Target
from ..reasons import why_not_differentiated, why_not_functions, why_pure_jax_alone

_JAX_WITH_BACKEND = (0, 10)
_MOST_HEAD_DIM = 256
_SCALAR_BYTES = 256 << 10  # of the scalar memory, for the ranges of tiles


@dataclass(frozen=True)
class TpuKernels:
    """See `Kernels`.

    Attributes:
      interpret: as of Pallas; then also where there is no TPU, for tests.
      generation: of the chip, as 'v5'; by default that of the TPUs here.
      forward_blocks, backward_blocks: of every call; None: those that `blocks.py` chooses for it.
    """

    interpret: Any = False
    generation: str | None = None
    forward_blocks: Any = None
    backward_blocks: Any = None
    name = "mosaic_tpu"
    is_opaque = True

    def supports(self, call: Call, which: Pass, target: Target) -> str | None:
        if (differentiated := why_not_differentiated(target)) is not None:
            return differentiated
        platforms = ("tpu",) if self.interpret is False else ("tpu", "cpu")
        reason = None
        if target.platform not in platforms:
            reason = f"the call is compiled for {target.platform}, not for a TPU alone"
        elif target.is_sharded:
            reason = (
                "XLA partitions this call over automatic mesh axes, and cannot split a kernel on TPUs: "
                "call it inside jax.shard_map, or make the axes explicit"
            )
        elif which is Pass.TANGENT:
            reason = "it has no kernel for tangents"
        return reason or _why_not_call(call) or _why_not_backend()

    def plan(self, call: Call, which: Pass, target: Target) -> Any:
        from . import plan

        generation = self.generation or generation_here()
        if which is Pass.COTANGENT:
            return self.backward_blocks or plan.backward_blocks(call, generation)
        return self.forward_blocks or plan.forward_blocks(call, generation)

    def forward(self, call: Call, target: Target) -> Forward:
        from . import family

        return family.forward(call, self.plan(call, Pass.FORWARD, target), self.interpret)

    def cotangent(self, call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
        from . import cotangent

        return cotangent.cotangent(call, given, self.plan(call, Pass.COTANGENT, target), self.interpret)

    def makes_gradients_together(self, call: Call, given: LinearPass, target: Target) -> bool:
        return False

    def tangent(self, call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
        raise NotImplementedError("it has no kernel for tangents")


def _why_not_call(call: Call) -> str | None:
    config, inputs = call
    dtype, H, D = inputs.query.dtype, inputs.query.shape[-1], inputs.value.shape[-1]
    if (reason := why_pure_jax_alone(call) or why_not_functions(call)) is not None:
        return reason
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, got {dtype}"
    if max(H, D) > _MOST_HEAD_DIM:
        return f"it takes head dimensions up to {_MOST_HEAD_DIM}, got {H if H == D else f'{H} of key and {D} of value'}"
    if config.dropout is not None and config.dropout.uniform_bits != 23:
        return "dropout under jax_enable_x64 draws float64, which TPUs lack"
    return _why_not_scalars(call)


def _why_not_scalars(call: Call) -> str | None:
    """Four numbers for each block of rows; blocks have 256 rows at least, if there are so many."""
    z, start = call.sizes, call.inputs.mask.key_start
    rows = 1 if start is None else max(1, start.size // (start.shape[-1] * start.shape[-2]))
    if 16 * rows * -(-max(z.T, z.S) // 256) > _SCALAR_BYTES:
        return f"the tile ranges of {rows} batch rows of {max(z.T, z.S)} tokens do not fit into scalar memory"
    return None


@functools.cache
def _why_not_backend() -> str | None:
    if jax.__version_info__[:2] < _JAX_WITH_BACKEND:
        return f"it needs JAX {'.'.join(map(str, _JAX_WITH_BACKEND))}, this is {jax.__version__}"
    try:
        from . import cotangent, family  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        return f"Pallas' Mosaic TPU backend cannot be imported: {error}"
    return None


@functools.cache
def generation_here() -> str:
    """'v5' of 'TPU v5 lite', say, or 'default' without a TPU here."""
    try:
        kinds = {device.device_kind for device in jax.local_devices(backend="tpu")}
    except RuntimeError:
        return "default"
    found = re.search(r"\d+", min(kinds, default=""))
    return f"v{found.group()}" if found else "default"
