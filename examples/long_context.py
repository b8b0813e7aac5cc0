"""Trains the model of train_language_model.py with each sequence split over eight devices, and once more on one.

    uv run examples/long_context.py

The losses of both must agree; otherwise the exit code is 1. The devices are eight that the CPU pretends to be. With
JAX_PLATFORMS=cuda they are the GPUs of this machine.

What a sequence that is split needs, beside a model for one that is not:

- `balanced_order`: tokens are put into it once, where they are loaded, with what is to be predicted of each.
- Positions: the rotary ones are those of the order. Attention knows the order by its name.
- `jax.shard_map` around attention alone. All else in a transformer goes token by token, and jit splits it.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

# Nothing of JAX may come before that.
import argparse
import sys
import time
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm
from train_language_model import (
    Attention,
    Batch,
    LanguageModel,
    flash,
    make_optimizer,
    standard_library,
    train_step,
    windows,
)

from jax_native_flash_attn import balanced_order, context_parallel_attention

AXIS = "sequence"
Strategy = Literal["ring", "all_to_all", "all_gather"]
TOLERANCE = 1e-5  # of a loss, relative: float32 rounding, which training amplifies


def over_devices(mesh: Mesh, strategy: Strategy | None) -> Attention:
    """Causal attention (B, T, N, H) of tokens in balanced order, T split over the devices of a mesh."""

    def attention(
        query: jax.Array, key: jax.Array, value: jax.Array, dropout_rate: float, dropout_rng: jax.Array | None
    ) -> jax.Array:
        def of_device(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return context_parallel_attention(
                query,
                key,
                value,
                is_causal=True,
                axis_name=AXIS,
                order="balanced",
                strategy=strategy,
                dropout_rate=dropout_rate,
                dropout_rng=dropout_rng,
            )

        spec = P(None, AXIS)
        return jax.shard_map(of_device, mesh=mesh, in_specs=spec, out_specs=spec)(query, key, value)

    return attention


def in_balanced_order(batch: Batch, mesh: Mesh) -> Batch:
    """The same bytes in another order, each device with its part of every sequence."""
    order = balanced_order(batch.text.shape[1], mesh.size)
    of_sequences, of_positions = (NamedSharding(mesh, spec) for spec in (P(None, AXIS), P(AXIS)))
    text, following = (jax.device_put(x[:, order], of_sequences) for x in (batch.text, batch.following))
    return Batch(text, following, jax.device_put(jnp.asarray(order), of_positions))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a byte-level transformer on sequences that are split over devices.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--strategy", choices=get_args(Strategy), help="who sends what")
    parser.add_argument("--context", type=int, default=1024, help="bytes that the model sees")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences per step")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks")
    parser.add_argument("--width", type=int, default=128, help="features of a token")
    parser.add_argument("--heads", type=int, default=8, help="attention heads")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="after the warm-up")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    args = parser.parse_args(argv)
    if min(args.context, args.steps, args.batch_size, args.layers, args.heads) < 1:
        parser.error("--context, --steps, --batch-size, --layers and --heads must be positive")
    if args.width % (2 * args.heads):
        parser.error("--width must be a multiple of twice --heads")
    return args


def train(args: argparse.Namespace, mesh: Mesh | None, name: str) -> list[float]:
    """The losses of all steps: on one device without a mesh."""
    attention = flash if mesh is None else over_devices(mesh, args.strategy)
    # Dropout would fall on other tokens in another order, and so give other losses.
    model = LanguageModel(args.layers, args.width, args.heads, 0.0, attention, nnx.Rngs(args.seed))
    optimizer = make_optimizer(model, args.learning_rate)
    if mesh is not None:
        for module in (model, optimizer):  # every device has all of the weights
            nnx.update(module, jax.device_put(nnx.state(module), NamedSharding(mesh, P())))
    text, _ = standard_library()
    batches = np.random.default_rng(args.seed)
    losses: list[float] = []
    with tqdm(total=args.steps, desc=f"{name}: compiling", unit="step", disable=None) as bar:
        for step in range(args.steps):
            starts = batches.integers(len(text) - args.context, size=args.batch_size)
            batch = windows(text, starts, args.context)
            batch = batch if mesh is None else in_balanced_order(batch, mesh)
            losses.append(float(train_step(model, optimizer, batch, None)))
            if step == 0:
                bar.set_description(f"{name}: training")
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update()
    return losses


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    started = time.perf_counter()
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
    print(f"{args.batch_size} x {args.context} bytes a step, {args.context // mesh.size} of each sequence on a device")
    split = train(args, mesh, f"{mesh.size} devices")
    whole = train(args, None, "1 device")
    difference = float(np.max(np.abs(np.subtract(split, whole)) / whole))
    is_same = difference <= TOLERANCE  # not so for a NaN
    print(f"split over {mesh.size} devices  {split[0]:.6f} -> {split[-1]:.6f} nats per byte")
    print(f"on one device         {whole[0]:.6f} -> {whole[-1]:.6f} nats per byte")
    print(f"largest difference    {difference:.1e} of a loss, {'ok' if is_same else 'FAILED'}")
    print(f"time                  {time.perf_counter() - started:.0f} s")
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
