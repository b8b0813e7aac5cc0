"""Functions of scores and of indices: the calls that they are tried in, and dense attention with them, in float64."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_native_flash_attn import flash_attention_with_lse
from tests.support.environment import fast_compilation, lenient_promotion

B, T, S, N, K, H = 2, 13, 17, 4, 2, 4
FLOATS = ("query", "key", "value", "bias", "sinks", "scale")


@dataclass(frozen=True)
class ModCase:
    """A call; `expected` gives a function's values with NumPy, for arrays that broadcast to (B, N, T, S).

    Attributes:
      score_mod, mask_mod: as of `flash_attention`.
      score_args, mask_args: their further arguments.
      options: further arguments of the call.
      oracle: what dense attention takes in place of the functions, if not themselves.
      masks: what `options` mean, a function of the indices; None for nothing.
    """

    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    score_args: tuple = ()
    mask_args: tuple = ()
    options: dict[str, Any] = field(default_factory=dict)
    masks: Callable | None = None


def numbers(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = dict(zip(FLOATS, ((B, T, N, H), (B, S, K, H), (B, S, K, H), (1, N, T, S), (N,), ()), strict=True))
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def indices() -> list[jax.Array]:
    """Batch, head, row and key numbers that broadcast to (B, N, T, S)."""
    return [
        jnp.arange(n, dtype=jnp.int32).reshape([-1 if axis == i else 1 for i in range(4)])
        for axis, n in enumerate((B, N, T, S))
    ]


def dense(case: ModCase, arrays: dict[str, Any], score_args: Any) -> tuple[jax.Array, jax.Array]:
    """out and lse, by whole arrays; a row without keys is not meant."""
    with lenient_promotion():
        key, value = (jnp.repeat(arrays[name], N // K, 2) for name in ("key", "value"))
        logits = jnp.einsum("btnh,bsnh->bnts", arrays["query"], key) * arrays["scale"] + arrays["bias"]
        if case.score_mod is not None:
            logits = case.score_mod(logits, *indices(), *score_args)
        cap = case.options.get("logits_soft_cap")
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        for mask, args in ((case.mask_mod, jax.tree.map(jnp.asarray, case.mask_args)), (case.masks, ())):
            if mask is not None:
                logits = jnp.where(mask(*indices(), *args), logits, -jnp.inf)
        sinks = jnp.broadcast_to(arrays["sinks"][None, :, None, None], (B, N, T, 1))
        lse = jax.nn.logsumexp(jnp.concatenate([logits, sinks], -1), -1)
        weights = jnp.exp(logits - lse[..., None])
        return jnp.einsum("bnts,bsnh->btnh", weights, value), jnp.moveaxis(lse, 1, 2)


def ours(case: ModCase, arrays: dict[str, Any], score_args: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    return flash_attention_with_lse(
        arrays["query"],
        arrays["key"],
        arrays["value"],
        arrays["bias"],
        scale=arrays["scale"],
        sinks=arrays["sinks"],
        score_mod=case.score_mod,
        score_mod_args=score_args,
        mask_mod=case.mask_mod,
        mask_mod_args=case.mask_args,
        **case.options,
        **options,
    )


def all_derivatives(attention: Callable, arrays: Any, score_args: Any, *, with_tangents: bool) -> Any:
    """Value and gradients; and, of a function of scores, a tangent and that of the gradients; in one program."""
    rng = np.random.default_rng(1)
    weights = [jnp.asarray(rng.standard_normal(shape)) for shape in ((B, T, N, H), (B, T, N))]
    floats = (arrays, score_args)
    tangents = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(np.shape(x)), x.dtype), floats)

    def loss(floats: Any) -> jax.Array:
        return sum(jnp.vdot(w, x) for w, x in zip(weights, attention(*floats), strict=True))

    def derivatives(floats: Any, tangents: Any) -> Any:
        function = jax.value_and_grad(loss)
        return jax.jvp(function, (floats,), (tangents,)) if with_tangents else function(floats)

    return jax.jit(derivatives, compiler_options=fast_compilation())(floats, tangents)


def assert_alike(got: Any, expected: Any, tolerance: float = 1e-11) -> None:
    """Each array, but for rounding in float64."""
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for x, (path, y) in zip(jax.tree.leaves(got), paths, strict=True):
        name, size = jax.tree_util.keystr(path), float(np.max(np.abs(y), initial=1e-3))
        assert np.shape(x) == np.shape(y), name
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * size, err_msg=name)


def check(case: ModCase, **options: Any) -> None:
    arrays = jax.tree.map(jnp.asarray, numbers())
    args = jax.tree.map(jnp.asarray, case.score_args)
    asked: dict[str, Any] = {"with_tangents": case.score_mod is not None}
    got = all_derivatives(lambda arrays, args: ours(case, arrays, args, **options), arrays, args, **asked)
    expected = all_derivatives(lambda arrays, args: dense(case, arrays, args), arrays, args, **asked)
    assert_alike(got, expected)
