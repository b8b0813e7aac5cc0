"""The TPU kernels without a TPU: run by an interpreter of Pallas, and in programs lowered for TPUs."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax

from jax_native_flash_attn._kernels.select import replacing
from jax_native_flash_attn._kernels.tpu.blocks import Blocks
from jax_native_flash_attn._kernels.tpu.plan import BackwardBlocks
from jax_native_flash_attn._kernels.tpu.support import TpuKernels

# So small that short sequences have several steps, tiles side by side and single ones, and units.
SMALL = Blocks(resident=256, tile=128, streamed=384, unit=128, unrolled=3, tries_without_maximum=True)
_SMALL_DQUERY = Blocks(resident=256, tile=256, streamed=512, unit=128, unrolled=3, part=128)
_SMALL_BIAS = Blocks(128, 128, 128, 128)


def small_blocks() -> dict[str, Any]:
    """Of `TpuKernels`."""
    return {"forward_blocks": SMALL, "backward_blocks": BackwardBlocks(_SMALL_DQUERY, SMALL, _SMALL_BIAS)}


def interpreted(*, has_small_blocks: bool = True) -> contextlib.AbstractContextManager[None]:
    """With the TPU kernels on a CPU, by Pallas' interpreter that makes XLA operations of them."""
    return replacing(TpuKernels(interpret=True, **(small_blocks() if has_small_blocks else {})))


def kernel_count(function: Callable[..., Any], *types: Any, platforms: tuple[str, ...] = ("tpu",)) -> int:
    """How many TPU kernels are in a program."""
    return jax.jit(function).trace(*types).lower(lowering_platforms=platforms).as_text().count("tpu_custom_call")
