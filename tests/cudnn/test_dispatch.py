"""When cuDNN's kernels are taken: by the GPU, by the call, by what was asked for. On the double of `jax.nn`'s call."""

from typing import Any

import jax
import numpy as np
import pytest
from jax import export

from jax_native_flash_attn import explain, flash_attention
from jax_native_flash_attn._kernels.cudnn import public
from tests.support.cudnn import double
from tests.support.targets import pretend_gpu

NAME = "cudnn_gpu"
Shape = jax.ShapeDtypeStruct


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of `jax.nn`; those are not lowered for a GPU of this process, but asked for types."""
    found: list[Any] = []

    def attention(*args: Any, **kwargs: Any) -> jax.Array:
        found.append(kwargs)
        return double(*args, **kwargs)

    monkeypatch.setattr(public, "jax_attention", attention)
    return found


def types(dtype: str = "bfloat16", T: int = 1024, H: int = 64, S: int | None = None) -> tuple[Shape, Shape, Shape]:
    query, key = (Shape((2, length, heads, H), dtype) for length, heads in ((T, 4), (S or T, 2)))
    return query, key, key


def families(*arrays: Any, **options: Any) -> tuple[str, str, str]:
    found = explain(*arrays, platform="cuda", **options)
    return found.forward.family, found.gradient.family, found.tangent.family


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("capability", "family"),
    [("7.5", "pure_jax"), *((x, NAME) for x in ("8.0", "8.6", "8.9", "10.0", "12.0")), ("9.0", "mosaic_gpu")],
)
def test_by_compute_capability(capability: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, capability)
    tangent = "mosaic_gpu" if capability == "9.0" else "pure_jax"
    for implementation in (None, "xla"):
        assert families(*types(), is_causal=True, implementation=implementation) == (family, family, tangent)
    assert families(*types(), implementation="pure_jax") == ("pure_jax",) * 3
    if capability != "7.5":
        assert families(*types(), implementation=NAME) == (NAME, NAME, tangent)
    wide = "mosaic_gpu" if capability == "9.0" else "pure_jax"
    assert families(*types(H=256))[0] == wide


def test_several_kinds_of_gpus(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, family in ((("8.0", "8.9"), NAME), (("7.5", "8.0"), "pure_jax"), ((), "pure_jax")):
        pretend_gpu(monkeypatch, *capabilities)
        assert families(*types())[0] == family


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("takes bfloat16 and float16, got float32", {"dtype": "float32"}),
        ("multiples of 8, got 20", {"H": 20}),
        ("up to 128 on compute capability 8.0, got 256", {"H": 256}),
        ("for 7340032 scores, fewer than 8388608", {"T": 896, "S": 1024}),
        ("dropout", {"dropout_rate": 0.5, "dropout_rng": Shape((2,), "uint32")}),
        ("soft cap", {"logits_soft_cap": 5.0}),
        ("sinks", {"sinks": Shape((4,), "float32")}),
        ("score_mod is a function", {"score_mod": lambda score, *_: 2 * score}),
        ("mask_mod is a function", {"mask_mod": lambda b, h, q, k: q >= k}),
        ("block_q", {"block_q": 64}),
        ("names an algorithm", {"precision": "BF16_BF16_F32"}),
        ("this one is an array", {"scale": Shape((), "float32")}),
        ("a positive scale, got -0.3", {"scale": -0.3}),
        ("a positive scale, got 0", {"scale": 0}),
        ("got 1030 rows and 1024 keys", {"T": 1030, "S": 1024, "is_causal": True, "local_window_size": (5, 0)}),
        ("window (a constant mask may be one) only to the left", {"local_window_size": (5, 5)}),
        ("window (a constant mask may be one) only to the left", {"mask": np.zeros((1, 1, 1024, 1024), bool)}),
        ("only to the left", {"is_causal": True, "query_offset": 3}),
        ("not offsets", {"is_causal": True, "query_offset": Shape((), "int32")}),
        ("not offsets", {"local_window_size": (Shape((), "int32"), 0)}),
        ("ids", {name: Shape((2, 1024), "int32") for name in ("query_segment_ids", "key_value_segment_ids")}),
        ("a bias that is bfloat16", {"bias": Shape((1, 4, 1024, 1024), "float32")}),
        ("a bias that has rows and keys", {"bias": Shape((1, 4, 1, 1024), "bfloat16")}),
        (
            "elements, more than",
            {"bias": Shape((1, 4, 1024, 1024), "bfloat16"), "mask": Shape((2, 1, 1, 1024), "bool")},
        ),
    ],
)
def test_reasons(reason: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "8.0")
    options = dict(options)
    arrays = types(**{name: options.pop(name) for name in ("dtype", "T", "H", "S") if name in options})
    found = explain(*arrays, **options, platform="cuda").forward
    assert found.family == "pure_jax"
    assert reason in found.reasons[NAME]


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "local_window_size": (100, 0)},
        {"local_window_size": (100, 0)},
        {"query_seq_lengths": Shape((2,), "int32"), "key_value_seq_lengths": Shape((2,), "int32")},
        {"mask": Shape((2, 1, 1024, 1024), "bool"), "is_causal": True},
        {"mask": Shape((1, 1, 1, 1024), "bool")},
        {"T": 2, "S": 1 << 19},
        {"bias": Shape((1, 4, 1024, 1024), "bfloat16")},
        {"scale": 0.3, "dtype": "float16"},
    ],
)
def test_what_is_taken(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "8.0")
    options = dict(options)
    arrays = types(**{name: options.pop(name) for name in ("dtype", "T", "H", "S") if name in options})
    assert families(*arrays, **options) == (NAME, NAME, "pure_jax")


@pytest.mark.parametrize("implementation", [None, NAME])
def test_odd_lengths(implementation: Any, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`jax.nn` refuses their gradients: other kernels do that, and the forward pass before it, asked or not."""
    pretend_gpu(monkeypatch, "8.0")
    arrays = types(T=1025)
    assert families(*arrays, implementation=implementation) == (NAME, "pure_jax", "pure_jax")
    reasons = explain(*arrays, implementation=implementation, platform="cuda").gradient.reasons
    assert reasons[NAME] == "jax.nn says of cuDNN: Unsupported sequence length Q 1025, KV 1025"
    asked.clear()
    value = jax.jit(lambda *x: flash_attention(*x, implementation=implementation).astype("float32").sum())
    jax.jit(jax.grad(value)).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert not asked
    value.trace(*arrays).lower(lowering_platforms=("cuda",))
    assert asked


