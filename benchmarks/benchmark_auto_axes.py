"""What it costs that XLA splits a call over devices (plain jit, auto axes), where it need not know its shardings.

    python benchmarks/benchmark_auto_axes.py

Batch and heads are sharded over all devices; a CPU pretends to be eight. Ours under auto axes stands beside `jax.nn`
there, and beside ours under explicit axes, which runs on the shards in a `shard_map`. Times are medians of interleaved
calls.
"""

import argparse
import os
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from machine import header
from timing import interleaved_medians, temporary_bytes
from tqdm import tqdm

from jax_native_flash_attn import flash_attention

# B, T, N, K, H
SHAPES = {"cpu": [(8, 512, 8, 8, 64), (4, 2048, 4, 4, 64), (8, 1024, 8, 2, 64)], "gpu": [(8, 4096, 32, 8, 128)]}


def compiled_calls(shape: tuple[int, ...], dtype: str, *, is_causal: bool, with_gradient: bool) -> dict[str, Any]:
    """Name -> (compiled program, its arguments)."""
    B, T, N, K, H = shape
    count = jax.device_count()
    grid = (max(1, count // 2), min(2, count))
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(s), dtype) for s in ((B, T, N, H), (B, T, K, H), (B, T, K, H))]
    programs = {}
    for name, attention, kind in (
        ("jax.nn, auto", jax.nn.dot_product_attention, AxisType.Auto),
        ("ours, auto", flash_attention, AxisType.Auto),
        ("ours, explicit", flash_attention, AxisType.Explicit),
    ):

        def forward(*x: jax.Array, attention: Any = attention) -> jax.Array:
            return attention(*x, is_causal=is_causal)

        def gradient(*x: jax.Array, forward: Any = forward) -> Any:
            return jax.grad(lambda *x: forward(*x).astype(jnp.float32).sum(), (0, 1, 2))(*x)

        mesh = jax.make_mesh(grid, ("data", "model"), axis_types=(kind,) * 2)
        sharding = NamedSharding(mesh, PartitionSpec("data", None, "model"))
        placed = [jax.device_put(x, sharding) for x in arrays]
        with jax.set_mesh(mesh):
            programs[name] = jax.jit(gradient if with_gradient else forward).lower(*placed).compile(), placed
    return programs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--time-budget", type=float, default=6.0, help="seconds for each line")
    options = parser.parse_args()
    print(header(), f"{jax.device_count()} devices", sep="\n")
    lines = ["| B x T x N/K x H | mode | time, ours auto / explicit | ours auto / jax.nn auto | temporary MiB |"]
    lines.append("|---|---|---|---|---|")
    cases = [
        (shape, is_causal, with_gradient)
        for shape in SHAPES["cpu" if jax.default_backend() == "cpu" else "gpu"]
        for is_causal in (False, True)
        for with_gradient in (False, True)
    ]
    for shape, is_causal, with_gradient in tqdm(cases):
        programs = compiled_calls(shape, options.dtype, is_causal=is_causal, with_gradient=with_gradient)
        times = interleaved_medians(
            {name: lambda f=f, x=x: f(*x) for name, (f, x) in programs.items()}, time_budget=options.time_budget
        )
        memory = {name: (temporary_bytes(f) or 0) / 2**20 for name, (f, _) in programs.items()}
        B, T, N, K, H = shape
        mode = ("causal " if is_causal else "") + ("gradient" if with_gradient else "forward")
        ratios = [times["ours, auto"] / times[name] for name in ("ours, explicit", "jax.nn, auto")]
        lines.append(
            f"| {B}x{T}x{N}/{K}x{H} | {mode} | {ratios[0]:.2f} | {ratios[1]:.2f} | "
            f"{memory['ours, auto']:.1f} : {memory['ours, explicit']:.1f} : {memory['jax.nn, auto']:.1f} |"
        )
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
