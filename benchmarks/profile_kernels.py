"""Where the time of a call goes: every GPU kernel of it, by `jax.profiler`.

python benchmarks/profile_kernels.py --shapes alphafold-384x384x4x64 --implementations flash:pure_jax jax.nn
"""

import collections
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
from harness.implementations import JaxAttention
from harness.inputs import make_inputs
from harness.machine import header
from harness.options import chosen_cases, command_line
from harness.programs import profiled
from harness.report import Table
from harness.shapes import MODES
from harness.timing import Call

_CALLS = 3


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, ["shapes"], implementations=["flash:pure_jax", "jax.nn"], modes=MODES)
    parser.add_argument("--least", type=float, default=0.02, help="leave out kernels below this part of the total")
    options = parser.parse_args(argv)
    print(header())
    calls = [(name, *case) for case in chosen_cases(options) for name in options.implementations]
    with ThreadPoolExecutor(8) as pool:
        compiled = list(pool.map(lambda call: JaxAttention(*call), calls))
    for (name, shape, mode), attention in zip(calls, compiled, strict=True):
        _print_kernels(f"{shape.name} {mode} {name}", attention.bind(make_inputs(shape)), options.least)


def _print_kernels(title: str, call: Call, least: float) -> None:
    jax.block_until_ready(call())
    data = profiled(call, _CALLS)
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
    table = Table(["kernel", "ms", "launches"], echoes=False)
    for kernel, times in sorted(kernels.items(), key=lambda item: -sum(item[1])):
        if sum(times) >= least * total:
            table.add(kernel[:90], f"{sum(times) / _CALLS:.3f}", f"{len(times) / _CALLS:.0f}")
    print(table, flush=True)


if __name__ == "__main__":
    main()
