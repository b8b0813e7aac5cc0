"""Boolean masks that are constants of a program: what is a band becomes one, and XLA folds no other."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import flash_attention
from jax_native_flash_attn._semantics.constant_masks import _as_band
from jax_native_flash_attn._semantics.masks import Band
from tests.support.environment import fast_compilation
from tests.support.grids import in_part, thinned
from tests.support.oracle import dense_numpy, masking
from tests.support.programs import equations

FAST = fast_compilation()
B, T, S, N, H = 2, 12, 9, 2, 8


def banded(T: int, S: int, lower: int | None, upper: int | None) -> np.ndarray:
    t, s = np.arange(T)[:, None], np.arange(S)[None]
    return (s - t >= (-T if lower is None else lower)) & (s - t <= (S if upper is None else upper))


@pytest.mark.parametrize("shape", [(3, 3), (1, 4), (4, 1), (2, 4), (4, 2), (1, 1)])
def test_every_small_mask_is_recognised(shape: tuple[int, int]):
    T, S = shape
    sides = (None, *range(-T - 1, S + 2))
    bands = {banded(T, S, lower, upper).tobytes() for lower, upper in itertools.product(sides, repeat=2)}
    for bits in itertools.product((False, True), repeat=T * S):
        mask = np.array(bits).reshape(1, 1, T, S)
        band = _as_band(mask, T, S)
        assert (band is not None) == (mask.tobytes() in bands), mask
        if band is not None:
            np.testing.assert_array_equal(banded(T, S, band.lower, band.upper), mask[0, 0])


def test_masks_that_differ_between_batch_rows_or_heads_are_no_band():
    causal, full = np.tril(np.ones((4, 4), bool)), np.ones((4, 4), bool)
    assert _as_band(np.broadcast_to(causal, (2, 3, 4, 4)), 4, 4) == Band(None, 0)
    assert _as_band(np.stack([causal, full])[:, None], 4, 4) is None
    assert _as_band(np.stack([causal, full])[None], 4, 4) is None
    # Axes of size 1.
    assert _as_band(np.ones((1, 1, 1, 4), bool), 4, 4) == Band()
    assert _as_band(np.array([[[[True, True, False, False]]]]), 4, 4) is None
    assert _as_band(np.array([[[[True, True, False, False]]]]), 1, 4) == Band(None, 1)
    assert _as_band(np.array([True, True, False]).reshape(1, 1, 3, 1), 3, 4) is None


BANDS = {
    "causal": banded(T, S, None, 0),
    "window": banded(T, S, -2, 1),
    "first rows dead": banded(T, S, None, -4),
    "last rows dead": banded(T, S, -1, None),
    "rows dead at both ends": banded(T, S, -7, -6),
    "none": banded(T, S, S, None),
    "all": banded(T, S, None, None),
    "one key": np.ones((T, 1), bool),
}
OTHERS = {
    "random": np.random.default_rng(0).random((T, S)) < 0.5,
    "random of batch rows": np.random.default_rng(1).random((B, 1, T, S)) < 0.5,
    "random of heads": np.random.default_rng(2).random((1, N, T, S)) < 0.1,
    "keys": np.arange(S) % 3 > 0,
    "keys of batch rows": np.random.default_rng(3).random((B, 1, 1, S)) < 0.7,
    "rows": (np.arange(T) % 3 > 0)[:, None],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (4, 0)},
    "lengths": {
        "query_seq_lengths": np.array([T, 7], np.int32), "key_value_seq_lengths": np.array([5, 0], np.int32)
    },
    "blocks": {"block_q": 5, "block_kv": 4},
}  # fmt: skip


def qkv() -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [rng.standard_normal(s).astype(np.float32) for s in ((B, T, N, H), (B, S, N, H), (B, S, N, H))]


def squares(attention: Any, *arrays: Any) -> Any:
    out = attention(*arrays)
    return (out**2).sum() / 2, out


def expected(name: str, options: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Gradients of `squares`, and out, in float64."""
    selection = {k: v for k, v in OPTIONS[options].items() if not k.startswith("block")}
    query, key, value = (x.astype(np.float64) for x in qkv())
    masks = masking(query, key, (BANDS | OTHERS)[name], **selection)
    dense = functools.partial(dense_numpy, query, key, value, np.zeros(masks.allowed.shape), H**-0.5, masks)
    out = dense(np.zeros_like(query)).results(N)["out"]
    found = dense(out).results(N)
    return [found[x] for x in ("query", "key", "value")], out


