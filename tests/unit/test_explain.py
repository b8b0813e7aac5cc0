"""`explain`: which kernels a call takes, and why."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jax_native_flash_attn import context_parallel_attention, explain, flash_attention
from tests.support.grids import thinned
from tests.support.programs import collective_elements
from tests.support.targets import needs_backend, pretend_gpu


def types(dtype: str = "bfloat16", T: int = 256, H: int = 64) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((2, T, n, H), jnp.dtype(dtype)) for n in (4, 2, 2)]


def test_on_a_cpu():
    found = explain(*types(), is_causal=True, platform="cpu", compiles=True)
    assert {found.forward.family, found.gradient.family, found.tangent.family} == {"pure_jax"}
    assert "not for an NVIDIA GPU" in found.forward.reasons["mosaic_gpu"]
    assert (found.forward.plan.sizes.T, found.forward.plan.sizes.G) == (256, 2)
    assert found.temporary_bytes is not None
    assert found.temporary_bytes["gradient"] >= found.temporary_bytes["forward"] > 0
    assert "forward: pure_jax" in str(found)
    assert "256 x 256 tiles" in str(found)


def test_blocks_that_are_asked_for_are_planned():
    plan = explain(*types(), block_q=64, block_kv=32, platform="cpu").forward.plan
    assert (plan.tile.block_q, plan.tile.block_kv) == (64, 32)


def test_a_constant_mask_that_is_a_band_skips_tiles():
    band = np.tril(np.ones((1, 1, 2048, 2048), bool))
    causal = explain(*types(T=2048), is_causal=True, platform="cpu").forward
    assert explain(*types(T=2048), mask=band, platform="cpu").forward == causal


def test_segments_positions_sinks_and_another_value_dimension():
    query, key, _ = types(T=64)
    ids, offset, sinks = (jax.ShapeDtypeStruct(n, d) for n, d in (((2, 64), "int32"), ((), "int32"), ((4,), "float32")))
    options = {"query_segment_ids": ids, "key_value_segment_ids": ids, "query_offset": offset, "sinks": sinks}
    value = jax.ShapeDtypeStruct((2, 64, 2, 32), key.dtype)
    static = {"is_causal": True, "logits_soft_cap": 5.0}
    found = explain(query, key, value, **options, **static, platform="cpu")
    assert {found.forward.family, found.gradient.family, found.tangent.family} == {"pure_jax"}
    assert found.forward.plan.sizes.D == 32


@needs_backend
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_hopper_gpu(dtype: str, monkeypatch: pytest.MonkeyPatch):
    pretend_gpu(monkeypatch, "9.0")
    found = explain(*types(dtype), platform="cuda")
    assert found.forward.family == "mosaic_gpu"
    assert found.forward.reasons.keys() == {"cudnn_gpu", "mosaic_tpu", "pure_jax"}
    assert found.forward.reasons["pure_jax"] == "mosaic_gpu comes first and supports the call"
    assert found.gradient.family == "mosaic_gpu"
    if dtype == "bfloat16":
        assert found.tangent.family == "mosaic_gpu"
        assert found.tangent.plan.block_kv == 64
    else:
        assert found.tangent.family == "pure_jax"
        assert found.tangent.reasons["mosaic_gpu"] == "its kernel for tangents is for 16 bits"
    assert explain(*types(dtype), implementation="pure_jax", platform="cuda").forward.family == "pure_jax"


def test_what_cannot_be_explained():
    with pytest.raises(ValueError, match="compiles=True needs the platform"):
        explain(*types(), platform="tpu", compiles=True)
    with pytest.raises(ValueError, match="platform must be one of"):
        explain(*types(), platform="gpu")
    with pytest.raises(NotImplementedError, match="cudnn"):
        explain(*types(), implementation="cudnn")
    with pytest.raises(ValueError, match="size 0"):
        explain(*types(T=0))
    with pytest.raises(NotImplementedError, match=r"does not run here: .* Of the others, .*'pure_jax': runs here"):
        explain(*types(), implementation="mosaic_gpu", platform="cpu")


def test_profiles_show_the_scope():
    text = jax.jit(jax.grad(lambda *x: flash_attention(*x).sum())).lower(*types("float32")).compile().as_text()
    assert re.search(r"op_name=\"[^\"]*\bflash_attention\)*/", text or "")


@pytest.mark.parametrize(
    ("strategy", "options", "visits"),
    thinned(
        [
            ("ring", {"is_causal": True, "order": "balanced"}, 4),
            ("all_gather", {}, 4),
            ("ring", {"is_causal": True, "local_window_size": (5, 0)}, 2),
            ("all_to_all", {}, 4),
            ("ring", {"is_causal": True, "local_window_size": (11, 0)}, 3),
        ],
        2,
    ),
)
def test_what_devices_send_is_what_the_program_sends(strategy: Any, options: dict[str, Any], visits: int):
    arrays, devices = types("float32", T=8), 4
    arrays[1:] = [jax.ShapeDtypeStruct((2, 8, 4, 64), jnp.float32)] * 2
    found = explain(*arrays, devices=devices, strategy=strategy, platform="cpu", **options)
    assert found.context is not None
    assert (found.context.visits, found.context.skipped) == (visits, devices - visits)
    assert str(found.context) in str(found)
    mesh = jax.make_mesh((devices,), ("s",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    spec = PartitionSpec(None, "s")
    attention = functools.partial(context_parallel_attention, axis_name="s", strategy=strategy, **options)
    over_all = jax.shard_map(attention, mesh=mesh, in_specs=spec, out_specs=spec)
    whole = [jax.ShapeDtypeStruct((2, 8 * devices, 4, 64), jnp.float32)] * 3

    def gradient(query: jax.Array, key: jax.Array, value: jax.Array, dout: jax.Array) -> Any:
        out, pullback = jax.vjp(over_all, query, key, value)
        return out, pullback(dout)

    def sent(program: Any, *arrays: Any) -> int:
        elements = collective_elements(jax.jit(program).lower(*arrays).compile().as_text())
        # What is gathered is in part the device's own; what is scattered or exchanged is counted by one part.
        part = {"all-gather": (devices - 1) / devices, "all-to-all": devices - 1, "reduce-scatter": devices - 1}
        return round(4 * sum(n * part.get(kind, 1) for kind, n in elements.items()))

    assert sent(over_all, *whole) == found.context.bytes_sent["forward"]
    both = found.context.bytes_sent["forward"] + found.context.bytes_sent["gradient"]
    # A ring sends keys and values once more in the gradient, unless XLA keeps what arrived the first time.
    again = found.context.bytes_sent["forward"] if strategy == "ring" else 0
    assert both - again <= sent(gradient, *whole, whole[0]) <= both


def test_compiling_is_for_one_device():
    with pytest.raises(ValueError, match="compiles=True is for one device, got devices=2"):
        explain(*types(), platform="cpu", devices=2, compiles=True)
