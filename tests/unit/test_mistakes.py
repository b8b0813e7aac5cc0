"""Mistakes of users who come from elsewhere: messages name the argument, what was given, what is accepted, and the fix.

The numbers are those of the try-out by a new user: what is an error, what is legal and warns, and what is right.
"""

import functools
import inspect
import pickle
import pydoc
import re
import warnings
from collections.abc import Callable
from typing import Any, get_overloads

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import (
    AttentionWarning,
    _warnings,
    context_parallel_attention,
    context_parallel_attention_with_lse,
    dropout_keep_mask,
    explain,
    flash_attention,
    flash_attention_with_lse,
    merge_attention,
)
from jax_native_flash_attn._keywords import FOREIGN

B, T, S, N, K, H = 2, 128, 128, 8, 2, 64
Q, KV, FEW = jnp.ones((B, T, N, H)), jnp.ones((B, S, N, H)), jnp.ones((B, S, K, H))
SMALL = jnp.ones((2, 1, 4, 2, 8))
RNG = jax.random.key(1)
STATIC = r"must be static, got a traced value: name it in static_argnames of jax.jit, .*functools.partial"
LAYOUT = r"If query, key and value are \(B, N, T, H\), as in PyTorch, transpose each with x.swapaxes\(-3, -2\)"
ROUTINES: dict[str, Any] = {
    x.__name__: x
    for x in (
        flash_attention,
        flash_attention_with_lse,
        context_parallel_attention,
        context_parallel_attention_with_lse,
        merge_attention,
        dropout_keep_mask,
    )
}
f, with_lse, parallel, parallel_with_lse, merge, keep_mask = ROUTINES.values()  # of any type: these calls are wrong


def transposed(*arrays: jax.Array) -> list[jax.Array]:
    return [x.swapaxes(1, 2) for x in arrays]


