"""Named attention shapes and their random inputs, shared by the benchmarks and the tests.

Axis letters: B batch, T query length, S key/value length, N query heads, K key/value heads,
H head dimension.
"""

import dataclasses
import random
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FORWARD = "forward"
GRADIENT = "gradient"
MODES = (FORWARD, GRADIENT)


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Everything that decides what one attention call computes, except the numbers.

    `goal` maps a mode to the time we want as a fraction of `jax.nn.dot_product_attention`'s time.
    """

    name: str
    batch: int
    query_length: int
    key_value_length: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    is_causal: bool = False
    local_window_size: tuple[int, int] | None = None
    bias_shape: tuple[int, int, int, int] | None = None
    mask_shape: tuple[int, int, int, int] | None = None
    dtype: str = "float32"
    key_value_lengths: tuple[int, ...] | None = None
    modes: tuple[str, ...] = MODES
    goal: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def score_elements(self) -> int:
        """Number of elements of the (B, N, T, S) array that dense attention makes."""
        return self.batch * self.num_heads * self.query_length * self.key_value_length

    def dense_bytes(self, mode: str) -> int:
        """Estimated temporary bytes of `jax.nn`'s dense code: float32 arrays of all scores.

        The counts are those that XLA:CPU reports: logits and probabilities in the forward pass,
        one array more for their cotangent, and one more for grouped heads.
        """
        arrays = 2 if mode == FORWARD else 3
        arrays += self.num_heads != self.num_key_value_heads
        return arrays * self.score_elements * max(4, np.dtype(jnp.dtype(self.dtype)).itemsize)

    def with_settings(
        self,
        dtype: str | None = None,
        is_causal: bool | None = None,
        local_window_size: tuple[int, int] | None = None,
    ) -> "AttentionShape":
        """Another dtype, causality or window under a name that says so; the goals are dropped."""
        changes: dict[str, Any] = {}
        suffix = ""
        if is_causal is not None and is_causal != self.is_causal:
            changes["is_causal"] = is_causal
            suffix += "-causal" if is_causal else "-full"
        if local_window_size is not None and local_window_size != self.local_window_size:
            changes["local_window_size"] = local_window_size
            suffix += "-window-{}-{}".format(*local_window_size)
        if dtype is not None and dtype != self.dtype:
            changes["dtype"] = dtype
            suffix += f"-{dtype}"
        if not changes:
            return self
        return dataclasses.replace(self, name=self.name + suffix, goal={}, **changes)

    def with_length(self, length: int) -> "AttentionShape":
        """The same call with `length` queries and `length` keys, for plots over the length."""
        if self.bias_shape or self.mask_shape or self.key_value_lengths:
            raise ValueError(f"{self.name}: only shapes without bias, mask and lengths are resized")
        resized = _plain(self.batch, length, length, self.num_heads, self.num_key_value_heads, self.head_dim)
        return resized.with_settings(self.dtype, self.is_causal, self.local_window_size)


class AttentionInputs(NamedTuple):
    """Arrays of one call; `cotangent` is what the gradient call is given for the output."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    mask: jax.Array | None
    key_value_seq_lengths: jax.Array | None
    cotangent: jax.Array


def make_inputs(shape: AttentionShape, seed: int = 0) -> AttentionInputs:
    """Random normal inputs for `shape`, the same on every platform for a given seed.

    A boolean mask keeps about four keys in five, and always the first one, so that no row is
    without a key.
    """
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(shape.dtype)

    def normal(*array_shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(array_shape, dtype=np.float32), dtype)

    query_shape = (shape.batch, shape.query_length, shape.num_heads, shape.head_dim)
    key_shape = (shape.batch, shape.key_value_length, shape.num_key_value_heads, shape.head_dim)
    query, cotangent = normal(*query_shape), normal(*query_shape)
    key, value = normal(*key_shape), normal(*key_shape)
    bias = None if shape.bias_shape is None else normal(*shape.bias_shape)
    mask = lengths = None
    if shape.mask_shape is not None:
        keep = rng.random(shape.mask_shape) < 0.8
        keep[..., 0] = True
        mask = jnp.asarray(keep)
    if shape.key_value_lengths is not None:
        lengths = jnp.asarray(shape.key_value_lengths, jnp.int32)
    return AttentionInputs(query, key, value, bias, mask, lengths, cotangent)


def find_shape(text: str) -> AttentionShape:
    """The shape named `text`, or the one that `text` writes out (see `parse_dimensions`)."""
    return NAMED_SHAPES[text] if text in NAMED_SHAPES else parse_dimensions(text)


