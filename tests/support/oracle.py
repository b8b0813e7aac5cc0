"""Dense attention, written from its mathematics: what the library's results are compared with.

Nothing here calls the library or `jax.nn`. Axis letters are those of the library (B T S N K G H D).

    x[b,n,t,s]      = scale * query[b,t,n] . key[b,s,n // G] + bias[b,n,t,s]
    logits[b,n,t,s] = cap * tanh(x[b,n,t,s] / cap), or x without a cap
    probs[b,n,t,:]  = softmax of logits[b,n,t,:] over the allowed keys s, and over the sink of the head if there is one
    out[b,t,n]      = sum over s of probs[b,n,t,s] * factor[b,n,t,s] * value[b,s,n // G]

with `factor` = keep / (1 - rate) of dropout. A row that may attend no key weighs every key, masked and
padded ones included, by 1 / S, but with a sink gives 0; a padded row gives 0. Three implementations:

- `float64_oracle`: everything in float64; its derivatives, of any order, come from autodiff.
- `dense_numpy`: value and first derivatives by hand, in any float of NumPy, with nothing to compile: in
  float64, or in extended precision to judge float64. It equals the former.
- `dense_same_dtype`: what careful dense code does in the input dtype. Its error against the oracle is
  the yardstick for the error of the library (`assert_as_accurate_as_dense`).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.environment import enable_x64, fast_compilation

# The lse of rows without an allowed key.
NOTHING_ALLOWED = -0.7 * float(np.finfo(np.float32).max)


def to_4d(array: Any) -> Any:
    """The array with axes of size 1 put in front until it has four."""
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def allowed_pairs(
    shape: tuple[int, int, int, int],
    mask: Any = None,
    *,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: Any = None,
    query_segment_ids: Any = None,
    key_value_segment_ids: Any = None,
    query_positions: Any = None,
    key_value_positions: Any = None,
    query_offset: Any = 0,
    rows: Any = None,
    xp: Any = np,
) -> Any:
    """Which query row may attend which key, as booleans of shape (B, N, T, S).

    Of the query rows numbered `rows` alone, where given: those are then the rows of `mask` and of the result. `xp`:
    `numpy`, in int64, or `jax.numpy`, for arguments that are traced, in int32.
    """
    B, N, T, S = shape
    rows = np.arange(T) if rows is None else np.asarray(rows)

    def integers(x: Any, *axes: int) -> Any:
        return xp.asarray(x).astype(np.int64 if xp is np else np.int32).reshape(axes)

    def of_rows(x: Any) -> Any:  # (B, T) -> (B, 1, rows, 1)
        return integers(x, -1, 1, T, 1)[:, :, rows]

    def of_keys(x: Any) -> Any:
        return integers(x, -1, 1, 1, S)

    t = of_rows(np.arange(T)) + integers(query_offset, -1, 1, 1, 1)
    if xp is np:
        t = np.clip(t, -(2**31), 2**31 - 1)  # as positions are, with an offset too
    t = t if query_positions is None else of_rows(query_positions)
    s = of_keys(np.arange(S) if key_value_positions is None else key_value_positions)
    allowed = xp.ones((B, N, len(rows), S), bool)
    if mask is not None:
        allowed &= to_4d(xp.asarray(mask))
    if is_causal:
        allowed &= s <= t
    if local_window_size is not None:
        is_pair = isinstance(local_window_size, tuple) or np.ndim(local_window_size) > 0
        pair = local_window_size if is_pair else (local_window_size,) * 2
        left, right = (integers(side, 1, 1, 1, 1) for side in pair)
        allowed &= (t - left <= s) & (s <= t + right)
    if query_segment_ids is not None:
        ids = of_keys(key_value_segment_ids)
        allowed &= (of_rows(query_segment_ids) == ids) & (ids >= 0)
    allowed &= valid_rows(B, T, query_seq_lengths, query_segment_ids, xp=xp)[:, None, rows, None]
    allowed &= valid_rows(B, S, key_value_seq_lengths, xp=xp)[:, None, None, :]
    return allowed


def wide_dtype(dtype: Any) -> Any:
    """The dtype in which results of a dtype are accumulated."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == np.float64 else jnp.float32)


