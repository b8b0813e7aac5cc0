"""Trains a vision transformer to read handwritten digits, and says how many of those it has not seen it reads.

    uv run examples/vision_transformer.py

The images are scikit-learn's, 8 x 8 pixels. Patches of 2 x 2 pixels and a class token make sequences of 17 tokens,
with `--patch-size 1` of 65: no length that tiles would divide. Dense attention follows the same losses:

    uv run examples/vision_transformer.py --attention dense

`--plot FILE` draws digits of the test, and where the class token looks. Attention weights are not kept by flash
attention, but rows of them are one call away: those rows of query, with the identity for value.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _memory import peak_memory_gib
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from jax_native_flash_attn import flash_attention

# (query, key, value) -> out, each array (B, T, N, H)
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
ATTENTION: dict[str, Attention] = {"flash": flash_attention, "dense": jax.nn.dot_product_attention}

SIDE = 8  # pixels
CLASSES = 10

# ---------------------------------------------------------------------------------------- model


class SelfAttention(nnx.Module):
    def __init__(self, width: int, heads: int, attention: Attention, rngs: nnx.Rngs):
        self.attention = attention
        self.project_in = nnx.LinearGeneral(width, (3, heads, width // heads), rngs=rngs)
        self.project_out = nnx.LinearGeneral((heads, width // heads), width, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.project_out(self.attention(*self.query_key_value(x)))

    def query_key_value(self, x: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.moveaxis(self.project_in(x), -3, 0))  # each (B, T, N, H)

    def class_weights(self, x: jax.Array) -> jax.Array:
        """Attention weights (B, N, T) of the class token."""
        query, key, _ = self.query_key_value(x)
        B, T, N, _ = query.shape
        identity = jnp.broadcast_to(jnp.eye(T, dtype=x.dtype)[:, None], (B, T, N, T))
        return flash_attention(query[:, :1], key, identity)[:, 0]  # the weighted sum of unit vectors: the weights


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, attention: Attention, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = SelfAttention(width, heads, attention, rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x))))


class VisionTransformer(nnx.Module):
    """Logits (B, 10) of the digits on images (B, 8, 8): Dosovitskiy et al. 2021, arXiv:2010.11929, in small."""

    def __init__(
        self, patch_size: int, layers: int, width: int, heads: int, attention: Attention, rngs: nnx.Rngs
    ) -> None:
        self.patch_size = patch_size
        tokens = 1 + (SIDE // patch_size) ** 2
        self.embedding = nnx.Linear(patch_size**2, width, rngs=rngs)
        self.class_token = nnx.Param(0.5 * jax.random.normal(rngs.params(), (1, 1, width)))
        self.positions = nnx.Param(0.5 * jax.random.normal(rngs.params(), (1, tokens, width)))
        self.blocks = nnx.List([Block(width, heads, attention, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.tokens(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))

    def tokens(self, images: jax.Array) -> jax.Array:
        """The class token, and one for each patch, row by row: (B, T, width)."""
        B, p, count = len(images), self.patch_size, SIDE // self.patch_size
        patches = images.reshape(B, count, p, count, p).swapaxes(2, 3).reshape(B, count**2, p**2)
        class_token = jnp.broadcast_to(self.class_token[...], (B, 1, self.class_token.shape[-1]))
        return jnp.concatenate([class_token, self.embedding(patches)], axis=1) + self.positions[...]

    def class_weights(self, images: jax.Array) -> jax.Array:
        """How much the class token attends each patch in the last block, mean of the heads: (B, 8/p, 8/p)."""
        x = self.tokens(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        weights = last.attention.class_weights(last.attention_norm(x))[..., 1:].mean(1)
        return weights.reshape(len(images), SIDE // self.patch_size, -1)


# ------------------------------------------------------------------------------------- training


class Digits(NamedTuple):
    """Images (B, 8, 8), from 0 to 1, and the digits (B,) on them."""

    images: jax.Array
    labels: jax.Array


def load(seed: int) -> tuple[Digits, Digits]:
    """1437 images to learn from, and 360 for the test."""
    pixels, labels = load_digits(return_X_y=True)
    images = np.asarray(pixels).reshape(-1, SIDE, SIDE) / 16
    parts = train_test_split(images, labels, test_size=0.2, random_state=seed, stratify=labels)
    train_images, test_images = (jnp.asarray(x, jnp.float32) for x in parts[:2])
    train_labels, test_labels = (jnp.asarray(x, jnp.int32) for x in parts[2:])
    return Digits(train_images, train_labels), Digits(test_images, test_labels)


def mean_loss(model: VisionTransformer, digits: Digits) -> jax.Array:
    """Cross entropy, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(model(digits.images), digits.labels).mean()


