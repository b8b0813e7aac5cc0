# /// script
# requires-python = ">=3.11"
# dependencies = ["jax-native-flash-attn", "psutil; sys_platform == 'win32'", "tqdm>=4.66"]
# [tool.uv.sources]
# jax-native-flash-attn = { path = "..", editable = true }
# ///
"""Exact attention over a long sequence in little memory: `uv run examples/quickstart.py`.

Computes causal attention and its gradients with respect to query, key and value, prints times and
memory, and compares a sample of the rows with `jax.nn.dot_product_attention`.
"""

import argparse
import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from _memory import peak_memory_gib
from tqdm import tqdm

from jax_native_flash_attn import flash_attention

TOLERANCE = 1e-4  # relative to the largest element of a head; float32 rounding stays well below


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Flash attention over one long causal sequence.")
    parser.add_argument("--length", type=int, default=32_768, help="tokens (%(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="attention heads (%(default)s)")
    parser.add_argument("--head-dim", type=int, default=64, help="size of a head (%(default)s)")
    args = parser.parse_args(argv)
    if args.length < 2 or args.heads < 1 or args.head_dim < 1:
        parser.error("--length must be at least 2, --heads and --head-dim at least 1")

    print(f"Causal attention over {args.length:,} tokens, {args.heads} heads of {args.head_dim}")
    jax.config.update("jax_default_matmul_precision", "highest")  # GPUs would default to TF32
    shape = (1, args.length, args.heads, args.head_dim)
    query, key, value, out_gradient = (
        jax.random.normal(k, shape, jnp.float32) for k in jax.random.split(jax.random.key(0), 4)
    )

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return flash_attention(query, key, value, is_causal=True)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.vdot(attend(query, key, value), out_gradient)

    # Compiling ahead of the first call is only done to time it apart.
    with tqdm(total=4, disable=None, bar_format="{bar:20} {desc} {elapsed}") as bar:
        with step(bar, "compile"):
            attend_compiled = jax.jit(attend).lower(query, key, value).compile()
            lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, value)
            gradient_compiled = lowered.compile()
        with step(bar, "value"):
            out = jax.block_until_ready(attend_compiled(query, key, value))
        with step(bar, "gradient"):
            gradients = jax.block_until_ready(gradient_compiled(query, key, value))
        with step(bar, "dense check"):
            errors = compare_with_dense(query, key, value, out_gradient, out, gradients)
        peak = peak_memory_gib()

    print(f"\nPeak memory of this process {peak:8.2f} GiB")
    print(f"Gradient of jax.nn's dense  {dense_memory_gib(shape):8.2f} GiB (as XLA plans it)")
    print("\nLargest difference from jax.nn, relative to the largest element:")
    for name, error in errors.items():
        print(f"  {name:<18}{error:8.1e}  {'ok' if error <= TOLERANCE else 'FAILED'}")
    # Written this way round so that a NaN fails too.
    return 0 if all(error <= TOLERANCE for error in errors.values()) else 1


def compare_with_dense(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out_gradient: jax.Array,
    out: jax.Array,
    gradients: tuple[jax.Array, jax.Array, jax.Array],
) -> dict[str, float]:
    """Compares some rows with dense attention over those rows, value and gradients."""
    # 32 rows spread over the sequence and the last 32. Only the last 32 rows see the last 32 keys,
    # so the gradients of those keys and values are complete without any other row. The very first
    # rows are left out: their elements are so large that errors in the others would look small.
    length = query.shape[1]
    last = max(length - 32, 0)
    spread = np.linspace(last // 32, last, 32, endpoint=False, dtype=int)
    rows = np.union1d(spread, np.arange(last, length))
    visible = np.arange(length) <= rows[:, None]

    @jax.jit
    def dense(query: jax.Array, key: jax.Array, value: jax.Array, out_gradient: jax.Array):
        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return jax.nn.dot_product_attention(query, key, value, mask=visible[None, None])

        out, transpose = jax.vjp(attend, query, key, value)
        query_gradient, key_gradient, value_gradient = transpose(out_gradient)
        return out, query_gradient, key_gradient[:, last:], value_gradient[:, last:]

    query_gradient, key_gradient, value_gradient = gradients
    actual = (
        out[:, rows],
        query_gradient[:, rows],
        key_gradient[:, last:],
        value_gradient[:, last:],
    )
    errors = []
    for n in range(query.shape[2]):  # one head at a time, so that the check needs little memory too
        head = np.s_[:, :, n : n + 1]
        expected = dense(query[:, rows][head], key[head], value[head], out_gradient[:, rows][head])
        errors.append([jnp.abs(a[head] - e).max() / jnp.abs(e).max() for a, e in zip(actual, expected, strict=True)])
    names = ("value", "gradient of query", "gradient of key", "gradient of value")
    return dict(zip(names, np.max(errors, axis=0).tolist(), strict=True))


@contextlib.contextmanager
def step(bar: tqdm, name: str) -> Iterator[None]:
    """Shows `name` and the elapsed time while XLA works, and prints its time at the end."""
    start = time.perf_counter()
    done = threading.Event()

    def show() -> None:
        # Without a terminal there is no bar: a line now and then shows that it is alive.
        while not done.wait(5 if bar.disable else 0.2):
            if bar.disable:
                print(f"{name}: {time.perf_counter() - start:.0f} s ...", file=sys.stderr, flush=True)
            else:
                bar.refresh()

    bar.set_description_str(name)
    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    bar.update()
    bar.clear()
    print(f"  {name:<12}{time.perf_counter() - start:8.2f} s", flush=True)


def dense_memory_gib(shape: tuple[int, ...]) -> float:
    """The temporary memory of jax.nn's value and gradient, in GiB: compiled to ask XLA, never run."""

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True).sum()

    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(array, array, array).compile()
    analysis = gradient.memory_analysis()
    return float("nan") if analysis is None else analysis.temp_size_in_bytes / 2**30


if __name__ == "__main__":
    sys.exit(main())
