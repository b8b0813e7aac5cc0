"""The Hopper kernel for tangents on a GPU, beyond `tests/parity`: shapes, masks, some tangents alone, large ones."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import flash_attention_with_lse
from tests.support.cases import SHAPES, Case, named_case
from tests.support.families import skip_unless_taken
from tests.support.hopper import make_arrays
from tests.support.transformations import check_transformation

pytestmark = pytest.mark.gpu(says_why=True)


@pytest.fixture(autouse=True)
def _hopper() -> None:  # pyright: ignore[reportUnusedFunction]
    skip_unless_taken(named_case("tile", "plain"), "mosaic_gpu")


_ODD = SHAPES["odd"]
CASES: dict[str, Case] = {
    "plain": Case(_ODD, "bfloat16"),
    "many items": Case((20, 200, 500, 4, 1, 64), "bfloat16", is_causal=True),
    "float16, 256": Case((1, 200, 190, 2, 1, 256), "float16", is_causal=True),
    "192 and 128": Case((1, 260, 300, 2, 2, 192), "bfloat16", value_dim=128),
    "64 and 128": Case((2, 260, 300, 2, 1, 64), "bfloat16", value_dim=128, is_causal=True),
    "40 and 72": Case((2, 130, 150, 2, 2, 40), "bfloat16", value_dim=72),
    "window": Case(_ODD, "bfloat16", local_window_size=(40, 20)),
    "lengths": Case(_ODD, "bfloat16", key_value_seq_lengths=(150, 0), traced=frozenset({"lengths"})),
    "lengths, causal": Case(_ODD, "bfloat16", is_causal=True, key_value_seq_lengths=(150, 333), query_offset=7),
    "segments": Case(_ODD, "bfloat16", segment_ids="shuffled"),
    "bias": Case(_ODD, "bfloat16", bias=(False, True, True, True), is_causal=True),
    "bias float32": Case((1, 200, 190, 2, 1, 128), "bfloat16", bias=(True, True, True, True), bias_dtype="float32"),
    "bias of keys": Case(_ODD, "bfloat16", bias=(True, False, False, True)),
    "bias of rows, sinks": Case(_ODD, "bfloat16", bias=(True, True, True, False), sinks="float32"),
    "mask": Case(_ODD, "bfloat16", mask=(True, True, True, True)),
    "mask of keys": Case(_ODD, "bfloat16", mask=(True, False, False, True)),
    "dropout": Case(_ODD, "bfloat16", dropout_rate=0.3),
    "soft cap": Case(_ODD, "bfloat16", logits_soft_cap=2.0, bias=(True, True, True, True)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tangents_of_all(case: Case) -> None:
    check_transformation("jvp", replace(case, scale=0.3, traced=case.traced | {"scale"}))


def _results(implementation: str, names: tuple[str, ...], arrays: dict[str, Any], tangents: dict[str, Any]) -> Any:
    """Tangents of out and lse."""
    call = functools.partial(flash_attention_with_lse, is_causal=True)
    others = {name: x for name, x in arrays.items() if name not in names}
    some = tuple({name: x[name] for name in names} for x in (arrays, tangents))
    if implementation == "float32":
        others, some = jax.tree.map(lambda x: x.astype(jnp.float32), (others, some))
    with jax.default_matmul_precision("highest" if implementation == "float32" else "default"):
        results = jax.jit(lambda x, dx: jax.jvp(lambda x: call(**others, **x), (x,), (dx,))[1])(*some)
    return [np.asarray(x, np.float32) for x in results]


def _arrays() -> dict[str, Any]:
    query, key, value = make_arrays(Case(_ODD, "bfloat16"))
    return {"query": query, "key": key, "value": value}


@pytest.mark.parametrize(
    "names", [("query",), ("key",), ("value",), ("bias",), ("scale",), ("query", "value")], ids=str
)
def test_some_tangents_alone(names: tuple[str, ...]) -> None:
    arrays = _arrays()
    arrays |= {"bias": jax.random.normal(jax.random.key(1), (1, 4, 301, 333)), "scale": jnp.float32(0.1)}
    tangents = {
        name: jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, (name, x) in enumerate(arrays.items())
    }
    for found, exact in zip(*(_results(x, names, arrays, tangents) for x in ("kernel", "float32")), strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=0.015 * np.abs(exact).max())


def test_tangents_of_logits_that_are_large_beside_their_differences() -> None:
    """Where all keys move together, out does not change. Some rows have no key in the tile that is visited first.

    Dense attention (bfloat16, its jvp on a CPU) errs by 0.0038 of the largest here; without a reference for each row,
    that is subtracted, the kernel would err by 0.36.
    """
    arrays = _arrays()
    small = jax.random.normal(jax.random.key(1), arrays["key"].shape, jnp.bfloat16)
    tangents = {"key": small + 64, "value": jnp.zeros_like(small)}
    exact, _ = _results("float32", ("key",), arrays, tangents)
    found, _ = _results("kernel", ("key",), arrays, tangents)
    assert np.abs(found - exact).max() < 2 * 0.0038 * np.abs(exact).max()
