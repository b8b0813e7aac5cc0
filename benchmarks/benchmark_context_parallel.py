"""How well attention of one long sequence is divided over the devices of this machine.

    python benchmarks/benchmark_context_parallel.py
    python benchmarks/benchmark_context_parallel.py --only '131072.*ring' --goals

Each line is the efficiency of a call over n devices, the time on one device divided by n times that on n, of samples
taken in turn in one process. The second efficiency is against n devices that do the whole call at the same time, each
for itself: devices that are all busy may run at lower clocks, and the slowest counts. Causal calls in a ring have their
tokens in the order of `balanced_order`, or, where the line says so, as they come. bfloat16 on accelerators, float32 on
a CPU.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness.machine import header
from harness.options import command_line
from harness.report import Table, milliseconds, progress
from harness.shapes import FORWARD, MODES
from harness.timing import interleaved_seconds, ratio, warm_up
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jax_native_flash_attn import context_parallel_attention, flash_attention

AXIS = "sequence"
STRATEGIES = ("ring", "all_gather", "all_to_all")
# Efficiency with two H200s, forward and with gradients, by length and mask.
GOALS = {
    (131072, True): (0.93, 0.95),
    (32768, True): (0.85, 0.90),
    (131072, False): (0.95, 0.97),
    (32768, False): (0.92, 0.96),
}


class Case(NamedTuple):
    """Query and key/value heads; `window` is one to the left of each query, of a causal call."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    is_causal: bool
    strategy: str
    window: int | None = None
    is_balanced: bool = True

    @property
    def name(self) -> str:
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        mask = f"window {self.window}" if self.window else "causal" if self.is_causal else "full"
        order = ", as tokens come" if self.is_causal and not self.is_balanced else ""
        return f"1x{self.length}x{heads}x{self.head_dim} {mask}, {self.strategy}{order}"

    def goal(self, mode: str) -> str:
        goals = GOALS.get((self.length, self.is_causal))
        slack = 0.05 if self.window or self.heads != self.kv_heads else 0.0
        return "-" if goals is None else f"{goals[mode != FORWARD] - slack:g}"


def cases(lengths: Sequence[int]) -> Iterator[Case]:
    for length in lengths:
        heads = 8 if length > 65536 else 16
        for strategy in STRATEGIES:
            is_ring = strategy == "ring"
            yield Case(length, heads, heads, 128, True, strategy, is_balanced=is_ring)
            yield Case(length, heads, heads, 128, False, strategy)
            yield Case(length, 32, 8, 128, True, strategy, is_balanced=is_ring)
            yield Case(length, heads, heads, 128, True, strategy, window=8192, is_balanced=False)
            if is_ring:
                yield Case(length, heads, heads, 128, True, strategy, is_balanced=False)


def attention(case: Case, mode: str, function: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
    window = None if case.window is None else (case.window, 0)

    def call(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        return function(query, key, value, is_causal=case.is_causal, local_window_size=window, **arguments)

    def program(query: jax.Array, key: jax.Array, value: jax.Array, dout: jax.Array) -> Any:
        if mode == FORWARD:
            return call(query, key, value)
        out, pullback = jax.vjp(call, query, key, value)
        return out, *pullback(dout)

    return program


def programs(case: Case, mode: str, devices: int) -> dict[str, Callable[[], Any]]:
    """The call on one device, on each of them at once, and over all, compiled."""
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)

    def arrays(sharding: Any, batch: int = 1) -> list[jax.Array]:
        """Made where they are needed: they are gigabytes."""
        shapes = [(batch, case.length, n, case.head_dim) for n in heads]
        make = jax.jit(
            lambda key: [
                jax.random.normal(k, shape, dtype) for k, shape in zip(jax.random.split(key, 4), shapes, strict=True)
            ],
            out_shardings=sharding,
        )
        return make(jax.random.key(0))

    def over(program: Callable, spec: PartitionSpec) -> Any:
        return jax.jit(jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))

    whole = attention(case, mode, flash_attention)
    order = "balanced" if case.is_causal and case.is_balanced else None
    parallel = attention(case, mode, context_parallel_attention, axis_name=AXIS, strategy=case.strategy, order=order)
    each, split = PartitionSpec(AXIS), PartitionSpec(None, AXIS)
    calls = {
        "one": (jax.jit(whole), arrays(SingleDeviceSharding(jax.devices()[0]))),
        "each": (over(whole, each), arrays(NamedSharding(mesh, each), devices)),
        "all": (over(parallel, split), arrays(NamedSharding(mesh, split))),
    }
    lowered = [f.lower(*x) for f, x in calls.values()]
    with ThreadPoolExecutor(len(lowered)) as pool:
        compiled = list(pool.map(lambda program: program.compile(), lowered))
    return {name: lambda f=f, x=calls[name][1]: f(*x) for name, f in zip(calls, compiled, strict=True)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, time_per_case=3.0, goals=False)
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 32768])
    parser.add_argument("--only", default="", help="a regular expression on the names of the lines")
    options = parser.parse_args(argv)
    devices = jax.device_count()
    print(header(), f"\n{devices} devices\n", flush=True)
    lines = [(case, mode) for case in cases(options.lengths) for mode in MODES]
    lines = [line for line in lines if re.search(options.only, f"{line[0].name}, {line[1]}")]
    columns = ["call", "mode", "one, ms", "each, ms", "all, ms", "efficiency [95%]", "against each"]
    columns += ["goal"] if options.goals else []
    with Table(columns, labels=2) as table:
        for case, mode in progress(lines, lambda line: line[0].name):
            try:
                calls = programs(case, mode, devices)
                warm_up(calls)
                samples = interleaved_seconds(calls, time_budget=options.time_per_case, sample_seconds=0.02)
            except Exception as error:  # out of memory, or a strategy that does not take the call
                table.add(
                    case.name,
                    mode,
                    "-",
                    "-",
                    f"{type(error).__name__}: {str(error)[:80]}",
                    *([""] if options.goals else []),
                )
                continue
            found = [str(ratio(samples[name] / devices, samples["all"])) for name in ("one", "each")]
            times = (milliseconds(float(np.median(samples[name]))) for name in ("one", "each", "all"))
            table.add(case.name, mode, *times, *found, *([case.goal(mode)] if options.goals else []))


if __name__ == "__main__":
    main()
