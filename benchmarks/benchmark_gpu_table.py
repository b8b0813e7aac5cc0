"""The GPU table: every GPU shape, ours beside `jax.nn` and tokamax, forward and with gradients.

    python benchmarks/benchmark_gpu_table.py --json gpu.json --plot docs/gpu_table.png
    python benchmarks/benchmark_gpu_table.py --implementations flash:pure_jax jax.nn --shapes gpu-2x8192x16x128
    python benchmarks/benchmark_gpu_table.py --time-budget 120 --mode forward
    python benchmarks/benchmark_gpu_table.py --from-json gpu.json --goals   an earlier run's table

Columns: median milliseconds of interleaved calls, TFLOP/s (4BNTSH operations, less what causal masks, windows and
lengths leave out; 3.5 times that with gradients) and their fraction of a large bfloat16 product's in the same run, the
temporary MiB that the compiler reserves, and the largest error against float64 as a fraction of a result's largest
element; last, ours against the best peer whose result is right, with the 95% interval of that ratio. A peer that
refuses or fails is printed as such.

Every shape is compiled in a process of its own, all at the same time, and then they measure one after the other. Short
calls are repeated within one program, so that starting them from Python does not count.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from harness.implementations import default_implementations
from harness.machine import environment, header
from harness.measure import Case, Settings, compile_case, time_case
from harness.options import command_line
from harness.processes import run_in_turn, wait_for_turn
from harness.report import peer_table, write_json, write_peer_plot
from harness.shapes import MODES, AttentionShape
from harness.suites import GPU_SHAPES, find_shape
from harness.timing import seconds_per_call, warm_up

_RESULT = "RESULT "
_CEILING = "ceiling"


def main(argv: Sequence[str] | None = None) -> None:
    options = _parse(argv)
    options.implementations = options.implementations or default_implementations()
    if options.child == _CEILING:
        _measure_ceiling()
    elif options.child:
        _measure_shape(find_shape(options.child), options)
    elif options.from_json:
        saved = json.loads(options.from_json.read_text())
        _report([Case.from_json(case) for case in saved["cases"]], saved["ceiling"], saved["environment"], options)
    else:
        print(header() + "\n", flush=True)
        cases, ceiling, unfinished = _run(options)
        if options.json:
            write_json(options.json, options, cases, ceiling=ceiling, unfinished=unfinished)
        _report(cases, ceiling, environment(), options)
        if unfinished:
            print(f"Not finished in time: {', '.join(unfinished)}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(
        __doc__,
        shapes=list(GPU_SHAPES),
        modes=MODES,
        implementations=None,
        max_dense_gib=48.0,
        max_repeats=7,
        time_per_case=1.0,
        time_budget=600.0,
        goals=False,
        json=None,
        plot=None,
    )
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="report what an earlier run wrote")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _measure_shape(shape: AttentionShape, options: argparse.Namespace) -> None:
    """In a child process: a line for each mode."""
    settings = Settings(
        max_repeats=options.max_repeats,
        time_per_case=options.time_per_case,
        max_dense_gib=options.max_dense_gib,
        max_checked_scores=2**22,
        fills_programs=True,
    )
    modes = [mode for mode in options.modes if mode in shape.modes]
    compiled = {mode: compile_case(shape, mode, options.implementations, settings, threads=4) for mode in modes}
    wait_for_turn()
    for mode in modes:
        case = time_case(shape, mode, compiled.pop(mode), settings)
        print(_RESULT + json.dumps({"case": case.as_json()}), flush=True)


def _measure_ceiling() -> None:
    """In a child process: operations per second of a large bfloat16 product on random data."""
    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul).lower(a, b).compile()
    wait_for_turn()
    call = functools.partial(product, a, b)
    warm_up({"product": call})
    ceiling = 2 * 8192**3 / min(seconds_per_call(call, 20) for _ in range(3))
    print(_RESULT + json.dumps({"ceiling": ceiling}), flush=True)


def _run(options: argparse.Namespace) -> tuple[list[Case], float | None, list[str]]:
    """All children: the cases, the ceiling, and the names of those that did not end."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes share the memory
    started = time.monotonic()
    settings = ["--mode", *options.modes, "--max-dense-gib", str(options.max_dense_gib)]
    settings += ["--max-repeats", str(options.max_repeats), "--time-per-case", str(options.time_per_case)]
    settings += ["--implementations", *options.implementations]
    names = [_CEILING, *(shape.name for shape in options.shapes)]
    results: dict[str, list[Any]] = {"case": [], "ceiling": []}

    def on_line(i: int, line: str) -> None:
        if line.startswith(_RESULT):
            for kind, result in json.loads(line[len(_RESULT) :]).items():
                results[kind].append(result)
            line = f"{time.monotonic() - started:.0f} s"
        print(f"{names[i]}: {line}", file=sys.stderr, flush=True)

    done = run_in_turn(
        [[sys.executable, __file__, "--child", name, *settings] for name in names],
        on_line,
        preparing_seconds=0.7 * options.time_budget,
        measuring_seconds=60.0,
        total_seconds=options.time_budget,
    )
    unfinished = [name for name, is_done in zip(names, done, strict=True) if not is_done]
    return [Case.from_json(case) for case in results["case"]], next(iter(results["ceiling"]), None), unfinished


def _report(cases: list[Case], ceiling: float | None, facts: dict[str, Any], options: argparse.Namespace) -> None:
    implementations = list(dict.fromkeys(name for case in cases for name in case.measurements))
    rate = "unknown" if ceiling is None else f"{ceiling / 1e12:.0f}"
    for mode in MODES:
        chosen = [case for case in cases if case.mode == mode]
        if chosen:
            print(f"{mode}: milliseconds, TFLOP/s (fraction of {rate}), temporary MiB, error against float64\n")
            print(peer_table(chosen, implementations, ceiling, goals=options.goals), end="\n\n")
    if options.plot:
        write_peer_plot(options.plot, cases, f"{facts['device']}, JAX {facts['jax']}; lower is better")


if __name__ == "__main__":
    main()
