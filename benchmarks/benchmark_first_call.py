"""What a first call costs beside `jax.nn`'s: tracing, lowering and compiling, in CPU seconds of all threads.

    python benchmarks/benchmark_first_call.py                          B 2, T = S = 2048, 8 heads of 64, float32
    python benchmarks/benchmark_first_call.py --shape 4x128x8x64 --rounds 3

Every measurement is a process of its own, which has compiled something small before; the programs take turns, and the
table has medians. With JAX's persistent cache, a process finds what an earlier one has compiled: it still traces and
lowers.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from harness.machine import header
from harness.report import Table, progress
from harness.shapes import GRADIENT, MODES

from jax_native_flash_attn import flash_attention

FUNCTIONS = {"flash": flash_attention, "jax.nn": jax.nn.dot_product_attention}
PHASES = ("trace", "lower", "compile")


def measure(name: str, mode: str, is_causal: bool, shape: tuple[int, ...], cache: str | None) -> list[float]:
    """CPU seconds of each phase, in this process."""
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    attend = functools.partial(FUNCTIONS[name], is_causal=is_causal)
    gradient = jax.value_and_grad(lambda *x: jnp.square(attend(*x)).sum(), (0, 1, 2))
    jax.jit(lambda x: x + 1)(jnp.ones(3)).block_until_ready()
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3
    steps = (lambda f: jax.jit(f).trace(*inputs), lambda traced: traced.lower(), lambda lowered: lowered.compile())
    seconds, x = [], gradient if mode == GRADIENT else attend
    for step in steps:
        start = time.process_time()
        x = step(x)
        seconds.append(time.process_time() - start)
    return seconds


def in_child(*arguments: str, cache: str | None = None) -> list[float]:
    command = [sys.executable, __file__, "--measure", *arguments, *(["--cache", cache] if cache else [])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2x2048x8x64", help="B x T x N x H")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=3, metavar=("NAME", "MODE", "MASK"), help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, mode, mask = options.measure
        shape = tuple(map(int, options.shape.split("x")))
        print(json.dumps(measure(name, mode, mask == "causal", shape, options.cache)))
        return
    print(header())
    columns = [
        "call",
        "mode",
        "program",
        *(f"{phase} s" for phase in PHASES),
        "all s",
        "from cache s",
        "ratio to jax.nn",
    ]
    calls = [(mask, mode) for mask in ("no mask", "causal") for mode in MODES]
    with Table(columns, labels=3) as table:
        for mask, mode in progress(calls, " ".join):
            measured = {name: ([], []) for name in FUNCTIONS}
            with tempfile.TemporaryDirectory() as cache:
                for _ in range(options.rounds):
                    for name, (first, again) in measured.items():
                        arguments = (name, mode, mask, "--shape", options.shape)
                        first.append(in_child(*arguments))
                        if not again:
                            in_child(*arguments, cache=cache)  # fills it
                        again.append(in_child(*arguments, cache=cache))
            totals = {name: np.median(np.sum(first, 1)) for name, (first, _) in measured.items()}
            for name, (first, again) in measured.items():
                phases = (f"{x:.2f}" for x in np.median(first, 0))
                numbers = (
                    f"{totals[name]:.2f}",
                    f"{np.median(np.sum(again, 1)):.2f}",
                    f"{totals[name] / totals['jax.nn']:.2f}",
                )
                table.add(mask, mode, name, *phases, *numbers)


if __name__ == "__main__":
    main()