@pytest.mark.parametrize(("name", "options"), thinned(itertools.product([*BANDS, *OTHERS], OPTIONS), 4))
def test_value_and_gradient(name: str, options: str):
    mask = (BANDS | OTHERS)[name]
    kinds = [np.asarray, jnp.asarray] if (name, options) in (("causal", "plain"), ("random", "plain")) else [np.asarray]
    for kind in kinds:
        attention = functools.partial(flash_attention, mask=kind(mask), **OPTIONS[options])
        gradient = jax.jit(
            jax.grad(functools.partial(squares, attention), (0, 1, 2), has_aux=True), compiler_options=FAST
        )
        for actual, wanted in zip(
            jax.tree.leaves(gradient(*qkv())), jax.tree.leaves(expected(name, options)), strict=True
        ):
            np.testing.assert_allclose(actual, wanted, atol=2e-6 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("options", ["plain", "causal", "window"])
@pytest.mark.parametrize("name", BANDS)
def test_a_band_leaves_no_array(name: str, options: str):
    def booleans(*arrays: Any, mask: Any) -> list[Any]:
        attention = functools.partial(flash_attention, mask=mask, **OPTIONS[options])
        jaxpr = jax.make_jaxpr(jax.grad(lambda *x: squares(attention, *x)[0], (0, 1, 2)))(*arrays)
        found = [*jaxpr.consts, *(x.aval for equation in equations(jaxpr.jaxpr) for x in equation.invars)]
        return [x for x in found if x.dtype == bool and x.ndim > 1 and x.shape[-2:] == (T, S)]

    mask = np.broadcast_to(BANDS[name], (T, S))
    for shaped in (mask, mask[None, None], np.broadcast_to(mask, (B, N, T, S))):
        assert not booleans(*qkv(), mask=shaped)
        assert not booleans(*qkv(), mask=jnp.asarray(shaped))
    assert booleans(*qkv(), mask=OTHERS["random"])


def test_eager_calls_analyse_nothing(monkeypatch: pytest.MonkeyPatch):
    from jax_native_flash_attn._semantics import constant_masks

    def forbidden(*unused: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(constant_masks, "_as_band", forbidden)
    for scale in (None, jnp.float32(0.3)):
        attention = functools.partial(flash_attention, mask=BANDS["causal"], scale=scale)
        attention(*qkv())
        jax.grad(lambda *x: squares(attention, *x)[0])(*qkv())  # noqa: B023
        jax.vmap(lambda q: attention(q, *qkv()[1:]))(qkv()[0][None])  # noqa: B023
        with pytest.raises(AssertionError):
            jax.jit(attention)(*qkv())


def test_under_vmap_and_inside_a_loop():
    query, key, value = qkv()
    for name in ("causal", "first rows dead", "random"):
        mask = (BANDS | OTHERS)[name]
        attention = lambda q: flash_attention(q, key, value, mask=mask)  # noqa: B023, E731
        wanted = expected(name, "plain")[1]
        for run in (jax.jit(jax.vmap(attention)), functools.partial(jax.lax.map, attention)):
            np.testing.assert_allclose(run(np.stack([query, query]))[1], wanted, atol=2e-6)


COMPILATION = """
import jax, numpy as np
from jax_native_flash_attn import flash_attention
T = 1024
x = jax.ShapeDtypeStruct((1, T, 2, 8), np.float32)
random = np.random.default_rng(0).random((T, T)) < 0.5
attention = lambda x: flash_attention(x, x, x, mask=random)
jax.jit(attention).lower(x).compile()
known = jax.numpy.asarray(random)
attention = lambda x: flash_attention(x, x, x, mask=known, local_window_size=(9, 0))
jax.jit(jax.grad(lambda x: attention(x).sum())).lower(x).compile()
"""


@in_part(1)
def test_the_compiler_folds_no_mask():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, "-c", COMPILATION], capture_output=True, text=True, env=environment, cwd=Path(__file__).parent
    )
    assert process.returncode == 0, process.stderr
    assert "Constant folding an instruction" not in process.stderr, process.stderr


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1), (3, 1)], ids=str)
def test_without_any_key(shape: tuple[int, ...]) -> None:
    query, key = np.ones((2, 3, 2, 4), np.float32), np.ones((2, 0, 2, 4), np.float32)
    out = jax.jit(lambda query: flash_attention(query, key, key, mask=np.ones(shape, bool)))(query)
    np.testing.assert_array_equal(out, np.zeros_like(query))
