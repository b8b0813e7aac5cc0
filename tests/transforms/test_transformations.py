"""Derivatives in every mode, order and argument against dense float64 attention; lse; vmap; what is not computed."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import flash_attention, flash_attention_with_lse, merge_attention
from tests.support.environment import bernoulli, enable_x64, fast_compilation
from tests.support.grids import thinned
from tests.support.oracle import (
    Masking,
    assert_as_accurate_as_dense,
    dense_float64,
    dense_in_both_modes,
    masking,
    noise_floor,
    reduce_bias_noise,
)
from tests.support.programs import largest_in_text

# Three tiles by three, and no length is a multiple of a block.
B, T, S, N, K, H = 2, 9, 11, 4, 2, 3
BLOCKS: dict[str, Any] = {"block_q": 4, "block_kv": 4}
SHAPES = {
    "query": (B, T, N, H),
    "key": (B, S, K, H),
    "value": (B, S, K, H),
    "bias": (1, N, T, S),
    "scale": (),
}
ARGUMENTS = tuple(SHAPES)
FAST = fast_compilation()

Results = Any  # a pytree of arrays
Function = Callable[..., Results]


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))


def random_mask(shape: tuple[int, ...], density: float = 0.6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < density


def boolean_mask() -> np.ndarray:
    mask = random_mask((B, 1, T, S))
    mask[0, :, 3] = False  # dead rows, also first and last of a tile
    mask[1, :, 4] = False
    mask[1, :, -1] = False
    return mask


def first_key_masked() -> np.ndarray:
    mask = random_mask((B, 1, 1, S))
    mask[..., 0] = False  # with causal: row 0 is dead
    return mask


LENGTHS = {
    "query_seq_lengths": np.array([7, 9], np.int32),
    "key_value_seq_lengths": np.array([11, 5], np.int32),
}
# What jit sees as arguments: arrays. All else is static.
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (3, 2)},
    "lengths": LENGTHS,
    "no key": {"key_value_seq_lengths": np.array([6, 0], np.int32)},
    "boolean": {"mask": boolean_mask()},
    "key mask, causal": {"mask": first_key_masked(), "is_causal": True},
    "traced window": {"local_window_size": np.array([4, 1], np.int32)},
    "dropout": {"dropout_rate": 0.3, "seed": 5},
    "everything": {
        "mask": boolean_mask(),
        "is_causal": True,
        "local_window_size": np.array([7, 3], np.int32),
        "dropout_rate": 0.2,
        "seed": 6,
        **LENGTHS,
    },
}


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Static options of flash_attention, and those that are arrays."""
    options = dict(options)
    seed = options.pop("seed", None)
    arrays: dict[str, Any] = {name: x for name, x in options.items() if isinstance(x, np.ndarray)}
    static = {name: x for name, x in options.items() if name not in arrays}
    if seed is not None:
        arrays["dropout_rng"] = jax.random.key(seed)
    return static, arrays