def numbers(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


def unknown(name: str, advice: str, function: str = "flash_attention") -> str:
    return rf"{function}\(\) got an unexpected keyword argument '{name}': .*{advice}"


def per_parameter(name: str, value: Any) -> Callable[[], Any]:
    """A call under `jax.jit` to which the option comes as an argument."""
    return lambda: jax.jit(lambda x: f(Q, KV, KV, dropout_rng=RNG, **{name: x}))(value)


# (mistake, call, type, what the message says)
MISTAKES: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    # shapes
    ("02 rank 5", lambda: f(Q[None], KV[None], KV[None]), ValueError,
        r"query must have at most 4 dimensions, got shape \(1, 2, 128, 8, 64\): take jax.vmap"),
    ("04b PyTorch's layout, T != S", lambda: f(*transposed(Q[:, :64], KV, KV)), ValueError,
        r"query heads must be a multiple of key's 128 heads, got 64, with query \(2, 8, 64, 64\) and key "
        rf"\(2, 8, 128, 64\) read as \(B, T, N, H\)\. {LAYOUT}"),
    ("04b unbatched", lambda: f(*(x[0] for x in transposed(Q[:, :64], KV, KV))), ValueError,
        r"query \(8, 64, 64\) and key \(8, 128, 64\) read as \(T, N, H\)\. .*are \(N, T, H\).*x.swapaxes\(-3, -2\)"),
    ("04c PyTorch's layout, mask", lambda: f(*transposed(Q, KV, KV), mask=numbers(B, 1, T, S, dtype=bool)), TypeError,
        r"mask must be broadcastable to \(B, N, T, S\) = \(2, 128, 8, 8\), got \(2, 1, 128, 128\) \(axis T\)\. "
        rf"{LAYOUT}"),
    ("04c PyTorch's layout, ids", lambda: f(*transposed(Q, KV, KV), query_segment_ids=numbers(B, T, dtype=int)),
        ValueError, rf"query_segment_ids must have shape \(B, T\) = \(2, 8\), got \(2, 128\)\. {LAYOUT}"),
    ("key alone in PyTorch's layout", lambda: f(Q, *transposed(FEW), FEW), ValueError,
        r"value must have key's .*\(B, S, K, D\) = \(2, 2, 128, D\), got \(2, 128, 2, 64\): one of the two is transp"),
    ("18 key padding mask", lambda: f(Q, KV, KV, mask=numbers(B, S, dtype=bool)), TypeError,
        r"mask must be .* \(B, N, T, S\) = \(2, 8, 128, 128\), got \(2, 128\), read as \(1, 1, 2, 128\) \(axis T\): "
        r"for one of \(B, S\) pass mask\[:, None, None, :\], or key_value_seq_lengths"),
    ("mask for all heads", lambda: f(Q, KV, KV, mask=numbers(B, T, S, dtype=bool)), ValueError,
        r"mask .*, got \(2, 128, 128\), read as \(1, 2, 128, 128\) \(axis N\): .*pass mask\[:, None\]"),
    ("mask for key's heads", lambda: f(Q, FEW, FEW, mask=numbers(1, K, T, S, dtype=bool)), ValueError,
        r"mask .*, got \(1, 2, 128, 128\) \(axis N\): .*pass jnp.repeat\(mask, 4, axis=-3\)"),
    ("mask, unbatched", lambda: f(Q[0], KV[0], KV[0], mask=numbers(S - 1, dtype=bool)), TypeError,
        r"mask must be broadcastable to \(N, T, S\) = \(8, 128, 128\), got \(127,\), read as \(1, 1, 127\) \(axis S\)"),
    ("45 heads", lambda: f(Q, KV[:, :, :3], KV[:, :, :3]), ValueError,
        r"query heads must be a multiple of key's 3 heads, got 8, with query .* read as \(B, T, N, H\)$"),
    ("46 more key heads", lambda: f(Q[:, :, :2], KV, KV), ValueError,
        r"multiple of key's 8 heads, got 2, with query \(2, 128, 2, 64\) and key \(2, 128, 8, 64\)"),
    ("48 batch", lambda: f(Q, KV[:1], KV[:1]), ValueError,
        r"key must have query's batch size and head dimension, \(B, S, K, H\) = \(2, S, K, 64\), got \(1, 128, 8, 64\) "
        r"beside query \(2, 128, 8, 64\)"),
    ("48 batch of keys alone", lambda: f(Q[0], KV, KV), ValueError,
        r"key must have .*, got \(2, 128, 8, 64\) beside query \(128, 8, 64\), read as \(1, 128, 8, 64\)"),
    ("head dimension, unbatched", lambda: f(Q[0], KV[0, :, :, :8], KV[0]), ValueError,
        r"key must have query's head dimension, \(S, K, H\) = \(S, K, 64\), got \(128, 8, 8\) beside query"),
    ("49 length of value", lambda: f(Q, KV, KV[:, :64]), ValueError,
        r"value must have key's batch size, length and heads, \(B, S, K, D\) = \(2, 128, 8, D\), got \(2, 64, 8, 64"),
    ("50 bias", lambda: f(Q, KV, KV, numbers(N, T, S + 1)), TypeError,
        r"bias must be .* \(2, 8, 128, 128\), got \(8, 128, 129\), read as \(1, 8, 128, 129\) \(axis S\)$"),
    ("51 bias of keys", lambda: f(Q, KV, KV, numbers(B, S)), TypeError,
        r"bias .*, got \(2, 128\), read as \(1, 1, 2, 128\) \(axis T\): .* pass bias\[:, None, None, :\]"),
    # keywords
    ("06", lambda: f(Q, KV, KV, attn_mask=0), TypeError, unknown("attn_mask", "pass mask if it is bool, .*; bias if")),
    ("07", lambda: f(Q, KV, KV, dropout_p=0.1), TypeError,
        unknown("dropout_p", r"dropout_rate, and dropout_rng such as jax.random.key\(0\)")),
    ("08", lambda: f(Q, KV, KV, causal=True), TypeError,
        unknown("causal", "pass is_causal, aligned at the top left; add query_offset=S - T if T != S")),
    ("09", lambda: f(Q, KV, KV, softmax_scale=0.1), TypeError, unknown("softmax_scale", "pass scale")),
    ("10", lambda: f(Q, KV, KV, sm_scale=0.1), TypeError, unknown("sm_scale", r"pass scale; None is 1 / sqrt\(H\)")),
    ("11", lambda: f(Q, KV, KV, window_size=(128, 0)), TypeError,
        unknown("window_size", r"pass local_window_size=\(left, right\).*-1 in flash_attn, is S here")),
    ("12", lambda: f(Q, KV, KV, segment_ids=0), TypeError,
        unknown("segment_ids", r"query_segment_ids, \(B, T\), and key_value_segment_ids, \(B, S\)")),
    ("13", lambda: f(Q, KV, KV, softcap=50.0), TypeError, unknown("softcap", "pass logits_soft_cap, with None, not 0")),
    ("14", lambda: f(Q, FEW, FEW, enable_gqa=True), TypeError, unknown("enable_gqa", "leave it out")),
    ("58", lambda: f(Q, KV, KV, block_size=128), TypeError, unknown("block_size", "pass block_q and block_kv")),
    ("60", lambda: f(Q, KV, KV, return_lse=True), TypeError,
        unknown("return_lse", "flash_attention_with_lse returns out and lse")),
    ("q, k, v", lambda: f(q=Q, k=KV, v=KV), TypeError, unknown("q", "pass query")),
    ("sliding window", lambda: f(Q, KV, KV, sliding_window=9), TypeError,
        unknown("sliding_window", r"local_window_size=\(w - 1, 0\) for a window of w keys that counts the query's")),
    ("padding where True is padding", lambda: f(Q, KV, KV, key_padding_mask=0), TypeError,
        unknown("key_padding_mask", r"mask=~key_padding_mask\[:, None, None, :\]")),
    ("lengths", lambda: f(Q, KV, KV, kv_len=0), TypeError, unknown("kv_len", r"pass key_value_seq_lengths, \(B,\)")),
    ("a slip", lambda: f(Q, KV, KV, is_casual=True), TypeError, unknown("is_casual", r"did you mean 'is_causal'\?")),
    ("nothing like it", lambda: f(Q, KV, KV, xyz=1), TypeError, unknown("xyz", "it takes query, key, .*sinks")),
    ("38 by position", lambda: f(Q, KV, KV, None, None, 0.1), TypeError,
        r"flash_attention\(\) takes 5 positional arguments \(query, key, value, bias, mask\), got 6: .* by name"),
    ("37 missing value", lambda: f(Q, KV), TypeError, r"flash_attention\(\) missing 1 .*: 'value'"),
    ("with_lse", lambda: with_lse(Q, KV, KV, causal=True), TypeError,
        unknown("causal", "pass is_causal", "flash_attention_with_lse")),
    ("with_lse: residual", lambda: with_lse(Q, KV, KV, return_residual=True), TypeError,
        unknown("return_residual", "flash_attention_with_lse returns out and lse", "flash_attention_with_lse")),
    ("with_lse: implementation", lambda: with_lse(Q, KV, KV, implementation="cudnn"), NotImplementedError,
        "implementation='cudnn' passes a call to jax.nn, which does not take this one"),
    ("context parallel", lambda: parallel(Q, KV, KV, axis_name="x", causal=True), TypeError,
        unknown("causal", "pass is_causal", "context_parallel_attention")),
    ("context parallel: lse", lambda: parallel(Q, KV, KV, axis_name="x", return_lse=True), TypeError,
        unknown("return_lse", "context_parallel_attention_with_lse returns", "context_parallel_attention")),
    ("context parallel with_lse", lambda: parallel_with_lse(Q, KV, KV, axis_name="x", sm_scale=1.0), TypeError,
        unknown("sm_scale", "pass scale", "context_parallel_attention_with_lse")),
    ("explain", lambda: explain(Q, KV, KV, causal=True), TypeError, unknown("causal", "pass is_causal")),
    ("explain, devices", lambda: explain(Q, KV, KV, causal=True, devices=2), TypeError,
        unknown("causal", "pass is_causal", "context_parallel_attention")),
    ("under jit", lambda: jax.jit(f)(Q, KV, KV, sm_scale=0.1), TypeError, unknown("sm_scale", "pass scale")),
    # masks and bias
    ("15 mask of 0 and -inf", lambda: f(Q, KV, KV, mask=numbers(T, S)), ValueError,
        "mask must have dtype bool, got float32: an additive mask is a bias"),
    ("17 mask of 0 and 1", lambda: f(Q, KV, KV, mask=numbers(B, 1, T, S, dtype=np.int32)), ValueError,
        r"mask must have dtype bool, got int32: .* pass mask.astype\(bool\)"),
    ("19 mask in the place of bias", lambda: f(Q, KV, KV, numbers(T, S, dtype=bool)), ValueError,
        "bias must hold numbers, which are added, got dtype bool: .*mask="),
    # dropout
    ("20 no key", lambda: f(Q, KV, KV, dropout_rate=0.1), ValueError,
        r"dropout_rng must be a PRNG key, such as jax.random.key\(0\), .*0\.1.*, got None: deterministic=True"),
    ("21 seed", lambda: f(Q, KV, KV, dropout_rate=0.1, dropout_rng=0), TypeError,
        r"dropout_rng must be a PRNG key, such as jax.random.key\(0\), got 0"),
    ("21 seed under jit", lambda: jax.jit(lambda x: f(Q, KV, KV, dropout_rate=0.1, dropout_rng=x))(0), TypeError,
        r"dropout_rng must be .*jax.random.key\(0\), got a traced array of dtype int32 and shape \(\)"),
    ("21 floats", lambda: f(Q, KV, KV, dropout_rate=0.1, dropout_rng=numbers(2)), TypeError,
        r"dropout_rng must be .*, got an array of dtype float32 and shape \(2,\)"),
    ("21 words of no key", lambda: f(Q, KV, KV, dropout_rate=0.1, dropout_rng=numbers(3, dtype=np.uint32)), TypeError,
        r"dropout_rng must be .*, got an array of dtype uint32 and shape \(3,\)"),
    ("21c keys", lambda: f(Q, KV, KV, dropout_rate=0.1, dropout_rng=jax.random.split(RNG, 2)), ValueError,
        r"dropout_rng must be a single key, got keys of shape \(2,\): take one, or jax.vmap over them"),
    ("21d NumPy's", lambda: f(Q, KV, KV, dropout_rate=0.1, dropout_rng=np.random.default_rng(0)), TypeError,
        r"dropout_rng must be .*jax.random.key\(0\), got a value of type Generator"),
    ("22 percent", lambda: f(Q, KV, KV, dropout_rate=10, dropout_rng=RNG), ValueError,
        r"dropout_rate must be a probability, in \[0, 1\], got 10"),
    ("22 as a flag", lambda: f(Q, KV, KV, dropout_rate=True, dropout_rng=RNG), TypeError,
        r"dropout_rate must be a Python number \(static\), such as 0.1, got True"),
    ("02 a name", lambda: f("q", KV, KV), TypeError, "query must be an array of numbers, got 'q'"),
    ("02 a name of a bias", lambda: f(Q, KV, KV, "b"), TypeError, "bias must be an array of numbers, got 'b'"),
    ("02 a name of a mask", lambda: f(Q, KV, KV, mask="m"), TypeError, "mask must be an array of numbers, got 'm'"),
    ("02 names of sinks", lambda: f(Q, KV, KV, sinks="s"), TypeError, "sinks must be an array of numbers, got 's'"),
    ("22 array", lambda: f(Q, KV, KV, dropout_rate=jnp.float32(0.1), dropout_rng=RNG), TypeError,
        r"dropout_rate must be a Python number \(static\), such as 0.1, got an array of dtype float32 and shape \(\)"),
    ("keep mask: rank", lambda: keep_mask(RNG, 0.1, (N, T, S)), ValueError,
        r"shape must be \(B, N, T, S\), got \(8, 128, 128\)"),
    ("keep mask: seed", lambda: keep_mask(0, 0.1, (B, N, T, S)), TypeError,
        r"dropout_rng must be a PRNG key, such as jax.random.key\(0\), got 0"),
    ("keep mask: swapped", lambda: keep_mask(0.1, RNG, (B, N, T, S)), TypeError,
        r"dropout_rate must be a Python number \(static\), such as 0.1, got an array of dtype key<fry>"),
    # static options
    ("22b", per_parameter("dropout_rate", 0.1), TypeError, f"dropout_rate {STATIC}"),
    ("44", per_parameter("is_causal", True), TypeError, f"is_causal {STATIC}"),
    ("44 deterministic", per_parameter("deterministic", True), TypeError, f"deterministic {STATIC}"),
    ("44 broadcast_dropout", per_parameter("broadcast_dropout", True), TypeError, f"broadcast_dropout {STATIC}"),
    ("44 return_residual", per_parameter("return_residual", True), TypeError, f"return_residual {STATIC}"),
    ("44 logits_soft_cap", per_parameter("logits_soft_cap", 30.0), TypeError, f"logits_soft_cap {STATIC}"),
    ("44 block_q", per_parameter("block_q", 16), TypeError, f"block_q {STATIC}"),
    ("44 block_kv", per_parameter("block_kv", 16), TypeError, f"block_kv {STATIC}"),
    ("44 return_max_logits", lambda: jax.jit(lambda x: with_lse(Q, KV, KV, return_max_logits=x))(True), TypeError,
        f"return_max_logits {STATIC}"),
    ("52", lambda: jax.jit(f)(Q, KV, KV, is_causal=True), TypeError, f"is_causal {STATIC}"),
    # lengths, window, scale
    ("25 one length", lambda: f(Q, KV, KV, key_value_seq_lengths=100), ValueError,
        r"key_value_seq_lengths must have shape \(B,\) = \(2,\), got \(\): .* pass jnp.full\(\(2,\), "),
    ("26 lengths of floats", lambda: f(Q, KV, KV, key_value_seq_lengths=jnp.array([100.0, 128.0])), ValueError,
        r"key_value_seq_lengths must hold integers, got dtype float32: cast it with x.astype"),
    ("55 one length, unbatched", lambda: f(Q[0], KV[0], KV[0], key_value_seq_lengths=jnp.int32(100)), ValueError,
        r"key_value_seq_lengths must have shape \(B,\) = \(1,\), got \(\): .* pass jnp.full\(\(1,\), "),
    ("ids beyond int32", lambda: f(Q, KV, KV, query_segment_ids=np.full((B, T), 2**40)),
        ValueError, r"query_segment_ids must lie within int32, got 1099511627776: number documents and tokens from 0"),
    ("positions beyond int32", lambda: f(Q, KV, KV, is_causal=True, query_positions=-numbers(B, T, dtype=np.uint32)),
        ValueError, r"query_positions must lie within int32, got 4294967295: number documents and tokens from 0"),
    ("ids, unbatched", lambda: f(Q[0], KV[0], KV[0], query_segment_ids=numbers(T - 1, dtype=int)), ValueError,
        r"query_segment_ids must have shape \(T,\) = \(128,\), got \(127,\)"),
    ("28c open window", lambda: f(Q, KV, KV, local_window_size=(128, None)), TypeError,
        r"local_window_size must hold integers, got \(128, None\): a side without a limit is S"),
    ("28d window of floats", lambda: f(Q, KV, KV, local_window_size=128.0), TypeError,
        "local_window_size must be an integer or a pair of integers, got 128.0"),
    ("41 scale by head", lambda: f(Q, KV, KV, scale=numbers(N)), ValueError,
        r"scale must be a scalar, got shape \(8,\): multiply query"),
    ("42 scale", lambda: f(Q, KV, KV, scale="auto"), ValueError,
        r"scale must be a real number, or None for 1 / sqrt\(H\), got 'auto'"),
    ("59 precision", lambda: f(Q, KV, KV, precision="bf16"), ValueError,
        "(?s)precision must be what JAX takes as such, got 'bf16'.*'bfloat16'"),
    ("an array that nobody would read", lambda: f(Q, KV, KV, query_offset=numbers(B)), TypeError,
        r"query_offset must be an integer, .*, got an array of dtype float32 and shape \(2,\)"),
    # implementation
    *((f"{number} implementation", functools.partial(f, Q, KV, KV, implementation=name), ValueError,
        rf"implementation must be one of \(None, 'xla', 'pure_jax', .*, 'dense', 'cudnn'\), got '{name}'")
        for number, name in ((29, "flash"), (30, "triton"))),
    ("implementation, an array", lambda: f(Q, KV, KV, implementation=numbers(2)), ValueError,
        r"implementation must be one of .*, got an array of dtype float32 and shape \(2,\)"),
    # dtypes
    ("33", lambda: f(Q.astype(jnp.bfloat16), KV, KV), ValueError,
        "key must have query's dtype bfloat16, got float32: cast one of them"),
    ("34 cache", lambda: f(Q, KV.astype(jnp.bfloat16), KV.astype(jnp.bfloat16)), ValueError,
        "key must have query's dtype float32, got bfloat16: cast one of them"),
    ("35", lambda: f(*(x.astype(jnp.int32) for x in (Q, KV, KV))), ValueError,
        "query must have a dtype of bfloat16, float16, float32, float64, got int32: cast it"),
    ("36", lambda: f(*(x.astype(jnp.float8_e4m3fn) for x in (Q, KV, KV))), ValueError,
        "query must have a dtype of .*, got float8_e4m3fn: cast it"),
    ("implementation='dense', tiles", lambda: f(Q, KV, KV, implementation="dense", block_q=16), ValueError,
        "implementation='dense' has no tiles, got block_q=16 and block_kv=None: leave them out, or take another"),
    # several devices
    ("explain: no devices", lambda: explain(Q, KV, KV, devices=0), ValueError,
        "devices must be at least 1, got 0: 1 is for a sequence that is not split"),
    ("explain: devices, text", lambda: explain(Q, KV, KV, devices="2"), TypeError,  # pyright: ignore[reportArgumentType]
        "devices must be an int, got '2': 1 is for a sequence that is not split"),
    ("explain: devices, a float", lambda: explain(Q, KV, KV, devices=2.0), TypeError,  # pyright: ignore[reportArgumentType]
        "devices must be an int, got 2.0"),
    *((f"explain: strategy, {n} devices", functools.partial(explain, Q, KV, KV, devices=n, strategy="rnig"), ValueError,
        r"strategy must be one of \(None, 'ring', 'all_to_all', 'all_gather'\), got 'rnig': did you mean 'ring'\?")
        for n in (1, 2)),
    ("explain: order", lambda: explain(Q, KV, KV, order="zigzag"), ValueError,
        "order must be None or 'balanced', .*, got 'zigzag': of any other order pass query_positions"),
    ("explain: a slip", lambda: explain(Q, KV, KV, stratgy="ring"), TypeError,
        unknown("stratgy", r"did you mean 'strategy'\?", "explain")),
    ("an axis of vmap", lambda: jax.vmap(lambda x: parallel(x, x, x, axis_name="i"), axis_name="i")(SMALL), ValueError,
        "axis_name must be a mesh axis of the jax.shard_map .*, got 'i', an axis of jax.vmap: .*strategy='all_gather'"),
    ("no axis at all", lambda: parallel(Q, KV, KV, axis_name="i"), ValueError,
        "axis_name must be a mesh axis of the jax.shard_map around this call, got 'i'"),
    # merge_attention
    ("merge: pairs", lambda: merge([(Q, Q[..., 0])]), TypeError, "merge_attention.* missing 1 .*'lses'"),
    ("merge: one pair by another", lambda: merge((Q, Q[..., 0]), (Q, Q[..., 0])), ValueError,
        r"outs must have one shape.*got \[\(2, 128, 8, 64\), \(2, 128, 8\)\].*merge_attention\(\*zip\(\*pairs\)\)"),
    ("merge: pairs as outs", lambda: merge([(Q, Q[..., 0])], [Q[..., 0]]), TypeError,
        r"outs must hold arrays, got a tuple of 2: .*merge_attention\(\*zip\(\*pairs\)\)"),
    ("merge: numbers", lambda: merge([Q, Q], [Q[..., 0]]), ValueError, "outs and lses .*equally many.*, got 2 and 1"),
    ("merge: empty", lambda: merge([], []), ValueError, "outs and lses must be .*at least one, got 0 and 0"),
    ("merge: arrays", lambda: merge(Q, Q[..., 0]), TypeError,
        r"outs must be a list of arrays, .*got an array of .*\(2, 128, 8, 64\): .* pass \[out\], .*list\(outs\)"),
    ("merge: array of lses", lambda: merge([Q], Q[..., 0]), TypeError, r"lses must be a list .*pass \[lse\]"),
    ("merge: lse (B, N, T)", lambda: merge([Q, Q], [jnp.zeros((B, N, T))] * 2), ValueError,
        r"outs .* and lses .*, got .* \[\(2, 8, 128\), .*: transpose lse, .* with lse.swapaxes\(-2, -1\)"),
    ("merge: swapped", lambda: merge([Q[..., 0]], [Q]), ValueError, r"outs .*\[\(2, 128, 8, 64\)\]: outs come first"),
    ("merge: integers", lambda: merge([Q.astype(int)], [Q[..., 0]]), TypeError,
        "outs must hold real numbers, got an array of dtype int32"),
]  # fmt: skip


