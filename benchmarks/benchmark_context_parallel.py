"""How well attention of one long sequence is divided over the devices of this machine.

    python benchmarks/benchmark_context_parallel.py
    python benchmarks/benchmark_context_parallel.py --only '131072.*ring' --goals

Each line is the efficiency of a call over n devices, the time on one device divided by n times that on n, of samples
taken in turn in one process. Causal calls have their tokens in the order of `balanced_order`, or, where the line says
so, as they come. bfloat16 on accelerators, float32 on a CPU.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness.machine import header
from harness.options import command_line
from harness.report import Table, milliseconds, progress
from harness.shapes import FORWARD, MODES
from harness.timing import interleaved_seconds, ratio, warm_up
from jax.sharding import NamedSharding, PartitionSpec

from jax_native_flash_attn import balanced_order, context_parallel_attention, flash_attention

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

    def goal(self, mode: str) -> float:
        slack = 0.05 if self.window or self.heads != self.kv_heads else 0.0
        return GOALS.get((self.length, self.is_causal), (0.0, 0.0))[mode != FORWARD] - slack


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

    def call(query: jax.Array, key: jax.Array, value: jax.Array, *positions: jax.Array) -> Any:
        masks: dict[str, Any] = {"is_causal": case.is_causal, "local_window_size": window}
        if positions:
            masks |= {"query_positions": positions[0], "key_value_positions": positions[0]}
        return function(query, key, value, **masks, **arguments)

    def program(query: jax.Array, key: jax.Array, value: jax.Array, dout: jax.Array, *positions: jax.Array) -> Any:
        if mode == FORWARD:
            return call(query, key, value, *positions)
        out, pullback = jax.vjp(lambda *x: call(*x, *positions), query, key, value)
        return out, *pullback(dout)

    return program


def programs(case: Case, mode: str, devices: int) -> dict[str, Callable[[], Any]]:
    """The call on one device, and over all, compiled."""
    rng, mesh = np.random.default_rng(0), jax.make_mesh((devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    shapes = [(1, case.length, n, case.head_dim) for n in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    spec = PartitionSpec(None, AXIS)
    split = [jax.device_put(jnp.asarray(x, dtype), NamedSharding(mesh, spec)) for x in arrays]
    if case.is_causal and case.is_balanced:
        positions = jnp.asarray(balanced_order(case.length, devices)[None])
        split.append(jax.device_put(positions, NamedSharding(mesh, spec)))
    of_one = jax.jit(attention(case, mode, flash_attention))
    parallel = attention(case, mode, context_parallel_attention, axis_name=AXIS, strategy=case.strategy)
    results = spec if mode == FORWARD else (spec,) * 4
    over_all = jax.jit(
        jax.shard_map(parallel, mesh=mesh, in_specs=(spec,) * len(split), out_specs=results, check_vma=False)
    )
    whole = [jax.device_put(jnp.asarray(x, dtype), jax.devices()[0]) for x in arrays]
    compiled: dict[str, Any] = {
        "one": (of_one.lower(*whole).compile(), whole),
        "all": (over_all.lower(*split).compile(), split),
    }
    return {name: lambda f=f: f[0](*f[1]) for name, f in compiled.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, time_per_case=3.0, goals=False)
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 32768])
    parser.add_argument("--only", default="", help="a regular expression on the names of the lines")
    options = parser.parse_args(argv)
    devices = jax.device_count()
    print(header(), f"\n{devices} devices\n", flush=True)
    lines = [(case, mode) for case in cases(options.lengths) for mode in MODES]
    lines = [line for line in lines if re.search(options.only, f"{line[0].name}, {line[1]}")]
    columns = ["call", "mode", "one, ms", "all, ms", "efficiency [95%]", *(["goal"] if options.goals else [])]
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
            found = ratio(samples["one"] / devices, samples["all"])
            times = (milliseconds(float(np.median(samples[name]))) for name in ("one", "all"))
            table.add(case.name, mode, *times, str(found), *([f"{case.goal(mode):g}"] if options.goals else []))


if __name__ == "__main__":
    main()
