"""Bounds of the logits on a CPU, and masks of documents with them and without, each against the float64 oracle."""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import explain, flash_attention
from jax_native_flash_attn._kernels.select import replacing
from jax_native_flash_attn._kernels.xla import forward as kernel
from jax_native_flash_attn._kernels.xla.family import XlaKernels
from jax_native_flash_attn._kernels.xla.limits import Limits
from jax_native_flash_attn._kernels.xla.quirks import CPU_FUSES_SOFTMAX
from tests.support.cases import FAST_COMPILATION
from tests.support.environment import lenient_promotion
from tests.support.grids import thinned
from tests.support.oracle import check_out, enable_x64, masking


@pytest.fixture(autouse=True, scope="module")
def _bounds_of_small_calls() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    with replacing(XlaKernels(Limits(cpu_large=1))):
        yield


def test_no_bound_beside_a_softmax_that_xla_fuses():
    """A bound would take a second form of the kernel, and save nothing."""
    types = [jax.ShapeDtypeStruct((1, 2048, 2, 64), jnp.float32)] * 3
    plan = explain(*types, platform="cpu").forward.plan
    assert plan.tile.block_kv == 2048
    assert plan.may_be_bounded is not CPU_FUSES_SOFTMAX
    assert explain(*types, platform="cpu", is_causal=True).forward.plan.may_be_bounded


@pytest.mark.parametrize(
    ("documents", "has_dead_rows", "is_bounded"), thinned(itertools.product((1, 8), (False, True), (False, True)), 3, 1)
)
def test_mask_of_documents(documents: int, has_dead_rows: bool, is_bounded: bool) -> None:
    """Few and many occupied tiles take different forms, decided at run time, with and without bounds."""
    L = 1024
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 1, L, 1, 8)).astype(np.float32)
    document = np.arange(L) * documents // L
    mask = (document[:, None] == document) & ~(has_dead_rows & (np.arange(L) == 5))[:, None]
    with contextlib.nullcontext() if is_bounded else replacing(XlaKernels()):
        out = jax.jit(lambda *x: flash_attention(*x, mask=mask[None, None]))(query, key, value)
    dense = jax.jit(jax.nn.dot_product_attention)(query, key, value, mask=mask[None, None])
    check_out("out", out, dense, query, key, value, mask=mask[None, None])


@pytest.mark.parametrize(
    ("masks", "magnitude", "dtype"),
    [
        ("plain", np.nan, "float32"),
        ("causal", 1.0, "float32"),
        ("causal", 9.0, "float32"),
        ("causal", 1.0, "float64"),
        ("causal", 1.0, "bfloat16"),
        ("window", 1.0, "float32"),
        ("lengths", 1.0, "float32"),
        ("lengths", 9.0, "float32"),
        ("lengths", np.nan, "float32"),
        ("mask", 1.0, "float32"),
        ("mask", 9.0, "float32"),
        ("mask and lengths", 1.0, "float32"),
        ("no keys", 1.0, "float32"),
    ],
)
def test_bounds_of_logits(masks: str, magnitude: float, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is subtracted from the logits is decided at run time, and where tiles are large or small alike."""
    taken = []
    forward = kernel.forward

    def watched(tiles: Any, bound: kernel.Bound | None = None) -> Any:
        holds = bound is not None if bound is None or bound.holds is None else bound.holds
        jax.debug.callback(lambda holds: taken.append(bool(holds)), holds)
        return forward(tiles, bound)

    monkeypatch.setattr(kernel, "forward", watched)
    rng = np.random.default_rng(0)
    shapes = (2, 131, 4, 16), (2, 139, 2, 16), (2, 139, 2, 16)
    allowed = rng.random((2, 1, 131, 139)) < 0.5
    has_a_dead_row = allowed & ~(np.arange(2 * 131).reshape(2, 1, 131, 1) == 131 + 5)
    lengths = {"key_value_seq_lengths": np.array([0, 70]), "query_seq_lengths": np.array([100, 131])}
    options = {
        "plain": {},
        "causal": {"is_causal": True},
        "window": {"local_window_size": (20, 3)},
        "lengths": lengths,
        "mask": {"mask": has_a_dead_row},
        "mask and lengths": {"mask": allowed, **lengths},
        "no keys": {"mask": allowed & False},
    }[masks]
    with enable_x64(dtype == "float64"):
        query, key, value = (rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes)
        query *= jnp.dtype(dtype).type(1.0 if np.isnan(magnitude) else magnitude)
        padded = key.copy()
        padded[1, 120] = np.nan if np.isnan(magnitude) else key[1, 120]
        call = functools.partial(flash_attention, block_q=64, block_kv=48, **options)
        out = jax.jit(call, compiler_options=FAST_COMPILATION)(query, padded, value)
        jax.effects_barrier()
        with lenient_promotion():
            reference = functools.partial(jax.nn.dot_product_attention, **options)
            dense = jax.jit(reference, compiler_options=FAST_COMPILATION)(query, key, value)
    is_padding = "lengths" in masks
    assert taken == [magnitude == 1.0 or (np.isnan(magnitude) and is_padding)]
    if np.isnan(magnitude) and not is_padding:
        reaches = np.broadcast_to(masking(query, key, **options).allowed, (2, 4, 131, 139))[1, ..., 120].T
        assert np.isnan(out[1][reaches]).all()
    else:
        check_out("out", out, dense, query, key, value, **options)