def parse_dimensions(text: str) -> AttentionShape:
    """A plain call from its dimensions: `BxTxNxH` or `B,T,S,N,K,H`.

    In the first form S is T and K is N, unless written as `T/S` and `N/K`: `1x4096x8/2x64` has 8
    query heads on 2 key/value heads, `4x1/32768x8x64` has one query on 32,768 keys.
    """
    if re.fullmatch(r"\d+(,\d+){5}", text):
        return _plain(*(int(number) for number in text.split(",")))
    match = re.fullmatch(r"(\d+)x(\d+)(?:/(\d+))?x(\d+)(?:/(\d+))?x(\d+)", text)
    if match is None:
        raise ValueError(
            f"{text!r} is neither a named shape nor BxTxNxH (as 1x4096x8/2x64) nor B,T,S,N,K,H; "
            f"named shapes: {', '.join(NAMED_SHAPES)}"
        )
    batch, query_length, key_length, heads, key_heads, head_dim = match.groups()
    return _plain(
        int(batch),
        int(query_length),
        int(key_length or query_length),
        int(heads),
        int(key_heads or heads),
        int(head_dim),
    )


def _plain(
    batch: int,
    query_length: int,
    key_value_length: int,
    num_heads: int,
    num_key_value_heads: int,
    head_dim: int,
) -> AttentionShape:
    """A shape without mask or bias, named as `parse_dimensions` reads it."""
    if num_key_value_heads < 1 or num_heads % num_key_value_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_key_value_heads} key/value heads")
    lengths, heads = f"{query_length}", f"{num_heads}"
    if key_value_length != query_length:
        lengths += f"/{key_value_length}"
    if num_key_value_heads != num_heads:
        heads += f"/{num_key_value_heads}"
    return AttentionShape(
        name=f"{batch}x{lengths}x{heads}x{head_dim}",
        batch=batch,
        query_length=query_length,
        key_value_length=key_value_length,
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
    )


def _row(dimensions: str, *goals: float, label: str = "", **settings: Any) -> AttentionShape:
    """A table row: its dimensions, a goal for the forward mode and perhaps one for the gradient.

    Its name is that of its dimensions, with `label` before and the setting behind.
    """
    shape = parse_dimensions(dimensions)
    name = f"{label}-{shape.name}" if label else shape.name
    if settings.get("is_causal"):
        name += "-causal"
    goal = dict(zip(MODES, goals, strict=False))
    return dataclasses.replace(shape, name=name, modes=tuple(goal), goal=goal, **settings)


# What we want on a CPU: time as a fraction of jax.nn's, forward and gradient.
CPU_SHAPES: tuple[AttentionShape, ...] = (
    _row("4x128x4x64", 0.75, 0.65),
    _row("8x256x8x64", 0.28, 0.60),
    _row("8x256x8x64", 0.28, 0.55, is_causal=True),
    _row("4x512x16x64", 0.28, 0.38),
    _row("4x512x16x64", 0.28, 0.32, is_causal=True),
    _row("1x1024x8x64", 0.25, 0.42),
    _row("1x1024x8x64", 0.24, 0.32, is_causal=True),
    _row("1x4096x8x64", 0.24, 0.27),
    _row("1x4096x8x64", 0.16, 0.11, is_causal=True),
    _row("1x4096x8/2x64", 0.16, 0.19, label="gqa", is_causal=True),
    _row("1x8192x4x128", 0.17, 0.16, is_causal=True),
    _row("1x16384x2x64", 0.12, is_causal=True),
    _row("1x8192x4x64", 0.03, 0.012, label="window-256-0", local_window_size=(256, 0)),
    _row("1x8192x4x64", 0.05, 0.019, label="window-256-256", local_window_size=(256, 256)),
    _row("1x1/32768x8x64", 0.25, label="decode"),
    _row("4x1/32768x8/2x128", 0.12, label="decode"),
    _row("1x2048x4x64", 0.30, 0.36, label="bias", bias_shape=(1, 4, 2048, 2048)),
    _row("1x2048x8x64", 0.27, 0.35, label="bf16", dtype="bfloat16"),
)


def _gpu_row(dimensions: str, *goals: float, **settings: Any) -> AttentionShape:
    """A row of the GPU table: bfloat16 unless said, and at most jax.nn's time unless said."""
    return _row(dimensions, *(goals or (1.0, 1.0)), **{"dtype": "bfloat16", **settings})


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
    _gpu_row("32x1/32768x32/8x128", 1.0, label="gpu-decode", key_value_lengths=(30000,) * 32),
    _gpu_row("2x4096x16x128", label="gpu-f32", dtype="float32", is_causal=True),
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
        shape = _plain(batch, query_length, key_value_length, num_heads, num_key_value_heads, head_dim).with_settings(
            dtype, is_causal
        )
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
