"""Which shapes the benchmarks measure: those with a name, in tables, and a grid of random ones; and the CPU's goals."""

import dataclasses
import random
from typing import Any

from harness.shapes import FORWARD, GRADIENT, MODES, AttentionShape, parse_dimensions, plain_shape


def find_shape(text: str) -> AttentionShape:
    """The shape named `text`, or the one that `text` writes out (see `parse_dimensions`)."""
    return NAMED_SHAPES[text] if text in NAMED_SHAPES else parse_dimensions(text)


def _row(dimensions: str, *, label: str = "", **settings: Any) -> AttentionShape:
    """A table row. Its name is that of its dimensions, with `label` before and the setting behind."""
    shape = parse_dimensions(dimensions)
    name = f"{label}-{shape.name}" if label else shape.name
    if settings.get("is_causal"):
        name += "-causal"
    return dataclasses.replace(shape, name=name, **settings)


_FORWARD_ALONE: dict[str, Any] = {"modes": (FORWARD,)}

CPU_SHAPES: tuple[AttentionShape, ...] = (
    _row("4x128x4x64"),
    _row("8x256x8x64"),
    _row("8x256x8x64", is_causal=True),
    _row("4x512x16x64"),
    _row("4x512x16x64", is_causal=True),
    _row("1x1024x8x64"),
    _row("1x1024x8x64", is_causal=True),
    _row("1x4096x8x64"),
    _row("1x4096x8x64", is_causal=True),
    _row("1x4096x8/2x64", label="gqa", is_causal=True),
    _row("1x8192x4x128", is_causal=True),
    _row("1x16384x2x64", is_causal=True, **_FORWARD_ALONE),
    _row("1x8192x4x64", label="window-256-0", local_window_size=(256, 0)),
    _row("1x8192x4x64", label="window-256-256", local_window_size=(256, 256)),
    _row("1x1/32768x8x64", label="decode", **_FORWARD_ALONE),
    _row("4x1/32768x8/2x128", label="decode", **_FORWARD_ALONE),
    _row("1x2048x4x64", label="bias", bias_shape=(1, 4, 2048, 2048)),
    _row("1x2048x8x64", label="bf16", dtype="bfloat16"),
)


def _gpu_row(dimensions: str, **settings: Any) -> AttentionShape:
    """A row of the GPU table: bfloat16 unless said."""
    return _row(dimensions, **{"dtype": "bfloat16", **settings})


GPU_SHAPES: tuple[AttentionShape, ...] = (
    _gpu_row("2x8192x16x128", label="gpu", is_causal=True),
    _gpu_row("2x8192x16x128", label="gpu"),
    _gpu_row("1x32768x16x128", label="gpu", is_causal=True),
    _gpu_row("4x4096x32/8x64", label="gpu-gqa", is_causal=True),
    _gpu_row("8x4096x32/8x128", label="mixtral", is_causal=True),
    _gpu_row("8x512x16x64", label="gpu"),
    _gpu_row("32x128x8x64", label="gpu"),
    _gpu_row(
        "384x384x4x64",
        label="alphafold",
        bias_shape=(1, 4, 384, 384),
        mask_shape=(384, 1, 1, 384),
    ),
    _gpu_row(
        "256x768x4x32",
        label="alphafold",
        bias_shape=(1, 4, 768, 768),
        mask_shape=(256, 1, 1, 768),
    ),
    _gpu_row("2x4096x16x64", label="gpu-bias", bias_shape=(1, 16, 4096, 4096)),
    _gpu_row("1x16384x32/8x128", label="gpu-window-1024-0", local_window_size=(1024, 0)),
    _gpu_row("8x4096x16x128", label="gpu-lengths", key_value_lengths=(512, 1024, 2048, 4096) * 2),
    _gpu_row("2x4096x8x256", label="gpu", is_causal=True),
    _gpu_row("3x3001x8x80", label="gpu-odd", is_causal=True),
    _gpu_row("4x1024x16x64", label="gpu-mask", mask_shape=(4, 1, 1024, 1024)),
    _gpu_row("32x512x12x64", label="bert-lengths", key_value_lengths=(512, 384, 256, 128) * 8),
    _gpu_row("1x8192x64/8x128", label="llama", is_causal=True),
    _gpu_row("2x4608x24x128", label="flux"),
    _gpu_row("16x729x16x72", label="siglip"),
    _gpu_row("64x256x16x72", label="dit"),
    _gpu_row("4x4096x8x40", label="stable-diffusion"),
    _gpu_row("32x1/32768x32/8x128", label="gpu-decode", key_value_lengths=(30000,) * 32, **_FORWARD_ALONE),
    _gpu_row("2x4096x16x128", label="gpu-f32", dtype="float32", is_causal=True),
    _gpu_row("1x2048x16x64", label="gpu-f32", dtype="float32", is_causal=True),
    _gpu_row("32x197x12x64", label="gpu-f32", dtype="float32"),
)

NAMED_SHAPES: dict[str, AttentionShape] = {row.name: row for row in CPU_SHAPES + GPU_SHAPES}
if len(NAMED_SHAPES) != len(CPU_SHAPES) + len(GPU_SHAPES):
    raise RuntimeError("two shapes have the same name")

