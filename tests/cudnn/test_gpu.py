"""cuDNN's kernels on a GPU, asked for by name: parity with the oracle, transformations, and how often they are called.

`benchmarks/check_cudnn.py` runs these and times the kernels.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import flash_attention, flash_attention_with_lse
from tests.support.cases import FAST_COMPILATION, Case, check_case
from tests.support.cudnn import cudnn_attention
from tests.support.hopper import make_arrays
from tests.support.transformations import check_transformation

pytestmark = pytest.mark.gpu

SHAPES = {
    "even": (2, 300, 332, 2, 2, 64),
    "odd": (2, 301, 333, 2, 2, 64),
    "wide": (1, 520, 520, 1, 3, 128),
    "narrow": (3, 128, 96, 2, 1, 40),
}
LENGTHS = {"key_value_seq_lengths": (31, 335), "poison": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "local_window_size": (70, 0)},
    "window without causality": {"local_window_size": (40, 0)},
    "scale": {"scale": 0.3, "magnitude": 3.0},
    "float16": {"dtype": "float16", "is_causal": True},
    "x64": {"x64": True},
    "vmap": {"vmapped": True, "is_causal": True},
}
OF_EVEN: dict[str, dict[str, Any]] = {
    "lengths of keys": LENGTHS,
    "lengths of keys, causal": LENGTHS | {"is_causal": True},
    "lengths of keys, zero": LENGTHS | {"key_value_seq_lengths": (0, 200)},
    "lengths of keys, zero, causal": LENGTHS | {"key_value_seq_lengths": (200, 0), "is_causal": True},
    "lengths of keys, window": LENGTHS | {"is_causal": True, "local_window_size": (70, 0)},
    "lengths of both": LENGTHS | {"query_seq_lengths": (17, 200)},
    "lengths of both, zero": LENGTHS | {"query_seq_lengths": (0, 290), "key_value_seq_lengths": (100, 0)},
    "lengths of queries": {"query_seq_lengths": (100, 0), "poison": True, "is_causal": True},
    "lengths, vmap": LENGTHS | {"query_seq_lengths": (17, 200), "vmapped": True},
    "mask": {"mask": (True, True, True, True)},
    "mask of all, causal": {"mask": (False, False, True, True), "is_causal": True},
    "sparse mask": {"mask": (False, True, True, True), "mask_density": 0.005},
    "sparse mask, causal": {"mask": (True, False, True, True), "mask_density": 0.01, "is_causal": True},
    "empty mask": {"mask": (False, False, True, True), "mask_density": 0.0},
    "mask of keys": {"mask": (True, False, False, True)},
    "mask of rows": {"mask": (True, False, True, False)},
    "mask, lengths": LENGTHS | {"mask": (True, False, True, True), "mask_density": 0.3},
    "mask, float16": {"mask": (True, True, True, True), "dtype": "float16", "mask_density": 0.1},
    "bias": {"bias": (True, True, True, True)},
    "bias of all": {"bias": (False, True, True, True), "is_causal": True},
    "bias of heads": {"bias": (True, False, True, True)},
    "bias of one": {"bias": (False, False, True, True)},
    "bias, mask": {"bias": (True, True, True, True), "mask": (True, False, True, True), "mask_density": 0.2},
    "bias, lengths": LENGTHS | {"bias": (False, True, True, True)},
    "bias, vmap": {"bias": (False, True, True, True), "vmapped": True},
}
CASES = {
    **{
        f"{shape}, {name}": Case(SHAPES[shape], **{"dtype": "bfloat16", **x})
        for name, x in OPTIONS.items()
        for shape, (_, rows, keys, *_) in SHAPES.items()
        if "local_window_size" not in x or rows <= keys  # the family takes no others
    },
    **{f"even, {name}": Case(SHAPES["even"], **{"dtype": "bfloat16", **x}) for name, x in OF_EVEN.items()},
    "one row": Case((2, 1, 1000, 2, 4, 128), "bfloat16", key_value_seq_lengths=(700, 1000), poison=True),
    "one key": Case((2, 70, 1, 1, 2, 32), "bfloat16"),
    "long": Case((1, 1100, 1300, 1, 1, 256), "bfloat16", is_causal=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case: Case) -> None:
    check_case(case, cudnn_attention, FAST_COMPILATION)


TRANSFORMED = {
    "causal": {"is_causal": True},
    "lengths": {"query_seq_lengths": (17, 120), "key_value_seq_lengths": (31, 0)},
    "mask": {"mask": (True, False, True, True), "mask_density": 0.3},
    "bias": {"bias": (False, True, True, True)},
}


@pytest.mark.parametrize("option", TRANSFORMED)
@pytest.mark.parametrize(
    "name",
    [
        "jacrev",
        "jacfwd",
        "linearize",
        "vmap",
        "gradient of vmap",
        "vmap of gradient",
        "checkpoint",
        "checkpoint that saves",
        "gradient of scan",
        "linear_transpose",
        "hessian",
        "lse",
        "gradient of out and lse",
    ],
)
def test_transformations(name: str, option: str) -> None:
    case = Case((2, 130, 150, 2, 2, 64), "bfloat16", scale=0.3, **TRANSFORMED[option])
    # cuDNN gives out in 16 bits, and its gradient takes that. Where a row has few keys, and one of them nearly all the
    # weight, its derivatives are small beside that rounding, and such rows are all that a Jacobian here has.
    limit = 4.0 if name.startswith("jac") else 2.0
    check_transformation(name, case, limit, implementation="cudnn_gpu")


@pytest.mark.parametrize("is_causal", [False, True])
def test_log_sum_exp_is_float32(is_causal: bool) -> None:
    query, key, value = make_arrays(Case((2, 500, 500, 2, 1, 64), "bfloat16"))
    with_lse: Any = flash_attention_with_lse
    _, lse = jax.jit(functools.partial(with_lse, is_causal=is_causal, implementation="cudnn_gpu"))(query, key, value)
    logits = np.einsum("btnh,bsnh->btns", *(np.asarray(x, np.float64) for x in (query, key))) / 8
    if is_causal:
        logits = np.where(np.tri(500, dtype=bool)[None, :, None, :], logits, -np.inf)
    expected = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(lse, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("lowest", ["-inf", "finfo.min", "-1e4"])
def test_biases_that_mask(lowest: str) -> None:
    """Of a row's keys some have a bias that low: as in pure JAX, up to the rounding of 16 bits.

    Where all have, a row is the mean of the values, and has a gradient of them alone.
    """
    query, key, value = make_arrays(Case((2, 128, 256, 2, 1, 64), "bfloat16"))
    low = {"-inf": -np.inf, "finfo.min": float(jnp.finfo("bfloat16").min), "-1e4": -1e4}[lowest]
    bias = np.where(np.random.default_rng(0).random((1, 2, 128, 256)) < 0.5, low, 1.0)
    bias[..., :100] = low
    bias[:, :, :5] = low
    bias = jnp.asarray(bias, "bfloat16")
    has_key = (jnp.arange(128) >= 5)[None, :, None, None]

    def run(implementation: Any) -> Any:
        def call(*floats: jax.Array) -> Any:
            out, pullback = jax.vjp(functools.partial(flash_attention, implementation=implementation), *floats)
            return out, pullback(jnp.where(has_key, out, 0)), pullback(jnp.where(has_key, 0, out))[2]

        return jax.tree.leaves(jax.jit(call)(query, key, value, bias))

    *results, of_others = run("cudnn_gpu")
    *expected, _ = run("pure_jax")
    if lowest != "-1e4":
        rows = np.where(has_key, 0, np.asarray(results[0], np.float64)).sum(1, keepdims=True) / 256
        results, expected = [*results, of_others], [*expected, np.broadcast_to(rows, of_others.shape)]
    for x, y in zip(results, expected, strict=True):
        x, y = (np.asarray(x, np.float64) for x in (x, y))
        np.testing.assert_allclose(x, y, rtol=0, atol=0.02 * np.abs(y).max())


def calls(program: Any, *arrays: Any) -> list[str]:
    """The calls of cuDNN in a compiled program, in order."""
    text = jax.jit(program).lower(*arrays).compile().as_text() or ""
    return re.findall(r'custom_call_target="__cudnn\$fmha(\w+)"', text)


def _loss(attention: Any, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.sin(attention(jnp.cos(query), key, value)).astype(jnp.float32).sum()


def _scanned(attention: Any) -> Any:
    def layers(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.sin(attention(jnp.cos(x), key, value)), None

        return jax.lax.scan(step, query, None, length=4)[0]

    return layers


SAVES = jax.checkpoint_policies.save_only_these_names("flash_attention_out", "flash_attention_lse")
PROGRAMS = {
    "gradient": (lambda f: f, 1),
    "checkpoint": (jax.checkpoint, 2),  # where attention is in the program, and where its gradient begins
    "checkpoint that saves": (lambda f: jax.checkpoint(f, policy=SAVES), 1),
    "scan": (_scanned, 1),
    "two layers": (lambda f: lambda q, k, v: f(jnp.sin(f(q, k, v)), k, v), 2),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_forward_passes_run_as_often_as_those_of_jax_nn(name: str) -> None:
    of_attention, count = PROGRAMS[name]
    arrays = make_arrays(Case((2, 512, 512, 4, 1, 64), "bfloat16"))

    def found(attention: Any) -> list[str]:
        return calls(jax.grad(functools.partial(_loss, of_attention(attention)), (0, 1, 2)), *arrays)

    ours = found(cudnn_attention)
    assert ours.count("Softmax") == count
    if name != "checkpoint that saves":  # by names that `jax.nn` does not give
        assert sorted(ours) == sorted(found(functools.partial(jax.nn.dot_product_attention, implementation="cudnn")))
