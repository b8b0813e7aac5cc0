"""Invalid calls: each raises a documented type, and the message names the argument."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import flash_attention
from tests.support.environment import lenient_promotion
from tests.support.reference import SIGNATURE, reference_attention

B, T, S, N, K, H = 2, 4, 6, 4, 2, 8
QUERY, KEY = np.ones((B, T, N, H), np.float32), np.ones((B, S, K, H), np.float32)


def ones(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, jnp.dtype(dtype))


def lengths(*values: int, dtype: Any = np.int32) -> np.ndarray:
    return np.array(values, dtype)


RNG = jax.random.key(0)

# (argument that the message must name, type, what replaces the arguments of a valid call)
CALLS: list[tuple[str, type[Exception], dict[str, Any]]] = [
    # ranks
    ("query", ValueError, {"query": ones(1, B, T, N, H)}),
    ("query", ValueError, {"query": ones(H)}),
    ("query", ValueError, {"query": QUERY[0]}),
    ("key", ValueError, {"key": ones(1, B, S, K, H)}),
    ("value", ValueError, {"value": ones(1, B, S, K, H)}),
    ("bias", ValueError, {"bias": ones(1, B, N, T, S)}),
    ("mask", ValueError, {"mask": ones(1, B, N, T, S, dtype=bool)}),
    # missing arrays
    ("query", ValueError, {"query": None}),
    ("key", ValueError, {"key": None}),
    ("value", ValueError, {"value": None}),
    # dtypes
    ("query", ValueError, {"query": QUERY.astype(jnp.bfloat16)}),
    ("value", ValueError, {"value": KEY.astype(np.float16)}),
    ("query", ValueError, dict.fromkeys(("key", "value"), KEY.astype(int)) | {"query": QUERY.astype(int)}),
    ("query", ValueError, dict.fromkeys(("key", "value"), KEY + 0j) | {"query": QUERY + 0j}),
    ("query", ValueError, {
        "query": QUERY.astype(jnp.float8_e4m3fn), "key": KEY.astype(jnp.float8_e4m3fn),
        "value": KEY.astype(jnp.float8_e4m3fn),
    }),
    ("mask", ValueError, {"mask": ones(B, N, T, S)}),
    ("mask", ValueError, {"mask": ones(B, N, T, S, dtype=np.int32)}),
    ("bias", TypeError, {"bias": ones(B, N, T, S, dtype=np.complex64)}),
    # shapes
    ("value", ValueError, {"value": ones(B, S - 1, K, H)}),
    ("value", ValueError, {"value": ones(B, S, 1, H)}),
    ("query", ValueError, {"query": ones(B + 1, T, N, H)}),
    ("query", ValueError, {"query": ones(B, T, N, H // 2)}),
    ("query", ValueError, {"query": ones(B, T, 3, H)}),
    ("key", ValueError, {"key": ones(B, S, 0, H), "value": ones(B, S, 0, H)}),
    ("mask", TypeError, {"mask": ones(B, N, T, S - 1, dtype=bool)}),
    ("mask", TypeError, {"mask": ones(B, N, T - 1, S, dtype=bool)}),
    ("mask", TypeError, {"mask": ones(B + 1, N, T, S, dtype=bool)}),
    ("mask", ValueError, {"mask": ones(B, K, T, S, dtype=bool)}),
    ("bias", TypeError, {"bias": ones(B, N, T, S - 1)}),
    ("bias", TypeError, {"bias": ones(N, T - 1, S)}),
    ("bias", TypeError, {"bias": ones(B + 1, 1, 1, 1)}),
    ("bias", ValueError, {"bias": ones(B, K, T, S)}),
    ("bias", ValueError, {"bias": ones(B, N, T, S, dtype=bool)}),
    # lengths
    ("query_seq_lengths", ValueError, {"query_seq_lengths": lengths(1, 2, 3)}),
    ("query_seq_lengths", ValueError, {"query_seq_lengths": np.int32(2)}),
    ("query_seq_lengths", ValueError, {"query_seq_lengths": lengths(1, 2, dtype=np.float32)}),
    ("key_value_seq_lengths", ValueError, {"key_value_seq_lengths": lengths(1)}),
    ("key_value_seq_lengths", ValueError, {"key_value_seq_lengths": ones(B, 1, dtype=np.int32)}),
    ("key_value_seq_lengths", ValueError, {"key_value_seq_lengths": lengths(1, 2, dtype=bool)}),
    # window
    ("local_window_size", ValueError, {"local_window_size": (1, 2, 3)}),
    ("local_window_size", ValueError, {"local_window_size": (1,)}),
    ("local_window_size", TypeError, {"local_window_size": 1.5}),
    ("local_window_size", TypeError, {"local_window_size": (1.5, 2.0)}),
    ("local_window_size", TypeError, {"local_window_size": (1, None)}),
    ("local_window_size", TypeError, {"local_window_size": "ab"}),
    # scale, causal, implementation
    ("scale", ValueError, {"scale": ones(3)}),
    ("scale", ValueError, {"scale": "large"}),
    ("is_causal", TypeError, {"is_causal": "yes"}),
    ("is_causal", TypeError, {"is_causal": np.array([True])}),
    ("deterministic", TypeError, {"deterministic": "yes"}),
    ("implementation", ValueError, {"implementation": "mosaic"}),
    ("implementation", ValueError, {"implementation": 3}),
    # extensions
    ("dropout_rate", ValueError, {"dropout_rate": -0.1, "dropout_rng": RNG}),
    ("dropout_rate", ValueError, {"dropout_rate": 1.5, "dropout_rng": RNG}),
    ("dropout_rate", ValueError, {"dropout_rate": float("nan"), "dropout_rng": RNG}),
    ("dropout_rate", TypeError, {"dropout_rate": "half", "dropout_rng": RNG}),
    ("dropout_rng", ValueError, {"dropout_rate": 0.5}),
    ("dropout", NotImplementedError, {"dropout_rate": 0.5, "dropout_rng": RNG, "implementation": "cudnn"}),
    ("precision", ValueError, {"precision": "exact"}),
    ("precision", ValueError, {"precision": 3}),
    ("precision", ValueError, {"precision": {}}),
    ("precision", ValueError, {"precision": ("highest", None)}),
    ("block_q", ValueError, {"block_q": 0}),
    ("block_q", TypeError, {"block_q": 16.0}),
    ("block_kv", ValueError, {"block_kv": -16}),
    ("block_kv", TypeError, {"block_kv": "16"}),
    ("query_segment_ids", ValueError, {"query_segment_ids": ones(B, T, dtype=np.int32)}),
    ("key_value_segment_ids", ValueError, {"key_value_segment_ids": ones(B, S, dtype=np.int32)}),
    ("query_segment_ids", ValueError, {"query_segment_ids": ones(B, S, dtype=np.int32)}),
    ("query_segment_ids", ValueError, {"query_segment_ids": ones(B, T)}),
    ("query_positions", ValueError, {"query_positions": ones(B, 1, T, dtype=np.int32)}),
    ("query_positions", ValueError, {"query_positions": ones(B, T)}),
    ("key_value_positions", ValueError, {"key_value_positions": ones(B, T, dtype=np.int32)}),
    ("query_offset", ValueError, {"query_offset": ones(B + 1, dtype=np.int32)}),
    ("query_offset", TypeError, {"query_offset": 1.5}),
    ("query_offset", TypeError, {"query_offset": ones(B)}),
    ("query_offset", ValueError, {"query_offset": 1, "query_positions": ones(B, T, dtype=np.int32)}),
    ("logits_soft_cap", ValueError, {"logits_soft_cap": 0.0}),
    ("logits_soft_cap", ValueError, {"logits_soft_cap": -30.0}),
    ("logits_soft_cap", ValueError, {"logits_soft_cap": float("nan")}),
    ("logits_soft_cap", TypeError, {"logits_soft_cap": "50"}),
    ("logits_soft_cap", TypeError, {"logits_soft_cap": ones(1)}),
    ("sinks", ValueError, {"sinks": ones(K)}),
    ("sinks", ValueError, {"sinks": ones(1, N)}),
    ("sinks", TypeError, {"sinks": ones(N, dtype=np.int32)}),
    ("broadcast_dropout", TypeError, {"broadcast_dropout": "yes"}),
    ("sinks", NotImplementedError, {"sinks": ones(N), "implementation": "cudnn"}),
    ("query_offset", NotImplementedError, {"query_offset": 2, "implementation": "cudnn"}),
]  # fmt: skip


def describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return "key" if isinstance(value, jax.Array) else repr(value)


def error_of_reference(arguments: dict[str, Any]) -> Exception | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # of complex numbers, and of H = 0
            jax.eval_shape(lambda: reference_attention(**arguments))
    except Exception as error:
        return error
    return None


IDS = ["-".join(f"{k}={describe(v)}" for k, v in changes.items()) for _, _, changes in CALLS]


@pytest.mark.parametrize(("argument", "error", "changes"), CALLS, ids=IDS)
def test_invalid_call(argument: str, error: type[Exception], changes: dict[str, Any]):
    arguments = {"query": QUERY, "key": KEY, "value": KEY, **changes}
    with pytest.raises(error) as raised:
        flash_attention(**arguments)
    assert type(raised.value) is error
    assert argument in str(raised.value)

    if not set(arguments) <= set(SIGNATURE.parameters):
        return
    reference_error = error_of_reference(arguments)
    crashed = isinstance(reference_error, AssertionError | ZeroDivisionError)  # not a check
    assert reference_error is None or crashed or isinstance(reference_error, error), repr(reference_error)


def test_the_valid_call_is_valid():
    # Or every error above could be about something else.
    assert flash_attention(QUERY, KEY, KEY).shape == QUERY.shape
    with lenient_promotion():
        assert reference_attention(QUERY, KEY, KEY).shape == QUERY.shape


def test_messages_say_what_was_given_and_what_is_accepted():
    with pytest.raises(TypeError, match=r"mask.*(\b6\b.*\b5\b|\b5\b.*\b6\b)"):
        flash_attention(QUERY, KEY, KEY, mask=ones(B, N, T, S - 1, dtype=bool))
    with pytest.raises(ValueError, match=r"implementation.*None.*xla.*pure_jax.*mosaic_gpu.*cudnn"):
        flash_attention(QUERY, KEY, KEY, implementation="mosaic")  # pyright: ignore
    with pytest.raises(ValueError, match=r"query heads must be a multiple of .*\b2\b.*\b3\b"):  # Flax tests for it
        flash_attention(QUERY[:, :, :3], KEY, KEY)
    with pytest.raises(ValueError, match=r"(?s)precision.*exact.*'float32'"):
        flash_attention(QUERY, KEY, KEY, precision="exact")


@pytest.mark.parametrize("name", ["is_causal", "deterministic"])
def test_traced_switches_say_how_to_make_them_static(name: str):
    with pytest.raises(TypeError, match=rf"(?s){name}.*static_argnames.*functools.partial"):
        jax.jit(lambda x: flash_attention(QUERY, KEY, KEY, **{name: x}))(True)


# What jax.nn takes, which asks only whether it is true.
SWITCHES = (None, False, True, 0, 1, np.bool_(False), np.bool_(True), np.array(True), jnp.array(False), jnp.array(1))


@pytest.mark.parametrize("given", SWITCHES, ids=repr)
def test_values_of_is_causal(given: Any):
    query, key = jax.random.normal(RNG, QUERY.shape), jax.random.normal(RNG, KEY.shape)
    expected = reference_attention(query, key, key, is_causal=given)
    np.testing.assert_allclose(flash_attention(query, key, key, is_causal=given), expected, atol=1e-6)
    assert np.abs(expected - reference_attention(query, key, key, is_causal=not given)).max() > 1e-2


def test_traced_dropout_rate_is_a_type_error():
    with pytest.raises(TypeError, match="dropout_rate"):
        jax.jit(lambda r: flash_attention(QUERY, KEY, KEY, dropout_rate=r, dropout_rng=RNG))(0.5)
