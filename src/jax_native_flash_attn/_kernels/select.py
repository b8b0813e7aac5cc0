"""Which kernels a call takes where it is lowered: Mosaic GPU's on Hopper GPUs, where they support it, else pure JAX's.

The choice is made while a primitive is lowered, so that one traced program runs on any platform. What is not lowered
for one kind of GPU alone (an export for several platforms) takes the pure JAX kernels.
"""

import functools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._semantics.call import Config, Inputs, batch_of, sum_to
from .._semantics.numerics import accumulation_dtype
from .hopper.blocks import Chip
from .protocol import Target
from .xla import family as xla
from .xla import kernels
from .xla.tiles import Tiles

_JAX_WITH_BACKEND = (0, 10)
_COMPUTE_CAPABILITY = 9  # Hopper: wgmma exists on no other
_FEW_ROWS = 64  # with which copies of float32 keys and values would cost more than attention


def forward(config: Config, inputs: Inputs, target: Target) -> tuple[jax.Array, ...]:
    """out and, if needed, lse; out in query's dtype, in accumulation dtype, or both, as `config` says."""
    if _takes_mosaic_gpu(config, inputs, target):
        from .hopper import family as hopper

        return hopper.forward(config, inputs, _chip())
    out, *lse = xla.forward(config, inputs, target)
    dtype = inputs.query.dtype
    out_dtype = dtype if config.rounds_out else accumulation_dtype(dtype)
    return (out.astype(out_dtype), *lse, *([out.astype(dtype)] if config.adds_rounded else []))


def cotangent(
    config: Config,
    inputs: Inputs,
    out: jax.Array,
    lse: jax.Array,
    cotangents: Mapping[str, jax.Array],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    target: Target,
) -> dict[str, jax.Array]:
    """As `xla.kernels.cotangent`.

    float32 takes the pure JAX kernels, asked for others or not, as wgmma transposes no tile of its elements. A bias
    without a key axis needs no kernel.
    """
    if "bias" in wanted and wanted["bias"].shape[-1] == 1:
        others = {name: like for name, like in wanted.items() if name != "bias"}
        dbias = {"bias": _cotangent_of_row_bias(inputs, cotangents, wanted["bias"])}
        if not others:
            return dbias
        return dbias | cotangent(config, inputs, out, lse, cotangents, others, target)
    if inputs.query.dtype != jnp.float32 and _takes_mosaic_gpu(config, inputs, target):
        from .hopper import cotangent as hopper

        return hopper.cotangent(config, inputs, out, lse, cotangents, wanted, _chip())
    tiles = Tiles(
        config,
        inputs,
        target,
        further={**cotangents, "lse": lse},
        summed_over_batch="bias" in wanted and math.prod(wanted["bias"].shape[-2:]) > 1,
        rounds_weights="scale" not in wanted,
    )
    return kernels.cotangent(tiles, out, lse, cotangents, wanted)


def forward_is_opaque(config: Config, inputs: Inputs, target: Target) -> bool:
    """Whether `forward` takes kernels that XLA cannot split over devices; of inputs the types suffice."""
    return _why_not_mosaic_gpu(config, inputs, target) is None


def cotangent_is_opaque(config: Config, inputs: Inputs, target: Target) -> bool:
    """As `forward_is_opaque`, of `cotangent` where it is not differentiated."""
    return inputs.query.dtype != jnp.float32 and forward_is_opaque(config, inputs, target)


def _cotangent_of_row_bias(
    inputs: Inputs, cotangents: Mapping[str, jax.Array], like: jax.ShapeDtypeStruct
) -> jax.Array:
    """A bias without a key axis changes no weight, since they add up to 1, but shifts lse: sum_s dz_ts = dl_t."""
    z, mask, dtype = inputs.sizes, inputs.mask, accumulation_dtype(inputs.query.dtype)
    rows = cotangents["lse"].astype(dtype) if "lse" in cotangents else jnp.zeros((1,) * (len(z.batch) + 2), dtype)
    if mask.key_start is not None and mask.key_stop is not None:
        rows = jnp.where(mask.key_start < mask.key_stop, rows, 0)  # padded rows have no key
    if mask.dead is not None:
        rows = jnp.where(mask.dead, 0, rows)
    batch = jnp.broadcast_shapes(z.batch, batch_of(cotangents))
    return sum_to(jnp.broadcast_to(rows, (*batch, z.N, z.T))[..., None], like)


