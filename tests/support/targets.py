"""What the library finds where it runs, as tests read it or pretend it: processors, Mosaic GPU, whole kernels."""

import pytest

from jax_native_flash_attn._kernels import select
from jax_native_flash_attn._kernels.cudnn import support as cudnn
from jax_native_flash_attn._kernels.hopper import support
from jax_native_flash_attn._kernels.xla import quirks


def why_no_backend() -> str | None:
    return support._why_not_backend()


needs_backend = pytest.mark.skipif(why_no_backend() is not None, reason=str(why_no_backend()))


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, *compute_capabilities: str) -> None:
    monkeypatch.setattr(support, "_compute_capabilities", lambda: frozenset(compute_capabilities))
    monkeypatch.setattr(cudnn, "compute_capabilities", lambda: frozenset(compute_capabilities))


def pretend_bfloat16_unit(monkeypatch: pytest.MonkeyPatch, *, exists: bool) -> None:
    """Whether the CPU has a matrix unit for bfloat16."""
    monkeypatch.setattr(quirks, "cpu_multiplies_bfloat16", lambda: exists)


def pretend_no_backend(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setattr(support, "_why_not_backend", lambda: reason)


def pretend_whole_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA is not to split kernels over devices, whichever they are."""
    monkeypatch.setattr(select, "is_opaque", lambda *unused: True)
