"""`score_mod` and `mask_mod`: each of the library, and what users may write, against dense attention in float64.

`python -m tests.parity.run_generated_mods` has generated ones.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import explain, flash_attention, mods
from tests.support.environment import enable_x64, fast_compilation
from tests.support.mods import B, H, K, ModCase, N, S, T, check

_RNG = np.random.default_rng(3)
_TILES = {"block_q": 8, "block_kv": 8}


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    with enable_x64():
        yield


def _written(score, b, h, q, k, slopes, more):
    """Not linear in score and arguments, which are read by head, by distance, by batch row and key; and -inf."""
    distance = (q - k).astype(score.dtype)
    x = score * (1 + 0.1 * jnp.tanh(score)) + slopes[h] ** 2 * distance * 0.05 + more["table"][h, q - k + S - 1]
    return jnp.where(k > q + 9, -jnp.inf, x * more["gate"][b, k])


_WRITTEN_ARGS = (
    _RNG.standard_normal(N),
    {"table": _RNG.standard_normal((N, T + S)), "gate": _RNG.standard_normal((B, S))},
)
_PREFIXES = np.array([3, 9])
_IDS = np.repeat(np.arange(4), 5)[None].repeat(B, 0) + np.array([[0], [1]])
_CASES = {
    "written": (ModCase(_written, score_args=_WRITTEN_ARGS, options={"logits_soft_cap": 3.0}), _TILES),
    "alibi": (ModCase(mods.alibi, score_args=(mods.alibi_slopes(N).astype(np.float64),)), _TILES),
    "T5": (ModCase(mods.T5RelativeBias(8, 12), score_args=(_RNG.standard_normal((8, N)),)), {}),
    "causal T5": (
        ModCase(
            mods.T5RelativeBias(8, 12, is_bidirectional=False),
            mods.causal,
            score_args=(_RNG.standard_normal((8, N)),),
        ),
        {},
    ),
    "soft cap": (ModCase(mods.SoftCap(1.5)), {}),
    "prefix": (ModCase(mask_mod=mods.prefix_lm, mask_args=(_PREFIXES,)), _TILES),
    "document": (ModCase(mask_mod=mods.document, mask_args=(_IDS[:, :T], _IDS[:, :S])), {}),
    "sliding window": (ModCase(mask_mod=mods.SlidingWindow(4, 2)), {}),
    "dilated": (ModCase(mask_mod=mods.Dilated(3, 4)), {}),
    "neighbourhood": (ModCase(mask_mod=mods.Neighbourhood(4, 4, 3, 3)), {}),
    "tree": (
        ModCase(mask_mod=mods.tree, mask_args=(mods.tree_ancestors([-1, 0, 0, 1, 1, 2, 3, *range(6)]), np.int32(4))),
        {},
    ),
}


@pytest.mark.parametrize("name", _CASES)
def test_value_and_derivatives(name: str):
    case, options = _CASES[name]
    check(case, **options)


def _jitted(function: Any) -> Any:
    return jax.jit(function, compiler_options=fast_compilation())


def _arrays(seed: int = 5) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(x)) for x in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))


def test_a_mask_is_that_of_a_boolean_one():
    """With and without what is known of tiles beforehand; rows without keys; beside other masks."""
    arrays, at = _arrays(), _RNG.random((N, T, S)) < 0.3
    table = jnp.asarray(at)

    def mask_mod(b, h, q, k, table):
        return table[h, q, k] & (k < 5 + 8 * b) & (q != 3)

    b = np.arange(B)[:, None, None, None]
    dense = at & (np.arange(S) < 5 + 8 * b) & (np.arange(T) != 3)[:, None]
    tiled = mods.make_tile_mask(mask_mod, T, S, mask_mod_args=(table,), batch=B, num_heads=N, block=4)
    function = {"mask_mod": mask_mod, "mask_mod_args": (table,)}
    lengths: dict[str, Any] = {"query_seq_lengths": np.array([T, 9]), "key_value_seq_lengths": np.array([11, S])}
    for given, others in (({"mask_mod": tiled}, {}), (function, lengths), ({"mask_mod": tiled}, lengths)):
        got = _jitted(functools.partial(flash_attention, **given, **others, block_q=8, block_kv=4))(*arrays)
        masks = {"mask": jnp.asarray(dense), "implementation": "dense"}
        expected = _jitted(functools.partial(flash_attention, **masks, **others))(*arrays)
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_empty_tiles_are_not_visited():
    """What is infinite in them would show: 0 * inf is NaN. (Three tiles of 6 keys.)"""
    query, key, value = _arrays()
    value = value.at[:, 12:].set(jnp.inf)
    mask = mods.make_tile_mask(lambda b, h, q, k: k < 8, T, S, block=8)
    assert jnp.isfinite(flash_attention(query, key, value, mask_mod=mask, block_q=8, block_kv=8)).all()


def test_what_is_known_of_tiles():
    mask = mods.make_tile_mask(lambda b, h, q, k: (k <= q) & (q != 5), 24, 16, block=8)
    np.testing.assert_array_equal(mask.classes[0, 0], [[1, 0], [2, 1], [2, 2]])
    np.testing.assert_array_equal(mask.has_key[0, 0], np.arange(24) != 5)


def test_captured_arrays_are_like_arguments():
    """Gradients, and `vmap`, of what a function closes over; beside dropout, by index."""
    arrays, slopes = _arrays(), jnp.asarray(_RNG.standard_normal((2, N)))
    dropout = {"dropout_rate": 0.3, "dropout_rng": jax.random.key(0)}

    def loss(slopes: jax.Array, *, captures: bool, **options: Any) -> jax.Array:
        args = () if captures else (slopes,)
        own = {"score_mod": (lambda *x: mods.alibi(*x, slopes)) if captures else mods.alibi, "score_mod_args": args}
        return (flash_attention(*arrays, **own, **dropout, **options) ** 2).sum()

    captured, given, dense = (
        _jitted(jax.vmap(jax.value_and_grad(lambda x, options=options: loss(x, **options))))(slopes)
        for options in ({"captures": True}, {"captures": False}, {"captures": True, "implementation": "dense"})
    )
    for x, y, z in zip(captured, given, dense, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)
        np.testing.assert_allclose(x, z, rtol=1e-10)


def test_indices_are_positions():
    arrays = _arrays()
    rows, keys = (jnp.asarray(_RNG.permutation(n)[None].repeat(B, 0)) for n in (T, S))
    bias = jnp.abs(rows[:, None, :, None] - keys[:, None, None, :]).astype(jnp.float64) * -0.5

    def mod(score, b, h, q, k):
        return score - 0.5 * jnp.abs(q - k).astype(score.dtype)

    def mask(b, h, q, k):
        return k <= q + 2

    got = flash_attention(*arrays, score_mod=mod, mask_mod=mask, query_positions=rows, key_value_positions=keys)
    allowed = keys[:, None, None, :] <= rows[:, None, :, None] + 2
    np.testing.assert_allclose(got, flash_attention(*arrays, bias, allowed), atol=1e-12)
    moved = np.array([2, -3])
    got = flash_attention(*arrays, score_mod=mod, query_offset=moved)
    bias = -0.5 * np.abs(np.arange(T)[:, None] + moved[:, None, None, None] - np.arange(S))
    np.testing.assert_allclose(got, flash_attention(*arrays, bias), atol=1e-12)


def test_rounded_products():
    """In bfloat16 the gradient of scale is made of moments of each row, and knows the slope of a function of scores."""
    arrays = [x.astype(jnp.bfloat16) for x in _arrays()]
    bias = jnp.asarray(_RNG.standard_normal((1, N, T, 1)))

    def gradients(*arrays: jax.Array, **options: Any) -> Any:
        def loss(scale: Any, bias: jax.Array, cap: jax.Array) -> jax.Array:
            def mod(score, b, h, q, k, cap):
                return cap.astype(score.dtype) * jnp.tanh(score / cap.astype(score.dtype))

            out = flash_attention(*arrays, bias, scale=scale, score_mod=mod, score_mod_args=(cap,), **options)
            return (out.astype(jnp.float64) * jnp.cos(jnp.arange(out.size, dtype=jnp.float64)).reshape(out.shape)).sum()

        return _jitted(jax.grad(loss, (0, 1, 2)))(jnp.float32(0.7), bias, jnp.float32(2.0))

    expected = gradients(*(x.astype(jnp.float64) for x in arrays), implementation="dense")
    for got, x in zip(gradients(*arrays, block_q=8, block_kv=8), expected, strict=True):
        np.testing.assert_allclose(got, x, rtol=0.02, atol=0.02 * np.abs(x).max())


def test_what_says_the_same_is_compiled_once():
    """For eager calls, that is; and under `jax.jit` a mod of the library is a static argument as it is."""
    arrays = _arrays()
    counts = []
    attention = jax.jit(flash_attention, static_argnames="score_mod")
    for cap in (2.0, 2.0, 3.0):
        attention(*arrays, score_mod=mods.SoftCap(cap))
        counts.append(attention._cache_size())  # pyright: ignore[reportFunctionMemberAccess]
    assert counts == [1, 1, 2]

    def call(x: float) -> Any:
        def config(score_mod: Any) -> Any:
            program = jax.make_jaxpr(lambda *arrays: flash_attention(*arrays, score_mod=score_mod))(*arrays)
            (eqn,) = (x for x in program.eqns if x.primitive.name == "flash_attention")
            return eqn.params["config"]

        return config(lambda score, *at: score * x)

    assert call(2.0) == call(2.0)
    assert hash(call(2.0)) == hash(call(2.0))
    assert call(2.0) != call(3.0)


def test_explain_says_why_other_kernels_do_not_run():
    x = jax.ShapeDtypeStruct((1, 1024, 8, 64), "bfloat16")
    found = explain(x, x, x, score_mod=mods.SoftCap(2.0), platform="cuda", implementation="pure_jax")
    assert found.forward.family == "pure_jax"
    found = explain(x, x, x, mask_mod=mods.causal, platform="cuda")
    assert "mask_mod is a function" in found.forward.reasons["cudnn_gpu"]


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (TypeError, "score_mod must be a function", {"score_mod": 3}),
        (TypeError, "score_mod must give a real number", {"score_mod": lambda s, b, h, q, k: s > 0}),
        (TypeError, "mask_mod must give bool", {"mask_mod": lambda b, h, q, k: q}),
        (TypeError, "score_mod must give a real number", {"score_mod": lambda s, b, h, q, k: jnp.stack([s, s])}),
        (TypeError, "score_mod_args must be a tuple", {"score_mod": mods.alibi, "score_mod_args": jnp.ones(N)}),
        (ValueError, "mask_mod=None", {"mask_mod_args": (jnp.ones(N),)}),
        (TypeError, "must be real", {"score_mod": mods.alibi, "score_mod_args": (jnp.ones(N, jnp.complex64),)}),
        (NotImplementedError, "effects", {"mask_mod": lambda b, h, q, k: (jax.debug.print("x"), q > k)[1]}),
        (ValueError, "T, S = ", {"mask_mod": mods.make_tile_mask(mods.causal, 7, 9)}),
        (ValueError, "positions or an offset", {"mask_mod": mods.make_tile_mask(mods.causal, T, S), "query_offset": 1}),
        (NotImplementedError, "cudnn", {"score_mod": mods.SoftCap(1.0), "implementation": "cudnn"}),
    ],
)
def test_errors(error: type[Exception], words: str, options: dict[str, Any]):
    with pytest.raises(error, match=words):
        flash_attention(*_arrays(), **options)


def test_a_picture():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = mods.visualize_mask(mods.prefix_lm, 24, 16, mask_mod_args=(jnp.array([0, 9]),), batch=1, block=8)
    drawn = np.asarray(axes.images[0].get_array())
    classes = np.array([[3, 1], [3, 2], [3, 3]])  # full; in part, by whether a key is attended
    np.testing.assert_array_equal(drawn[::8, ::8][:, 0], classes[:, 0])
    np.testing.assert_array_equal(drawn[[0, 12, 20], 12], classes[:, 1])


def test_a_tile_mask_needs_the_sizes_that_its_function_reads():
    with pytest.raises(ValueError, match="num_heads is needed"):
        mods.make_tile_mask(lambda b, h, q, k: k < h, T, S)


def test_buckets_are_those_of_t5():
    """As by the loops that its paper's code amounts to."""

    def bucket(distance: int, count: int) -> int:
        exact = count // 2
        if distance < exact:
            return distance
        return min(count - 1, exact + int(np.log(np.float32(distance / exact)) / np.log(128 / exact) * (count - exact)))

    for is_bidirectional in (True, False):
        got = mods.T5RelativeBias(is_bidirectional=is_bidirectional).bucket(jnp.arange(-200, 200, dtype=jnp.int32))
        if is_bidirectional:
            expected = [16 * (x > 0) + bucket(abs(x), 16) for x in range(-200, 200)]
        else:
            expected = [bucket(max(0, -x), 32) for x in range(-200, 200)]
        np.testing.assert_array_equal(got, expected)
