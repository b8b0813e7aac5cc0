"""Decodes with a key/value cache, and measures how fast while the cache fills.

    uv run examples/decode_with_cache.py

A conversation of several turns with a transformer of random weights. In each turn a prompt is read by chunks, and a
reply is written byte by byte. Keys and values of all that was read or written stay in a cache of fixed size.
`query_offset` tells attention where in the cache its queries stand. It is traced: there are two programs, one for
chunks and one for single bytes, compiled before the first turn. One forward over the whole conversation, without a
cache, must give the same logits; otherwise the exit code is 1.

The table compares three kinds of attention. `flash` visits what is filled of the cache. `window` is flash attention to
the last tokens alone (`local_window_size`), and visits those. `dense` is jax.nn's under a mask, and visits the whole
cache, however little is in it.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _memory import peak_memory_gib
from flax import nnx
from tqdm import tqdm
from train_language_model import rotate, standard_library

from jax_native_flash_attn import flash_attention

TOLERANCE = 1e-4  # relative to the largest logit; float32 rounding stays well below

# ------------------------------------------------------------------------------------ attention

# (query, key, value, offset) -> out: of queries (B, t, N, H) at positions offset, offset + 1, ...
# to keys and values (B, S, K, H) at positions 0, 1, ...
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | int], jax.Array]


def flash(
    query: jax.Array, key: jax.Array, value: jax.Array, offset: jax.Array | int, window: int | None = None
) -> jax.Array:
    last = None if window is None else (window - 1, 0)
    return flash_attention(query, key, value, is_causal=True, query_offset=offset, local_window_size=last)


def dense(query: jax.Array, key: jax.Array, value: jax.Array, offset: jax.Array | int) -> jax.Array:
    is_visible = jnp.arange(key.shape[1]) <= offset + jnp.arange(query.shape[1])[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=is_visible[None, None])


# ---------------------------------------------------------------------------------------- model


class Cache(NamedTuple):
    """Keys and values of one layer, each (B, S, K, H)."""

    key: jax.Array
    value: jax.Array

    def write(self, key: jax.Array, value: jax.Array, offset: jax.Array | int) -> "Cache":
        """With (B, t, K, H) put behind the first `offset` tokens, where there must be room: XLA does not check it."""
        pairs = zip(self, (key, value), strict=True)
        return Cache(*(jax.lax.dynamic_update_slice_in_dim(cached, x, offset, axis=1) for cached, x in pairs))


class Block(nnx.Module):
    """With grouped queries: N heads of query share K of key and value, which keeps the cache small."""

    def __init__(self, width: int, heads: int, cached_heads: int, head_dim: int, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.project_query = nnx.LinearGeneral(width, (heads, head_dim), use_bias=False, rngs=rngs)
        self.project_key_value = nnx.LinearGeneral(width, (2, cached_heads, head_dim), use_bias=False, rngs=rngs)
        self.project_out = nnx.LinearGeneral((heads, head_dim), width, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(
        self, x: jax.Array, cache: Cache | None, offset: jax.Array | int, attention: Attention
    ) -> tuple[jax.Array, Cache | None]:
        normed = self.attention_norm(x)
        positions = offset + jnp.arange(x.shape[1])
        query = rotate(self.project_query(normed), positions)  # (B, t, N, H)
        key, value = jnp.moveaxis(self.project_key_value(normed), -3, 0)  # each (B, t, K, H)
        key = rotate(key, positions)
        if cache is not None:
            cache = key, value = cache.write(key, value, offset)  # each (B, S, K, H)
        x = x + self.project_out(attention(query, key, value, offset))
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x)))), cache


class Decoder(nnx.Module):
    """Logits (B, t, 256) of the byte that follows each byte of `text` (B, t), and the caches with these bytes.

    Without caches, `text` is all that there is.
    """

    def __init__(self, layers: int, width: int, heads: int, cached_heads: int, head_dim: int, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(256, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, cached_heads, head_dim, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 256, use_bias=False, rngs=rngs)

    def __call__(
        self,
        text: jax.Array,
        caches: list[Cache] | None = None,
        offset: jax.Array | int = 0,
        *,
        attention: Attention,
    ) -> tuple[jax.Array, list[Cache | None]]:
        x = self.embedding(text)
        updated = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x, cache = block(x, cache, offset, attention)
            updated.append(cache)
        return self.head(self.norm(x)), updated


# ------------------------------------------------------------------------------------- decoding


Program = Callable[[jax.Array, list[Cache], int], tuple[jax.Array, list[Cache], jax.Array]]


def make_compiler(model: Decoder, caches: list[Cache]) -> Callable[[int, Attention], Program]:
    """What compiles a program (text, caches, offset) -> logits, caches, following byte for texts of a length."""
    graph, weights = nnx.split(model)

    def program(weights: nnx.State, text: jax.Array, caches: list[Cache], offset: jax.Array, attention: Attention):
        logits, updated = nnx.merge(graph, weights)(text, caches, offset, attention=attention)
        return logits, updated, logits[:, -1:].argmax(-1).astype(jnp.int32)

    # Donated, the caches are updated in place.
    jitted = jax.jit(program, donate_argnames="caches", static_argnames="attention")

    @functools.cache
    def compile_for(length: int, attention: Attention) -> Program:
        # Compiled ahead it would refuse any other shape, so that nothing is compiled again.
        text = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = jitted.lower(weights, text, caches, jnp.int32(0), attention=attention).compile()
        return lambda text, caches, offset: compiled(weights, text, caches, jnp.int32(offset))

    return compile_for


@functools.partial(nnx.jit, static_argnames="attention")
def forward(model: Decoder, text: jax.Array, attention: Attention) -> jax.Array:
    """All logits at once."""
    return model(text, attention=attention)[0]


class Conversation(NamedTuple):
    """What was read and written, (1, bytes), its logits, and the tokens per second of each turn: medians."""

    text: jax.Array
    logits: jax.Array
    read: list[float]
    written: list[float]


def converse(
    prompts: np.ndarray, chunk: int, reply: int, read: Program, write: Program, caches: list[Cache], bar: tqdm
) -> Conversation:
    """Reads each of the prompts (turns, bytes) by chunks and writes a reply to each, the likeliest bytes."""
    texts, found, read_speeds, write_speeds = [], [], [], []
    offset = 0

    def follow(program: Program, text: jax.Array) -> tuple[jax.Array, float]:
        """The following byte, and the tokens per second."""
        nonlocal caches, offset
        started = time.perf_counter()
        logits, caches, following = jax.block_until_ready(program(text, caches, offset))
        seconds = time.perf_counter() - started
        offset += text.shape[1]
        texts.append(text)
        found.append(logits)
        bar.update(text.shape[1])
        return following, text.shape[1] / seconds

    for prompt in prompts:
        following, speeds = jnp.zeros((1, 1), jnp.int32), []
        for text in prompt.reshape(-1, 1, chunk):
            following, speed = follow(read, jnp.asarray(text, jnp.int32))
            speeds.append(speed)
        read_speeds.append(float(np.median(speeds)))
        speeds = []
        for _ in range(reply):
            following, speed = follow(write, following)
            speeds.append(speed)
        write_speeds.append(float(np.median(speeds)))
    return Conversation(jnp.concatenate(texts, 1), jnp.concatenate(found, 1), read_speeds, write_speeds)


# ----------------------------------------------------------------------------------- the command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Decodes with a key/value cache, and measures how fast while the cache fills.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--turns", type=int, default=8, help="prompts and replies; the cache holds all of them")
    parser.add_argument("--prompt", type=int, default=992, help="bytes of each prompt")
    parser.add_argument("--reply", type=int, default=32, help="bytes of each reply")
    parser.add_argument("--chunk", type=int, default=248, help="bytes of a prompt that are read at once")
    parser.add_argument("--window", type=int, default=512, help="tokens that the attention with a window sees")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks")
    parser.add_argument("--width", type=int, default=256, help="features of a token")
    parser.add_argument("--heads", type=int, default=16, help="attention heads of query")
    parser.add_argument("--cached-heads", type=int, default=4, help="attention heads of key and value")
    parser.add_argument("--head-dim", type=int, default=32, help="size of a head")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args(argv)
    if min(size for name, size in vars(args).items() if name != "seed") < 1:
        parser.error("all but --seed must be positive")
    if args.prompt % args.chunk:
        parser.error("--prompt must be a multiple of --chunk")
    if args.heads % args.cached_heads or args.head_dim % 2:
        parser.error("--heads must be a multiple of --cached-heads, and --head-dim even")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    started = time.perf_counter()
    model = Decoder(args.layers, args.width, args.heads, args.cached_heads, args.head_dim, nnx.Rngs(args.seed))
    total = args.turns * (args.prompt + args.reply)
    cached_mib = 2 * args.layers * total * args.cached_heads * args.head_dim * 4 / 2**20
    print(f"{args.layers} layers, {args.heads} heads of query, {args.cached_heads} of key and value")
    print(f"a cache of {total:,} tokens, {cached_mib:.0f} MiB; prompts are read by chunks of {args.chunk}\n")
    text, _ = standard_library()
    prompts = text[: args.turns * args.prompt].reshape(args.turns, args.prompt)
    window = functools.partial(flash, window=args.window)
    kinds: dict[str, Attention] = {"flash": flash, f"window {args.window}": window, "dense": dense}
    found: dict[str, Conversation] = {}
    differences: dict[str, float] = {}
    shape = (1, total, args.cached_heads, args.head_dim)

    def empty_caches() -> list[Cache]:
        return [Cache(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(args.layers)]

    compile_for = make_compiler(model, empty_caches())
    with tqdm(total=len(kinds) * total, unit="token", disable=None) as bar:
        for kind, attention in kinds.items():
            bar.set_description(kind)
            # Chunks by dense attention would take minutes, and so would a whole forward: flash attention does them.
            without_cache = flash if attention is dense else attention
            read, write = compile_for(args.chunk, without_cache), compile_for(1, attention)
            found[kind] = converse(prompts, args.chunk, args.reply, read, write, empty_caches(), bar)
            expected = forward(model, found[kind].text, without_cache)
            largest = jnp.abs(expected).max()
            differences[kind] = float(jnp.abs(found[kind].logits - expected).max() / largest)

    print("tokens in  tokens per second, median")
    print(
        "the cache   reading" + "".join(f"{f'writing: {kind}' if i == 0 else kind:>17}" for i, kind in enumerate(kinds))
    )
    for turn in range(args.turns):
        writing = "".join(f"{of_kind.written[turn]:20,.0f}" for of_kind in found.values())
        print(f"{(turn + 1) * (args.prompt + args.reply):9,}{found['flash'].read[turn]:10,.0f}{writing}")
    print("\nLargest difference of a logit from one forward without a cache, relative to the largest logit:")
    for kind, difference in differences.items():
        print(f"  {kind:<14}{difference:8.1e}  {'ok' if difference <= TOLERANCE else 'FAILED'}")
    print(f"\ntime           {time.perf_counter() - started:.0f} s")
    print(f"peak memory    {peak_memory_gib():.2f} GiB")
    # Written this way round so that a NaN fails too.
    return 0 if all(difference <= TOLERANCE for difference in differences.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
