"""Trains a small language model on the source code of Python's standard library, byte by byte.

A causal transformer (Flax nnx, optax) with rotary positions and attention dropout. The text is
what every machine with Python has. Defaults are sized for a laptop:

    uv run examples/train_language_model.py

The same training on dense attention, which drops the same attention weights, follows the same
losses; `--loss-log` writes them down for comparison:

    uv run examples/train_language_model.py --steps 50 --loss-log flash.jsonl
    uv run examples/train_language_model.py --steps 50 --loss-log dense.jsonl --attention dense

With a long context, flash attention trains in memory where dense attention cannot.
`--memory-limit-gib` has the operating system refuse more (Linux), so that one can see it:

    uv run examples/train_language_model.py --context 8192 --steps 5 --memory-limit-gib 4
    uv run examples/train_language_model.py --context 8192 --steps 5 --memory-limit-gib 4 \
        --attention dense

The last line of a run is its peak resident memory. On CPU most of the time goes into the random
bits of the dropout, one for each query and key; `--dropout 0` is several times faster.
"""

import argparse
import json
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _memory import limit_memory, peak_memory_gib
from flax import nnx
from tqdm import tqdm

from jax_native_flash_attn import dropout_keep_mask, flash_attention

# (query, key, value, dropout_rate, dropout_rng) -> out, each array (B, T, N, H)
Attention = Callable[[jax.Array, jax.Array, jax.Array, float, jax.Array | None], jax.Array]

# ------------------------------------------------------------------------------------ attention


def flash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    dropout_rate: float,
    dropout_rng: jax.Array | None,
) -> jax.Array:
    return flash_attention(query, key, value, is_causal=True, dropout_rate=dropout_rate, dropout_rng=dropout_rng)


def dense(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    dropout_rate: float,
    dropout_rng: jax.Array | None,
) -> jax.Array:
    if dropout_rng is None or dropout_rate == 0:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True)
    # jax.nn's attention has no dropout, so this is its computation with the weights written out.
    B, T, N, H = query.shape
    logits = jnp.einsum("BTNH,BSNH->BNTS", query, key) / np.sqrt(H)
    weights = jax.nn.softmax(logits, where=jnp.tri(T, dtype=bool))
    keep = dropout_keep_mask(dropout_rng, dropout_rate, (B, N, T, T))
    weights = jnp.where(keep, weights / (1 - dropout_rate), 0)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)


ATTENTION: dict[str, Attention] = {"flash": flash, "dense": dense}

# ---------------------------------------------------------------------------------------- model


class SelfAttention(nnx.Module):
    def __init__(self, width: int, heads: int, dropout: float, attention: Attention, rngs: nnx.Rngs):
        self.dropout = dropout
        self.attention = attention
        self.project_in = nnx.LinearGeneral(width, (3, heads, width // heads), use_bias=False, rngs=rngs)
        self.project_out = nnx.LinearGeneral((heads, width // heads), width, axis=(-2, -1), use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, dropout_rng: jax.Array | None) -> jax.Array:
        query, key, value = jnp.moveaxis(self.project_in(x), -3, 0)  # each (B, T, N, H)
        query, key = rotate(query, positions), rotate(key, positions)
        dropout = 0.0 if dropout_rng is None else self.dropout
        return self.project_out(self.attention(query, key, value, dropout, dropout_rng))


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, dropout: float, attention: Attention, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = SelfAttention(width, heads, dropout, attention, rngs)
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, dropout_rng: jax.Array | None) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), positions, dropout_rng)
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x))))


class LanguageModel(nnx.Module):
    """Logits (B, T, 256) of the byte that follows each byte of `text` (B, T).

    `positions` (T,) says where in the sequence the bytes stand, if not in order.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        dropout: float,
        attention: Attention,
        rngs: nnx.Rngs,
    ):
        self.embedding = nnx.Embed(256, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, dropout, attention, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 256, use_bias=False, rngs=rngs)

    def __call__(
        self, text: jax.Array, dropout_rng: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        positions = jnp.arange(text.shape[1]) if positions is None else positions
        x = self.embedding(text)
        for layer, block in enumerate(self.blocks):
            # Without a key there is no dropout: validation and sampling.
            rng = None if dropout_rng is None else jax.random.fold_in(dropout_rng, layer)
            x = block(x, positions, rng)
        return self.head(self.norm(x))


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary positions (T,): turns pairs of features of x (B, T, N, H) by angles that grow with them."""
    frequency = 10_000.0 ** -jnp.linspace(0, 1, x.shape[-1] // 2, endpoint=False)
    angle = positions[:, None, None] * frequency  # (T, 1, H // 2)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


# ------------------------------------------------------------------------------------- training


class Batch(NamedTuple):
    """Bytes to learn from, (B, T); those that follow them; and where they stand, (T,), if not in order."""

    text: jax.Array
    following: jax.Array
    positions: jax.Array | None = None


def mean_loss(model: LanguageModel, batch: Batch, dropout_rng: jax.Array | None = None) -> jax.Array:
    """Cross entropy, in nats per byte, of the bytes that follow."""
    logits = model(batch.text, dropout_rng, batch.positions).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.following).mean()


def make_optimizer(model: LanguageModel, learning_rate: float) -> nnx.Optimizer:
    schedule = optax.warmup_constant_schedule(0.0, learning_rate, warmup_steps=20)
    return nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)), wrt=nnx.Param)


@nnx.jit
def train_step(
    model: LanguageModel, optimizer: nnx.Optimizer, batch: Batch, dropout_rng: jax.Array | None
) -> jax.Array:
    loss, gradients = nnx.value_and_grad(mean_loss)(model, batch, dropout_rng)
    optimizer.update(model, gradients)
    return loss


