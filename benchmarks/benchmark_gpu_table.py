"""The GPU table: every GPU shape, ours beside `jax.nn` and cuDNN, forward and with gradients.

    python benchmarks/benchmark_gpu_table.py
    python benchmarks/benchmark_gpu_table.py --implementations flash:xla jax.nn --shapes gpu-2x8192x16x128

Columns: median milliseconds of interleaved calls, TFLOP/s and their fraction of `--ceiling` (4BNTSH operations, less
what causal masks, windows and lengths leave out; 3.5 times that with gradients), the temporary memory that the compiler
reserves, and the largest error of one head of each result against float64, as a fraction of its largest element.
Everything is compiled beforehand, in parallel; inputs are made on the GPU.
"""

import argparse
import functools
import importlib
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_shapes import FORWARD, GPU_SHAPES, GRADIENT, AttentionInputs, AttentionShape, find_shape
from machine import header
from timing import interleaved_medians, temporary_bytes

from jax_native_flash_attn import flash_attention

DEFAULT_IMPLEMENTATIONS = ("flash", "flash:xla", "jax.nn", "jax.nn:cudnn")


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
    if library == "flash":
        return flash_attention
    if library == "jax.nn":
        return jax.nn.dot_product_attention
    if library == "tokamax":
        return importlib.import_module("tokamax").dot_product_attention
    raise ValueError(f"{library!r} is not a library: flash, jax.nn or tokamax")


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


def compile_call(implementation: str, shape: AttentionShape, mode: str) -> Any:
    """The compiled executable, from inputs to (out, gradients)."""

    def call(inputs: AttentionInputs) -> Any:
        arguments = (inputs.query, inputs.key, inputs.value, inputs.bias)
        function = functools.partial(attention, implementation, shape, inputs=inputs)
        if mode == FORWARD:
            return function(arguments), ()
        out, pullback = jax.vjp(function, arguments)
        return out, pullback(inputs.cotangent)[0]

    return jax.jit(call).lower(jax.eval_shape(functools.partial(random_inputs, shape))).compile()


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


def errors(shape: AttentionShape, inputs: AttentionInputs, results: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of the last group of heads of the last batch row, over out and its gradients."""
    G = shape.num_heads // shape.num_key_value_heads
    with jax.enable_x64(True):
        wide = functools.partial(jnp.asarray, dtype=jnp.float64)
        query, cotangent = (wide(x[-1, :, -G:]) for x in (inputs.query, inputs.cotangent))
        key, value = (wide(x[-1, :, -1]) for x in (inputs.key, inputs.value))
        T, S = query.shape[0], key.shape[0]
        rows, columns = jnp.arange(T)[:, None], jnp.arange(S)[None]
        allowed = jnp.ones((T, S), bool)
        if shape.is_causal:
            allowed &= columns <= rows
        if shape.local_window_size is not None:
            left, right = shape.local_window_size
            allowed &= (columns >= rows - left) & (columns <= rows + right)
        if shape.key_value_lengths is not None:
            allowed &= columns < shape.key_value_lengths[-1]
        if inputs.mask is not None:
            allowed &= inputs.mask[-1, -1]
        bias = jnp.zeros((1, 1, 1)) if inputs.bias is None else wide(inputs.bias[-1, -G:])

        def dense(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            logits = jnp.einsum("tgh,sh->gts", query, key) * shape.head_dim**-0.5 + bias
            weights = jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf), -1)
            return jnp.einsum("gts,sh->tgh", weights, value)

        gradient = any(gradients for _, gradients in results.values())
        if gradient:
            out, pullback = jax.vjp(dense, query, key, value)
            expected = (out, *pullback(cotangent))
        else:
            expected = (dense(query, key, value),)
        found = {}
        for name, (out, gradients) in results.items():
            heads = [out[-1, :, -G:], *([gradients[0][-1, :, -G:]] if gradients else [])]
            heads += [x[-1, :, -1] for x in gradients[1:3]]
            found[name] = max(
                float(jnp.abs(wide(x) - e).max() / jnp.abs(e).max()) for x, e in zip(heads, expected, strict=True)
            )
        return found


def _cell(seconds: float, flops: float, ceiling: float, temporary: int | None, error: float) -> str:
    rate = flops / seconds / 1e12
    memory = "-" if temporary is None else f"{temporary / 2**20:.0f}"
    return f"{seconds * 1e3:.3f} ms, {rate:.0f} ({rate / ceiling:.2f}), {memory} MiB, {error:.0e}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=find_shape, default=GPU_SHAPES)
    parser.add_argument("--implementations", nargs="+", default=DEFAULT_IMPLEMENTATIONS)
    parser.add_argument("--mode", choices=(FORWARD, GRADIENT, "both"), default="both")
    parser.add_argument("--ceiling", type=float, default=790.0, help="TFLOP/s of a large bfloat16 product")
    parser.add_argument("--max-dense-gib", type=float, default=60.0, help="jax.nn's dense code is left out above this")
    parser.add_argument("--threads", type=int, default=8, help="compilations at once")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    print(header())
    print("milliseconds, TFLOP/s (fraction of the ceiling), temporary memory, error against float64\n")
    print(f"| case | mode | {' | '.join(options.implementations)} |")
    print("|---|---|" + "---|" * len(options.implementations))

    def compile_or_reason(implementation: str, shape: AttentionShape, mode: str) -> Any:
        if implementation == "jax.nn" and shape.dense_bytes(mode) > options.max_dense_gib * 2**30:
            return "out of reach"
        try:
            return compile_call(implementation, shape, mode)
        except Exception as error:  # whatever a peer refuses with is its cell of the table
            return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"

    started = time.perf_counter()
    with ThreadPoolExecutor(options.threads) as pool:
        futures = {
            (shape.name, mode, name): pool.submit(compile_or_reason, name, shape, mode)
            for shape in options.shapes
            for mode in shape.modes
            if options.mode in (mode, "both")
            for name in options.implementations
        }
        compiled = {key: future.result() for key, future in futures.items()}
    print(f"compiled in {time.perf_counter() - started:.0f} s", file=sys.stderr)

    for shape in options.shapes:
        inputs = random_inputs(shape)
        for mode in shape.modes:
            if options.mode not in (mode, "both"):
                continue
            cells, results, calls = {}, {}, {}
            for name in options.implementations:
                executable = compiled.pop((shape.name, mode, name))
                if isinstance(executable, str):
                    cells[name] = executable
                    continue
                try:
                    results[name] = jax.block_until_ready(executable(inputs))
                    calls[name] = functools.partial(executable, inputs)
                    cells[name] = temporary_bytes(executable)
                except Exception as error:
                    cells[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
            found = dict.fromkeys(results, float("nan"))
            try:
                found = errors(shape, inputs, results)
            except Exception as error:
                print(f"{shape.name}: no reference: {type(error).__name__}", file=sys.stderr)
            results.clear()
            seconds = interleaved_medians(calls, repeats=options.repeats, sample_seconds=0.01) if calls else {}
            flops = 4 * shape.score_elements * shape.head_dim * live_fraction(shape) * (1 if mode == FORWARD else 3.5)
            for name, each in seconds.items():
                cells[name] = _cell(each, flops, options.ceiling, cells[name], found[name])
            row = " | ".join(str(cells[name]) for name in options.implementations)
            print(f"| {shape.name} | {mode} | {row} |", flush=True)


if __name__ == "__main__":
    main()
