"""A bias without a key axis: its gradient is the cotangent of the log-sum-exp, exactly, and takes no kernel."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import flash_attention, flash_attention_with_lse
from tests.support.environment import enable_x64, fast_compilation
from tests.support.grids import thinned
from tests.support.oracle import float64_oracle, masking

B, T, N, K, H = 2, 6, 4, 2, 16
FAST = fast_compilation()
SHAPES = ((B, N, T, 1), (1, N, T, 1), (B, 1, T, 1), (1, 1, 1, 1))


def options_of(name: str, S: int) -> dict[str, Any]:
    mask = np.random.default_rng(1).random((B, 1, T, S)) < 0.6
    mask[0, :, 3] = False  # a dead row
    return {
        "plain": {},
        "lengths": {
            "query_seq_lengths": np.array([T, 4], np.int32),
            "key_value_seq_lengths": np.array([0, S], np.int32),
        },
        "mask": {"mask": mask},
        "causal, lengths, mask": {
            "is_causal": True,
            "mask": mask,
            "query_seq_lengths": np.array([5, 0], np.int32),
        },
        "dropout": {"dropout_rate": 0.4, "dropout_rng": jax.random.key(0)},
    }[name]


MASKS = ("plain", "lengths", "mask", "causal, lengths, mask", "dropout")


def normal(seed: int, shape: tuple[int, ...], dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def operands(S: int, dtype: Any) -> Any:
    return tuple(normal(seed, (B, n, heads, H), dtype) for seed, (n, heads) in enumerate(((T, N), (S, K), (S, K))))


def live_rows(S: int, options: dict[str, Any]) -> np.ndarray:
    """Which rows have a key, (B, T, N)."""
    query, key, _ = operands(S, np.float32)
    without_dropout = {name: x for name, x in options.items() if not name.startswith("dropout")}
    return np.moveaxis(masking(query, key, **without_dropout).allowed.any(-1), 1, 2)


@pytest.mark.parametrize(("masks", "dtype", "S"), thinned(itertools.product(MASKS, ["float32", "bfloat16"], [7, 1]), 3))
def test_gradient_is_the_cotangent_of_lse(masks: str, dtype: str, S: int):
    options = options_of(masks, S)
    arrays = operands(S, dtype)
    dout, dlse = normal(5, (B, T, N, H), dtype), normal(6, (3, B, T, N))
    expected = np.moveaxis(np.where(live_rows(S, options), np.asarray(dlse, np.float64), 0), -1, -2)[..., None]

    @functools.partial(jax.jit, compiler_options=FAST)
    def gradients(biases, arrays, dout, dlse):
        def gradient(bias):
            _, vjp = jax.vjp(lambda bias: flash_attention_with_lse(*arrays, bias=bias, **options), bias)
            through_out = jax.grad(lambda bias: (flash_attention(*arrays, bias=bias, **options) * dout).sum())(bias)
            return through_out, jax.vmap(lambda dlse: vjp((dout, dlse))[0])(dlse)

        return [gradient(bias) for bias in biases]

    biases = [normal(7, shape) for shape in SHAPES]
    for bias, (through_out, through_lse) in zip(biases, gradients(biases, arrays, dout, dlse), strict=True):
        assert not np.asarray(through_out).any()
        axes = tuple(axis + 1 for axis in range(4) if bias.shape[axis] != expected.shape[axis + 1])
        if not axes:
            np.testing.assert_array_equal(through_lse, expected.astype(np.float32))
        sums = expected.sum(axes, keepdims=True)
        # Each addition rounds once.
        atol = np.finfo(np.float32).eps * np.abs(expected).sum(axes, keepdims=True).max()
        np.testing.assert_allclose(through_lse, sums, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("masks", "shape"), thinned(itertools.product(["lengths", "causal, lengths, mask"], SHAPES[1:]), 2), ids=str
)
def test_higher_derivatives(masks: str, shape: tuple[int, ...]):
    with enable_x64():
        S, options = 7, options_of(masks, 7)
        query, key, value = operands(S, np.float64)
        arguments = query, key, value, normal(3, shape, np.float64)
        tangents = tuple(normal(8 + i, x.shape, np.float64) for i, x in enumerate(arguments))
        weights, live = normal(4, (B, T, N, H), np.float64), live_rows(S, options)

        def hvps(attention: Any) -> Any:
            def loss(*arguments):
                out, lse = attention(*arguments, **options)
                return (weights * jnp.sin(out)).sum() + (weights[..., 0] * jnp.sin(jnp.where(live, lse, 0))).sum()

            gradient = jax.grad(loss, (0, 1, 2, 3))

            def forward_over_reverse(*arguments):
                return jax.jvp(gradient, arguments, tangents)[1]

            def reverse_over_reverse(*arguments):
                return jax.vjp(gradient, *arguments)[1](tangents)

            def both(*arguments):
                return forward_over_reverse(*arguments), reverse_over_reverse(*arguments)

            return jax.jit(both, compiler_options=FAST)(*arguments)

        ours, dense = hvps(flash_attention_with_lse), hvps(float64_oracle)
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(dense), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


def test_no_kernel_runs_for_it_alone():
    arrays, bias = operands(7, np.float32), normal(7, (1, N, T, 1))

    def loss(bias, arrays):
        out, lse = flash_attention_with_lse(*arrays, bias=bias)
        return out.sum() + lse.sum()

    def compiled(function: Any) -> str:
        text = jax.jit(function, compiler_options=FAST).lower(bias, arrays).compile().as_text()
        assert text is not None
        return text

    assert " dot(" in compiled(loss)
    assert " dot(" not in compiled(jax.grad(loss))
