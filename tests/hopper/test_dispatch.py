"""When the Mosaic GPU kernels are taken: by the GPU, by the call, by what was asked for."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_native_flash_attn import explain
from tests.support.cases import Case, call_types
from tests.support.environment import enable_x64
from tests.support.grids import in_part
from tests.support.hopper import lowered_text
from tests.support.targets import needs_backend, pretend_gpu, pretend_no_backend

BFLOAT16, FLOAT32 = Case((1, 128, 128, 2, 1, 64), "bfloat16"), Case((1, 128, 128, 2, 1, 64))


@needs_backend
def test_pure_jax_unless_asked_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    assert "mosaic_gpu" not in lowered_text(None, "cuda")
    assert "mosaic_gpu" not in lowered_text("pure_jax", "cuda")


@needs_backend
@pytest.mark.parametrize(("capability", "expected"), [("9.0", True), ("8.0", False), ("10.0", False)])
def test_dispatch_by_compute_capability(capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, capability)
    for implementation in (None, "xla"):
        assert ("mosaic_gpu" in lowered_text(implementation, "cuda")) == expected
    assert "mosaic_gpu" not in lowered_text("pure_jax", "cuda")


def test_several_platforms_take_pure_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "9.0")
    assert "mosaic_gpu" not in lowered_text(None, "cpu", "cuda")


@pytest.mark.parametrize(
    ("reason", "case", "options"),
    [
        ("compiled for cpu", BFLOAT16, {}),
        ("precision is .*HIGHEST", FLOAT32, {"precision": "highest"}),
        ("more than 64 query rows", Case((1, 64, 128, 2, 1, 64)), {}),
        ("more than one key", Case((1, 128, 1, 2, 1, 64)), {}),
        ("got float64", Case((1, 128, 128, 2, 1, 64), "float64"), {}),
        ("up to 256, got 264", Case((1, 128, 128, 2, 1, 264), "bfloat16"), {}),
        ("block_q", Case((1, 128, 128, 2, 1, 64), "bfloat16", block_q=64), {}),
    ],
)
def test_asking_where_it_cannot_run_is_an_error(reason: str, case: Case, options: dict[str, Any]) -> None:
    platform = "cpu" if reason == "compiled for cpu" else "cuda"
    with enable_x64("float64" in reason), pytest.raises(NotImplementedError, match=reason):
        lowered_text("mosaic_gpu", platform, case=case, **options)


@in_part(1)
@needs_backend
def test_unsupported_calls_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "9.0")
    assert "mosaic_gpu" not in lowered_text(None, "cuda", case=Case((1, 128, 128, 2, 1, 264), "bfloat16"))
    assert "mosaic_gpu" in lowered_text(None, "cuda", case=FLOAT32)
    # As XLA multiplies on a GPU; each spelling as the others of the same precision.
    x = call_types(FLOAT32)
    for precision in ("highest", "float32", jax.lax.Precision.HIGHEST, ("default", "highest"), "F32_F32_F32"):
        assert explain(**x, platform="cuda", precision=precision).forward.family == "pure_jax"
    for precision in ("default", "fastest", "bfloat16", "high", "bfloat16_3x", "tensorfloat32", ("high", "default")):
        assert explain(**x, platform="cuda", precision=precision).forward.family == "mosaic_gpu"
    assert "mosaic_gpu" not in lowered_text(None, "cuda", case=FLOAT32, precision="highest")
    assert "mosaic_gpu" in lowered_text(None, "cuda", case=FLOAT32, precision="high")
    assert "mosaic_gpu" not in lowered_text(None, "cuda", precision="BF16_BF16_F32")
    assert "mosaic_gpu" not in lowered_text(None, "cuda", score_mod=lambda score, *_: jnp.sin(score))
    for function in ({"score_mod": lambda score, *_: 2 * score}, {"mask_mod": lambda batch, head, q, k: q >= k}):
        assert "mosaic_gpu" in lowered_text(None, "cuda", **function)


def test_one_warning_on_a_hopper_gpu_without_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_no_backend(monkeypatch, "no module named absl")
    for capabilities, implementation, warns in (
        ({"9.0"}, "pure_jax", False),
        (set(), None, False),
        ({"8.0"}, None, False),
        ({"9.0"}, None, True),
        ({"9.0"}, None, False),  # once
    ):
        pretend_gpu(monkeypatch, *capabilities)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert "mosaic_gpu" not in lowered_text(implementation, "cuda")
            assert "mosaic_gpu" not in lowered_text(implementation, "cpu")
        messages = [str(w.message) for w in found if "flash_attention" in str(w.message)]
        assert len(messages) == warns, (capabilities, implementation)
        assert all("absl" in m and "[hopper]" in m for m in messages)