@nnx.jit
def train_step(model: VisionTransformer, optimizer: nnx.Optimizer, digits: Digits) -> jax.Array:
    loss, gradients = nnx.value_and_grad(mean_loss)(model, digits)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def predict(model: VisionTransformer, images: jax.Array) -> jax.Array:
    return model(images).argmax(-1)


def draw(path: Path, model: VisionTransformer, test: Digits, count: int = 8) -> None:
    """Draws images, what was read, and below them what the class token attends."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    predictions = np.asarray(predict(model, test.images))
    wrong = np.flatnonzero(predictions != np.asarray(test.labels))[: count // 2]
    right = np.setdiff1d(np.arange(len(predictions)), wrong)
    shown = np.concatenate([right[: count - len(wrong)], wrong])
    weights = nnx.jit(VisionTransformer.class_weights)(model, test.images[shown])
    figure, axes = plt.subplots(2, count, figsize=(1.3 * count, 3), layout="constrained", squeeze=False)
    for above, below, i, weight in zip(*axes, shown, weights, strict=True):
        is_right = predictions[i] == test.labels[i]
        title = f"{predictions[i]}" if is_right else f"{predictions[i]}, is {test.labels[i]}"
        above.set_title(title, color="black" if is_right else "tab:red")
        above.imshow(test.images[i], cmap="gray_r")
        below.imshow(weight, cmap="viridis", vmin=0)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("image")
    axes[1, 0].set_ylabel("attended")
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ----------------------------------------------------------------------------------- the command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a vision transformer on scikit-learn's digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--attention", choices=ATTENTION, default="flash", help="implementation")
    parser.add_argument("--patch-size", type=int, choices=(1, 2, 4), default=2, help="side of a patch, in pixels")
    parser.add_argument("--epochs", type=int, default=15, help="times that each image is seen")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--width", type=int, default=64, help="features of a token")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at the start; a cosine to 0")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and what is kept for the test")
    parser.add_argument("--plot", type=Path, help="draw digits and attention weights to this file")
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.layers, args.heads) < 1:
        parser.error("--epochs, --batch-size, --layers and --heads must be positive")
    if args.width % args.heads:
        parser.error("--width must be a multiple of --heads")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    started = time.perf_counter()
    train, test = load(args.seed)
    steps = len(train.labels) // args.batch_size
    model = VisionTransformer(
        args.patch_size, args.layers, args.width, args.heads, ATTENTION[args.attention], nnx.Rngs(args.seed)
    )
    schedule = optax.cosine_decay_schedule(args.learning_rate, args.epochs * steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)
    parameters = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{parameters:,} parameters, {len(train.labels):,} images to learn from, {len(test.labels)} for the test")
    print(f"{args.attention} attention over {model.positions.shape[1]} tokens\n")
    print("epoch  training loss  test accuracy")
    orders = np.random.default_rng(args.seed)
    accuracy = 0.0
    with tqdm(total=args.epochs * steps, desc="compiling", unit="step", disable=None) as bar:
        for epoch in range(1, args.epochs + 1):
            order = orders.permutation(len(train.labels))[: steps * args.batch_size].reshape(steps, -1)
            losses = []
            for batch in order:
                losses.append(train_step(model, optimizer, Digits(train.images[batch], train.labels[batch])))
                bar.set_description("training")
                bar.update()
            if epoch in np.linspace(1, args.epochs, 8, dtype=int):
                accuracy = float((predict(model, test.images) == test.labels).mean())
                bar.write(f"{epoch:5}{np.mean(jax.device_get(losses)):15.6f}{accuracy:15.1%}")
    if args.plot is not None:
        draw(args.plot, model, test)
    print(f"\ntest accuracy    {accuracy:.1%}")
    print(f"time             {time.perf_counter() - started:.0f} s")
    print(f"peak memory      {peak_memory_gib():.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
