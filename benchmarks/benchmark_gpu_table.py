"""The GPU table: every GPU shape, ours beside `jax.nn` and tokamax, forward and with gradients.

    python benchmarks/benchmark_gpu_table.py --json gpu.json --plot docs/gpu_table.png
    python benchmarks/benchmark_gpu_table.py --implementations flash:pure_jax jax.nn --shapes gpu-2x8192x16x128
    python benchmarks/benchmark_gpu_table.py --time-budget 120 --mode forward

Columns: median milliseconds of interleaved calls, TFLOP/s (4BNTSH operations, less what causal masks, windows and
lengths leave out; 3.5 times that with gradients) and their fraction of a large bfloat16 product's in the same run, the
temporary memory that the compiler reserves, and the largest error against float64 as a fraction of a result's largest
element; last, ours against the best peer whose result is right. A peer that refuses or fails is printed as such.

Every shape is compiled in a process of its own, all at the same time, and then they measure one after the other. Short
calls are repeated within one program, so that starting them from Python does not count.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_reference import largest_error, reference_results, select, with_cotangent_on
from attention_shapes import FORWARD, GPU_SHAPES, GRADIENT, MODES, AttentionInputs, AttentionShape, find_shape
from gpu_report import tables, write_plot
from machine import environment, header
from other_tree import flash_attention_of
from processes import run_in_turn, wait_for_turn
from timing import interleaved_medians, repeated, seconds_per_call, temporary_bytes, warm_up

from jax_native_flash_attn import flash_attention

OURS = "flash"
_RESULT = "RESULT "
_CEILING = "ceiling"
_SECONDS, _RATE = 3e-4, 400e12  # calls shorter than this at this rate are repeated within a program


def default_implementations() -> list[str]:
    """Ours and the peers that are installed."""
    names = [OURS, "jax.nn", "jax.nn:cudnn"]
    if importlib.util.find_spec("tokamax") is not None:
        names += ["tokamax:mosaic_gpu", "tokamax:triton"]
    return names


def random_inputs(shape: AttentionShape, seed: int = 0) -> AttentionInputs:
    """Normal inputs made on the device; a mask keeps four keys in five, and always the first."""
    dtype = jnp.dtype(shape.dtype)
    keys = iter(jax.random.split(jax.random.key(seed), 6))
    queries = (shape.batch, shape.query_length, shape.num_heads, shape.head_dim)
    rows = (shape.batch, shape.key_value_length, shape.num_key_value_heads, shape.head_dim)
    query, key, value, cotangent = (jax.random.normal(next(keys), s, dtype) for s in (queries, rows, rows, queries))
    bias = None if shape.bias_shape is None else jax.random.normal(next(keys), shape.bias_shape, dtype)
    mask = lengths = None
    if shape.mask_shape is not None:
        mask = (jax.random.uniform(next(keys), shape.mask_shape) < 0.8).at[..., 0].set(True)
    if shape.key_value_lengths is not None:
        lengths = jnp.asarray(shape.key_value_lengths, jnp.int32)
    return AttentionInputs(query, key, value, bias, mask, lengths, cotangent)


@functools.cache
def _function(library: str) -> Any:
    if library == OURS:
        return flash_attention
    if library.startswith(f"{OURS}="):
        return flash_attention_of(library.removeprefix(f"{OURS}="))
    if library == "jax.nn":
        return jax.nn.dot_product_attention
    if library == "tokamax":
        logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of every call that nobody has tuned
        return importlib.import_module("tokamax").dot_product_attention
    raise ValueError(f"{library!r} is not a library: {OURS}, jax.nn or tokamax")


def attention(implementation: str, shape: AttentionShape, arguments: Any, inputs: AttentionInputs) -> jax.Array:
    library, _, name = implementation.partition(":")
    query, key, value, bias = arguments
    lengths = inputs.key_value_seq_lengths
    settings: dict[str, Any] = {"implementation": name or ("xla" if library == "jax.nn" else None)}
    if library == "jax.nn" and name == "cudnn" and lengths is not None:
        settings["query_seq_lengths"] = jnp.full_like(lengths, shape.query_length)  # cuDNN wants both
    return _function(library)(
        query,
        key,
        value,
        bias,
        inputs.mask,
        is_causal=shape.is_causal,
        key_value_seq_lengths=lengths,
        local_window_size=shape.local_window_size,
        **settings,
    )


def live_fraction(shape: AttentionShape) -> float:
    """Part of the T x S scores that masks of intervals leave, over the batch."""
    rows = np.arange(shape.query_length)[:, None]
    low, high = np.zeros_like(rows), np.full_like(rows, shape.key_value_length)
    if shape.is_causal:
        high = np.minimum(high, rows + 1)
    if shape.local_window_size is not None:
        low = np.maximum(low, rows - shape.local_window_size[0])
        high = np.minimum(high, rows + shape.local_window_size[1] + 1)
    if shape.key_value_lengths is not None:
        high = np.minimum(high, np.asarray(shape.key_value_lengths)[None])
    return float(np.maximum(high - low, 0).mean() / shape.key_value_length)


def operations(shape: AttentionShape, mode: str) -> float:
    return 4 * shape.score_elements * shape.head_dim * live_fraction(shape) * (1 if mode == FORWARD else 3.5)


def compilable(implementation: str, shape: AttentionShape, mode: str) -> Any:
    """A function from inputs to (out, gradients)."""

    def call(inputs: AttentionInputs) -> Any:
        arguments = (inputs.query, inputs.key, inputs.value, inputs.bias)
        function = functools.partial(attention, implementation, shape, inputs=inputs)
        if mode == FORWARD:
            return function(arguments), ()
        out, pullback = jax.vjp(function, arguments)
        return out, pullback(inputs.cotangent)[0]

    return call


def compile_call(implementation: str, shape: AttentionShape, mode: str) -> Any:
    """The compiled executable."""
    inputs = jax.eval_shape(functools.partial(random_inputs, shape))
    return jax.jit(compilable(implementation, shape, mode)).lower(inputs).compile()


class _Program:
    """One implementation of one case, compiled."""

    def __init__(self, implementation: str, shape: AttentionShape, mode: str):
        call = compilable(implementation, shape, mode)
        types = jax.eval_shape(functools.partial(random_inputs, shape))
        self.count = max(1, min(64, round(_SECONDS * _RATE / operations(shape, mode))))
        single = jax.jit(call).lower(types).compile()
        self.temporary_bytes = temporary_bytes(single)
        self.call = single if self.count == 1 else jax.jit(repeated(call, self.count)).lower(types).compile()


def _compile(implementation: str, shape: AttentionShape, mode: str, max_dense_gib: float) -> Any:
    """The program, or why there is none."""
    if implementation == "jax.nn" and shape.dense_bytes(mode) > max_dense_gib * 2**30:
        return "out of reach"
    try:
        return _Program(implementation, shape, mode)
    except Exception as error:  # whatever a peer refuses with is its cell of the table
        return _reason(error)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"


def measure_shape(shape: AttentionShape, options: Any) -> None:
    """In a child process: a line for each mode."""
    modes = [mode for mode in shape.modes if options.mode in (mode, "both")]
    with ThreadPoolExecutor(4) as pool:
        futures = {
            (mode, name): pool.submit(_compile, name, shape, mode, options.max_dense_gib)
            for mode in modes
            for name in options.implementations
        }
        programs = {key: future.result() for key, future in futures.items()}
    wait_for_turn()
    selection = select(shape, 2**22)
    inputs = with_cotangent_on(random_inputs(shape), selection)
    for mode in modes:
        reference = reference_results(shape, mode, inputs, selection)
        cells: dict[str, dict[str, Any]] = {}
        calls = {}
        for name in options.implementations:
            program = programs.pop((mode, name))
            if isinstance(program, str):
                cells[name] = {"reason": program}
                continue
            try:
                out, gradients = jax.block_until_ready(program.call(inputs))
                results = {"out": out, **dict(zip(("query", "key", "value", "bias"), gradients, strict=False))}
                error = largest_error({k: v for k, v in results.items() if v is not None}, reference, selection)
                del out, gradients, results
            except Exception as failure:
                cells[name] = {"reason": _reason(failure)}
                continue
            cells[name] = {"temporary_bytes": program.temporary_bytes, "error": error, "count": program.count}
            calls[name] = functools.partial(program.call, inputs)
        warm_up(calls)
        settings = {"max_repeats": options.repeats, "time_budget": options.seconds, "sample_seconds": 5e-3}
        seconds = interleaved_medians(calls, **settings) if calls else {}
        for name, each in seconds.items():
            cells[name]["seconds"] = each / cells[name]["count"]
        result = {"shape": shape.name, "mode": mode, "operations": operations(shape, mode), "cells": cells}
        print(_RESULT + json.dumps(result), flush=True)


def measure_ceiling() -> None:
    """In a child process: operations per second of a large bfloat16 product on random data."""
    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul).lower(a, b).compile()
    wait_for_turn()
    call = functools.partial(product, a, b)
    warm_up({"product": call})
    print(
        _RESULT + json.dumps({"ceiling": 2 * 8192**3 / min(seconds_per_call(call, 20) for _ in range(3))}), flush=True
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in GPU_SHAPES])
    parser.add_argument(
        "--implementations", nargs="+", help="as flash:pure_jax, jax.nn:cudnn, flash=DIR; default: what is installed"
    )
    parser.add_argument("--mode", choices=(FORWARD, GRADIENT, "both"), default="both")
    parser.add_argument("--max-dense-gib", type=float, default=48.0, help="jax.nn's dense code is left out above this")
    parser.add_argument("--repeats", type=int, default=7, help="samples of a call at most")
    parser.add_argument("--seconds", type=float, default=1.0, help="for the samples of a case")
    parser.add_argument("--time-budget", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--plot", type=Path, help="draw time relative to the best peer into this PNG file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.implementations = options.implementations or default_implementations()
    if options.child == _CEILING:
        return measure_ceiling()
    if options.child:
        return measure_shape(find_shape(options.child), options)

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes share the memory
    started = time.monotonic()
    settings = ["--mode", options.mode, "--max-dense-gib", str(options.max_dense_gib), "--repeats"]
    settings += [str(options.repeats), "--seconds", str(options.seconds), "--implementations", *options.implementations]
    names = [_CEILING, *options.shapes]
    results: list[dict[str, Any]] = []

    def on_line(i: int, line: str) -> None:
        if not line.startswith(_RESULT):
            print(f"{names[i]}: {line}", file=sys.stderr, flush=True)
            return
        results.append(json.loads(line[len(_RESULT) :]))
        print(f"{time.monotonic() - started:.0f} s: {names[i]}", file=sys.stderr, flush=True)

    done = run_in_turn(
        [[sys.executable, __file__, "--child", name, *settings] for name in names],
        on_line,
        preparing_seconds=0.7 * options.time_budget,
        measuring_seconds=60.0,
        total_seconds=options.time_budget,
    )
    ceiling = next((x["ceiling"] for x in results if "ceiling" in x), None)
    report = {
        "environment": environment(),
        "ceiling": ceiling,
        "implementations": options.implementations,
        "cases": [x for x in results if "cells" in x],
        "unfinished": [name for name, is_done in zip(names, done, strict=True) if not is_done],
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(header() + "\n")
    for mode in MODES:
        print(tables(report, mode))
    if report["unfinished"]:
        print(f"Not finished in time: {', '.join(report['unfinished'])}")
    if options.plot:
        write_plot(options.plot, report)
    return None


if __name__ == "__main__":
    main()