# Batch, grouped heads, a long causal call, a window and decoding: seconds each on two CPU cores.
DEFAULT_SHAPES: tuple[AttentionShape, ...] = tuple(
    NAMED_SHAPES[name]
    for name in (
        "8x256x8x64",
        "4x512x16x64-causal",
        "1x1024x8x64",
        "gqa-1x4096x8/2x64-causal",
        "decode-1x1/32768x8x64",
    )
)

PRESETS: dict[str, tuple[AttentionShape, ...]] = {
    "default": DEFAULT_SHAPES,
    "cpu": CPU_SHAPES,
    "gpu": GPU_SHAPES,
    "all": CPU_SHAPES + GPU_SHAPES,
}

# What the plot over the sequence length resizes unless it is given another shape.
PLOT_SHAPE = dataclasses.replace(parse_dimensions("1x1024x4x64"), is_causal=True)


# What we want on a CPU: time as a fraction of jax.nn's, forward and perhaps gradient.
_CPU_GOALS: dict[str, tuple[float, ...]] = {
    "4x128x4x64": (0.75, 0.65),
    "8x256x8x64": (0.28, 0.60),
    "8x256x8x64-causal": (0.28, 0.55),
    "4x512x16x64": (0.28, 0.38),
    "4x512x16x64-causal": (0.28, 0.32),
    "1x1024x8x64": (0.25, 0.42),
    "1x1024x8x64-causal": (0.24, 0.32),
    "1x4096x8x64": (0.24, 0.27),
    "1x4096x8x64-causal": (0.16, 0.11),
    "gqa-1x4096x8/2x64-causal": (0.16, 0.19),
    "1x8192x4x128-causal": (0.17, 0.16),
    "1x16384x2x64-causal": (0.12,),
    "window-256-0-1x8192x4x64": (0.03, 0.012),
    "window-256-256-1x8192x4x64": (0.05, 0.019),
    "decode-1x1/32768x8x64": (0.25,),
    "decode-4x1/32768x8/2x128": (0.12,),
    "bias-1x2048x4x64": (0.30, 0.36),
    "bf16-1x2048x8x64": (0.27, 0.35),
}


def goal_of(shape: AttentionShape, mode: str) -> float | None:
    """The wanted time as a fraction of `jax.nn`'s; on a GPU to be no slower."""
    if shape in GPU_SHAPES:
        return 1.0
    for goal_mode, goal in zip(MODES, _CPU_GOALS.get(shape.name, ()), strict=False):
        if goal_mode == mode:
            return goal
    return None


def grid_shapes(
    count: int, seed: int = 0, max_dense_bytes: int = 2**30, max_flops: float = 4e10
) -> list[AttentionShape]:
    """`count` shapes spread over what callers use, the same list for the same arguments.

    Batch 1 to 64, lengths 1 to 4096 (half of them odd, some a single query), 1 to 32 heads of 16 to
    256, grouped or not, causal or not, float32 and bfloat16; in turn one with few scores, one with
    more and one with many. Kept are those whose dense gradient needs at most `max_dense_bytes` and
    whose two products take at most `max_flops` operations, so that the whole grid runs in minutes.
    A shorter list is the beginning of a longer one.
    """
    score_classes = ((0, 2**16), (2**16, 2**21), (2**21, 2**63))
    # random.Random: its stream is the same in every Python version, unlike NumPy's generators.
    rng = random.Random(seed)
    shapes: dict[str, AttentionShape] = {}
    while len(shapes) < count:
        batch = 2 ** rng.randint(0, 6)
        query_length = _random_length(rng)
        kind = rng.random()
        if kind < 0.5:
            key_value_length = query_length
        elif kind < 0.65:
            query_length, key_value_length = rng.randint(1, 16), _random_length(rng)
        else:
            key_value_length = _random_length(rng)
        num_heads = 2 ** rng.randint(0, 5)
        num_key_value_heads = num_heads
        if rng.random() < 0.25:
            num_key_value_heads = max(1, num_heads // rng.choice((2, 4, 8)))
        head_dim = rng.choice((16, 32, 48, 64, 80, 96, 128, 192, 256))
        is_causal = rng.random() < 0.5
        dtype = rng.choice(("float32", "bfloat16"))
        shape = plain_shape(
            batch, query_length, key_value_length, num_heads, num_key_value_heads, head_dim
        ).with_settings(dtype, is_causal)
        flops = 4 * shape.score_elements * head_dim
        fewest, most = score_classes[len(shapes) % len(score_classes)]
        if not fewest <= shape.score_elements < most:
            continue
        if shape.dense_bytes(GRADIENT) <= max_dense_bytes and flops <= max_flops:
            shapes[shape.name] = shape
    return list(shapes.values())


def _random_length(rng: random.Random) -> int:
    """1 to 4096, uniform in the logarithm; half are powers of two, half any number, often odd."""
    exponent = rng.uniform(0, 12)
    return 2 ** round(exponent) if rng.random() < 0.5 else round(2**exponent)
