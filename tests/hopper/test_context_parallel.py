"""Split sequences take the Mosaic GPU kernels, forward and backward, in programs lowered for CUDA without a GPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn import context_parallel_attention, explain, flash_attention, mods
from jax_native_flash_attn._kernels.xla.family import XlaKernels
from jax_native_flash_attn._sharding import lowering
from tests.support.grids import in_part, rest, thinned
from tests.support.targets import needs_backend, pretend_gpu

pytestmark = needs_backend

DEVICES, B, T, N, K, H = 2, 2, 256, 4, 2, 64
IDS = jax.ShapeDtypeStruct((B, T), jnp.int32)
CASES: dict[str, tuple[dict[str, Any], dict[str, jax.ShapeDtypeStruct]]] = {
    "full": ({}, {}),
    "balanced": ({"is_causal": True, "order": "balanced"}, {}),
    "window": ({"is_causal": True, "local_window_size": (50, 0)}, {}),
    "ids": ({"is_causal": True}, {"query_segment_ids": IDS, "key_value_segment_ids": IDS}),
    "functions": (
        {
            "is_causal": True,
            "score_mod": mods.alibi,
            "score_mod_args": (mods.alibi_slopes(N),),
            "mask_mod": mods.prefix_lm,
            "mask_mod_args": (np.array([3, 199], np.int32),),
        },
        {},
    ),
    "bias and dropout": (
        {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)},
        {"bias": jax.ShapeDtypeStruct((1, N, T, T), jnp.bfloat16)},
    ),
}


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "9.0")

    def refuse(*_: Any) -> Any:
        raise AssertionError("took the pure JAX kernels")

    for name in ("forward", "cotangent", "tangent"):
        monkeypatch.setattr(XlaKernels, name, refuse)


def _arrays() -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16) for n in (N, K, K)]


def _lowered(f: Any, *arrays: Any) -> str:
    def gradients(query: Any, key: Any, value: Any, *others: Any) -> Any:
        out, pullback = jax.vjp(lambda *x: f(*x, *others), query, key, value)
        return out, pullback(out)

    return jax.jit(gradients).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", [*thinned([x for x in CASES if x != "functions"], 5, 3), rest("functions")])
def test_a_ring_lowers_for_cuda(name: str) -> None:
    static, traced = CASES[name]
    mesh = AbstractMesh((DEVICES,), ("s",), axis_types=(AxisType.Auto,))
    split = P(None, "s")
    specs = {name: P(None, None, "s") if name == "bias" else split for name in traced}

    def attention(query: Any, key: Any, value: Any, given: Any) -> jax.Array:
        return context_parallel_attention(query, key, value, **given, **static, axis_name="s")

    over_all = jax.shard_map(attention, mesh=mesh, in_specs=(split,) * 3 + (specs,), out_specs=split)
    text = _lowered(over_all, *_arrays(), traced)
    assert "mosaic_gpu" in text
    assert "collective_permute" in text


@in_part(1)
def test_explicit_axes_lower_for_cuda() -> None:
    mesh = jax.make_mesh((DEVICES,), ("s",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:DEVICES])
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, P(None, "s"))
        arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) for x in _arrays()]
        text = _lowered(lambda *x: flash_attention(*x, is_causal=True), *arrays)
    assert "mosaic_gpu" in text
    assert "collective_permute" in text


_DOCUMENT: dict[str, Any] = {"mask_mod": mods.document, "mask_mod_args": (jnp.zeros((B, T), jnp.int32),) * 2}


def test_what_is_read_by_place_is_not_read_in_a_ring() -> None:
    """There numbers of rows and keys are not places in the arrays that a kernel gets."""
    x, place = _arrays(), {"platform": "cuda", "devices": DEVICES}
    reason = "mask_mod reads an argument by query_index, which positions, an offset or a ring make another than"
    with pytest.raises(NotImplementedError, match=f"'mosaic_gpu' does not run here: {reason}"):
        explain(*x, **_DOCUMENT, **place, implementation="mosaic_gpu")
    found = explain(*x, **_DOCUMENT, **place)
    for each in (found.forward, found.gradient, found.tangent):
        assert each.family == "pure_jax"
        assert reason in each.reasons["mosaic_gpu"]
    assert explain(*x, **_DOCUMENT, **place, strategy="all_to_all").gradient.family == "mosaic_gpu"
    other = explain(*x, score_mod=mods.SoftCap(2.0), **place)
    assert {each.family for each in (other.forward, other.gradient, other.tangent)} == {"mosaic_gpu"}


@pytest.mark.parametrize("reads_places", [True, False])
def test_auto_axes_have_a_ring_of_what_kernels_take_there(reads_places: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they gather the rows, and the kernels run."""
    rings = []

    def as_unit(kernel: Any, of_ring: Any, *others: Any) -> Any:
        rings.append(of_ring)
        return lambda *_: tuple(jnp.zeros(x.shape, x.dtype) for x in others[-1])

    monkeypatch.setattr(lowering, "as_unit", as_unit)
    mesh = jax.make_mesh((DEVICES,), ("s",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])
    split = NamedSharding(mesh, P(None, "s"))
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) for x in _arrays()]
    options = _DOCUMENT if reads_places else {"mask_mod": mods.causal}
    _lowered(lambda *x: flash_attention(*x, **options), *arrays)
    assert [ring is None for ring in rings] == [reads_places] * 2  # of value and gradient