# What `jax.nn` takes, and is hardly meant: (mistake, call, what the warning says).
HARDLY_MEANT: list[tuple[str, Callable[[], Any], str]] = [
    ("01 rank 2", lambda: f(Q[0, :, 0], KV[0, :, 0], KV[0, :, 0]),
        r"query of shape \(128, 64\) is read as heads at one position.* pass query, key and value with an axis "),
    ("03 PyTorch's layout", lambda: f(*transposed(Q, KV, KV)),
        r"query of shape \(2, 8, 128, 64\) and key of shape \(2, 8, 128, 64\) are read as \(B, T, N, H\) and "
        r"\(B, S, K, H\), 8 queries of 128 heads\. If query, key and value are \(B, N, T, H\), .*each with x.swapaxes"),
    ("04 PyTorch's layout, grouped heads", lambda: f(*transposed(Q, FEW, FEW)),
        r"query of shape \(2, 8, 128, 64\) and key of shape \(2, 2, 128, 64\) are read as .*each with x.swapaxes"),
    ("04b PyTorch's layout, T = 2 * S", lambda: f(*transposed(Q.repeat(4, 1), KV.repeat(2, 1), KV.repeat(2, 1))),
        r"query of shape \(2, 8, 512, 64\) and key of shape \(2, 8, 256, 64\) are read as .* 8 queries of 512 heads"),
    ("05 query alone", lambda: f(*transposed(Q), KV, KV),
        r"query of shape \(2, 8, 128, 64\) beside key of shape \(2, 128, 8, 64\) .* with query.swapaxes\(-3, -2\)"),
    ("16 mask of 0 and 1 as a bias", lambda: f(Q, KV, KV, jnp.tril(jnp.ones((T, S)))),
        r"bias of shape \(128, 128\) holds 0 and 1 alone, which are added .*: pass mask=bias.astype\(bool\); bias - 1"),
    ("18b padding mask, B = T", lambda: f(Q[:, :2], KV, KV, mask=numbers(B, S, dtype=bool)),
        r"mask of shape \(2, 128\) is read as \(T, S\), .* pass mask\[:, None, None, :\]"),
    ("27 long lengths", lambda: f(Q, KV, KV, key_value_seq_lengths=jnp.array([100, 4096])),
        "key_value_seq_lengths has lengths outside of 0 to 128, got 4096, which is taken for 128: give how many"),
    ("27b negative lengths", lambda: f(Q, KV, KV, key_value_seq_lengths=jnp.array([-1, 128])),
        "key_value_seq_lengths has lengths outside of 0 to 128, got -1, which is taken for 0: give how many tokens"),
    ("28 negative window", lambda: f(Q, KV, KV, local_window_size=-1),
        r"local_window_size=\(-1, -1\) leaves all queries without keys: .* no window is None"),
    ("28b window of flash_attn", lambda: f(Q, KV, KV, local_window_size=(-1, -1)),
        r"local_window_size=\(-1, -1\) leaves all queries without keys: .* A side without a limit is S, not -1"),
    ("56 decoding", lambda: f(Q[:, -1:], KV, KV, is_causal=True),
        "is_causal=True with T = 1 < S = 128 .* pass query_offset=S - T"),
]  # fmt: skip
# What is no mistake: (number, call, what it is the same as).
RIGHT: list[tuple[str, Callable[[], Any], Callable[[], Any]]] = [
    ("21b raw key", lambda: f(Q, KV, KV, dropout_rate=0.1, dropout_rng=jax.random.key_data(RNG)),
        lambda: f(Q, KV, KV, dropout_rate=0.1, dropout_rng=RNG)),
    *((f"{number} lengths", functools.partial(f, Q, KV, KV, key_value_seq_lengths=lengths),
        lambda: f(Q, KV, KV, key_value_seq_lengths=jnp.array([100, 128], jnp.int32)))
        for number, lengths in ((23, [100, 128]), (24, np.array([100, 128])))),
    *((f"{number} scale", functools.partial(f, Q, KV, KV, scale=scale), functools.partial(f, Q, KV, KV, scale=same))
        for number, scale, same in ((39, np.float64(0.125), 0.125), (40, np.int64(1), 1.0))),
    ("43 is_causal=1", lambda: f(Q, KV, KV, is_causal=1), lambda: f(Q, KV, KV, is_causal=True)),
    ("47 value's head dimension", lambda: f(Q, KV, KV[..., :32]), lambda: f(Q, KV, KV)[..., :32]),
    ("53 float64", lambda: f(*(np.asarray(x, np.float64) for x in (Q, KV, KV))), lambda: f(Q, KV, KV)),
    ("54 lists", lambda: f(*[[[[1.0, 2.0]]]] * 3), lambda: f(*[jnp.array([[[1.0, 2.0]]])] * 3)),
    ("57 tile of 100", lambda: f(Q, KV, KV, block_q=100), lambda: f(Q, KV, KV)),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "says"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES])