validation_step = nnx.jit(mean_loss)


def validation_loss(model: LanguageModel, text: np.ndarray, args: argparse.Namespace) -> float:
    """The loss on windows spread evenly over the held-out text, always the same ones."""
    starts = np.linspace(0, len(text) - args.context - 1, 4 * args.batch_size, dtype=int)
    losses = [
        validation_step(model, windows(text, batch, args.context)) for batch in starts.reshape(4, args.batch_size)
    ]
    return float(np.mean(jax.device_get(losses)))


def windows(text: np.ndarray, starts: np.ndarray, context: int) -> Batch:
    """Bytes to learn from, and the same shifted by one to be predicted."""
    found = jnp.asarray(text[starts[:, None] + np.arange(context + 1)], jnp.int32)
    return Batch(found[:, :-1], found[:, 1:])


def standard_library() -> tuple[np.ndarray, np.ndarray]:
    """The bytes of Python's own modules: training text, and every twentieth file for validation."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    contents = [file.read_bytes() for file in files]
    held_out = b"".join(contents[::20])
    training = b"".join(content for i, content in enumerate(contents) if i % 20)
    return np.frombuffer(training, np.uint8), np.frombuffer(held_out, np.uint8)


# ------------------------------------------------------------------------------------- sampling


@nnx.jit
def next_byte(model: LanguageModel, window: jax.Array, length: jax.Array, rng: jax.Array) -> jax.Array:
    # Attention is causal, so what stands behind the first `length` bytes has no influence.
    logits = model(window[None])[0, length - 1]
    return jax.random.categorical(rng, logits.astype(jnp.float32) / 0.8)


def sample(model: LanguageModel, prompt: bytes, count: int, window_size: int, seed: int) -> str:
    """Continues `prompt`, each byte computed from all of the last `window_size` anew."""
    text = bytearray(prompt)
    rngs = jax.random.split(jax.random.key(seed), count)
    for rng in tqdm(rngs, desc="sampling", unit="byte", leave=False, disable=None):
        tail = text[-window_size:]
        window = np.zeros(window_size, np.int32)
        window[: len(tail)] = tail
        text.append(int(next_byte(model, jnp.asarray(window), jnp.asarray(len(tail)), rng)))
    # A terminal should not see the control characters that an untrained model writes.
    characters = text.decode(errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in characters)


# ----------------------------------------------------------------------------------- the command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a byte-level transformer on Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--attention", choices=ATTENTION, default="flash", help="implementation")
    parser.add_argument("--context", type=int, default=512, help="bytes that the model sees")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=argparse.SUPPRESS,
        help="sequences per step (default: as many as make 4096 bytes, at least 1)",
    )
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--width", type=int, default=128, help="features of a token")
    parser.add_argument("--heads", type=int, default=2, help="attention heads")
    parser.add_argument("--dropout", type=float, default=0.1, help="dropped attention weights")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="after the warm-up")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--sample-bytes", type=int, default=400, help="text to write at the end")
    parser.add_argument("--loss-log", type=Path, help="write JSON lines of step and loss here")
    parser.add_argument("--memory-limit-gib", type=float, help="fail if more is needed (Linux)")
    args = parser.parse_args(argv)
    args.batch_size = getattr(args, "batch_size", max(1, 4096 // args.context))
    if min(args.context, args.steps, args.batch_size, args.layers, args.heads) < 1:
        parser.error("--context, --steps, --batch-size, --layers and --heads must be positive")
    if args.width % (2 * args.heads):
        parser.error("--width must be a multiple of twice --heads")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.memory_limit_gib is not None:
        limit_memory(args.memory_limit_gib)

    training_text, validation_text = standard_library()
    model = LanguageModel(
        args.layers,
        args.width,
        args.heads,
        args.dropout,
        ATTENTION[args.attention],
        nnx.Rngs(args.seed),
    )
    optimizer = make_optimizer(model, args.learning_rate)
    parameters = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{parameters:,} parameters, {len(training_text):,} bytes of text")
    print(f"{args.attention} attention, batches of {args.batch_size} x {args.context} bytes")

    batches = np.random.default_rng(args.seed)
    dropout_rng = jax.random.key(args.seed)
    losses: list[float] = []
    with tqdm(total=args.steps, desc="compiling", unit="step", disable=None) as bar:
        started = time.perf_counter()
        for step in range(args.steps):
            starts = batches.integers(len(training_text) - args.context, size=args.batch_size)
            batch = windows(training_text, starts, args.context)
            loss = train_step(model, optimizer, batch, jax.random.fold_in(dropout_rng, step))
            losses.append(float(loss))
            if step == 0:
                started = time.perf_counter()  # so that the speed excludes compilation
                bar.set_description("training")
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update()
        seconds = time.perf_counter() - started

    if args.loss_log is not None:
        lines = (json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses))
        args.loss_log.write_text("".join(f"{line}\n" for line in lines))
    if args.steps > 1:
        speed = (args.steps - 1) * args.batch_size * args.context / seconds
        print(f"speed            {speed:,.0f} tokens per second")
    print(f"training loss    {losses[0]:.4f} -> {losses[-1]:.4f} nats per byte")
    print(f"validation loss  {validation_loss(model, validation_text, args):.4f} nats per byte")
    if args.sample_bytes:
        text = sample(model, b"def ", args.sample_bytes, min(args.context, 256), args.seed)
        print(f"{' sample ':-^80}\n{text}\n{'':-^80}")
    print(f"peak memory      {peak_memory_gib():.2f} GiB")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"Does not fit in memory. {error}")
