"""The NVIDIA GPUs of this process."""

import functools
from typing import Any

import jax


@functools.cache
def compute_capabilities() -> frozenset[str]:
    """Of all of them, as '9.0'; empty where JAX sees none."""
    try:
        devices: Any = jax.local_devices(backend="cuda")
    except RuntimeError:
        return frozenset()
    return frozenset(str(device.compute_capability) for device in devices)