def oracle_masks(options: dict[str, Any]) -> Masking:
    """What the oracle needs to know of the options; always of full shape, so that it is compiled once for all."""
    options = dict(options)
    seed = options.pop("seed", 0)
    rate = options.setdefault("dropout_rate", 0.0)
    keep = np.asarray(bernoulli(jax.random.key(seed), 1 - rate, (B, N, T, S)))
    return masking(normal(0, SHAPES["query"]), normal(0, SHAPES["key"]), keep=keep, **options)


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a derivative is taken, and in which directions; all float64."""

    primals: tuple[Any, ...]
    tangents: tuple[Any, ...]
    weights: Any  # of the output in a scalar loss; its cotangent


jax.tree_util.register_dataclass(Point, ["primals", "tangents", "weights"], [])


def point(shapes: dict[str, tuple[int, ...]] = SHAPES, out_shape: tuple[int, ...] = (B, T, N, H)) -> Point:
    primals = tuple(normal(i, shape) for i, shape in enumerate(shapes.values()))
    tangents = tuple(normal(10 + i, shape) for i, shape in enumerate(shapes.values()))
    return Point(primals, tangents, normal(20, out_shape))


# ---- the transformations, as (function, point) -> results


def loss(f: Function, at: Point) -> Function:
    return lambda *primals: jnp.vdot(at.weights, jnp.sin(f(*primals)))


def gradient(f: Function, at: Point) -> Function:
    return jax.grad(loss(f, at), range(len(at.primals)))


def along(f: Function, at: Point) -> Function:
    """The derivative of f along the tangents, by forward mode."""
    return lambda *primals: jax.jvp(f, primals, at.tangents)[1]


def slope(f: Function, at: Point) -> Function:
    """The gradient along the tangents, as a scalar, by reverse mode."""

    def inner(*primals: Any) -> Any:
        pairs = zip(gradient(f, at)(*primals), at.tangents, strict=True)
        return sum((jnp.vdot(g, t) for g, t in pairs), start=jnp.zeros(()))

    return inner


def grad(f: Function, at: Point) -> Function:
    return jax.grad(f, range(len(at.primals)))


def jacobian(of: Callable[..., Any]) -> Callable[[Function, Point], Results]:
    return lambda f, at: of(f, range(len(at.primals)))(*at.primals)


TRANSFORMATIONS: dict[str, Callable[[Function, Point], Results]] = {
    "value": lambda f, at: f(*at.primals),
    "jvp": lambda f, at: jax.jvp(f, at.primals, at.tangents),
    # One program for both, which takes less than two.
    "first order": lambda f, at: (jax.jvp(f, at.primals, at.tangents), jax.vjp(f, *at.primals)[1](at.weights)),
    "linearize": lambda f, at: jax.linearize(f, *at.primals)[1](*at.tangents),
    "vjp": lambda f, at: jax.vjp(f, *at.primals)[1](at.weights),
    "jacfwd": jacobian(jax.jacfwd),
    "jacrev": jacobian(jax.jacrev),
    "hessian": lambda f, at: jacobian(jax.hessian)(loss(f, at), at),
    "jacrev of jacfwd": lambda f, at: jacobian(lambda g, i: jax.jacrev(jax.jacfwd(g, i), i))(loss(f, at), at),
    "forward over forward": lambda f, at: along(along(f, at), at)(*at.primals),
    "forward over reverse": lambda f, at: along(gradient(f, at), at)(*at.primals),
    "reverse over reverse": lambda f, at: grad(slope(f, at), at)(*at.primals),
    "reverse over forward": lambda f, at: gradient(along(f, at), at)(*at.primals),
    "third, forward over forward over reverse": lambda f, at: along(along(gradient(f, at), at), at)(*at.primals),
    "third, reverse over forward over reverse": lambda f, at: grad(along(slope(f, at), at), at)(*at.primals),
    "third, forward over reverse over reverse": lambda f, at: along(grad(slope(f, at), at), at)(*at.primals),
    "third, reverse over forward over forward": lambda f, at: gradient(along(along(f, at), at), at)(*at.primals),
}


def restrict(f: Function, at: Point, names: Sequence[str]) -> tuple[Function, Point]:
    """f as a function of some of its arguments, the others being constant."""
    chosen = [ARGUMENTS.index(name) for name in names]

    def restricted(*varying: Any) -> Any:
        arguments = list(at.primals)
        for i, x in zip(chosen, varying, strict=True):
            arguments[i] = x
        return f(*arguments)

    primals, tangents = (tuple(x[i] for i in chosen) for x in (at.primals, at.tangents))
    return restricted, Point(primals, tangents, at.weights)


def ours(*primals: Any, **options: Any) -> jax.Array:
    query, key, value, bias, scale = primals
    return flash_attention(query, key, value, bias, scale=scale, **options, **BLOCKS)


def ours_with_lse(*primals: Any, **options: Any) -> jax.Array:
    """out and lse as one array, lse of dead rows left out: (B, T, N, H + 1)."""
    query, key, value, bias, scale = primals
    out, lse = flash_attention_with_lse(query, key, value, bias, scale=scale, **options, **BLOCKS)
    return jnp.concatenate([out, jnp.where(lse > -1e30, lse, 0.0)[..., None]], -1)


def oracle(query: Any, key: Any, value: Any, bias: Any, scale: Any, *, masks: Masking) -> jax.Array:
    return dense_float64(query, key, value, bias, scale, masks)[0]


def oracle_with_lse(query: Any, key: Any, value: Any, bias: Any, scale: Any, *, masks: Masking) -> jax.Array:
    out, lse = dense_float64(query, key, value, bias, scale, masks)
    return jnp.concatenate([out, jnp.where(lse > -1e30, lse, 0.0)[..., None]], -1)


@functools.cache
def compiled_oracle(function: Function, transformation: str, names: tuple[str, ...]) -> Callable[..., Results]:
    @functools.partial(jax.jit, compiler_options=FAST)
    def run(at: Point, masks: Masking) -> Results:
        return TRANSFORMATIONS[transformation](*restrict(functools.partial(function, masks=masks), at, names))

    return run


def run_ours(function: Function, transformation: str, names: tuple[str, ...], at: Point, options: Any) -> Results:
    static, arrays = split_options(options)

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(at: Point, arrays: dict[str, Any]) -> Results:
        f = functools.partial(function, **static, **arrays)
        return TRANSFORMATIONS[transformation](*restrict(f, at, names))

    return run(at, arrays)


def assert_close(actual: Results, expected: Results, tolerance: float = 1e-11) -> None:
    """Every element, relative to the largest expected one."""
    actual, structure = jax.tree.flatten(actual)
    expected, expected_structure = jax.tree.flatten(expected)
    assert structure == expected_structure
    largest = max(np.abs(np.asarray(x)).max(initial=0.0) for x in expected)
    assert np.isfinite(largest)
    assert largest > 0
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * largest)


def check(
    transformation: str,
    mask: str,
    names: tuple[str, ...] = ARGUMENTS,
    functions: tuple[Function, Function] = (ours, oracle),
    at: Point | None = None,
) -> None:
    with enable_x64():
        at = at or point()
        actual = run_ours(functions[0], transformation, names, at, MASKS[mask])
        expected = compiled_oracle(functions[1], transformation, names)(at, oracle_masks(MASKS[mask]))
        assert_close(actual, expected)


# ---- derivatives in float64


# Reverse mode through a kernel runs its second form (loops that can be reversed).
SECOND_ORDER = ["forward over forward", "forward over reverse", "reverse over reverse", "reverse over forward"]
# Each skips tiles, or leaves rows without a key, in its own way.
SOME_MASKS = ["none", "no key", "key mask, causal", "everything"]


@pytest.mark.parametrize(
    ("transformation", "mask"),
    [
        *itertools.product(["first order"], MASKS),
        *thinned(itertools.product(["linearize", *SECOND_ORDER], SOME_MASKS), every=3),
    ],
)
def test_all_arguments_with_each_mask(transformation: str, mask: str):
    check(transformation, mask)


@pytest.mark.parametrize(
    ("name", "mask"), thinned(itertools.product(ARGUMENTS, ["none", "key mask, causal", "everything"]), every=2)
)
def test_each_argument_alone_with_each_mask(name: str, mask: str):
    # Symbolic zeros take another path for each argument.
    check("first order", mask, (name,))


@pytest.mark.parametrize(
    ("transformation", "mask", "names"),
    thinned(
        [
            ("third, forward over forward over reverse", "everything", ARGUMENTS),
            ("third, reverse over forward over reverse", "causal", ("query", "value")),
            ("third, forward over reverse over reverse", "boolean", ("key", "bias")),
            ("third, reverse over forward over forward", "traced window", ("query", "scale")),
        ],
        2,
        1,
    ),
)
def test_third_order(transformation: str, mask: str, names: tuple[str, ...]):
    check(transformation, mask, names)


@pytest.mark.parametrize(
    ("transformation", "mask", "names"),
    thinned(
        [
            ("jacfwd", "everything", ARGUMENTS),
            ("jacrev", "everything", ARGUMENTS),
            ("hessian", "boolean", ("query", "scale")),
            ("hessian", "dropout", ("key", "value")),
            ("hessian", "causal", ("bias",)),
            ("jacrev of jacfwd", "none", ("query",)),
        ],
        2,
    ),
)
def test_jacobians_and_hessians(transformation: str, mask: str, names: tuple[str, ...]):
    check(transformation, mask, names)


@pytest.mark.parametrize("name", thinned(ARGUMENTS, 2))
def test_second_order_of_each_argument_alone(name: str):
    check("reverse over reverse", "key mask, causal", (name,))


@pytest.mark.parametrize(("outer", "inner"), thinned([("value", "bias"), ("scale", "key"), ("bias", "query")], 3, 1))
def test_mixed_second_derivatives(outer: str, inner: str):
    # Gradient with respect to one argument, differentiated in another, in both modes.
    with enable_x64():
        at = point()
        i, j = ARGUMENTS.index(outer), ARGUMENTS.index(inner)

        def mixed(f: Function, at: Point) -> Results:
            def inner_gradient(x: Any) -> Any:
                arguments = [x if n == i else primal for n, primal in enumerate(at.primals)]
                return jax.grad(loss(f, at), j)(*arguments)

            x, dx = at.primals[i], at.tangents[i]
            return jax.jvp(inner_gradient, (x,), (dx,))[1], jax.vjp(inner_gradient, x)[1](at.tangents[j])

        static, arrays = split_options(MASKS["everything"])
        masks = oracle_masks(MASKS["everything"])
        run = functools.partial(jax.jit, compiler_options=FAST)
        actual = run(lambda at, arrays: mixed(functools.partial(ours, **static, **arrays), at))(at, arrays)
        expected = run(lambda at, masks: mixed(functools.partial(oracle, masks=masks), at))(at, masks)
        assert_close(actual, expected)


@pytest.mark.parametrize("mask", ["none", "everything"])
def test_linear_transpose_in_value(mask: str):
    with enable_x64():
        at = point()
        query, key, value, bias, scale = at.primals
        static, arrays = split_options(MASKS[mask])

        @functools.partial(jax.jit, compiler_options=FAST)
        def transpose(cotangent: Any, arrays: Any) -> Any:
            f = functools.partial(ours, **static, **arrays)
            return jax.linear_transpose(lambda value: f(query, key, value, bias, scale), value)(cotangent)

        actual = transpose(at.weights, arrays)
        expected = compiled_oracle(oracle, "vjp", ("value",))(at, oracle_masks(MASKS[mask]))
        assert_close(actual, expected)


def test_linear_transpose_in_another_argument_is_an_error():
    query, key, value, bias, scale = (x.astype(np.float32) for x in point().primals)
    with pytest.raises(NotImplementedError, match="linear in value"):
        jax.linear_transpose(lambda query: ours(query, key, value, bias, scale), query)(query)


# ---- the other dtypes


def dense_low(*primals: Any, masks: Masking) -> jax.Array:
    return dense_in_both_modes(*primals, masks)[0]


_MODES = ("jvp", "vjp", "forward over reverse")
_ROUNDED = [
    *itertools.product(["float32"], SOME_MASKS, _MODES),
    *zip(itertools.cycle(["bfloat16", "float16"]), ["none"] * 3 + ["everything"] * 3, _MODES * 2, strict=False),
]


@pytest.mark.parametrize(
    ("dtype", "mask", "transformation"),
    thinned(_ROUNDED, every=5),
)
def test_other_dtypes_are_as_accurate_as_dense_attention(transformation: str, mask: str, dtype: str):
    exact = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)).astype(np.float64), point())
    low = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), exact)
    masks = oracle_masks(MASKS[mask])
    # The gradient of scale is one sum of all terms, with one error: no statistics, so only where its noise is known.
    names = ARGUMENTS if transformation != "forward over reverse" else ARGUMENTS[:-1]
    with enable_x64():
        expected = compiled_oracle(oracle, transformation, names)(exact, masks)
    actual = run_ours(ours, transformation, names, low, MASKS[mask])
    dense = compiled_oracle(dense_low, transformation, names)(low, masks)
    floors: dict[str, Any] = {}
    if transformation == "vjp":
        query, key, value, bias, scale = exact.primals
        bias = np.broadcast_to(bias, (B, N, T, S))
        floors = noise_floor(query, key, value, bias, scale, masks, exact.weights, dtype)
        floors["bias"] = reduce_bias_noise(floors["bias"], floors.pop("bias_row"), SHAPES["bias"])
    leaves = (jax.tree.leaves(x) for x in (actual, dense, expected))
    for i, (ours_, dense_, exact_) in enumerate(zip(*leaves, strict=True)):
        assert ours_.dtype == dense_.dtype
        floor = floors.get(names[i]) if floors else None
        # Second order has no noise floor of its own, and dense code is now and then exact by luck.
        limit = 4.0 if transformation == "forward over reverse" else 2.0
        assert_as_accurate_as_dense(f"{transformation} {i}", ours_, dense_, exact_, floor, limit)


# ---- nothing is computed for what is not differentiated


def cost(f: Function, *arguments: Any) -> tuple[float, int]:
    """Floating point operations and temporary bytes of the compiled program."""
    compiled: Any = jax.jit(f).lower(*arguments).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def flops(f: Function, *arguments: Any) -> float:
    return cost(f, *arguments)[0]


def test_nothing_is_computed_for_arguments_that_are_not_differentiated():
    length = 64  # one tile: the compiler's count knows nothing of trip counts
    shapes = [(1, length, 2, 64)] * 3 + [(1, 1, length, length), ()]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def attention(*primals: Any) -> jax.Array:
        query, key, value, bias, scale = primals
        return flash_attention(query, key, value, bias, scale=scale)

    def gradient_flops(*argnums: int) -> float:
        return flops(jax.grad(lambda *x: attention(*x).sum(), argnums), *arguments)

    def jvp_flops(*argnums: int) -> float:
        def tangent(primals: Any, tangents: Any) -> jax.Array:
            def varying(*chosen: Any) -> jax.Array:
                full = list(primals)
                for i, x in zip(argnums, chosen, strict=True):
                    full[i] = x
                return attention(*full)

            primals_, tangents_ = ([x[i] for i in argnums] for x in (primals, tangents))
            return jax.jvp(varying, primals_, tangents_)[1]

        return flops(tangent, arguments, arguments)

    product = 2 * length * length * 2 * 64  # of all heads
    everything = gradient_flops(0, 1, 2, 3, 4)
    assert gradient_flops(0) < everything - 1.9 * product  # no gradient of key and value
    assert gradient_flops(2) < gradient_flops(0) - 0.9 * product  # nor what only the logits need
    assert gradient_flops(0, 1, 2) < gradient_flops(0, 1, 2, 3)
    assert jvp_flops(2) < jvp_flops(0, 1, 2) - 2.9 * product
    assert jvp_flops(0) < jvp_flops(0, 1) - 0.9 * product


# ---- lse


@pytest.mark.parametrize(
    ("transformation", "mask"),
    [
        ("first order", "everything"),
        ("first order", "no key"),
        ("forward over reverse", "everything"),
        ("reverse over reverse", "no key"),
        ("reverse over forward", "dropout"),
    ],
)
def test_lse_is_differentiable_in_every_mode(transformation: str, mask: str):
    at = point(out_shape=(B, T, N, H + 1))
    check(transformation, mask, functions=(ours_with_lse, oracle_with_lse), at=at)


@pytest.mark.parametrize("transformation", ["vjp", "forward over reverse"])
def test_lse_alone(transformation: str):
    def pick(f: Function) -> Function:
        return lambda *primals, **options: f(*primals, **options)[..., -1]

    functions = pick(ours_with_lse), pick(oracle_with_lse)
    check(transformation, "key mask, causal", ("query", "key", "bias"), functions, point(out_shape=(B, T, N)))


def test_the_residual_has_no_gradient():
    query, key, value = (x.astype(np.float32) for x in point().primals[:3])

    def both(query: Any, key: Any) -> Any:
        return flash_attention(query, key, value, return_residual=True, **BLOCKS)

    (out, lse), (dout, dlse) = jax.jit(lambda *x: jax.jvp(both, x, x))(query, key)
    assert not np.asarray(dlse).any()
    assert np.asarray(dout).any()
    gradients = jax.jit(jax.grad(lambda *x: both(*x)[1].sum(), (0, 1)))(query, key)
    assert not any(np.asarray(g).any() for g in gradients)
    expected = flash_attention_with_lse(query, key, value, **BLOCKS)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])


MERGES = {
    "an empty part": [(0, 5), (5, 5), (5, 11)],
    "two levels": [[(0, 3), (3, 4)], [(4, 9), [(9, 9), (9, 11)]]],
}


@pytest.mark.parametrize(
    ("transformation", "parts"),
    [("first order", "two levels"), ("forward over reverse", "an empty part")],
)
def test_merge_equals_attention_over_all_keys(transformation: str, parts: str):
    mask = random_mask((B, 1, T, S), seed=3)
    mask[..., -1] = True  # no dead rows: a row without any key is the mean of the parts' means
    mask[0, 0, 2, :4] = False  # but one without a key in the first part

    def merged(*primals: Any) -> jax.Array:
        query, key, value, bias, scale = primals

        def over(part: Any) -> tuple[jax.Array, jax.Array]:
            if isinstance(part, list):
                outs, lses = zip(*map(over, part), strict=True)
                return merge_attention(outs, lses)
            keys = slice(*part)
            arrays = query, key[:, keys], value[:, keys], bias[..., keys], mask[..., keys]
            return flash_attention_with_lse(*arrays, scale=scale, **BLOCKS)

        out, lse = over(MERGES[parts])
        return jnp.concatenate([out, lse[..., None]], -1)

    with enable_x64():
        at = point(out_shape=(B, T, N, H + 1))
        actual = run_ours(merged, transformation, ARGUMENTS, at, {})
        masks = oracle_masks({"mask": mask})
        expected = compiled_oracle(oracle_with_lse, transformation, ARGUMENTS)(at, masks)
        assert_close(actual, expected)


def test_merge_of_empty_parts_and_its_errors():
    out, lse = jnp.zeros((1, 3, 2, 4)), jnp.full((1, 3, 2), -jnp.inf)
    merged = merge_attention([out, out], [lse, lse])
    assert not np.asarray(merged[0]).any()
    assert np.isneginf(np.asarray(merged[1])).all()
    for outs, lses in ([], []), ([out], []), ([out, out[:, :2]], [lse, lse[:, :2]]), ([out], [lse[..., 0]]):
        with pytest.raises(ValueError, match="outs"):
            merge_attention(outs, lses)


# ---- vmap

V = 3
VMAPS: dict[str, dict[str, Any]] = {
    "query": {"axes": {"query": 0}},
    "key and value at other axes": {"axes": {"key": 2, "value": -1}, "out": 1},
    "bias and scale": {"axes": {"bias": 0, "scale": 0}, "mask": "causal"},
    "boolean mask": {"axes": {"mask": 1}, "mask": "boolean", "out": -1},
    "lengths": {"axes": {"query_seq_lengths": 0, "key_value_seq_lengths": 1, "query": 1}, "mask": "lengths"},
    "window": {"axes": {"local_window_size": 0}, "mask": "traced window"},
    "dropout key": {"axes": {"dropout_rng": 0, "value": 0}, "mask": "dropout"},
    "everything": {
        "axes": dict.fromkeys((*ARGUMENTS, *split_options(MASKS["everything"])[1]), 0),
        "mask": "everything",
        "out": 2,
    },
}


def moved(x: np.ndarray, axis: int | None) -> np.ndarray:
    return x if axis is None else np.moveaxis(x, 0, axis)


def batched_options(options: dict[str, Any], axes: dict[str, int]) -> list[dict[str, Any]]:
    """The options of each element of a vmap: those that `axes` names differ."""
    elements = [dict(options) for _ in range(V)]
    for i, element in enumerate(elements):
        if "mask" in axes:
            element["mask"] = random_mask(options["mask"].shape, seed=40 + i)
        for name in ("query_seq_lengths", "key_value_seq_lengths", "local_window_size"):
            if name in axes:
                element[name] = np.maximum(options[name] - i, 1)
        if "dropout_rng" in axes:
            element["seed"] = 50 + i
    return elements


def value_and_derivatives(f: Function, at: Point, second_order: bool) -> Results:
    first = f(*at.primals), gradient(f, at)(*at.primals)
    return (*first, along(gradient(f, at), at)(*at.primals)) if second_order else first


@pytest.mark.parametrize("case", thinned(VMAPS, 2))
def test_vmap_over_some_arguments(case: str):
    axes, out_axis = VMAPS[case]["axes"], VMAPS[case].get("out", 0)
    second_order = case in ("bias and scale", "everything")
    options = MASKS[VMAPS[case].get("mask", "none")]
    elements = batched_options(options, axes)
    batched = point({name: (V, *shape) if name in axes else shape for name, shape in SHAPES.items()})
    at = point()
    primals = batched.primals
    points = dataclasses.replace(at, primals=primals)
    with enable_x64():
        static, _ = split_options(options)
        each = [split_options(element)[1] for element in elements]
        arrays, array_axes = {}, {}
        for name in each[0]:
            axis = axes.get(name)
            stacked = each[0][name] if axis is None else jnp.stack([element[name] for element in each], axis)
            arrays[name], array_axes[name] = stacked, axis
        placed = tuple(moved(x, axes.get(name)) for name, x in zip(ARGUMENTS, primals, strict=True))
        in_axes = Point(tuple(axes.get(name) for name in ARGUMENTS), (None,) * len(ARGUMENTS), None)

        def run(at: Point, arrays: dict[str, Any]) -> Results:
            return value_and_derivatives(functools.partial(ours, **static, **arrays), at, second_order)

        actual = jax.jit(
            jax.vmap(run, (in_axes, array_axes), (out_axis, *(0,) * (1 + second_order))),
            compiler_options=FAST,
        )(dataclasses.replace(points, primals=placed), arrays)
        actual = (jnp.moveaxis(actual[0], out_axis, 0), *actual[1:])

        masks = jax.tree.map(lambda *x: np.stack(x), *map(oracle_masks, elements))
        expected = vmapped_oracle(tuple(name in axes for name in ARGUMENTS), second_order)(points, masks)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e)


@functools.cache
def vmapped_oracle(flags: tuple[bool, ...], second_order: bool) -> Callable[..., Results]:
    in_axes = Point(tuple(0 if flag else None for flag in flags), (None,) * len(flags), None)

    def run(at: Point, masks: Masking) -> Results:
        return value_and_derivatives(functools.partial(oracle, masks=masks), at, second_order)

    return jax.jit(jax.vmap(run, (in_axes, 0)), compiler_options=FAST)


@pytest.mark.parametrize("transformation", ["value", "vjp", "reverse over reverse"])
def test_nested_vmap(transformation: str):
    # query over the outer axis only, key over the inner one only, value over both, at different axes.
    outer, inner = 2, 3
    with enable_x64():
        at = point()
        query, key = normal(60, (outer, *SHAPES["query"])), normal(61, (inner, *SHAPES["key"]))
        value = normal(62, (outer, inner, *SHAPES["value"]))

        def results(f: Function) -> Function:
            def run(query: Any, key: Any, value: Any) -> Results:
                here = dataclasses.replace(at, primals=(query, key, value, *at.primals[3:]))
                return TRANSFORMATIONS[transformation](f, here)

            return jax.vmap(jax.vmap(run, (None, 2, 1)), (0, None, 1))

        placed = query, np.moveaxis(key, 0, 2), np.moveaxis(value, (0, 1), (1, 2))
        static, arrays = split_options(MASKS["key mask, causal"])
        masks = oracle_masks(MASKS["key mask, causal"])
        run = functools.partial(jax.jit, compiler_options=FAST)
        actual = run(lambda *x: results(functools.partial(ours, **static, **arrays))(*x))(*placed)
        expected = run(lambda *x: results(functools.partial(oracle, masks=masks))(*x))(*placed)
        assert_close(actual, expected)


@pytest.mark.parametrize("in_axes", [(0, None, None, None), (None, 0, 0, 0)])
def test_derivatives_of_a_vmapped_function(in_axes: tuple[int | None, ...]):
    # The other order: arguments that are shared get one gradient, summed over the mapped axis.
    with enable_x64():
        shapes = dict(zip(ARGUMENTS, in_axes, strict=False))
        at = point(
            {name: shape if shapes.get(name) is None else (V, *shape) for name, shape in SHAPES.items()},
            (V, B, T, N, H),
        )

        def mapped(f: Function) -> Function:
            return jax.vmap(f, (*in_axes, None))

        static, arrays = split_options(MASKS["boolean"])
        masks = oracle_masks(MASKS["boolean"])
        run = functools.partial(jax.jit, compiler_options=FAST)

        def results(f: Function, at: Point) -> Results:
            return {t: TRANSFORMATIONS[t](mapped(f), at) for t in ("vjp", "reverse over reverse")}

        actual = run(lambda at: results(functools.partial(ours, **static, **arrays), at))(at)
        expected = run(lambda at: results(functools.partial(oracle, masks=masks), at))(at)
        for transformation, found in actual.items():
            assert_close(found, expected[transformation])


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0)], ids=["out", "lse"])
def test_vmap_of_a_pullback_over_one_cotangent(in_axes: tuple[int | None, int | None]):
    """Of out and lse, one has an axis that the other and the inputs lack."""
    with enable_x64():
        at = point()
        lead = tuple(() if axis is None else (V,) for axis in in_axes)
        cotangents = normal(63, (*lead[0], *SHAPES["query"])), normal(64, (*lead[1], B, T, N))

        static, arrays = split_options(MASKS["boolean"])
        masks = oracle_masks(MASKS["boolean"])

        def with_lse(*primals: Any) -> Results:
            query, key, value, bias, scale = primals
            return flash_attention_with_lse(query, key, value, bias, scale=scale, **static, **arrays, **BLOCKS)

        def pulled_back(f: Function) -> Function:
            pullback = jax.vjp(f, *at.primals)[1]
            return jax.jit(jax.vmap(lambda *x: pullback(x), in_axes), compiler_options=FAST)

        actual = pulled_back(with_lse)(*cotangents)
        expected = pulled_back(functools.partial(dense_float64, masks=masks))(*cotangents)
        assert_close(actual, expected)


@pytest.mark.parametrize("mode", ["value", "gradient"])
@pytest.mark.parametrize("length", [64, 2048])
def test_vmap_over_a_batch_costs_what_the_batch_costs(length: int, mode: str):
    def attention(query: Any, key: Any, value: Any) -> jax.Array:
        return flash_attention(query, key, value, is_causal=True)

    def gradients(*primals: Any) -> Any:
        return jax.grad(lambda *x: attention(*x).sum(), (0, 1, 2))(*primals)

    f = attention if mode == "value" else gradients
    query, key = (length, 2, 32), (length, 1, 32)
    folded = [jax.ShapeDtypeStruct((4 * 2, *shape), jnp.float32) for shape in (query, key, key)]
    mapped = [jax.ShapeDtypeStruct((4, 2, *shape), jnp.float32) for shape in (query, key, key)]
    (flops_folded, bytes_folded), (flops_mapped, bytes_mapped) = cost(f, *folded), cost(jax.vmap(f), *mapped)
    assert flops_mapped <= 1.05 * flops_folded
    assert bytes_mapped <= 1.05 * bytes_folded + 4096


def test_vmap_does_not_copy_a_shared_bias():
    length, elements = 512, 64  # enough for a copy to exceed the tiles
    query = jax.ShapeDtypeStruct((elements, 1, length, 2, 8), jnp.float32)
    bias = jax.ShapeDtypeStruct((1, 2, length, length), jnp.float32)

    def attention(query: Any, bias: Any) -> jax.Array:
        return flash_attention(query, query, query, bias)

    def summed(query: Any, bias: Any) -> jax.Array:
        return jax.vmap(attention, (0, None))(query, bias).sum()

    def hvp(query: Any, bias: Any) -> Any:
        return jax.jvp(lambda query: jax.grad(lambda q: attention(q, bias).sum())(query), (query,), (query,))[1]

    functions = {
        "value": jax.vmap(attention, (0, None)),
        "gradient in query": jax.vmap(jax.grad(lambda *x: attention(*x).sum()), (0, None)),
        "one gradient of the bias": jax.grad(summed, (0, 1)),
        "hvp in query": jax.vmap(hvp, (0, None)),
    }
    for name, f in functions.items():
        compiled: Any = jax.jit(f).lower(query, bias).compile()
        size, shape = largest_in_text(compiled.as_text())
        assert size < elements * length * length, (name, shape)
        assert compiled.memory_analysis().temp_size_in_bytes < elements * length * length * 4, name


def test_vmap_over_part_of_the_arguments_does_not_copy_a_shared_key():
    length, elements = 2048, 16
    query = jax.ShapeDtypeStruct((elements, 1, 16, 1, 256), jnp.float32)
    key = jax.ShapeDtypeStruct((1, length, 1, 256), jnp.float32)
    mapped = jax.vmap(flash_attention, (0, None, None))
    assert cost(mapped, query, key, key)[1] < elements * length * 256 * 4 / 2