def test_where_jax_finds_no_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*unused: Any, **kwargs: Any) -> None:
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(public, "jax_attention", refuse)
    pretend_gpu(monkeypatch, "8.0")
    # Not a shape of another test: answers are kept.
    found = explain(*types(T=1032), platform="cuda").forward
    assert found.family == "pure_jax"
    assert found.reasons[NAME] == "jax.nn says of cuDNN: cuDNN is not detected"


def test_programs(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lowered for GPUs like the one here calls cuDNN; what is exported, or for several platforms, does not."""
    pretend_gpu(monkeypatch, "8.0")
    arrays = types(T=1040)

    def is_called(lower: Any, implementation: Any = None) -> bool:
        call = jax.jit(lambda *x: flash_attention(*x, is_causal=True, implementation=implementation))
        explain(*arrays, is_causal=True, platform="cuda")  # answers are kept
        asked.clear()
        lower(call)
        return bool(asked)

    assert is_called(lambda call: call.trace(*arrays).lower(lowering_platforms=("cuda",)))
    assert not is_called(lambda call: call.trace(*arrays).lower(lowering_platforms=("cuda", "cpu")))
    assert not is_called(lambda call: call.trace(*arrays).lower(lowering_platforms=("rocm",)))
    assert not is_called(lambda call: export.export(call, platforms=("cuda",))(*arrays))
    assert is_called(lambda call: export.export(call, platforms=("cuda",))(*arrays), NAME)
    with pytest.raises(NotImplementedError, match="compiled for accelerator"):
        is_called(lambda call: call.trace(*arrays).lower(lowering_platforms=("rocm",)), NAME)
