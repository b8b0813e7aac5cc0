"""What it costs that XLA splits a call over devices (plain jit, auto axes), where it need not know its shardings.

    python benchmarks/benchmark_auto_axes.py

Batch and heads are sharded over all devices; a CPU pretends to be eight. Ours under auto axes stands beside `jax.nn`
there, and beside ours under explicit axes, which runs on the shards in a `shard_map`. Times are medians of interleaved
calls.
"""

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
from harness.machine import header
from harness.memory import temporary_bytes
from harness.options import command_line
from harness.report import Table, mebibytes, progress
from harness.shapes import FORWARD, MODES
from harness.timing import interleaved_seconds, ratio
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_native_flash_attn import flash_attention

# B, T, N, K, H
SHAPES = {"cpu": [(8, 512, 8, 8, 64), (4, 2048, 4, 4, 64), (8, 1024, 8, 2, 64)], "gpu": [(8, 4096, 32, 8, 128)]}


def compiled_calls(shape: tuple[int, ...], dtype: str, *, is_causal: bool, mode: str) -> dict[str, Any]:
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
            programs[name] = jax.jit(forward if mode == FORWARD else gradient).lower(*placed).compile(), placed
    return programs


def main(argv: Sequence[str] | None = None) -> None:
    options = command_line(__doc__, modes=MODES, dtype="float32", time_per_case=6.0).parse_args(argv)
    print(header(), f"{jax.device_count()} devices", sep="\n", flush=True)
    columns = "ours auto / explicit [95%]", "ours auto / jax.nn auto [95%]", "temporary MiB of these three"
    cases = [
        (shape, is_causal, mode)
        for shape in SHAPES["cpu" if jax.default_backend() == "cpu" else "gpu"]
        for is_causal in (False, True)
        for mode in options.modes
    ]
    with Table(["B x T x N/K x H", "mode", *columns], labels=2) as table:
        for shape, is_causal, mode in progress(cases, str):
            programs = compiled_calls(shape, options.dtype, is_causal=is_causal, mode=mode)
            calls = {name: lambda f=f, x=x: f(*x) for name, (f, x) in programs.items()}
            samples = interleaved_seconds(calls, time_budget=options.time_per_case)
            B, T, N, K, H = shape
            others = "ours, explicit", "jax.nn, auto"
            table.add(
                f"{B}x{T}x{N}/{K}x{H}",
                f"causal {mode}" if is_causal else mode,
                *(str(ratio(samples["ours, auto"], samples[name])) for name in others),
                " : ".join(mebibytes(temporary_bytes(programs[name][0]) or 0) for name in ("ours, auto", *others)),
            )


if __name__ == "__main__":
    main()
