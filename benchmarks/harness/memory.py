"""Memory of one attention call: what the compiler reserves, and the peak of a process.

The former misses the scratch of some fused loops on a CPU. The latter is measured in a process of its own: in one that
did other work before, memory that the allocator kept would serve the call unseen.
"""

import contextlib
import ctypes
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax

from harness.inputs import make_inputs
from harness.shapes import AttentionShape

_STATUS = Path("/proc/self/status")
_RESET_PEAK = Path("/proc/self/clear_refs")


def temporary_bytes(compiled: Any) -> int | None:
    """Bytes that the compiler reserves beside inputs and outputs, or None if it does not say."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def can_measure_resident() -> bool:
    """Whether the system lets a process reset its high-water mark, as Linux does."""
    return _RESET_PEAK.exists() and jax.default_backend() == "cpu"


def peak_resident_bytes(implementation: str, shape: AttentionShape, mode: str, seed: int = 0) -> int:
    """How far the first call raises the resident memory at its peak, its results included.

    Inputs and the compiled program are there before and not counted.
    """
    # Spawned, not forked: a forked copy of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_in_this_process, implementation, shape, mode, seed).result()


def _peak_in_this_process(implementation: str, shape: AttentionShape, mode: str, seed: int) -> int:
    from harness.implementations import compile_attention  # which imports `temporary_bytes`

    if shape.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    inputs = make_inputs(shape, seed)
    call = compile_attention(implementation, shape, mode).bind(inputs)
    # What the compiler freed and the C library kept would serve the call without raising the mark.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    _RESET_PEAK.write_text("5")
    before = _kibibytes("VmRSS")
    jax.block_until_ready(call())
    return (_kibibytes("VmHWM") - before) * 1024


def _kibibytes(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
