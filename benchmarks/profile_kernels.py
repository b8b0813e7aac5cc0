"""Where the time of a call goes: every GPU kernel of it, by `jax.profiler`.

python benchmarks/profile_kernels.py --shapes alphafold-384x384x4x64 --implementations flash:pure_jax jax.nn
"""

import argparse
import collections
import glob
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from attention_shapes import MODES, AttentionShape, find_shape
from benchmark_gpu_table import compile_call, random_inputs
from machine import header

_CALLS = 3


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=find_shape, required=True)
    parser.add_argument("--implementations", nargs="+", default=("flash:pure_jax", "jax.nn"))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--least", type=float, default=0.02, help="leave out kernels below this part of the total")
    options = parser.parse_args(argv)
    print(header())
    calls = [
        (name, shape, mode)
        for shape in options.shapes
        for mode in options.mode
        if mode in shape.modes
        for name in options.implementations
    ]
    with ThreadPoolExecutor(8) as pool:
        executables = list(pool.map(lambda call: compile_call(*call), calls))
    for (name, shape, mode), executable in zip(calls, executables, strict=True):
        _print_kernels(f"{shape.name} {mode} {name}", executable, shape, options.least)


def _print_kernels(title: str, executable: Any, shape: AttentionShape, least: float) -> None:
    inputs = random_inputs(shape)
    jax.block_until_ready(executable(inputs))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(_CALLS):
                jax.block_until_ready(executable(inputs))
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
    kernels = collections.defaultdict(list)
    for plane in data.planes:
        if "GPU" not in plane.name:
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    kernels[event.name].append(event.duration_ns / 1e6)
    total = sum(map(sum, kernels.values()))
    print(f"\n{title}: {total / _CALLS:.3f} ms in kernels")
    for kernel, times in sorted(kernels.items(), key=lambda item: -sum(item[1])):
        if sum(times) >= least * total:
            print(f"  {sum(times) / _CALLS:8.3f} ms  {len(times) / _CALLS:5.0f} x  {kernel[:90]}")


if __name__ == "__main__":
    main()
