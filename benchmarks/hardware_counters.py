"""Which units of the GPU each kernel of a call keeps busy, by the hardware counters that Nsight Compute (`ncu`) reads.

python benchmarks/hardware_counters.py --shapes gpu-2x8192x16x128 --implementations flash jax.nn:cudnn

One launch of each kernel, at whatever clock the GPU runs. Columns but the first are percent of the most that is
possible, over the kernel's time. Kernels of less than 2% of a call's time are left out.
"""

import argparse
import csv
import ctypes
import subprocess
import sys
from collections.abc import Sequence

import jax
from attention_shapes import MODES, find_shape
from benchmark_gpu_table import compile_call, random_inputs
from machine import header

_TIME = "gpu__time_duration.sum"
_PERCENT = ".avg.pct_of_peak_sustained_elapsed"
_METRICS = {
    "us": _TIME,
    "busiest unit": f"sm__throughput{_PERCENT}",
    "tensor cores": f"sm__pipe_tensor_cycles_active{_PERCENT}",
    "issued": f"sm__inst_issued{_PERCENT}",
    "L1": f"l1tex__throughput{_PERCENT}",
    "L2": f"lts__throughput{_PERCENT}",
    "DRAM": f"dram__throughput{_PERCENT}",
}
_MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3}
_LEAST = 0.02


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", required=True)
    parser.add_argument("--implementations", nargs="+", default=("flash", "jax.nn:cudnn"))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--as-profiled", action="store_true", help="make the one call, under ncu")
    options = parser.parse_args(argv)
    if options.as_profiled:
        _call_once(options.implementations[0], options.shapes[0], options.mode[0])
        return
    print(header())
    print(f"| case | kernel | {' | '.join(_METRICS)} |")
    print("|---" * (2 + len(_METRICS)) + "|")
    for shape in options.shapes:
        for mode in options.mode:
            for name in options.implementations:
                if mode in find_shape(shape).modes:
                    _print_kernels(shape, mode, name)


def _call_once(name: str, shape_name: str, mode: str) -> None:
    shape = find_shape(shape_name)
    executable, inputs = compile_call(name, shape, mode), random_inputs(shape)
    jax.block_until_ready(executable(inputs))
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuProfilerStart()
    jax.block_until_ready(executable(inputs))
    driver.cuProfilerStop()


def _print_kernels(shape: str, mode: str, name: str) -> None:
    profiler = [
        *("ncu", "--csv", "--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off"),
        *("--metrics", ",".join(_METRICS.values())),
    ]
    call = ["--shapes", shape, "--implementations", name, "--mode", mode, "--as-profiled"]
    done = subprocess.run([*profiler, sys.executable, __file__, *call], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if done.returncode or start is None:
        print(f"{shape} {mode} {name}: {(done.stdout + done.stderr)[-1500:]}")
        return
    kernels: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(lines[start:]):
        _, values = kernels.setdefault(row["ID"], (row["Kernel Name"], {}))
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except ValueError:  # a counter that this chip or version lacks
            continue
        values[row["Metric Name"]] = value * _MICROSECONDS[row["Metric Unit"]] if row["Metric Name"] == _TIME else value
    total = sum(values[_TIME] for _, values in kernels.values())
    for kernel, values in kernels.values():
        if values[_TIME] >= _LEAST * total:
            cells = [
                f"{values[_TIME]:.1f}",
                *(f"{values.get(x, float('nan')):.0f}" for x in list(_METRICS.values())[1:]),
            ]
            print(f"| {shape} {mode} {name} | {kernel[:60]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
