"""Solves Poisson's equation with a network that has attention: second derivatives through `flash_attention`.

    uv run examples/physics_informed.py

A physics-informed network u(x, y) is trained on the residual of an equation alone, without knowing its solution:

    u_xx + u_yy = f   on the unit square,   u = 0 on its edge.

Points are the queries, all of them in one sequence. They attend learned tokens, the keys and values, as a solver of
operators attends its sensors. So u at a point depends on no other point, and one `jvp` along x, of all points at once,
gives all of u_x. A `jvp` of that gives u_xx. The loss is differentiated once more, in reverse. `--attention dense`
trains the same network on jax.nn's attention, which follows the same losses; it stores the weights of every point.

The exact solution is known, and the table shows how far the network is from it. `--plot FILE` draws both.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _memory import peak_memory_gib
from flax import nnx
from tqdm import tqdm

from jax_native_flash_attn import flash_attention

# (query, key, value) -> out: of (T, N, H) and (S, N, H)
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
ATTENTION: dict[str, Attention] = {"flash": flash_attention, "dense": jax.nn.dot_product_attention}

# ------------------------------------------------------------------------------------- equation


def exact(points: jax.Array) -> jax.Array:
    """The solution at points (T, 2)."""
    x, y = points.T
    return jnp.sin(jnp.pi * x) * jnp.sin(2 * jnp.pi * y)


def source(points: jax.Array) -> jax.Array:
    """The right side f, (T,)."""
    return -5 * jnp.pi**2 * exact(points)


def laplacian(solution: Callable[[jax.Array], jax.Array], points: jax.Array) -> jax.Array:
    """u_xx + u_yy, (T,), of a solution that at each point depends on that point alone."""

    def second_derivative(axis: int) -> jax.Array:
        direction = jnp.zeros_like(points).at[:, axis].set(1.0)

        def derivative(points: jax.Array) -> jax.Array:
            return jax.jvp(solution, (points,), (direction,))[1]

        return jax.jvp(derivative, (points,), (direction,))[1]

    return second_derivative(0) + second_derivative(1)


# ---------------------------------------------------------------------------------------- model


class CrossAttention(nnx.Module):
    def __init__(self, width: int, heads: int, tokens: int, attention: Attention, rngs: nnx.Rngs):
        shape = (tokens, heads, width // heads)
        self.attention = attention
        self.project_query = nnx.LinearGeneral(width, shape[1:], rngs=rngs)
        self.key = nnx.Param(jax.random.normal(rngs.params(), shape))
        self.value = nnx.Param(jax.random.normal(rngs.params(), shape))
        self.project_out = nnx.LinearGeneral(shape[1:], width, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.project_out(self.attention(self.project_query(x), self.key[...], self.value[...]))


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, tokens: int, attention: Attention, rngs: nnx.Rngs):
        self.attention = CrossAttention(width, heads, tokens, attention, rngs)
        self.mlp_in = nnx.Linear(width, 2 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(x)
        return x + self.mlp_out(jnp.tanh(self.mlp_in(x)))  # smooth: it is differentiated twice


class Solution(nnx.Module):
    """u (T,) at points (T, 2), 0 on the edge of the unit square by construction."""

    def __init__(self, layers: int, width: int, heads: int, tokens: int, attention: Attention, rngs: nnx.Rngs):
        self.embedding = nnx.Linear(2, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, tokens, attention, rngs) for _ in range(layers)])
        self.head = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, points: jax.Array) -> jax.Array:
        x = jnp.tanh(self.embedding(4 * points - 2))
        for block in self.blocks:
            x = block(x)
        return 16 * (points * (1 - points)).prod(-1) * self.head(x)[:, 0]


# ------------------------------------------------------------------------------------- training


def mean_loss(model: Solution, points: jax.Array) -> jax.Array:
    """Mean of the squared residuals, relative to that of the right side."""
    f = source(points)
    return jnp.square(laplacian(model, points) - f).mean() / jnp.square(f).mean()


@nnx.jit
def train_step(model: Solution, optimizer: nnx.Optimizer, rng: jax.Array, like: jax.Array) -> jax.Array:
    points = jax.random.uniform(rng, like.shape)
    loss, gradients = nnx.value_and_grad(mean_loss)(model, points)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def error_on_grid(model: Solution, points: jax.Array) -> jax.Array:
    """The root of the mean squared error, relative to the solution."""
    expected = exact(points)
    return jnp.linalg.norm(model(points) - expected) / jnp.linalg.norm(expected)


def grid(side: int) -> jax.Array:
    """Points (side * side, 2)."""
    x = jnp.linspace(0, 1, side)
    return jnp.stack(jnp.meshgrid(x, x, indexing="ij"), axis=-1).reshape(-1, 2)


def draw(path: Path, model: Solution, side: int = 64) -> None:
    """Draws the solution of the network, the exact one, and the difference."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    points = grid(side)
    found, expected = (np.asarray(u(points)).reshape(side, side).T for u in (model, exact))
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    drawn = {"network": found, "exact": expected, "difference": found - expected}
    for axis, (name, u) in zip(axes, drawn.items(), strict=True):
        limit = np.abs(u).max()
        image = axis.imshow(u, origin="lower", extent=(0, 1, 0, 1), cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set(title=name, xlabel="x", ylabel="y", xticks=[0, 1], yticks=[0, 1])
        figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ----------------------------------------------------------------------------------- the command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Solves Poisson's equation with a physics-informed network that has attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--attention", choices=ATTENTION, default="flash", help="implementation")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps")
    parser.add_argument("--points", type=int, default=257, help="points of a step, drawn anew for each")
    parser.add_argument("--tokens", type=int, default=33, help="learned tokens that points attend")
    parser.add_argument("--layers", type=int, default=2, help="blocks")
    parser.add_argument("--width", type=int, default=32, help="features of a point")
    parser.add_argument("--heads", type=int, default=2, help="attention heads")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="at the start; a cosine to 0")
    parser.add_argument("--seed", type=int, default=0, help="of weights and points")
    parser.add_argument("--plot", type=Path, help="draw the solution to this file")
    args = parser.parse_args(argv)
    if min(args.steps, args.points, args.tokens, args.layers, args.heads) < 1:
        parser.error("--steps, --points, --tokens, --layers and --heads must be positive")
    if args.width % args.heads:
        parser.error("--width must be a multiple of --heads")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    started = time.perf_counter()
    model = Solution(args.layers, args.width, args.heads, args.tokens, ATTENTION[args.attention], nnx.Rngs(args.seed))
    schedule = optax.cosine_decay_schedule(args.learning_rate, args.steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
    parameters = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{parameters:,} parameters, {args.attention} attention of {args.points} points to {args.tokens} tokens\n")
    print("step       loss  error against the exact solution")
    test_points = grid(33)
    like = jnp.zeros((args.points, 2))
    rows = set(np.linspace(1, args.steps, 9, dtype=int).tolist())
    with tqdm(total=args.steps, desc="compiling", unit="step", disable=None) as bar:
        for step in range(1, args.steps + 1):
            loss = train_step(model, optimizer, jax.random.fold_in(jax.random.key(args.seed), step), like)
            if step in rows:
                bar.write(f"{step:4}{float(loss):11.3e}{float(error_on_grid(model, test_points)):11.3e}")
            bar.set_description("training")
            bar.update()
    if args.plot is not None:
        draw(args.plot, model)
    print(f"\ntime           {time.perf_counter() - started:.0f} s")
    print(f"peak memory    {peak_memory_gib():.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
