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
from harness.implementations import JaxAttention
from harness.inputs import make_inputs
from harness.machine import header
from harness.options import chosen_cases, command_line
from harness.report import Table
from harness.shapes import MODES, AttentionShape

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
    parser = command_line(__doc__, ["shapes"], implementations=["flash", "jax.nn:cudnn"], modes=MODES)
    parser.add_argument("--as-profiled", action="store_true", help=argparse.SUPPRESS)  # one call, under ncu
    options = parser.parse_args(argv)
    cases = [(name, *case) for case in chosen_cases(options) for name in options.implementations]
    if options.as_profiled:
        _call_once(*cases[0])
        return
    print(header(), flush=True)
    with Table(["case", "kernel", *_METRICS], labels=2) as table:
        for case in cases:
            _add_kernels(table, *case)


def _call_once(name: str, shape: AttentionShape, mode: str) -> None:
    call = JaxAttention(name, shape, mode).bind(make_inputs(shape))
    jax.block_until_ready(call())
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuProfilerStart()
    jax.block_until_ready(call())
    driver.cuProfilerStop()


def _add_kernels(table: Table, name: str, shape: AttentionShape, mode: str) -> None:
    profiler = [
        *("ncu", "--csv", "--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off"),
        *("--metrics", ",".join(_METRICS.values())),
    ]
    call = ["--shapes", shape.name, "--implementations", name, "--mode", mode, "--as-profiled"]
    done = subprocess.run([*profiler, sys.executable, __file__, *call], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if done.returncode or start is None:
        print(f"{shape.name} {mode} {name}: {(done.stdout + done.stderr)[-1500:]}")
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
            table.add(f"{shape.name} {mode} {name}", kernel[:60], *cells)


if __name__ == "__main__":
    main()
