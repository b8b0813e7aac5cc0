"""The machine and the versions that measured figures depend on."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import jax_native_flash_attn


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Versions, device and processor, for a report."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "jax_native_flash_attn": jax_native_flash_attn.__version__,
        "python": platform.python_version(),
        "platform": device.platform,
        "device": device.device_kind,
        "cpu": _cpu_model(),
        "cores": usable_cores(),
    }


def header() -> str:
    """The environment in two lines."""
    facts = environment()
    return (
        f"JAX {facts['jax']} (jaxlib {facts['jaxlib']}), "
        f"jax_native_flash_attn {facts['jax_native_flash_attn']}, Python {facts['python']}\n"
        f"platform {facts['platform']}, device {facts['device']}, "
        f"processor {facts['cpu']}, {facts['cores']} cores"
    )


def _cpu_model() -> str:
    """The processor's name and, where known, the features that decide its speed here."""
    name, features = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        fields = {field.strip(): text.strip() for field, _, text in lines}
        name = fields.get("model name", name)
        flags = fields.get("flags", "").split()
        known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        features = ", ".join(flag for flag in known if flag in flags)
    return f"{name} ({features})" if features else name