def test_mistake(call: Callable[[], Any], error: type[Exception], says: str):
    with pytest.raises(error, match=says) as raised:
        call()
    assert type(raised.value) is error


@pytest.mark.parametrize(("call", "says"), [row[1:] for row in HARDLY_MEANT], ids=[row[0] for row in HARDLY_MEANT])
def test_hardly_meant(call: Callable[[], Any], says: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JAX_NATIVE_FLASH_ATTN_WARNINGS")
    monkeypatch.setattr(_warnings, "_looked_at", set())
    with pytest.warns(AttentionWarning, match=says) as found:
        call()
    assert [x.filename for x in found] == [__file__]


@pytest.mark.parametrize(("call", "same"), [row[1:] for row in RIGHT], ids=[row[0] for row in RIGHT])
def test_right(call: Callable[[], Any], same: Callable[[], Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JAX_NATIVE_FLASH_ATTN_WARNINGS")
    with warnings.catch_warnings(action="error", category=AttentionWarning):
        np.testing.assert_allclose(call(), same(), rtol=2e-6)


def test_what_cannot_run_says_why():  # 31
    if jax.default_backend() != "cpu":
        pytest.skip("for a host without a GPU")
    with pytest.raises(NotImplementedError, match=r"implementation='mosaic_gpu' does not run here: .*'pure_jax': runs"):
        f(Q, KV, KV, implementation="mosaic_gpu")


def test_an_error_of_cudnn_is_marked():  # 32
    if jax.default_backend() != "cpu":
        pytest.skip("for a host without cuDNN")
    with pytest.raises(Exception, match="cuDNN") as raised:
        f(Q, KV, KV, implementation="cudnn")
    assert [x for x in raised.value.__notes__ if "jax.nn.dot_product_attention" in x and "implementation='cudnn'" in x]


# ------------------------------------------------------------------------------------------ foreign keywords


def test_every_piece_of_advice_names_what_there_is():
    ours = set(ROUTINES).union(*(inspect.signature(x).parameters for x in ROUTINES.values()))
    for name, advice in FOREIGN.items():
        advice = advice.format(with_lse="flash_attention_with_lse")
        words = set(re.findall(r"\w+", advice))
        assert words & ours, (name, advice)
        passed = set(re.findall(r"\b(?:pass|add) (\w+)", advice))
        assert passed <= ours, (name, advice)


def test_no_foreign_keyword_is_ours_everywhere():
    assert not {name for name in FOREIGN if all(name in inspect.signature(x).parameters for x in (f, with_lse))}


@pytest.mark.parametrize("function", [flash_attention, flash_attention_with_lse])
def test_functions_look_as_they_are_written(function: Any):
    parameters = inspect.signature(function).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "bias", "mask", "scale", "is_causal"]
    assert {x.kind for x in parameters.values()} == {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    }
    shown = "".join(pydoc.plain(pydoc.render_doc(function)).splitlines()[2:])
    assert re.match(rf"{function.__name__}\(\s*query: ", shown)
    assert len(get_overloads(function)) == 2
    assert pickle.loads(pickle.dumps(function)) is function
