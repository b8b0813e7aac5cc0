"""cuDNN's kernels as this library calls them, on the GPU here: right, called once, and as fast as `jax.nn` calls them?

    python benchmarks/check_cudnn.py                 all of it, in under 4 minutes on one H200
    python benchmarks/check_cudnn.py --skip tests    the figures alone

1. tests: `tests/cudnn`, in several processes: parity, masks, biases, lengths, GQA, transformations, and how many calls
   of cuDNN a program has.
2. table: rows of the GPU table, ours beside `jax.nn`'s cuDNN, by `benchmark_gpu_table.py`.
3. threshold: small calls, cuDNN's beside pure JAX, for `_FEWEST_SCORES` of `_kernels/cudnn/support.py`.
4. jax.nn: what cuDNN itself makes of rows without keys, of NaN in padding and of very low biases.
"""

import argparse
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from harness.measure import Settings, compile_case, reason_of, time_case
from harness.report import Table
from harness.shapes import MODES, parse_dimensions

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "table", "threshold", "jax.nn")
ROWS = (
    "gpu-2x8192x16x128-causal",
    "gpu-2x8192x16x128",
    "gpu-gqa-4x4096x32/8x64-causal",
    "mixtral-8x4096x32/8x128-causal",
    "llama-1x8192x64/8x128-causal",
    "gpu-8x512x16x64",
    "siglip-16x729x16x72",
    "stable-diffusion-4x4096x8x40",
    "gpu-bias-2x4096x16x64",
    "gpu-lengths-8x4096x16x128",
)
SMALL = ("1x64x4x64", "1x256x8x64", "8x128x8x64", "4x256x16x64", "8x256x16x64", "4x512x16x64", "8x1/1024x8x64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[])
    parser.add_argument("--processes", type=int, default=12, help="of the tests")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    if "tests" not in options.skip:
        print(f"PASS/FAIL: {_tests(options.processes, environment)}", flush=True)
    if "table" not in options.skip:
        _table(environment)
    if "threshold" not in options.skip:
        _threshold()
    if "jax.nn" not in options.skip:
        _peculiarities()


def _tests(processes: int, environment: dict[str, str]) -> str:
    """Their last line; the tests that fail are printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-n", str(processes)]
    command += ["--dist", "worksteal", "-m", "gpu", "--tb", "line", "tests/cudnn"]
    flags = f"{environment.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    found = subprocess.run(
        command, cwd=ROOT, env={**environment, "XLA_FLAGS": flags}, capture_output=True, text=True, check=False
    )
    lines = (found.stdout + found.stderr).strip().splitlines()
    print("\n".join(line for line in lines if re.match(r"(FAILED|ERROR|E  |/)", line)), flush=True)
    return next((line for line in reversed(lines) if "passed" in line or "failed" in line), lines[-1] if lines else "")


def _table(environment: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "benchmark_gpu_table.py"), "--shapes", *ROWS]
    command += [
        "--implementations",
        "flash:cudnn_gpu",
        "jax.nn:cudnn",
        "--time-per-case",
        "0.5",
        "--time-budget",
        "110",
    ]
    subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=False)


def _threshold() -> None:
    """Milliseconds of small calls within a program."""
    names = ("flash:cudnn_gpu", "flash:pure_jax")
    settings = Settings(time_per_case=0.2, fills_programs=True, check_results=False)
    table = Table(["shape", "scores", *(f"{mode}: {x}" for mode in MODES for x in (*names, "ratio"))], echoes=False)
    with table:
        for dimensions in SMALL:
            shape = parse_dimensions(dimensions).with_settings("bfloat16")
            cells = [dimensions, str(shape.score_elements)]
            for mode in MODES:
                compiled = compile_case(shape, mode, names, settings, threads=2)
                measured = time_case(shape, mode, compiled, settings)
                for name in names:
                    found = measured.measurements[name]
                    cells.append(str(found.reason) if found.seconds is None else f"{found.seconds * 1e3:.4f}")
                ratio = measured.ratio(*names)
                cells.append("" if ratio is None else f"{ratio.value:.2f}")
            table.add(*cells)


def _peculiarities() -> None:
    """Of `jax.nn` itself: whether results are finite, and how far from what this library promises."""
    query, key, value = (jax.random.normal(jax.random.key(i), (2, 256, 2, 64), jnp.bfloat16) for i in range(3))
    lengths = jnp.array([100, 256], jnp.int32)
    padded = (jnp.arange(256) >= lengths[:, None])[..., None, None]
    some = jnp.where(jax.random.bernoulli(jax.random.key(3), 0.5, (1, 2, 256, 256)), 0.0, 1.0)

    def biased(low: float, columns: int, rows: int = 256) -> jax.Array:
        is_low = (jnp.arange(256) < columns)[None, None, None, :] & (jnp.arange(256) < rows)[None, None, :, None]
        return jnp.where(is_low, low, some).astype(jnp.bfloat16)

    least = float(jnp.finfo(jnp.bfloat16).min)
    nan_key, nan_value = (jnp.where(padded, jnp.nan, x) for x in (key, value))
    full = {"query_seq_lengths": jnp.full((2,), 256, jnp.int32)}
    cases: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "lengths": ((query, key, value), {**full, "key_value_seq_lengths": lengths}),
        "NaN in padded keys": ((query, nan_key, value), {**full, "key_value_seq_lengths": lengths}),
        "NaN in padded values": ((query, key, nan_value), {**full, "key_value_seq_lengths": lengths}),
        "a length of 0": ((query, key, value), {**full, "key_value_seq_lengths": lengths * 0 + jnp.array([0, 256])}),
        "padded rows": ((query, key, value), {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}),
        "bias -inf, 10 keys": ((query, key, value, biased(-jnp.inf, 10)), {}),
        "bias -inf, 200 keys": ((query, key, value, biased(-jnp.inf, 200)), {}),
        "bias finfo.min, 200 keys": ((query, key, value, biased(least, 200)), {}),
        "bias -inf, all keys of 3 rows": ((query, key, value, biased(-jnp.inf, 256, 3)), {}),
        "bias finfo.min, all keys of 3 rows": ((query, key, value, biased(least, 256, 3)), {}),
        "bias -2**40, all keys of 3 rows": ((query, key, value, biased(-(2.0**40), 256, 3)), {}),
    }
    with Table(["jax.nn, cuDNN", "out: not finite", "gradients: not finite", "mean of rows 0 to 2 off by"]) as table:
        for name, (arrays, options) in cases.items():
            call = functools.partial(jax.nn.dot_product_attention, **options, implementation="cudnn")

            def run(*arrays: jax.Array, call: Any = call) -> Any:
                out, pullback = jax.vjp(call, *arrays)
                return out, pullback(jnp.ones_like(out))

            try:
                out, gradients = jax.jit(run)(*arrays)
            except Exception as error:  # whatever it refuses with is its line of the table
                table.add(name, reason_of(error), "", "")
                continue
            off = jnp.abs(out[:, :3].astype(jnp.float32) - value.astype(jnp.float32).mean(1, keepdims=True)).max()
            bad = [int((~jnp.isfinite(x)).sum()) for x in (out, *gradients)]
            table.add(name, str(bad[0]), ", ".join(map(str, bad[1:])), f"{float(off):.3g}")


if __name__ == "__main__":
    main()
