"""The tables of figures in docs/guides: decoding, packed sequences, memory of a bias.

    python benchmarks/benchmark_guides.py

Times are the least of several calls, taken in turn. CPU times count all threads of the process.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness.machine import header
from harness.memory import temporary_bytes
from harness.report import Table

from jax_native_flash_attn import flash_attention

_MEBIBYTE = 2**20


def arrays(*shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def least_seconds(calls: dict[str, Callable[[], Any]], clock: Callable[[], float], rounds: int) -> dict[str, float]:
    for call in calls.values():
        jax.block_until_ready(call())
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            jax.block_until_ready(call())
            least[name] = min(least[name], clock() - start)
    return least


def decoding() -> None:
    """One token against a cache of 32,768 slots, 8 query heads, 2 key/value heads of 64, float32."""
    x = arrays((1, 1, 8, 64), (1, 32768, 2, 64), (1, 32768, 2, 64))

    @jax.jit
    def causal(offset: Any, *x: jax.Array) -> jax.Array:
        return flash_attention(*x, query_offset=offset, is_causal=True)

    @jax.jit
    def window(offset: Any, *x: jax.Array) -> jax.Array:
        return flash_attention(*x, query_offset=offset, is_causal=True, local_window_size=(1023, 0))

    with Table(["tokens before", "causal, ms", "window of 1,024, ms"]) as table:
        for offset in (1000, 8000, 16000, 32767):
            calls = {"causal": lambda o=offset: causal(o, *x), "window": lambda o=offset: window(o, *x)}
            least = least_seconds(calls, time.perf_counter, rounds=100)
            table.add(f"{offset:,}", *(f"{1e3 * least[name]:.1f}" for name in calls))


def packing() -> None:
    """8,192 tokens in one row, 4 heads of 64, causal, float32, value."""
    x = arrays(*[(1, 8192, 4, 64)] * 3)
    in_order = np.repeat(np.arange(8), 1024)[None]
    mixed = np.random.default_rng(0).permutation(in_order, axis=1)

    @jax.jit
    def packed(ids: Any, *x: jax.Array) -> jax.Array:
        return flash_attention(*x, query_segment_ids=ids, key_value_segment_ids=ids, is_causal=True)

    @jax.jit
    def masked(ids: Any, *x: jax.Array) -> jax.Array:
        return flash_attention(*x, mask=ids[:, None, :, None] == ids[:, None, None, :], is_causal=True)

    one_document = jax.jit(lambda *x: flash_attention(*x, is_causal=True))
    calls = {
        "one document, is_causal alone": lambda: one_document(*x),
        "8 documents of 1,024 tokens, in order": lambda: packed(in_order, *x),
        "32 documents of 256 tokens, in order": lambda: packed(np.repeat(np.arange(32), 256)[None], *x),
        "8 documents, tokens mixed": lambda: packed(mixed, *x),
        "8 documents, by a boolean mask": lambda: masked(in_order, *x),
    }
    with Table(["call", "CPU ms"]) as table:
        for name, seconds in least_seconds(calls, time.process_time, rounds=7).items():
            table.add(name, f"{1e3 * seconds:.0f}")


def bias_memory() -> None:
    """Value and all gradients of a causal call with B = 4, T = S = 2048, N = 8, H = 64, float32."""
    B, N, T = 4, 8, 2048
    x = jax.ShapeDtypeStruct((B, T, N, 64), jnp.float32)

    def temporary(function: Callable[..., jax.Array], *types: Any) -> str:
        program = jax.jit(jax.value_and_grad(lambda *x: function(*x).sum(), argnums=tuple(range(len(types)))))
        size = temporary_bytes(program.lower(*types).compile())
        return "-" if size is None else f"{size / _MEBIBYTE:,.0f}"

    with Table(["bias", "its MiB", "temporary MiB"]) as table:
        table.add("none, jax.nn", "", temporary(lambda *x: jax.nn.dot_product_attention(*x, is_causal=True), x, x, x))
        table.add("none", "", temporary(lambda *x: flash_attention(*x, is_causal=True), x, x, x))
        for shape in ((1, N, 1, T), (B, 1, 1, T), (1, N, T, 1), (1, N, T, T), (B, N, T, T)):
            bias = jax.ShapeDtypeStruct(shape, jnp.float32)
            size = f"{4 * np.prod(shape) / _MEBIBYTE:.2f}"
            table.add(str(shape), size, temporary(lambda *x: flash_attention(*x, is_causal=True), x, x, x, bias))


def main() -> None:
    print(header())
    for measure in (decoding, packing, bias_memory):
        print(f"\n{measure.__name__}: {measure.__doc__}\n")
        measure()


if __name__ == "__main__":
    main()
