"""README's examples run as they are pasted, one after the other, and its recipes give what they say."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the examples define."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 10
    names: dict[str, Any] = {"printed": []}
    for block in blocks:
        exec(block.replace("print(found)", "printed.append(str(found))"), names)
    return names


def dense(
    query: Any, key: Any, value: Any, change: Any = lambda z: z, *, scale: float, sinks: Any = None
) -> np.ndarray:
    """Attention in float64 with all masks in `change`, a function of the logits (B, N, T, S)."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, query.shape[2] // key.shape[2], 2) for x in (key, value))
    logits = change(scale * np.einsum("btnh,bsnh->bnts", query, key))
    sink = np.full(query.shape[2], -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    weights = np.exp(logits)
    weights /= weights.sum(-1, keepdims=True) + np.exp(sink)[:, None, None]
    return np.einsum("bnts,bsnd->btnd", weights, value)


def masked(z: np.ndarray, *, window: float = np.inf) -> np.ndarray:
    distance = np.arange(z.shape[-2])[:, None] - np.arange(z.shape[-1])
    return np.where((distance >= 0) & (distance <= window), z, -np.inf)


# Numbers are of size 1, and no sum of products of float32 is longer than a logit of 192 dimensions.
assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=192 * float(np.finfo(np.float32).eps))


def test_examples(names: dict[str, Any]):
    assert names["dbias"].shape == names["bias"].shape
    assert "flash_attention on cuda" in names["printed"][0]


def test_packed_documents(names: dict[str, Any]):
    arrays = [names[name][:1] for name in ("query", "key", "value")]
    for first in range(0, 192, 64):
        expected = dense(*(x[:, first : first + 64] for x in arrays), masked, scale=names["H"] ** -0.5)
        assert_close(names["packed"][:, first : first + 64], expected)
    assert not names["packed"][:, 192:].any()


def test_chunks(names: dict[str, Any]):
    query, key, value = (names[name] for name in ("query", "key", "value"))
    assert_close(names["prefilled"], dense(query, key, value, masked, scale=names["H"] ** -0.5))
    assert names["attend_to_cache"]._cache_size() == 1


def test_sinks(names: dict[str, Any]):
    arrays = [names[name] for name in ("query", "key", "value")]
    expected = dense(*arrays, functools.partial(masked, window=127), scale=names["H"] ** -0.5, sinks=names["sinks"])
    assert_close(names["gpt_oss"], expected)
    assert names["dsinks"].shape == names["sinks"].shape


def test_soft_cap(names: dict[str, Any]):
    arrays = [names[name] for name in ("query", "key", "value")]
    expected = dense(*arrays, lambda z: masked(50 * np.tanh(z / 50)), scale=256**-0.5)
    assert_close(names["gemma"], expected)


def test_value_dimension(names: dict[str, Any]):
    arrays = [names[name] for name in ("mla_query", "mla_key", "mla_value")]
    assert_close(names["mla"], dense(*arrays, masked, scale=192**-0.5))


def test_alibi(names: dict[str, Any]):
    query, key, value, slopes = (names[name] for name in ("query", "key", "value", "slopes"))
    distance = np.arange(key.shape[1]) - np.arange(query.shape[1])[:, None]
    bias = np.asarray(slopes, np.float64)[:, None, None] * distance
    assert_close(names["biased"], dense(query, key, value, lambda z: masked(z + bias), scale=names["H"] ** -0.5))


def test_largest_logits(names: dict[str, Any]):
    found: list[np.ndarray] = []

    def keep(z: np.ndarray) -> np.ndarray:
        found.append(masked(z).max((0, 2, 3)))
        return masked(z)

    dense(*(names[name] for name in ("query", "key", "value")), keep, scale=names["H"] ** -0.5)
    assert_close(names["max_logits"], found[0])
    assert isinstance(names["max_logits"], jax.Array)
    assert names["max_logits"].dtype == jnp.float32


def test_sequence_over_devices(names: dict[str, Any]):
    arrays = [names[name] for name in ("query", "key", "value")]
    expected = dense(*arrays, masked, scale=names["H"] ** -0.5)
    assert_close(names["out_in_order"], expected[:, names["order"]])
    assert names["out_in_order"].sharding.spec[1] == "sequence"
    assert len(names["out_in_order"].addressable_shards) == jax.device_count()
