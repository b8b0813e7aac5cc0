"""JAX's configuration under test, shared by pytest (conftest.py) and run_generated.py."""

import contextlib
import functools
import os
from typing import Any

DEVICE_COUNT = 8


def configure() -> None:
    """Several CPU devices and strict promotion; call it before anything initialises JAX's backend."""
    flag = "--xla_force_host_platform_device_count"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={DEVICE_COUNT}".strip()

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


@functools.cache
def fast_compilation() -> dict[str, Any]:
    """Compiler options for programs whose compilation takes longer than their run, on a CPU.

    Without them XLA compiles as it does for users: what judges rounding by the last bits does without.
    """
    import jax

    if jax.default_backend() != "cpu":
        return {}
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    # An option of JAX before 0.12 alone, which halves the time there.
    with_fewer_passes = options | {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x, compiler_options=with_fewer_passes).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return options
    return with_fewer_passes
