"""What the recipes of the pages must give, by dense attention in float64: by the name of a recipe's result."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Names = dict[str, Any]


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


def arrays(names: Names) -> list[Any]:
    return [names[name] for name in ("query", "key", "value")]


def check_bias_gradient(names: Names) -> None:
    assert names["dbias"].shape == names["bias"].shape
    assert names["dbias"].any()


def check_packed_documents(names: Names) -> None:
    """Each run of equal ids is a document of its own, and padding, which has negative ids, attends nothing."""
    ids = np.asarray(names["ids"])
    assert len(np.unique(ids)) > 2
    for row, row_ids in enumerate(ids):
        for i in np.unique(row_ids):
            (where,) = np.nonzero(row_ids == i)
            found = names["packed"][row : row + 1, where]
            if i < 0:
                assert not found.any()
                continue
            document = (np.asarray(x)[row : row + 1, where] for x in arrays(names))
            assert_close(found, dense(*document, masked, scale=names["H"] ** -0.5))


def check_chunks(names: Names) -> None:
    assert_close(names["prefilled"], dense(*arrays(names), masked, scale=names["H"] ** -0.5))
    assert names["attend_to_cache"]._cache_size() <= 2  # compiled once for chunks of a prompt, and for single tokens


def check_sinks(names: Names) -> None:
    window = functools.partial(masked, window=127)
    expected = dense(*arrays(names), window, scale=names["H"] ** -0.5, sinks=names["sinks"])
    assert_close(names["gpt_oss"], expected)
    assert names["dsinks"].shape == names["sinks"].shape


def check_soft_cap(names: Names) -> None:
    assert_close(names["gemma"], dense(*arrays(names), lambda z: masked(50 * np.tanh(z / 50)), scale=256**-0.5))


def check_value_dimension(names: Names) -> None:
    parts = (names[name] for name in ("mla_query", "mla_key", "mla_value"))
    assert_close(names["mla"], dense(*parts, masked, scale=192**-0.5))


def check_alibi(names: Names) -> None:
    query, key, value = arrays(names)
    distance = np.arange(key.shape[1]) - np.arange(query.shape[1])[:, None]
    bias = np.asarray(names["slopes"], np.float64)[:, None, None] * distance
    assert_close(names["biased"], dense(query, key, value, lambda z: masked(z + bias), scale=names["H"] ** -0.5))


def check_largest_logits(names: Names) -> None:
    found: list[np.ndarray] = []

    def keep(z: np.ndarray) -> np.ndarray:
        found.append(masked(z).max((0, 2, 3)))
        return masked(z)

    dense(*arrays(names), keep, scale=names["H"] ** -0.5)
    assert_close(names["max_logits"], found[0])
    assert names["max_logits"].dtype == jnp.float32


def check_sequence_over_devices(names: Names) -> None:
    expected = dense(*arrays(names), masked, scale=names["H"] ** -0.5)
    assert_close(names["out_in_order"], expected[:, names["order"]])
    assert names["out_in_order"].sharding.spec[1] == "sequence"
    assert len(names["out_in_order"].addressable_shards) == jax.device_count()


RECIPES: dict[str, Callable[[Names], None]] = {
    "dbias": check_bias_gradient,
    "packed": check_packed_documents,
    "prefilled": check_chunks,
    "gpt_oss": check_sinks,
    "gemma": check_soft_cap,
    "mla": check_value_dimension,
    "biased": check_alibi,
    "max_logits": check_largest_logits,
    "out_in_order": check_sequence_over_devices,
}
