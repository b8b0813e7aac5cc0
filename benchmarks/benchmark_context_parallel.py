"""How well attention of one long sequence is divided over the devices of this machine.

    python benchmarks/benchmark_context_parallel.py
    python benchmarks/benchmark_context_parallel.py --only '131072.*ring' --goals
    python benchmarks/benchmark_context_parallel.py --beyond-one-device 950272

Each line is the efficiency of a call over n devices, the time on one device divided by n times that on n, of samples
taken in turn in one process. The second efficiency is against n devices that do the whole call at the same time, each
for itself: devices that are all busy may run at lower clocks, and the slowest counts. Causal calls in a ring have their
tokens in the order of `balanced_order`, or, where the line says so, as they come. bfloat16 on accelerators, float32 on
a CPU.

`--beyond-one-device` runs one causal call of 64 heads of 128 with gradients, over all devices in a ring, and says how
much memory it takes beside the same call on one device, which is compiled and not run.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness.machine import header
from harness.options import command_line
from harness.report import Table, milliseconds, progress
from harness.shapes import FORWARD, GRADIENT, MODES
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


class Programs(NamedTuple):
    """The call on one device, on each of them at once, and over all: functions, and shardings of what they take."""

    case: Case
    functions: dict[str, Any]
    shardings: dict[str, Any]

    @classmethod
    def of(cls, case: Case, mode: str, devices: int) -> "Programs":
        mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))

        def over(program: Callable, spec: PartitionSpec) -> Any:
            return jax.jit(jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))

        whole = attention(case, mode, flash_attention)
        order = "balanced" if case.is_causal and case.is_balanced else None
        parallel = attention(
            case, mode, context_parallel_attention, axis_name=AXIS, strategy=case.strategy, order=order
        )
        each, split = PartitionSpec(AXIS), PartitionSpec(None, AXIS)
        functions = {"one": jax.jit(whole), "each": over(whole, each), "all": over(parallel, split)}
        one = SingleDeviceSharding(jax.devices()[0])
        return cls(case, functions, {"one": one, "each": NamedSharding(mesh, each), "all": NamedSharding(mesh, split)})

    def types(self, name: str) -> list[jax.ShapeDtypeStruct]:
        """Of query, key, value and the cotangent of out."""
        case, sharding = self.case, self.shardings[name]
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        batch = sharding.num_devices if name == "each" else 1
        heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
        return [jax.ShapeDtypeStruct((batch, case.length, n, case.head_dim), dtype, sharding=sharding) for n in heads]

    def arrays(self, name: str) -> list[jax.Array]:
        """Random numbers, made where they are needed: they are gigabytes."""
        types = self.types(name)

        def make(key: jax.Array) -> list[jax.Array]:
            keys = jax.random.split(key, len(types))
            return [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, types, strict=True)]

        return jax.jit(make, out_shardings=self.shardings[name])(jax.random.key(0))

    def compiled(self, *names: str) -> dict[str, Any]:
        lowered = [self.functions[name].lower(*self.types(name)) for name in names]
        with ThreadPoolExecutor(len(lowered)) as pool:
            return dict(zip(names, pool.map(lambda program: program.compile(), lowered), strict=True))


def calls(programs: Programs) -> dict[str, Callable[[], Any]]:
    """Each with its inputs, compiled."""
    inputs = {name: programs.arrays(name) for name in programs.functions}
    return {name: lambda f=f, x=inputs[name]: f(*x) for name, f in programs.compiled(*inputs).items()}


def beyond_one_device(length: int, devices: int) -> str:
    """What a call takes over all devices that may not fit into one."""
    case = Case(length, 64, 64, 128, True, "ring")
    programs = Programs.of(case, GRADIENT, devices)
    compiled = programs.compiled("one", "all")

    def needed(name: str) -> float:
        memory = compiled[name].memory_analysis()
        parts = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
        return (sum(parts) - memory.alias_size_in_bytes) / 2**30

    counts = f"{needed('one'):.1f} GiB on one device, {needed('all'):.1f} on each of {devices}, by XLA's count"
    inputs = jax.block_until_ready(programs.arrays("all"))
    jax.block_until_ready(compiled["all"](*inputs))
    start = time.perf_counter()
    results = jax.block_until_ready(compiled["all"](*inputs))
    seconds = time.perf_counter() - start
    statistics = [device.memory_stats() or {} for device in jax.devices()]
    peaks = " and ".join(f"{x['peak_bytes_in_use'] / 2**30:.1f}" for x in statistics if "peak_bytes_in_use" in x)
    limits = {f"{x['bytes_limit'] / 2**30:.1f}" for x in statistics if "bytes_limit" in x}
    is_finite = all(bool(jnp.isfinite(x).all()) for x in results)
    return (
        f"{case.name}, gradient: {counts}; peak of {peaks or 'unknown'} GiB, of {' or '.join(limits) or 'unknown'}; "
        f"{seconds:.1f} s; {'finite' if is_finite else 'NOT FINITE'}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, time_per_case=3.0, goals=False)
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 32768])
    parser.add_argument("--only", default="", help="a regular expression on the names of the lines")
    parser.add_argument("--beyond-one-device", type=int, metavar="LENGTH")
    options = parser.parse_args(argv)
    devices = jax.device_count()
    print(header(), f"\n{devices} devices\n", flush=True)
    if options.beyond_one_device is not None:
        print(beyond_one_device(options.beyond_one_device, devices))
        return
    lines = [(case, mode) for case in cases(options.lengths) for mode in MODES]
    lines = [line for line in lines if re.search(options.only, f"{line[0].name}, {line[1]}")]
    columns = ["call", "mode", "one, ms", "each, ms", "all, ms", "efficiency [95%]", "against each"]
    columns += ["goal"] if options.goals else []
    with Table(columns, labels=2) as table:
        for case, mode in progress(lines, lambda line: line[0].name):
            try:
                timed = calls(Programs.of(case, mode, devices))
                warm_up(timed)
                samples = interleaved_seconds(timed, time_budget=options.time_per_case, sample_seconds=0.02)
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