def _takes_mosaic_gpu(config: Config, inputs: Inputs, target: Target) -> bool:
    reason = _why_not_mosaic_gpu(config, inputs, target)
    if reason and config.implementation == "mosaic_gpu" and target.differentiated is None:
        raise NotImplementedError(f"implementation='mosaic_gpu' does not run here: {reason}")
    return reason is None


def _why_not_mosaic_gpu(config: Config, inputs: Inputs, target: Target) -> str | None:
    if target.differentiated is not None:
        return "JAX cannot differentiate its kernels: derivatives of derivatives are pure JAX's, asked for or not"
    is_asked = config.implementation == "mosaic_gpu"
    if config.implementation is not None and not is_asked:
        return f"implementation={config.implementation!r} was asked for"
    reason = _why_not_platform(target) or _why_not_call(config, inputs) or _why_not_device(is_asked=is_asked)
    if reason is None and (reason := _why_not_backend()) and not is_asked:
        _warn_of_backend(reason)
    return reason


@functools.cache  # once in a process
def _warn_of_backend(reason: str) -> None:
    warnings.warn(
        "flash_attention takes its pure JAX kernels on this Hopper GPU, several times slower than those for it: "
        f"{reason}. `pip install 'jax-native-flash-attn[hopper]'` installs what they need; "
        "implementation='pure_jax' asks for the slow ones and ends this warning.",
        stacklevel=2,
    )


def _why_not_platform(target: Target) -> str | None:
    if target.platform != "cuda":
        return f"the call is compiled for {target.platform}, not for an NVIDIA GPU alone"
    if target.is_sharded:
        return "XLA partitions this call (symbolic shapes, or manual and automatic mesh axes at once)"
    return None


def _why_not_call(config: Config, inputs: Inputs) -> str | None:
    dtype, H = inputs.query.dtype, inputs.query.shape[-1]
    if not all(isinstance(n, int) for x in jax.tree.leaves(inputs) for n in x.shape):
        return "its shapes are symbolic"
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bfloat16, float16 and float32, got {dtype}"
    if dtype == jnp.float32:
        if not _allows_tf32(config.precision):
            return f"it multiplies float32 in TensorFloat-32, and precision is {config.precision}"
        if H > 128 or inputs.sizes.T <= _FEW_ROWS:
            return (
                f"of float32 it takes head dimensions up to 128 and more than {_FEW_ROWS} query rows, "
                f"got {H} and {inputs.sizes.T}"
            )
    if H % 16 or not 16 <= H <= 256 or inputs.sizes.D != H:
        return f"it takes head dimensions that are multiples of 16 up to 256, got {H}"
    if config.block_q is not None or config.block_kv is not None:
        return "block_q and block_kv are for the pure JAX kernels"
    if isinstance(config.precision, jax.lax.DotAlgorithm | jax.lax.DotAlgorithmPreset):
        return f"precision {config.precision} names an algorithm"
    return None


def _allows_tf32(precision: Any) -> bool:
    """Whether XLA would multiply float32 so on a GPU: unless the highest precision is asked for, or an algorithm."""
    allowing = (None, jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGH)
    return all(p in allowing for p in (precision if type(precision) is tuple else (precision,)))


@functools.cache
def _why_not_backend() -> str | None:
    if jax.__version_info__[:2] < _JAX_WITH_BACKEND:
        return f"it needs JAX {'.'.join(map(str, _JAX_WITH_BACKEND))}, this is {jax.__version__}"
    try:
        from .hopper import cotangent, family  # noqa: F401  # pyright: ignore[reportUnusedImport]
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


@functools.cache
def _core_counts() -> frozenset[int]:
    try:
        devices: Any = jax.local_devices(backend="cuda")
    except RuntimeError:
        return frozenset()
    return frozenset(getattr(device, "core_count", Chip().cores) for device in devices)


@functools.cache
def _compute_capabilities() -> frozenset[str]:
    try:
        devices: Any = jax.local_devices(backend="cuda")
    except RuntimeError:
        return frozenset()
    return frozenset(str(device.compute_capability) for device in devices)
