"""The family of kernels for Hopper GPUs, by Pallas' Mosaic GPU backend: what it supports, and where.

Without that backend, which this module does not import: JAX before 0.10 lacks it, and it needs `absl`.
"""

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..._semantics.call import Call, batch_of
from ..._semantics.masks import Band, MaskOperands
from ..._semantics.visible import Visible
from ..gpus import compute_capabilities as _compute_capabilities
from ..protocol import Forward, LinearPass, Pass, Target
from ..reasons import why_not_differentiated, why_not_on_nvidia, why_pure_jax_alone
from .blocks import BackwardBlocks, Blocks, Chip
from .formula_builder import why_not_lowered

_JAX_WITH_BACKEND = (0, 10)
_COMPUTE_CAPABILITY = 9  # Hopper: wgmma exists on no other
_FEW_ROWS = 64  # with which copies of float32 keys and values would cost more than attention


@dataclass(frozen=True)
class HopperKernels:
    """See `Kernels`.

    Attributes:
      forward_blocks, backward_blocks, tangent_blocks: of every call; None: those that `blocks.py` chooses for it.
    """

    forward_blocks: Blocks | None = None
    backward_blocks: BackwardBlocks | None = None
    tangent_blocks: Blocks | None = None
    name = "mosaic_gpu"
    is_opaque = True

    def supports(self, call: Call, which: Pass, target: Target) -> str | None:
        if (reason := why_not_differentiated(target)) is not None:
            return reason
        is_asked = call.config.implementation == self.name
        reason = (
            why_not_on_nvidia(target)
            or _why_not_call(call)
            or _why_not_pass(call, which)
            or _why_not_device(is_asked=is_asked)
        )
        if reason is None and (reason := _why_not_backend()) and not is_asked:
            _warn_of_backend(reason)
        return reason

    def plan(self, call: Call, which: Pass, target: Target) -> Blocks | BackwardBlocks:
        """A cotangent's is for all gradients but that of scale, a tangent's for a bias without one."""
        from . import tangent

        if which is Pass.COTANGENT:
            return self._backward_blocks(call, target)
        if which is Pass.TANGENT:
            return self.tangent_blocks or tangent.plan(call.inputs)
        return self._forward_blocks(call)

    def _forward_blocks(self, call: Call) -> Blocks:
        from . import family

        return self.forward_blocks or family.plan(call.config, call.inputs, _chip())

    def _backward_blocks(self, call: Call, target: Target) -> BackwardBlocks:
        from . import cotangent

        return self.backward_blocks or cotangent.plan(
            call.config, call.inputs, _chip().cores, at_once=_runs_at_once(target)
        )

    def forward(self, call: Call, target: Target) -> Forward:
        from . import family

        return family.forward(call.config, call.inputs, self._forward_blocks(call), _chip().cores)

    def cotangent(self, call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
        from . import cotangent

        at_once = _runs_at_once(target)
        return cotangent.cotangent(call, given, self.backward_blocks, _chip().cores, at_once=at_once)

    def makes_gradients_together(self, call: Call, given: LinearPass, target: Target) -> bool:
        from .host.fused_plan import makes_all

        is_fused = self._backward_blocks(call, target).fused is not None
        return is_fused and makes_all(call.inputs, batch_of(given.operands), given.wanted)

    def finds_visible(self, mask: MaskOperands, T: int, S: int, target: Target, implementation: str | None) -> bool:
        """Whether there is a kernel for `find_visible` in a call that asks for this implementation."""
        is_asked = implementation == self.name
        shapes = [n for x in jax.tree.leaves(mask) for n in x.shape]
        reason = why_not_on_nvidia(target) or _why_not_device(is_asked=is_asked) or _why_not_backend()
        return reason is None and all(isinstance(n, int) for n in (T, S, *shapes))

    def find_visible(
        self,
        mask: MaskOperands,
        T: int,
        S: int,
        padded: jax.Array | None,
        has_dead_rows: bool | None,
        band: Band | None,
    ) -> Visible:
        from . import visible

        return visible.find_visible(mask, T, S, padded, has_dead_rows, band)

    def tangent(self, call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
        from . import tangent

        return tangent.tangent(call, given, self.tangent_blocks, _chip().cores)


def _why_not_pass(call: Call, which: Pass) -> str | None:
    if which is Pass.TANGENT and call.inputs.query.dtype == jnp.float32:
        return "its kernel for tangents is for 16 bits"
    bias = call.inputs.bias
    if which is Pass.COTANGENT and not call.config.adds_bias and bias is not None and bias.shape[-1] == 1:
        return "it has no gradient of a bias without keys inside a soft cap or score_mod"
    if which is not Pass.FORWARD and call.config.differentiates_args:
        return "it has no derivatives of score_mod_args"
    return why_not_lowered(call, needs_slope=which is not Pass.FORWARD)


@functools.cache  # once in a process
def _warn_of_backend(reason: str) -> None:
    warnings.warn(
        "flash_attention takes its pure JAX kernels on this Hopper GPU, several times slower than those for it: "
        f"{reason}. `pip install 'jax-native-flash-attn[hopper]'` installs what they need; "
        "implementation='pure_jax' asks for the slow ones and ends this warning.",
        stacklevel=2,
    )


def _why_not_call(call: Call) -> str | None:
    config, inputs = call
    dtype, H, D = inputs.query.dtype, inputs.query.shape[-1], inputs.value.shape[-1]
    if (reason := why_pure_jax_alone(call)) is not None:
        return reason
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bfloat16, float16 and float32, got {dtype}"
    if dtype == jnp.float32:
        if not _allows_tf32(config.precision):
            return f"it multiplies float32 in TensorFloat-32, and precision is {config.precision}"
        if max(H, D) > 128 or inputs.sizes.T <= _FEW_ROWS:
            return (
                f"of float32 it takes head dimensions up to 128 and more than {_FEW_ROWS} query rows, "
                f"got {_named(H, D)} and {inputs.sizes.T}"
            )
        if inputs.sizes.S == 1:
            return "of float32 it takes more than one key: XLA makes no rounded product of the values of one"
    if max(H, D) > 256:
        return f"it takes head dimensions up to 256, got {_named(H, D)}"
    return None


def _named(H: int, D: int) -> str:
    return str(H) if H == D else f"{H} of key and {D} of value"


def _allows_tf32(precision: Any) -> bool:
    """Whether XLA would multiply float32 so on a GPU: unless the highest precision is asked for, or an algorithm."""
    allowing = (None, jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGH)
    return all(p in allowing for p in (precision if type(precision) is tuple else (precision,)))


@functools.cache
def _why_not_backend() -> str | None:
    if jax.__version_info__[:2] < _JAX_WITH_BACKEND:
        return f"it needs JAX {'.'.join(map(str, _JAX_WITH_BACKEND))}, this is {jax.__version__}"
    try:
        from . import cotangent, family, tangent, visible  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        return f"Pallas' Mosaic GPU backend cannot be imported: {error}"
    return None


def _why_not_device(*, is_asked: bool) -> str | None:
    """Devices of another kind than Hopper. Without any GPU here, a program is lowered for elsewhere: only if asked."""
    found = _compute_capabilities()
    if not found:
        return None if is_asked else "there is no GPU here"
    others = {x for x in found if int(x.split(".")[0]) != _COMPUTE_CAPABILITY}
    return f"it needs compute capability {_COMPUTE_CAPABILITY}.x, got {', '.join(sorted(others))}" if others else None


def _chip() -> Chip:
    """The GPUs of this process; a common one if there is none. Of several kinds, the least."""
    found, cores = _compute_capabilities(), _core_counts()
    default = Chip()
    return Chip(min(found, default=default.capability), min(cores, default=default.cores))


def _runs_at_once(target: Target) -> bool:
    """Whether one block of threads for each of the chip's multiprocessors is sure to run, all at once.

    Beside the transfers between several devices, which hold multiprocessors while they wait, it is not.
    """
    return bool(_core_counts()) and not target.is_exported and not target.has_several


@functools.cache
def _core_counts() -> frozenset[int]:
    try:
        devices: Any = jax.local_devices(backend="cuda")
    except RuntimeError:
        return frozenset()
    return frozenset(getattr(device, "core_count", Chip().cores) for device in devices)
