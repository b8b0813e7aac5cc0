"""`score_mod` and `mask_mod` lower for CUDA as on a Hopper GPU, without one, in its kernels."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_native_flash_attn import explain, flash_attention, mods
from jax_native_flash_attn._kernels.xla.family import XlaKernels
from tests.support.grids import in_part, thinned
from tests.support.hopper_mods import CALLS, ModCall, attention, floats, split
from tests.support.targets import needs_backend, pretend_gpu

pytestmark = needs_backend


@pytest.fixture
def no_pure_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("took the pure JAX kernels")

    for name in ("forward", "cotangent", "tangent"):
        monkeypatch.setattr(XlaKernels, name, refuse)


def _text(call: ModCall, kind: str) -> str:
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jax.eval_shape(lambda: floats(call)))
    traced = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), split(call.options)[0])

    def run(arrays: Any, traced: Any) -> Any:
        def of(wanted: Any) -> Any:
            return attention(call, {**arrays, **wanted}, traced, implementation="mosaic_gpu")

        wanted = {name: arrays[name] for name in call.wanted}
        if kind == "value":
            return of(wanted)
        if kind == "tangent":
            return jax.jvp(of, (wanted,), (wanted,))
        return jax.value_and_grad(lambda x: of(x).astype(jnp.float32).sum())(wanted)

    return jax.jit(run).trace(arrays, traced).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("no_pure_jax")
@pytest.mark.parametrize("name", thinned(list(CALLS), 13, 7))
def test_value_and_gradients(name: str) -> None:
    """A kernel for the forward, one for query, one for key and value or one each, and one for a bias."""
    kernels = _text(CALLS[name], "gradient").count("custom_call @mosaic_gpu")
    assert kernels >= 3 + ("bias" in CALLS[name].wanted)


@pytest.mark.usefixtures("no_pure_jax")
def test_a_choice_by_one_number() -> None:
    assert _text(CALLS["by batch row"], "value").count("custom_call @mosaic_gpu") == 1


@pytest.mark.usefixtures("no_pure_jax")
@pytest.mark.parametrize("name", thinned(["alibi", "gate", "prefix"], 3, 2))
def test_tangents(name: str) -> None:
    assert _text(CALLS[name], "tangent").count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("score_mod has the primitive erf_inv", {"score_mod": lambda s, *_: jax.lax.erf_inv(s)}),
        (
            "mask_mod gathers from an argument by an index that it computes from query_index",
            {"mask_mod": lambda b, h, q, k, x: x[q // 2], "mask_mod_args": (jax.ShapeDtypeStruct((512,), bool),)},
        ),
    ],
)
def test_explain_says_why(reason: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "9.0")
    x = jax.ShapeDtypeStruct((1, 1024, 8, 64), "bfloat16")
    found = explain(x, x, x, platform="cuda", **options)
    for each in (found.forward, found.gradient, found.tangent):
        assert each.family == "pure_jax"
        assert reason in each.reasons["mosaic_gpu"]


def test_explain_of_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "9.0")
    x = jax.ShapeDtypeStruct((1, 1024, 8, 64), "bfloat16")
    found = explain(x, x, x, platform="cuda", score_mod=mods.SoftCap(2.0))
    assert {each.family for each in (found.forward, found.gradient, found.tangent)} == {"mosaic_gpu"}


@in_part(1)
@pytest.mark.usefixtures("no_pure_jax")
def test_the_gradient_of_arguments_takes_pure_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "9.0")
    x, slopes = jax.ShapeDtypeStruct((1, 256, 8, 64), "bfloat16"), jax.ShapeDtypeStruct((8,), "float32")

    def loss(query: Any, slopes: Any) -> jax.Array:
        mod = {"score_mod": mods.alibi, "score_mod_args": (slopes,)}
        return flash_attention(query, query, query, **mod, implementation="mosaic_gpu").astype(jnp.float32).sum()

    jax.jit(jax.grad(loss)).trace(x, slopes).lower(lowering_platforms=("cuda",))
    with pytest.raises(AssertionError, match="took the pure JAX kernels"):
        jax.jit(jax.grad(loss, (0, 1))).trace(x, slopes).lower(lowering_platforms=("cuda",))