def valid_rows(B: int, length: int, lengths: Any = None, ids: Any = None, *, xp: Any = np) -> Any:
    """Which rows of a padded array (B, length, ...) are not padding, by their lengths and by ids (B, length)."""
    valid = xp.ones((B, length), bool)
    if lengths is not None:
        valid &= np.arange(length, dtype=np.int32)[None, :] < xp.asarray(lengths).astype(np.int32)[:, None]
    if ids is not None:
        valid &= xp.asarray(ids).reshape(-1, length) >= 0
    return valid


def dropout_factor(keep: Any, rate: float) -> Any:
    """What the probabilities are multiplied by."""
    if keep is None:
        return 1.0
    return keep / (1.0 - rate) if rate < 1.0 else keep * 0.0


def _heads(key_or_value: Any, N: int) -> Any:
    """Repeats key/value heads to one per query head: head n reads key/value head n // G."""
    return jnp.repeat(key_or_value, N // key_or_value.shape[2], axis=2)


@dataclasses.dataclass(frozen=True)
class Masking:
    """Everything about a call that is not differentiable, as arrays of full shape."""

    allowed: Any  # (B, N, T, S)
    query_valid: Any  # (B, T)
    key_valid: Any  # (B, S)
    factor: Any  # (B, N, T, S), or 1.0 without dropout
    cap: Any = math.inf  # of the logits


jax.tree_util.register_dataclass(Masking, ["allowed", "query_valid", "key_valid", "factor", "cap"], [])


def masking(
    query: Any,
    key: Any,
    mask: Any = None,
    *,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    query_segment_ids: Any = None,
    dropout_rate: float = 0.0,
    keep: Any = None,
    logits_soft_cap: float | None = None,
    xp: Any = np,
    **selection: Any,
) -> Masking:
    """Gathers the arguments of flash_attention that are not differentiable; `keep` is the dropout mask."""
    (B, T, N, _), S = to_4d(query).shape, to_4d(key).shape[1]
    lengths = {"query_seq_lengths": query_seq_lengths, "key_value_seq_lengths": key_value_seq_lengths}
    return Masking(
        allowed_pairs((B, N, T, S), mask, query_segment_ids=query_segment_ids, xp=xp, **lengths, **selection),
        valid_rows(B, T, query_seq_lengths, query_segment_ids, xp=xp),
        valid_rows(B, S, key_value_seq_lengths, xp=xp),
        dropout_factor(None if keep is None else np.asarray(keep, np.float64), dropout_rate),
        math.inf if logits_soft_cap is None else logits_soft_cap,
    )


def _capped(x: Any, cap: Any) -> Any:
    cap = jnp.asarray(cap, x.dtype)
    finite = jnp.where(jnp.isinf(cap), jnp.ones_like(cap), cap)
    return jnp.where(jnp.isinf(cap), x, finite * jnp.tanh(x / finite))


def _sink_column(sinks: Any, dtype: Any) -> Any:
    """(1 or B, N, 1, 1) of sinks (N,) or (B, N); -inf for none."""
    return (
        jnp.full((1, 1, 1, 1), -jnp.inf, dtype)
        if sinks is None
        else sinks.astype(dtype).reshape(-1, sinks.shape[-1], 1, 1)
    )


def dense_float64(query, key, value, bias, scale, masks: Masking, sinks=None, change=lambda logits: logits):
    """(out, lse) of 4-D float64 inputs; differentiable in every argument but `masks`; `change` is a `score_mod`."""
    N, S = query.shape[2], key.shape[1]
    allowed, factor = jnp.asarray(masks.allowed), jnp.asarray(masks.factor)
    query_valid = jnp.asarray(masks.query_valid)[:, :, None, None]
    key_valid = jnp.asarray(masks.key_valid)[:, :, None, None]
    sink = _sink_column(sinks, query.dtype)
    live = allowed.any(axis=-1, keepdims=True) | (query_valid[:, None, :, 0] & (sink > -jnp.inf))  # (B, N, T, 1)

    # Padding may hold NaN, and 0 * NaN is NaN: it must not enter a product, here or in a derivative.
    real_query = jnp.where(query_valid, query, 0.0)
    real_key = _heads(jnp.where(key_valid, key, 0.0), N)
    real_value = _heads(jnp.where(key_valid, value, 0.0), N)

    logits = _capped(change(jnp.einsum("btnh,bsnh->bnts", real_query, real_key) * scale + bias), masks.cap)
    logits = jnp.where(allowed, logits, -jnp.inf)
    row_max = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf), sink)
    row_max = jax.lax.stop_gradient(jnp.where(live, row_max, 0.0))
    weights = jnp.exp(logits - row_max)
    total = jnp.where(live, weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - row_max), 1.0)
    out = jnp.einsum("bnts,bsnd->btnd", weights / total * factor, real_value)
    lse = (row_max + jnp.log(total))[..., 0].transpose(0, 2, 1)

    # Rows without a key: the plain mean, of padding too.
    # (Heads stay grouped here: XLA:CPU up to JAX 0.12 miscompiles the derivative of a product of
    # repeated heads with a compile-time constant; the gradient of value came out as garbage.)
    B, _, T, _ = allowed.shape
    K = value.shape[2]
    uniform = (jnp.full(allowed.shape, 1.0 / max(S, 1)) * factor).reshape(B, K, N // K, T, S)
    mean = jnp.einsum("bkgts,bskd->btkgd", uniform, value).reshape(out.shape)
    live = live[..., 0].transpose(0, 2, 1)
    out = jnp.where(live[..., None], out, mean)
    out = jnp.where(query_valid, out, 0.0)
    return out, jnp.where(live, lse, NOTHING_ALLOWED if S else -jnp.inf)


@functools.cache
def _compiled_dense_float64() -> Any:
    return jax.jit(dense_float64, compiler_options=fast_compilation())


def float64_oracle(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: Any = None,
    sinks: Any = None,
    **selection: Any,
) -> tuple[Any, Any]:
    """(out, lse) in float64 for the arguments of flash_attention, and the dropout mask `keep`.

    Call it, and differentiate it, inside `enable_x64()`.
    """
    shape = query.shape
    masks = masking(query, key, mask, **selection)
    query, key, value, bias = (
        to_4d(jnp.asarray(x, jnp.float64)) for x in (query, key, value, 0.0 if bias is None else bias)
    )
    bias = jnp.broadcast_to(bias, jnp.shape(masks.allowed))
    scale = 1.0 / math.sqrt(shape[-1]) if scale is None else jnp.asarray(scale, jnp.float64)
    arguments = query, key, value, bias, scale, masks, None if sinks is None else jnp.asarray(sinks, jnp.float64)
    # What is differentiated cannot be compiled with options inside.
    is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments))
    out, lse = dense_float64(*arguments) if is_traced else _compiled_dense_float64()(*arguments)
    return out.reshape(*shape[:-1], -1), lse.reshape(shape[:-1])


