"""`jax.nn`'s cuDNN call without cuDNN: for tests of what this library puts around it, on a CPU.

The double refuses what cuDNN refuses. What cuDNN leaves open is as bad as it can be: rows without keys are NaN, and NaN
in padding goes everywhere.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_native_flash_attn import flash_attention
from jax_native_flash_attn._kernels import select
from jax_native_flash_attn._kernels.cudnn import public
from jax_native_flash_attn._kernels.cudnn.family import CudnnKernels
from jax_native_flash_attn._kernels.protocol import Pass, Target
from jax_native_flash_attn._semantics.call import Call

cudnn_attention: Any = functools.partial(flash_attention, implementation="cudnn_gpu")


def double(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float,
    is_causal: bool,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
    local_window_size: tuple[int, int] | None,
    implementation: str,
) -> jax.Array:
    """As `jax.nn.dot_product_attention`."""
    (B, T, N, H), (_, S, _, D) = query.shape, value.shape
    assert implementation == "cudnn"
    assert isinstance(scale, float)
    assert scale > 0
    assert H == D
    assert query.dtype == key.dtype == value.dtype in (jnp.bfloat16, jnp.float16)
    assert H % 8 == 0
    t, s = jnp.arange(T).reshape(1, 1, T, 1), jnp.arange(S).reshape(1, 1, 1, S)
    visible = jnp.ones((1, 1, T, S), bool)
    if is_causal:
        visible &= s <= t
    if local_window_size is not None:
        assert is_causal
        assert local_window_size[1] == 0
        assert T <= S
        visible &= s >= t - local_window_size[0]
    assert (query_seq_lengths is None) == (key_value_seq_lengths is None)
    if query_seq_lengths is not None:
        assert query_seq_lengths.shape == key_value_seq_lengths.shape == (B,)
        visible &= (t < query_seq_lengths[:, None, None, None]) & (s < key_value_seq_lengths[:, None, None, None])
    if mask is not None:
        assert bias is None
        assert mask.shape[2:] == (T, S)
        bias = jnp.where(mask, 0, -(2.0**41) if query.dtype == jnp.bfloat16 else -(2.0**15)).astype(query.dtype)
    if bias is not None:
        assert bias.dtype == query.dtype
        assert bias.shape[2:] == (T, S)
        assert bias.shape[0] in (1, B)
        assert bias.shape[1] in (1, N)
    else:
        bias = jnp.zeros((1, 1, 1, 1), query.dtype)
    return _kernel(scale, query, key, value, bias, jnp.broadcast_to(visible, (B, 1, T, S)))


def _forward(scale: float, query: Any, key: Any, value: Any, bias: Any, visible: Any) -> tuple[Any, Any]:
    z = _logits(scale, query, key, bias, visible)
    lse = jax.nn.logsumexp(z, axis=-1)
    weights = jax.nn.softmax(z, axis=-1).astype(value.dtype)
    out = _product("bnts,bsnh->btnh", weights, _heads(value, query)).astype(query.dtype)
    return out, (query, key, value, bias, visible, lse, out)


def _forward_of_gradient(scale: float, *args: Any) -> tuple[Any, Any]:
    T, S = args[0].shape[1], args[1].shape[1]
    if T % 2 or S % 2:
        raise NotImplementedError(f"Unsupported sequence length Q {T}, KV {S}.")
    return _forward(scale, *args)


def _logits(scale: float, query: Any, key: Any, bias: Any, visible: Any) -> Any:
    products = _product("btnh,bsnh->bnts", query, _heads(key, query))
    return jnp.where(visible, products * scale + bias.astype(jnp.float32), -jnp.inf)


def _product(axes: str, a: Any, b: Any) -> Any:
    """Of 16-bit operands, in float32."""
    return jnp.einsum(axes, a.astype(jnp.float32), b.astype(jnp.float32))


def _heads(x: Any, query: Any) -> Any:
    return jnp.repeat(x, query.shape[2] // x.shape[2], 2)


def _backward(scale: float, saved: Any, dout: Any) -> tuple[Any, ...]:
    query, key, value, bias, visible, lse, out = saved
    weights = jnp.exp(_logits(scale, query, key, bias, visible) - lse[..., None])
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    dz = weights * (_product("btnh,bsnh->bnts", dout, _heads(value, query)) - delta[..., None])
    half = dz.astype(query.dtype)
    dquery = _product("bnts,bsnh->btnh", half, _heads(key, query)) * scale
    dkey = _product("bnts,btnh->bsnh", half, query) * scale
    dvalue = _product("bnts,btnh->bsnh", weights.astype(query.dtype), dout)
    dkey, dvalue = (x.reshape(*x.shape[:2], key.shape[2], -1, x.shape[-1]).sum(3) for x in (dkey, dvalue))
    axes = tuple(i for i in range(4) if bias.shape[i] == 1)
    return dquery.astype(query.dtype), *(x.astype(key.dtype) for x in (dkey, dvalue)), _rounded(dz, bias, axes), None


def _rounded(dz: Any, bias: Any, axes: tuple[int, ...]) -> Any:
    return dz.sum(axes, keepdims=True).astype(bias.dtype)


_kernel = jax.custom_vjp(lambda *args: _forward(*args)[0], nondiff_argnums=(0,))
_kernel.defvjp(_forward_of_gradient, _backward)


@dataclass(frozen=True)
class _Anywhere(CudnnKernels):
    def supports(self, call: Call, which: Pass, target: Target) -> str | None:
        return super().supports(call, which, target._replace(platform="cuda"))


@contextlib.contextmanager
def cudnn_everywhere() -> Iterator[None]:
    """The family runs on any platform, on the double."""
    with pytest.MonkeyPatch.context() as patch, select.replacing(_Anywhere()):
        patch.setattr(public, "jax_attention", double)
        yield
