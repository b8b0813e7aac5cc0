"""Times the Hopper forward kernel with several block shapes, and checks each against float64.

    python benchmarks/tune_mosaic.py gpu-2x8192x16x128-causal gpu-2x8192x16x128 --blocks 64x128x2w2 64x128x2w3

Each candidate is `block_q x block_kv x stages w warpgroups`, with an s behind for softmax weights in shared memory.
Needs a Hopper GPU. What it finds belongs into `_mosaic_blocks.py`.
"""

import argparse
import os
import re
import subprocess
import sys
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_shapes import AttentionShape, find_shape
from benchmark_gpu_table import random_inputs
from timing import interleaved_medians

from jax_native_flash_attn._logits import Config, Inputs
from jax_native_flash_attn._masks import make_mask
from jax_native_flash_attn._mosaic_blocks import Blocks
from jax_native_flash_attn._mosaic_forward import forward


def parse_blocks(text: str) -> Blocks:
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)w(\d)(s?)", text)
    if match is None:
        raise ValueError(f"blocks are written as 64x128x2w2 or 64x64x2w2s, got {text!r}")
    return Blocks(*map(int, match.groups()[:4]), weights_in_shared=bool(match[5]))


def kernel_call(shape: AttentionShape, arrays: Any, blocks: Blocks, *, needs_lse: bool) -> Any:
    _, T, _, H = arrays.query.shape
    S = arrays.key.shape[1]

    def call(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        band, mask = make_mask(
            T,
            S,
            is_causal=shape.is_causal,
            static_window=shape.local_window_size,
            traced_window=None,
            query_lengths=None,
            key_value_lengths=lengths,
            allowed=None,
        )
        scale = jnp.full((1,), H**-0.5, jnp.float32)
        inputs = Inputs(query, key, value, scale, None, mask, None, None)
        config = Config(band, None, None, None, None, needs_lse)
        return forward(config, inputs, blocks, jnp.float32 if needs_lse else query.dtype)[0].reshape(query.shape)

    jitted = jax.jit(call)
    return lambda: jitted(arrays.query, arrays.key, arrays.value, arrays.key_value_seq_lengths)


def reference_head(shape: AttentionShape, arrays: Any, b: int, n: int) -> np.ndarray:
    """(T, H) of one head in float64."""
    group = shape.num_heads // shape.num_key_value_heads
    with jax.enable_x64(True):
        q, k, v = (
            jnp.asarray(x, jnp.float64)
            for x in (arrays.query[b, :, n], arrays.key[b, :, n // group], arrays.value[b, :, n // group])
        )
        logits = q @ k.T * shape.head_dim**-0.5
        rows, columns = jnp.arange(q.shape[0])[:, None], jnp.arange(k.shape[0])[None]
        allowed = jnp.ones(logits.shape, bool)
        if shape.is_causal:
            allowed &= columns <= rows
        if shape.local_window_size is not None:
            left, right = shape.local_window_size
            allowed &= (columns >= rows - left) & (columns <= rows + right)
        if shape.key_value_lengths is not None:
            allowed &= columns < shape.key_value_lengths[b]
        return np.asarray(jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf), -1) @ v)


def run_shape(name: str, candidates: list[str], *, needs_lse: bool) -> None:
    shape = find_shape(name).with_settings("bfloat16")
    arrays = random_inputs(shape)
    calls, errors = {}, {}
    b, n = shape.batch - 1, shape.num_heads - 1
    expected = reference_head(shape, arrays, b, n)
    for text in candidates:
        try:
            call = kernel_call(shape, arrays, parse_blocks(text), needs_lse=needs_lse)
            out = call()
            errors[text] = np.abs(np.asarray(out[b, :, n], np.float64) - expected).max()
            calls[text] = call
        except Exception as error:
            print(f"{name} {text}: {type(error).__name__}: {str(error)[:1500]}")
            if os.environ.get("OUT"):
                with open(os.path.join(os.environ["OUT"], "tracebacks.txt"), "a") as file:
                    file.write(f"==== {name} {text}\n{traceback.format_exc()}\n")
    try:
        peer = jax.jit(
            lambda q, k, v, length: jax.nn.dot_product_attention(
                q,
                k,
                v,
                is_causal=shape.is_causal,
                local_window_size=shape.local_window_size,
                key_value_seq_lengths=length,
                query_seq_lengths=None if length is None else jnp.full_like(length, q.shape[1]),
                implementation="cudnn",
            )
        )
        cudnn = lambda: peer(arrays.query, arrays.key, arrays.value, arrays.key_value_seq_lengths)  # noqa: E731
        out = cudnn()
        errors["cudnn"] = np.abs(np.asarray(out[b, :, n], np.float64) - expected).max()
        calls["cudnn"] = cudnn
    except Exception as error:
        print(f"{name} cudnn: {type(error).__name__}: {str(error)[:200]}")
    seconds = interleaved_medians(calls, repeats=7, sample_seconds=0.01)
    flops = 4 * shape.score_elements * shape.head_dim / (2 if shape.is_causal else 1)
    for text, value in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"{name:28} {text:14} {value * 1e3:8.3f} ms {flops / value / 1e12:6.0f} TF/s  error {errors[text]:.1e}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--blocks", nargs="+", default=["64x128x2w2"])
    parser.add_argument("--lse", action="store_true", help="with log-sum-exp and float32 output, as for derivatives")
    parser.add_argument("--timeout", type=float, help="seconds for each shape, which then runs in its own process")
    arguments = parser.parse_args()
    for name in arguments.shapes:
        if arguments.timeout is None:
            run_shape(name, arguments.blocks, needs_lse=arguments.lse)
            continue
        command = [sys.executable, __file__, name, "--blocks", *arguments.blocks, *(["--lse"] if arguments.lse else [])]
        try:
            subprocess.run(command, timeout=arguments.timeout, check=False)
        except subprocess.TimeoutExpired:
            print(f"{name}: no result after {arguments.timeout} s")


if __name__ == "__main__":
    main()