@jax.custom_vjp
def _round_cotangent(x, like):
    """Identity; the cotangent goes through the dtype of `like`."""
    return x


_round_cotangent.defvjp(
    lambda x, like: (x, like),
    lambda like, g: (g.astype(like.dtype).astype(g.dtype), jnp.zeros_like(like)),
)


def dense_same_dtype(query, key, value, bias, scale, masks: Masking, sinks=None):
    """(out, lse, largest logits) as dense code computes them in the dtype of its 4-D inputs; differentiable.

    lse and the largest logit of each row, (B, N, T), are in the wider dtype. Products take the input dtype
    and accumulate in float32 (float64 for float64), in the derivative too; softmax is in that wider dtype,
    and the probabilities are rounded to the dtype of value. Written with an upcast before each product,
    which is exact and runs on every backend (XLA:CPU has no float16 product).
    """
    dtype, N = query.dtype, query.shape[2]
    wide = wide_dtype(dtype)
    key, value = _heads(key, N), _heads(value, N)
    allowed = jnp.asarray(masks.allowed)
    logits = jnp.einsum("btnh,bsnh->bnts", query.astype(wide), key.astype(wide))
    logits = _round_cotangent(logits, jnp.zeros((), dtype))
    logits = _capped(logits * jnp.asarray(scale, wide) + bias.astype(wide), masks.cap)
    logits = jnp.where(allowed, logits, jnp.asarray(NOTHING_ALLOWED, wide))
    largest = jnp.where(allowed.any(-1), logits.max(axis=-1), -jnp.inf)
    sink = _sink_column(sinks, wide)
    row_max = jax.lax.stop_gradient(jnp.maximum(logits.max(axis=-1, keepdims=True), sink))
    weights = jnp.exp(logits - row_max)
    total = weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - row_max)
    probs = weights / total * jnp.asarray(masks.factor).astype(wide)
    out = jnp.einsum("bnts,bsnd->btnd", probs.astype(dtype).astype(wide), value.astype(wide))
    out = jnp.where(jnp.asarray(masks.query_valid)[:, :, None, None], out.astype(dtype), 0)
    lse = (row_max + jnp.log(total))[..., 0].transpose(0, 2, 1)
    return out, lse, largest


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _round_tangent(x: jax.Array, dtype: str) -> jax.Array:
    """Identity; tangents and cotangents go through a narrower dtype."""
    del dtype
    return x


