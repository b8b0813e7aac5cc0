"""Times the Hopper forward kernel with several block shapes, and checks each against float64.

    python benchmarks/tune_mosaic.py gpu-2x8192x16x128-causal gpu-2x8192x16x128 --blocks 64x128x2w2 64x128x2w3p
    python benchmarks/tune_mosaic.py gpu-8x512x16x64=64x128x2w2,jax.nn:cudnn alphafold-384x384x4x64=64x64x3w3p
    python benchmarks/tune_mosaic.py gpu-f32-2x4096x16x128-causal --blocks 64x64x2w2s 64x64x1w2sp 64x64x1w3s

Each candidate is `block_q x block_kv x stages w warpgroups`, behind it an s for softmax weights in shared memory, a p
for persistent blocks, a t for products in turn, and `/4` for four splits of the keys; or a peer, as `jax.nn:cudnn` (see
benchmark_gpu_table.py --help). Needs a Hopper GPU. What it finds belongs into the table in `_kernels/hopper/blocks.py`.

Each shape has a process of its own, which starts again without a candidate that gives no result in time.
"""

import argparse
import functools
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from harness.errors import largest_error, reference_results, select
from harness.implementations import attention, calls_per_program, repeated
from harness.inputs import input_types, make_inputs
from harness.measure import reason_of
from harness.options import command_line
from harness.processes import run_in_turn, wait_for_turn
from harness.report import Table
from harness.shapes import FORWARD, AttentionShape
from harness.suites import GPU_SHAPES, find_shape
from harness.timing import interleaved_seconds, ratio, warm_up

from jax_native_flash_attn._kernels.hopper.blocks import Blocks
from jax_native_flash_attn._kernels.hopper.support import HopperKernels
from jax_native_flash_attn._kernels.select import replacing

_SECONDS = 1e-3  # of one program: shorter calls are repeated in it


def parse_blocks(text: str) -> Blocks | None:
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)w(\d)(s?)(p?)(t?)(?:/(\d+))?", text)
    if match is None:
        return None
    block_q, block_kv, stages, warpgroups = map(int, match.groups()[:4])
    in_shared, persistent, takes_turns = map(bool, match.groups()[4:7])
    return Blocks(block_q, block_kv, stages, warpgroups, in_shared, persistent, takes_turns, int(match[8] or 1))


def _find(name: str) -> AttentionShape:
    """A row of the GPU table as it is, others in bfloat16."""
    shape = find_shape(name)
    return shape if shape in GPU_SHAPES else shape.with_settings("bfloat16")


def lowered(name: str, candidate: str, *, needs_lse: bool) -> Any:
    """The lowered program, and how often it computes the call."""
    shape = _find(name)
    count = calls_per_program(shape.operations(FORWARD), _SECONDS)
    blocks = parse_blocks(candidate)
    implementation = candidate if blocks is None else "flash:mosaic_gpu"

    def call(inputs: Any) -> Any:
        function = functools.partial(attention, implementation, shape, inputs=inputs)
        return jax.vjp(function, inputs.differentiated)[0] if needs_lse else function(inputs.differentiated)

    with replacing(HopperKernels(forward_blocks=blocks)):
        traced = jax.jit(repeated(call, count)).trace(input_types(shape))
        return traced.lower(lowering_platforms=("cuda",)), count


def measure(name: str, candidates: list[str], options: Any) -> None:
    """In a child process: prints a line for each result, and before it which candidate is being tried."""
    programs = {}
    with ThreadPoolExecutor(4) as pool:
        for candidate in candidates:
            try:
                program, count = lowered(name, candidate, needs_lse=options.lse)
                programs[candidate] = pool.submit(program.compile), count
            except Exception as error:
                print(f"{name} {candidate}: {reason_of(error)}", flush=True)
    wait_for_turn()
    shape = _find(name)
    inputs, selection = make_inputs(shape), select(shape, 2**21)
    reference = reference_results(shape, inputs, selection)
    calls, errors, counts = {}, {}, {}
    for candidate, (future, count) in programs.items():
        print(f"TRY {candidate}", flush=True)
        try:
            executable = future.result()
            errors[candidate] = largest_error({"out": executable(inputs)}, reference, selection)
            calls[candidate], counts[candidate] = functools.partial(executable, inputs), count
        except Exception as error:
            print(f"{name} {candidate}: {reason_of(error)}", flush=True)
    print("TRY timing", flush=True)
    warm_up(calls)
    samples = interleaved_seconds(calls, repeats=options.repeats, sample_seconds=1e-2) if calls else {}
    samples = {candidate: seconds / counts[candidate] for candidate, seconds in samples.items()}
    medians = {candidate: float(np.median(seconds)) for candidate, seconds in samples.items()}
    best = min(medians, key=lambda candidate: medians[candidate], default="")
    table = Table(["shape", "candidate", "ms", "TFLOP/s", "to the best [95%]", "error"], labels=2, echoes=False)
    for candidate in sorted(medians, key=lambda candidate: medians[candidate]):
        rate = shape.operations(FORWARD) / medians[candidate] / 1e12
        numbers = f"{medians[candidate] * 1e3:.4f}", f"{rate:.0f}", str(ratio(samples[candidate], samples[best]))
        table.add(name, candidate, *numbers, f"{errors[candidate]:.1e}")
    print(table, flush=True)


def main() -> None:
    parser = command_line(__doc__, repeats=7)
    parser.add_argument("shapes", nargs="+", help="SHAPE, or SHAPE=CANDIDATE,CANDIDATE")
    parser.add_argument("--blocks", nargs="+", default=["64x128x2w2", "64x128x2w2p"])
    parser.add_argument("--lse", action="store_true", help="with log-sum-exp and float32 output, as for derivatives")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds for all candidates of a shape")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    left: dict[str, list[str]] = {}
    for text in options.shapes:
        name, _, candidates = text.partition("=")
        left[name] = candidates.split(",") if candidates else options.blocks
    if options.child:
        measure(*next(iter(left.items())), options)
        return
    while left:
        settings = ["--child", "--repeats", str(options.repeats), *(["--lse"] if options.lse else [])]
        names, tried = list(left), dict.fromkeys(left, "")
        commands = [[sys.executable, __file__, f"{name}={','.join(left[name])}", *settings] for name in names]

        def on_line(i: int, line: str, names: list[str] = names, tried: dict[str, str] = tried) -> None:
            if line.startswith("TRY "):
                tried[names[i]] = line.split()[1]
            else:
                print(line, flush=True)

        done = run_in_turn(commands, on_line, preparing_seconds=120.0, measuring_seconds=options.timeout)
        for name, is_done in zip(names, done, strict=True):
            culprit = tried[name]
            if not is_done:
                print(f"{name} {culprit or 'preparing'}: no result", flush=True)
            if is_done or culprit not in left[name]:
                del left[name]
            else:
                left[name].remove(culprit)


if __name__ == "__main__":
    main()
