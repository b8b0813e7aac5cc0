"""JAX's configuration under test, shared by pytest (conftest.py) and run_generated.py."""

import contextlib
import functools
import importlib.metadata
import os
from typing import Any

DEVICE_COUNT = 8
_HAS_TWO_EMITTERS = tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11)


def xla_flags(devices: int) -> str:
    """So many CPU devices, and what has XLA compile in less CPU time: nearly all that most tests do is to compile.

    Programs are not cut into parts that are compiled side by side, as each core has its worker. JAX up to 0.10 has two
    ways from a fusion to LLVM; the older takes less than half the time, and `full_optimization` asks for the newer.
    """
    flags = [f"--xla_force_host_platform_device_count={devices}", "--xla_cpu_parallel_codegen_split_count=1"]
    return " ".join([*flags, *(["--xla_cpu_use_fusion_emitters=false"] if _HAS_TWO_EMITTERS else [])])


def of_process(devices: int) -> dict[str, str]:
    """Environment variables of another process, which compiles as tests do."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def configure() -> None:
    """Several CPU devices and strict promotion; call it before anything initialises JAX's backend."""
    # Workers of pytest-xdist, which begin later, so have one thread for NumPy's products: more take a sixth more time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {xla_flags(DEVICE_COUNT)}".strip()

    # Of calls that are legal; tests/unit/test_warnings.py is about them.
    os.environ["JAX_NATIVE_FLASH_ATTN_WARNINGS"] = "0"

    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


_x64_everywhere = False


def use_x64_everywhere() -> None:
    """64-bit types in the whole session, also where a test would switch them off."""
    global _x64_everywhere
    import jax

    _x64_everywhere = True
    jax.config.update("jax_enable_x64", True)


def enable_x64(enabled: bool = True) -> contextlib.AbstractContextManager[object]:
    """The context manager that switches 64-bit types on, under its name in the installed JAX."""
    import jax

    enabled = enabled or _x64_everywhere
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    import jax.experimental  # JAX 0.7

    return getattr(jax.experimental, "enable_x64")(enabled)  # noqa: B009  (unknown to the newer)


@contextlib.contextmanager
def lenient_promotion():
    """JAX's default promotion, which jax.nn and Flax rely on inside."""
    import jax

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def bernoulli(rng: Any, p: float, shape: tuple[int, ...]) -> Any:
    """`jax.random.bernoulli`, whose compilation otherwise takes a second or two for each shape."""
    return _compiled_bernoulli()(rng, p, shape)


@functools.cache
def _compiled_bernoulli() -> Any:
    import jax

    return jax.jit(jax.random.bernoulli, static_argnums=2, compiler_options=fast_compilation())


def fast_compilation() -> dict[str, Any]:
    """Compiler options for programs whose compilation takes longer than their run, on a CPU.

    Tests have them anyway, from `conftest.py`. Here they are for other processes, and for what a test compiles early.
    """
    import jax

    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def full_optimization() -> dict[str, Any]:
    """Compiler options with which XLA compiles as it does for users: where rounding is judged by the last bits, and
    what is not finite."""
    import jax

    if jax.default_backend() != "cpu":
        return {}
    options: dict[str, Any] = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    return options | ({"xla_cpu_use_fusion_emitters": True} if _HAS_TWO_EMITTERS else {})