@_round_tangent.defjvp
def _round_tangent_jvp(dtype: str, primals: Any, tangents: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
    return primals[0], tangents[0].astype(dtype).astype(tangents[0].dtype)


def dense_in_both_modes(query, key, value, bias, scale, masks: Masking, sinks=None):
    """As `dense_same_dtype`, but differentiable in both modes and every order; of float32 and 16 bits.

    Of rows without a key, lse is -inf.
    """
    dtype, wide, N = query.dtype, jnp.float32, query.shape[2]
    allowed = jnp.asarray(masks.allowed)
    key, value = (_heads(x, N).astype(wide) for x in (key, value))
    logits = _round_tangent(jnp.einsum("btnh,bsnh->bnts", query.astype(wide), key), str(dtype))
    logits = _capped(logits * scale.astype(wide) + bias.astype(wide), masks.cap)
    sink = _sink_column(sinks, wide)
    has_sink = jnp.broadcast_to(sink > -jnp.inf, (*logits.shape[:-1], 1))
    logits = jnp.where(allowed, logits, jnp.float32(-1e30))
    logits = jnp.concatenate([logits, jnp.broadcast_to(sink, has_sink.shape)], -1)
    is_live = allowed.any(-1) | (has_sink[..., 0] & jnp.asarray(masks.query_valid)[:, None, :])
    lse = jnp.where(is_live, jax.nn.logsumexp(logits, axis=-1), -jnp.inf)
    probs = jax.nn.softmax(logits)[..., :-1] * jnp.asarray(masks.factor).astype(wide)
    out = jnp.einsum("bnts,bsnd->btnd", probs.astype(dtype).astype(wide), value).astype(dtype)
    return jnp.where(jnp.asarray(masks.query_valid)[:, :, None, None], out, 0), jnp.moveaxis(lse, 1, 2)


@dataclasses.dataclass(frozen=True)
class Dense:
    """Value and gradients of one call by their formulas; key, value and their gradients have N heads."""

    key: np.ndarray  # (B, S, N, H)
    value: np.ndarray
    dout: np.ndarray  # 0 in padded rows
    live: np.ndarray  # (B, N, T, 1)
    products: np.ndarray  # query . key, (B, N, T, S)
    logits: np.ndarray  # -inf where not allowed
    probs: np.ndarray
    lse: np.ndarray  # (B, T, N)
    out: np.ndarray
    dprobs: np.ndarray
    delta: np.ndarray  # (B, N, T, 1)
    dlogits: np.ndarray  # behind the cap
    slope: np.ndarray  # of the cap
    sink_probs: np.ndarray  # (B, N, T, 1)
    max_logits: np.ndarray  # (B, N)
    dproducts: np.ndarray  # of scaled products, and of the bias
    dquery: np.ndarray
    dkey: np.ndarray
    dvalue: np.ndarray
    dscale: np.ndarray
    dsinks: np.ndarray  # (B, N)

    def results(self, num_kv_heads: int) -> dict[str, np.ndarray]:
        """By the names of Case's results; bias in full shape."""
        return {
            "out": self.out,
            "lse": self.lse,
            "query": self.dquery,
            "key": _sum_heads(self.dkey, num_kv_heads),
            "value": _sum_heads(self.dvalue, num_kv_heads),
            "bias": self.dproducts,
            "scale": self.dscale,
            "sinks": self.dsinks,
            "max_logits": self.max_logits,
        }


_einsum = functools.partial(np.einsum, optimize=True)


def _sum_heads(x: np.ndarray, num_kv_heads: int) -> np.ndarray:
    B, S, N, D = x.shape
    return x.reshape(B, S, num_kv_heads, N // num_kv_heads, D).sum(axis=3)


def dense_numpy(query, key, value, bias, scale, masks: Masking, dout, sinks=None, dlse=None) -> Dense:
    """Of 4-D NumPy arrays without NaN and a bias of full shape; in the dtype of the arrays."""
    G = query.shape[2] // key.shape[2]
    key, value = np.repeat(key, G, axis=2), np.repeat(value, G, axis=2)
    allowed, factor = masks.allowed, np.asarray(masks.factor, query.dtype)
    query_valid = masks.query_valid[:, :, None, None]
    dout = np.where(query_valid, dout, 0)
    has_key = allowed.any(axis=-1, keepdims=True)
    sink = np.full((1, 1, 1, 1), -np.inf, query.dtype) if sinks is None else sinks[None, :, None, None]
    live = has_key | (query_valid[:, None, :, 0] & (sink > -np.inf))
    products = _einsum("btnh,bsnh->bnts", query, key)
    x = products * scale + bias
    tanh = np.tanh(x / np.asarray(masks.cap, x.dtype)) if masks.cap < math.inf else np.zeros_like(x)
    x = masks.cap * tanh if masks.cap < math.inf else x
    logits = np.where(allowed, x, -np.inf)
    largest = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(live, np.maximum(largest, sink), 0)
    weights, sink_weight = np.exp(logits - top), np.where(live, np.exp(sink - top), 0)
    total = np.where(live, weights.sum(axis=-1, keepdims=True) + sink_weight, 1)
    probs = np.where(live, weights / total, np.ones_like(scale) / max(allowed.shape[-1], 1))
    out = _einsum("bnts,bsnd->btnd", probs * factor, value)
    dprobs = _einsum("btnd,bsnd->bnts", dout, value)
    delta = (dout * out).sum(axis=-1).transpose(0, 2, 1)[..., None]
    if dlse is not None:
        delta = delta - np.where(live, dlse.transpose(0, 2, 1)[..., None], 0)
    dlogits = np.where(live, probs * (dprobs * factor - delta), 0)
    dproducts = dlogits * (1 - tanh * tanh)
    return Dense(
        key=key,
        value=value,
        dout=dout,
        live=live,
        products=products,
        logits=logits,
        probs=probs,
        lse=(top + np.log(total))[..., 0].transpose(0, 2, 1),
        out=np.where(query_valid, out, 0),
        dprobs=dprobs,
        delta=delta,
        dlogits=dlogits,
        slope=1 - tanh * tanh,
        sink_probs=sink_weight / total,
        max_logits=largest.max(axis=(2, 3), initial=-np.inf),
        dproducts=dproducts,
        dquery=scale * _einsum("bnts,bsnh->btnh", dproducts, key),
        dkey=scale * _einsum("bnts,btnh->bsnh", dproducts, query),
        dvalue=_einsum("bnts,btnd->bsnd", probs * factor, dout),
        dscale=(dproducts * products).sum(),
        dsinks=-(sink_weight / total * delta).sum(axis=(2, 3)),
    )


# ---------------------------------------------------------------------------------------------------
# The tolerance


def noise_floor(query, key, value, bias, scale, masks: Masking, dout, dtype, sinks=None, dlse=None) -> dict[str, Any]:
    """The error that a single rounding of every term would make, for each result; in float64.

    Dense code is now and then exact by luck (one key; one term; a sum that cancels), so twice its
    error alone is no fair bound. This is first-order error propagation through the formulas of value
    and gradient: products of inputs, probabilities, their cotangents and those of logits round to
    `dtype`, all else to the wider dtype. Independent roundings add as root of squares; that of a
    row's delta = dout . out is common to the row and adds coherently. The gradient of scale stays wide.

    Each bound comes from the size of what is added or multiplied, not from the size of the result, which may be 0:

    - dz = p * (dp - delta) of a row with one key is 0. Its error is that of dp and of delta, and so the roundings of
      their own terms.
    - Behind a soft cap, dz is multiplied by a slope 1 - t^2, which is 0 where the cap is reached. The error of a
      product is a * error(b) + b * error(a) + error(a) * error(b). The last of these is what is left where dz and the
      slope are both 0.
    - t is a tanh, and no lone rounding: XLA makes it as a quotient of polynomials. The last step of each rounds a
      product and a sum; the numerator is then multiplied by x, and the quotient rounds too. These are six.
    - A sum of n terms has n roundings, of its partial sums. The library may sum the rows of a whole group of heads one
      after the other, where dense code sums those of one head, with a smaller error. n is the former.

    `bias` is for a bias of full shape, and `bias_row` its coherent part: reduce_bias_noise takes
    them to the shape of the bias.
    """
    # Accumulations of many roundings are bounded by the unit roundoff, eps / 2; a lone rounding to a
    # narrow dtype errs by 0.2 eps, root mean square over random numbers (uniform within half a unit
    # in the last place, which is eps down to eps / 2 of the number).
    low = float(jnp.finfo(dtype).eps) * (0.5 if wide_dtype(dtype) == dtype else 0.2)
    wide = float(jnp.finfo(wide_dtype(dtype)).eps) / 2

    def root(spec, *squares):
        return np.sqrt(_einsum(spec, *(x * x for x in squares)))

    def rows(x):  # (B, T, N) -> (B, N, T, 1)
        return x.transpose(0, 2, 1)[..., None]

    x = dense_numpy(query, key, value, bias, scale, masks, dout, sinks, dlse)
    allowed, factor, live = masks.allowed, masks.factor, x.live
    key, value, dout, K = x.key, x.value, x.dout, key.shape[2]
    plain, logits, probs, lse, out = x.products, x.logits, x.probs, x.lse, x.out
    dprobs, delta, dlogits, slope = x.dprobs, x.delta, x.dlogits, x.slope

    def per_head(noise):  # reduces query heads to key/value heads, root of squares
        return np.sqrt(_sum_heads(noise * noise, K))

    product_size = root("btnh,bsnh->bnts", query, key) * np.abs(scale) + np.abs(bias)
    # A cap's tanh has six roundings; its product with the cap is one more, and the slope divides that by the cap again.
    capped_size = np.abs(logits) * (math.sqrt(6 + 1) if masks.cap < math.inf else 1.0)
    logit_size = np.where(allowed, np.maximum(slope * product_size, capped_size), 0.0)
    lse_noise = wide * (1.0 + logit_size.max(axis=-1, keepdims=True, initial=0.0))  # (B, N, T, 1)
    if sinks is not None:
        lse_noise = lse_noise + wide * np.abs(sinks)[None, :, None, None]
    # The slope is 1 - tanh^2: that of a large logit cancels. The square has the error of tanh twice, and its own.
    slope_noise = 0.0
    if masks.cap < math.inf:
        square = (1.0 - slope) * math.sqrt(2**2 * (6 + 2) + 1)
        slope_noise = wide * (slope + square + 2.0 * slope * product_size / masks.cap)
    steepest = slope + slope_noise
    probs_wide = probs * wide * (1.0 + logit_size)  # as softmax leaves them
    probs_noise = probs_wide + probs * (low + lse_noise)  # as they enter the product with value

    # Accumulated one by one, n random terms of root square sum r, in all e, are a random walk that ends at e. The root
    # mean square of its partial sums is sqrt(r^2 / 6 + e^2 / 3), and rounding each errs by `wide` of it at most,
    # uniformly, which is another 1 / 3. An e below r is as good as r, sqrt(n / 6) wide r: it cancels in the end alone.
    def accumulating(n, r, e):
        return wide * np.sqrt(n / 18 * (r**2 + 2 * np.maximum(r, np.abs(e)) ** 2))

    # Dense takes delta from the very dprobs that it is subtracted from; where they are equal (a row with one key),
    # it is exact. A flash backward sums D products twice.
    summing = 1.0 + math.sqrt(value.shape[-1] / 6)
    dprobs_size = summing * root("btnd,bsnd->bnts", dout, value) + np.abs(dprobs)
    delta_size = summing * rows(root("btnd,btnd->btn", dout, out)) + np.abs(delta)

    def own_noise(rounding):
        """Of the cotangents in front of the cap."""
        noise = probs * (rounding * np.abs(dprobs) + wide * dprobs_size) * factor + rounding * np.abs(dlogits)
        noise = noise + (probs_wide + probs * lse_noise) * np.abs(dprobs * factor - delta)
        return np.where(live, noise * steepest + np.abs(dlogits) * slope_noise, 0.0)

    own = own_noise(low)
    common = np.where(live, wide * delta_size, 0.0)  # times probs and slope, the same sign along a row

    def column(own_size, common_size):
        return np.sqrt(own_size**2 + common_size**2)

    common_probs = common * probs * steepest
    lse_rows = lse_noise[..., 0].transpose(0, 2, 1)[..., None]  # (B, T, N, 1)
    # Dense multiplies the cotangents of logits with the products before any of them is rounded to `dtype`.
    scale_own = root("bnts,bnts->", own_noise(wide), plain)
    scale_common = root("bnt->", (common_probs * plain).sum(axis=-1))
    dquery_own = root("bnts,bsnh->btnh", own, key)
    dquery_common = np.abs(_einsum("bnts,bsnh->btnh", common_probs, key))
    dkey_noise = np.abs(scale) * column(
        root("bnts,btnh->bsnh", own, query), root("bnts,btnh->bsnh", common_probs, query)
    )

    def summing_rows(terms, total):  # of each query head, to those of a key/value head
        return accumulating(query.shape[1] * query.shape[2] // K, per_head(terms), _sum_heads(total, K))

    # Dense may sum keys, or rows, in several parts, which is more exact (of few rows, XLA does so in JAX 0.12).
    dkey_sum = summing_rows(np.abs(scale) * root("bnts,btnh->bsnh", x.dproducts, query), x.dkey)
    dvalue_noise = root("bnts,btnd->bsnd", probs_noise * factor, dout)
    dvalue_sum = summing_rows(root("bnts,btnd->bsnd", probs * factor, dout), x.dvalue)
    out_sum = accumulating(value.shape[1], root("bnts,bsnd->btnd", probs * factor, value), out)
    out_noise = np.hypot(root("bnts,bsnd->btnd", probs_noise * factor, value), out_sum)
    rounded = low * root("bnts,bnts->bnt", probs * factor, dprobs)[..., None]
    sink_noise = x.sink_probs * (rounded + wide * delta_size + (lse_noise + wide) * np.abs(delta))
    return {
        "out": out_noise + (low + lse_rows) * np.abs(out),
        "lse": 3 * lse_rows[..., 0] + low * np.abs(lse),
        "query": np.abs(scale) * (dquery_own + dquery_common) + low * np.abs(x.dquery),
        "key": np.hypot(per_head(dkey_noise), dkey_sum) + per_head(low * np.abs(x.dkey)),
        # 1 / (1 - rate), and 1 / S of rows without a key, are rounded once for all rows.
        "value": np.hypot(per_head(dvalue_noise), dvalue_sum) + per_head((low + 2 * wide) * np.abs(x.dvalue)),
        "scale": scale_own + scale_common + wide * np.abs(x.dscale),
        "bias": own,
        "bias_row": common_probs,
        # Rounded weights, or their rounded cotangents, make delta noise.
        "sinks": np.sqrt((sink_noise**2).sum(axis=(2, 3))),
        "max_logits": wide * (1.0 + logit_size.max(axis=(2, 3), initial=0.0)),
    }


def reduce_bias_noise(own: Any, common: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Noise floor of the gradient of a bias of this (4-D) shape; each axis is 1 or full."""
    own, common = np.asarray(own), np.asarray(common)
    axes = tuple(i for i in range(4) if shape[i] == 1)
    if shape[3] == 1:
        common = common.sum(axis=3, keepdims=True)
    squares = (own**2).sum(axis=axes, keepdims=True) + (common**2).sum(axis=axes, keepdims=True)
    return np.sqrt(squares)


# An error of dense attention below this part of the floor has none of the roundings that the floor counts. A choice: it
# is derived from nothing.
_EXACT = 1e-3


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The largest absolute error of one result, beside what it is judged by."""

    error: float
    dense_error: float
    floor: float
    count: int

    @property
    def ratio(self) -> float:
        """Error in units of the dense error plus the floor; at most 2 passes.

        The floor is a root mean square, and errors are the largest of `count`. Of so many normal ones, s in root mean
        square, that is expected to be s * sqrt(2 log(2 count)). An error of dense attention is such a largest one, too;
        where it has none, exact by luck, no less than that passes.
        """
        yardstick = self.dense_error + self.floor
        if self.dense_error < _EXACT * self.floor:
            yardstick = self.floor * max(1.0, math.sqrt(2 * math.log(2 * self.count)) / 2)
        if self.error == 0.0:
            return 0.0
        return self.error / yardstick if yardstick > 0.0 else math.inf

    @property
    def dense_ratio(self) -> float:
        """Error in units of the dense error alone, for statistics: dense is now and then exact."""
        if self.error == 0.0:
            return 0.0
        return self.error / self.dense_error if self.dense_error > 0.0 else math.inf


def _widened(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x if x.dtype == np.longdouble else x.astype(np.float64)


def assert_as_accurate_as_dense(
    name: str, actual: Any, dense: Any, expected: Any, floor: Any = None, limit: float = 2.0
) -> Accuracy:
    """Asserts that the error of `actual` is at most `limit` times that of `dense` plus a floor.

    Both errors are the largest over the array, against `expected` (float64 or wider). `floor` is an array of
    noise_floor, or by default two units in the last place of the largest magnitude in `expected`.
    """
    dtype = np.asarray(actual).dtype
    actual, dense, expected = _widened(actual), _widened(dense), _widened(expected)
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    if name == "max_logits":  # of a head without any key
        none = expected == -np.inf
        np.testing.assert_array_equal(actual == -np.inf, none)
        actual, dense, expected = (np.where(none, 0.0, x) for x in (actual, dense, expected))
    assert np.isfinite(expected).all(), f"{name}: the oracle is not finite"
    assert np.isfinite(actual).all(), f"{name}: {np.sum(~np.isfinite(actual))} values not finite"
    largest = np.abs(expected).max(initial=0.0)
    if floor is None:
        floor = 2 * float(jnp.finfo(dtype).eps) * largest
    accuracy = Accuracy(
        float(np.abs(actual - expected).max(initial=0.0)),
        float(np.abs(dense - expected).max(initial=0.0)),
        float(np.max(np.asarray(floor), initial=0.0)),
        expected.size,
    )
    assert accuracy.ratio <= limit, (
        f"{name}: error {accuracy.error:.3e} is {accuracy.ratio:.2f} times that of dense attention "
        f"({accuracy.dense_error:.3e}; noise floor {accuracy.floor:.3e}; largest {largest:.3e})"
    )
    return accuracy


__all__ = [
    "NOTHING_ALLOWED",
    "Accuracy",
    "Masking",
    "allowed_pairs",
    "assert_as_accurate_as_dense",
    "dense_float64",
    "dense_in_both_modes",
    "dense_numpy",
    "dense_same_dtype",
    "enable_x64",
    "float64_oracle",
    "masking",
    "noise_floor",
    "reduce_bias_noise",
    "to_4d",
    "valid_rows",
    "wide_dtype",
]


def check_out(name: str, out: Any, dense: Any, *operands: Any, at: Any = ..., **options: Any) -> None:
    """Asserts that `out[at]` is as accurate as `dense[at]`."""
    with enable_x64():
        expected, _ = float64_oracle(*operands, **options)
    query, key, value = (np.asarray(x, np.float64) for x in operands)
    masks, scale = masking(query, key, **options), 1 / np.sqrt(query.shape[-1])
    floors = noise_floor(query, key, value, np.zeros(masks.allowed.shape), scale, masks, np.zeros(out.shape), out.dtype)
    assert_as_accurate_as_dense(name, out[at], dense[at], np.asarray(expected)[at], floors["out"][at])
