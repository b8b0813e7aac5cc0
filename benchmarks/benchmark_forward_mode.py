"""Times value and tangent of query, key and value (`jax.jvp`) on a Hopper GPU, beside the forward pass alone.

    python benchmarks/benchmark_forward_mode.py
    python benchmarks/benchmark_forward_mode.py 64x256x16x64 2x4096x16x128-causal --blocks 64x64x3w2p 64x128x2w2

A row is `batch x length x heads x head dimension`, bfloat16. Candidates are block shapes of the tangent kernel as in
tune_mosaic.py, beside those that the library chooses; `pure_jax` is the forward kernel with the tangent in pure JAX.
All calls of a row are interleaved in one process. Errors are the largest of the tangent of out, against float32 with
the highest precision; that of `pure_jax` is what 16 bits cost there.
"""

import argparse
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness.implementations import calls_per_program, repeated
from harness.machine import header
from harness.timing import interleaved_seconds, ratio
from tune_mosaic import parse_blocks

from jax_native_flash_attn import flash_attention
from jax_native_flash_attn._kernels.hopper.support import HopperKernels
from jax_native_flash_attn._kernels.protocol import Pass
from jax_native_flash_attn._kernels.select import replacing

ROWS = ("64x256x16x64", "8x1024x16x64", "2x4096x16x128", "2x4096x16x128-causal")
_SECONDS = 1e-3  # of one program: shorter calls are repeated in it


class _WithoutTangents(HopperKernels):
    def supports(self, call: Any, which: Pass, target: Any) -> str | None:
        return "not asked for" if which is Pass.TANGENT else super().supports(call, which, target)


def _family(candidate: str) -> HopperKernels:
    if candidate == "pure_jax":
        return _WithoutTangents()
    return HopperKernels(tangent_blocks=parse_blocks(candidate))


def measure(row: str, blocks: list[str], seconds: float) -> None:
    """Prints a line for each candidate of a row."""
    B, T, N, H = map(int, re.findall(r"\d+", row))
    attention = functools.partial(flash_attention, is_causal=row.endswith("causal"))
    random = np.random.default_rng(0)
    primals, tangents = (
        [jnp.asarray(random.standard_normal((B, T, N, H)), jnp.bfloat16) for _ in range(3)] for _ in range(2)
    )

    def both(primals: Any, tangents: Any) -> Any:
        return jax.jvp(attention, primals, tangents)

    def program(function: Any, count: int, *arguments: Any) -> Any:
        return jax.jit(repeated(function, count)).lower(*arguments).compile()

    count = calls_per_program(12 * B * N * T * T * H, _SECONDS)
    calls = {"forward": functools.partial(program(lambda x: attention(*x), count, primals), primals)}
    tangent_of_out = {}
    for candidate in ("library", *blocks, "pure_jax"):
        try:
            with replacing(_family(candidate)):
                tangent_of_out[candidate] = np.asarray(jax.jit(both)(primals, tangents)[1], np.float32)
                calls[candidate] = functools.partial(
                    program(lambda x: both(*x), count, (primals, tangents)), (primals, tangents)
                )
        except Exception as error:  # a block shape that does not fit, say
            print(f"{row:24} {candidate:12} {type(error).__name__}: {str(error)[:150]}", flush=True)
    with jax.default_matmul_precision("highest"), replacing(_WithoutTangents()):
        wide: Any = jax.tree.map(lambda x: x.astype(jnp.float32), (primals, tangents))
        exact = np.asarray(jax.jit(both)(*wide)[1])
    samples = interleaved_seconds(calls, time_budget=seconds)
    for name, times in samples.items():
        beside = ratio(times, samples["forward"])
        found = tangent_of_out.get(name)
        error = "" if found is None else f"error {np.abs(found - exact).max():.2e} of {np.abs(exact).max():.2e}"
        print(f"{row:24} {name:12} {np.median(times) / count * 1e3:8.3f} ms, {beside} of forward  {error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(ROWS))
    parser.add_argument("--blocks", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row")
    options = parser.parse_args()
    print(header())
    for row in options.rows:
        measure(row, options.blocks, options.seconds)


if __name__ == "__main__":
    main()
