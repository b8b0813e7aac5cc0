"""What cuDNN, and `jax.nn` in front of it, support of a call, and where."""

import functools
import math

import jax
import jax.numpy as jnp

from ..._semantics.call import Call, Config, Inputs
from ..gpus import compute_capabilities
from ..protocol import Pass, Target
from ..reasons import why_not_differentiated, why_not_functions, why_not_on_nvidia, why_pure_jax_alone
from . import public
from .operands import prepare, request_of, sizes_of_terms
from .public import Operands, Request

NAME = "cudnn_gpu"

_LOWEST_CAPABILITY = 8
_HOPPER = 9  # has kernels of this library's own; and cuDNN's for head dimensions above _MOST_HEAD_DIM
_MOST_HEAD_DIM = 128
# Of all batch rows and heads, unless asked for. Of 2^22, cuDNN takes 1.15 times as long as pure JAX, 1.29 times with
# gradients; of 2^25, 0.2 and 0.4 times (docs/measurements/gpu_cudnn.md).
_FEWEST_SCORES = 1 << 23


def why_not(call: Call, which: Pass, target: Target) -> str | None:
    """See `Kernels.supports`."""
    is_asked = call.config.implementation == NAME
    return (
        why_not_differentiated(target)
        or why_not_on_nvidia(target)
        or _why_not_exported(target, is_asked=is_asked)
        or why_pure_jax_alone(call)
        or why_not_functions(call)
        or _why_not_arrays(call)
        or _why_not_config(call)
        or _why_not_mask(call)
        or _why_not_pass(call, which)
        or _why_not_device(call, is_asked=is_asked)
        or _why_not_jax(call, which)
    )


def _why_not_exported(target: Target, *, is_asked: bool) -> str | None:
    if target.is_exported and not is_asked:
        return "jax.export refuses cuDNN's calls, whose form may change"
    return None


def _why_not_arrays(call: Call) -> str | None:
    inputs = call.inputs
    dtype, H, D = inputs.query.dtype, inputs.query.shape[-1], inputs.value.shape[-1]
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, got {dtype}"
    if H != D:
        return f"it takes one head dimension, got {H} of key and {D} of value"
    if H % 8:
        return f"it takes head dimensions that are multiples of 8, got {H}"
    bias, T, S = inputs.bias, call.sizes.T, call.sizes.S
    if bias is not None and (bias.dtype != dtype or dtype == jnp.float16):
        return f"it takes a bias that is bfloat16 beside a query that is, got {bias.dtype} and {dtype}"
    if bias is not None and bias.shape[-2:] != (T, S):
        return f"it takes a bias that has rows and keys, ({T}, {S}), got {bias.shape[-2:]}"
    return None


def _why_not_config(call: Call) -> str | None:
    config = call.config
    if config.dropout is not None:
        return "its dropout would drop other weights"
    if call.inputs.sinks is not None:
        return "it has no sinks"
    if config.logits_soft_cap is not None:
        return "it has no soft cap"
    if config.needs_max_logits:
        return "it gives no largest logits"
    if config.static_scale is None:
        return "it takes scale as a number, and this one is an array"
    if not 0 < config.static_scale < math.inf:  # with -0.3, no result was finite
        return f"it takes a positive scale, got {config.static_scale:g}"
    return None


def _why_not_mask(call: Call) -> str | None:
    band, mask = call.config.band, call.inputs.mask
    if mask.key_start is not None and not call.config.has_band_intervals:
        return "of masks it takes causal ones, static windows, lengths and booleans, not offsets, positions or ids"
    if band.upper not in (None, 0) or (band.lower is not None and (band.upper is None or band.lower > 0)):
        return "it takes a window (a constant mask may be one) only to the left of each row, beside a causal mask"
    if band.lower is not None and call.sizes.T > call.sizes.S:
        return f"it takes a window for no more rows than keys, got {call.sizes.T} rows and {call.sizes.S} keys"
    given, widened = sizes_of_terms(call)
    if widened > max(given, sum(math.prod(x.shape) for x in (call.inputs.query, call.inputs.key, call.inputs.value))):
        return f"it takes bias and mask as one, with rows and keys: {widened} elements, more than query, key and value"
    return None


def _why_not_pass(call: Call, which: Pass) -> str | None:
    if which is Pass.TANGENT:
        return "it has no kernel for tangents"
    if which is Pass.COTANGENT and call.config.differentiates_lse:
        return "it has no gradient of the log-sum-exp"
    return None


def _why_not_device(call: Call, *, is_asked: bool) -> str | None:
    """Without any GPU here, a program is lowered for elsewhere: only if asked."""
    found = {x: int(x.split(".")[0]) for x in compute_capabilities()}
    if not found:
        return None if is_asked else "there is no GPU here"
    if low := [x for x, major in found.items() if major < _LOWEST_CAPABILITY]:
        return f"it needs compute capability {_LOWEST_CAPABILITY}.0 or more, got {', '.join(sorted(low))}"
    if _HOPPER in found.values() and not is_asked:
        return f"compute capability {_HOPPER}.x has kernels of its own; these run there if asked for"
    H = call.inputs.query.shape[-1]
    if H > _MOST_HEAD_DIM and set(found.values()) != {_HOPPER}:
        return f"it takes head dimensions up to {_MOST_HEAD_DIM} on compute capability {min(found)}, got {H}"
    scores = math.prod(call.sizes.batch) * call.sizes.N * call.sizes.T * call.sizes.S
    if scores < _FEWEST_SCORES and not is_asked:
        return f"pure JAX is as fast for {scores} scores, fewer than {_FEWEST_SCORES}"
    return None


def _why_not_jax(call: Call, which: Pass) -> str | None:
    """What `jax.nn` itself says, which knows the versions of cuDNN: asked with types alone."""
    operands = jax.eval_shape(functools.partial(_prepared, call.config), call.inputs)
    types = tuple(None if x is None else (x.shape, x.dtype) for x in operands)
    return _why_not_public(request_of(call), types, needs_lse=call.config.needs_lse or which is Pass.COTANGENT)


def _prepared(config: Config, inputs: Inputs) -> Operands:
    call = Call(config, inputs)
    return prepare(call, call.sizes.batch)


@functools.lru_cache(maxsize=1024)
def _why_not_public(request: Request, types: tuple, *, needs_lse: bool) -> str | None:
    operands = Operands(*(None if x is None else jax.ShapeDtypeStruct(*x) for x in types))
    function = public.attention_and_lse if needs_lse else public.attention
    try:
        jax.eval_shape(functools.partial(function, request), operands)
    except (NotImplementedError, ValueError, TypeError, RuntimeError, LookupError) as error:
        return f"jax.nn says of cuDNN: {str(error).rstrip('.')}"
    return None
