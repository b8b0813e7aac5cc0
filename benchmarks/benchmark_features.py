"""What masks, padding, dropout and higher derivatives cost, as ratios of times measured in one process.

    python benchmarks/benchmark_features.py             masks, padding, dropout, derivatives
    python benchmarks/benchmark_features.py --models    what models of today ask for: packing, offsets, caps, sinks

Each line compares two programs on the same inputs; the goal (`--goals`) is the largest ratio that we accept. With
`--models` the inputs are those of a platform: float32 on a CPU, bfloat16 elsewhere, where each program holds its call
several times, so that starting it from Python does not count.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness.machine import header
from harness.options import command_line
from harness.report import Table, milliseconds, progress
from harness.shapes import FORWARD, GRADIENT, MODES
from harness.timing import interleaved_seconds, ratio, repeated

from jax_native_flash_attn import flash_attention, flash_attention_with_lse

Function = Callable[..., Any]


class Comparison(NamedTuple):
    """`function` against `baseline`, each with its arguments."""

    name: str
    function: Function
    arguments: tuple[Any, ...]
    baseline: Function
    baseline_arguments: tuple[Any, ...]
    goal: float


def gradient(f: Function) -> Function:
    """The output of `f` and the gradients of query, key and value."""
    return lambda *x: jax.value_and_grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2))(*x)


def comparisons(length: int) -> Iterator[Comparison]:
    """All lines of the table, for B = 1, N = K = 4, H = 64."""
    rng = np.random.default_rng(0)

    def qkv(length: int) -> tuple[jax.Array, ...]:
        shape = (1, length, 4, 64)
        return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3))

    x = qkv(length)
    half = jnp.array([length // 2], jnp.int32)
    documents = jnp.arange(length) * 8 // length
    same_document = (documents[:, None] == documents[None, :])[None, None]
    key = jax.random.key(0)

    def plain(*x: jax.Array) -> jax.Array:
        return flash_attention(*x)

    def causal(*x: jax.Array) -> jax.Array:
        return flash_attention(*x, is_causal=True)

    def padded(*x: jax.Array) -> jax.Array:
        return flash_attention(*x, query_seq_lengths=half, key_value_seq_lengths=half)

    def packed(*x: jax.Array) -> jax.Array:
        query, key, value, mask = x
        return flash_attention(query, key, value, mask=mask)

    def dropped(*x: jax.Array) -> jax.Array:
        return flash_attention(*x, dropout_rate=0.1, dropout_rng=key)

    def dense_dropped(query: jax.Array, key_: jax.Array, value: jax.Array) -> jax.Array:
        logits = jnp.einsum("btnh,bsnh->bnts", query, key_) / 8
        keep = jax.random.bernoulli(key, 0.9, logits.shape)
        probabilities = jnp.where(keep, jax.nn.softmax(logits) / 0.9, 0)
        return jnp.einsum("bnts,bsnh->btnh", probabilities, value)

    def in_mode(mode: str, f: Function) -> Function:
        return gradient(f) if mode == GRADIENT else f

    for mode in MODES:
        against_plain = (in_mode(mode, plain), x)
        yield Comparison(f"{mode}, lengths T/2 : none", in_mode(mode, padded), x, *against_plain, 0.6)
        yield Comparison(
            f"{mode}, mask of 8 documents : none", in_mode(mode, packed), (*x, same_document), *against_plain, 0.3
        )
        dense = in_mode(mode, dense_dropped)
        yield Comparison(f"{mode}, dropout : dense with dropout", in_mode(mode, dropped), x, dense, x, 1.0)
        prime = qkv(length + 5)  # 2048 + 5 is a prime
        name = f"{mode}, length {length + 5} : {length}"
        yield Comparison(name, in_mode(mode, plain), prime, *against_plain, 1.1)

    def jvp(f: Function) -> Function:
        return lambda *x: jax.jvp(f, x, x)

    for name, f in (("plain", plain), ("causal", causal)):
        yield Comparison(f"{name}, jvp : gradient", jvp(f), x, gradient(f), x, 1.5)
        # A Hessian-vector product is a gradient and its tangent.
        yield Comparison(f"{name}, hvp : gradient + tangent", jvp(gradient(f)), x, gradient(f), x, 2.5)


def model_comparisons(platform: str) -> Iterator[Comparison]:
    """The new arguments, each against the plain causal call on the same query, key and value."""
    rng, is_cpu = np.random.default_rng(0), platform == "cpu"
    count, dtype = (1, jnp.float32) if is_cpu else (10, jnp.bfloat16)

    def attention(*x: Any, with_lse: bool = False, **arguments: Any) -> Any:
        names = ("query", "key", "value", "mask", "query_segment_ids", "query_offset", "sinks")
        traced = {name: value for name, value in zip(names, x, strict=True) if value is not None}
        if "query_segment_ids" in traced:
            traced["key_value_segment_ids"] = traced["query_segment_ids"]
        function = flash_attention_with_lse if with_lse else flash_attention
        return function(**traced, **arguments, is_causal=True)

    def program(mode: str, **arguments: Any) -> Function:
        def run(x: tuple[Any, ...]) -> Any:
            query, key, value, *integers, sinks = x
            if mode == FORWARD:
                return attention(*x, **arguments)

            def of_floats(query: Any, key: Any, value: Any, sinks: Any) -> Any:
                return attention(query, key, value, *integers, sinks, **arguments)

            out, pullback = jax.vjp(of_floats, query, key, value, sinks)
            return out, pullback(out)

        return lambda *x: repeated(run, count)(x)

    shapes = [(1, 8192, 8, 8, 64)] if is_cpu else [(2, 8192, 16, 16, 128), (4, 4096, 32, 8, 64)]
    for B, T, N, K, H in shapes:
        sizes = (B, T, N, H), (B, T, K, H), (B, T, K, H)
        query, key, value = (jnp.asarray(rng.standard_normal(size), dtype) for size in sizes)
        nothing = (query, key, value, None, None, None, None)
        offset, sinks = jnp.zeros(B, jnp.int32), jnp.asarray(rng.standard_normal(N), jnp.float32)
        packed = (*(x[:1] for x in nothing[:3]), None, None, None, None)
        ids = jnp.repeat(jnp.arange(8, dtype=jnp.int32), T // 8)[None]
        for mode in MODES:
            name = f"{mode}, {B}x{T}x{N}/{K}x{H} causal"
            plain, is_forward = program(mode), mode == FORWARD
            same_document = (ids[:, :, None] == ids[:, None, :])[:, None]
            for label, mask, by_ids, goals in (
                ("8 documents", None, ids, (0.20, 0.22)),
                ("mask of 8 documents", same_document, None, (1.0, 0.8)),
            ):
                yield Comparison(
                    f"{mode}, 1x{T}x{N}/{K}x{H} causal, {label}",
                    plain,
                    (*packed[:3], mask, by_ids, None, None),
                    plain,
                    packed,
                    goals[not is_forward],
                )
            with_offset, with_sinks = (*nothing[:5], offset, None), (*nothing[:6], sinks)
            yield Comparison(f"{name}, soft cap", program(mode, logits_soft_cap=50.0), nothing, plain, nothing, 1.12)
            yield Comparison(f"{name}, sinks", plain, with_sinks, plain, nothing, 1.02)
            yield Comparison(f"{name}, offset", plain, with_offset, plain, nothing, 1.02)
            if is_forward:
                with_lse, largest = (program(mode, with_lse=True, **x) for x in ({}, {"return_max_logits": True}))
                yield Comparison(f"{name}, largest logits : lse", largest, nothing, with_lse, nothing, 1.04)


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, time_per_case=4.0, goals=False)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--models", action="store_true", help="what models of today ask for, against plain calls")
    options = parser.parse_args(argv)
    print(header())
    if not options.models:
        print(f"B 1, T = S = {options.length}, 4 heads of 64, float32")
    print(flush=True)
    lines = model_comparisons(jax.default_backend()) if options.models else comparisons(options.length)
    columns = ["comparison", "ms", "to ms", "ratio [95%]", *(["goal", "verdict"] if options.goals else [])]
    with Table(columns) as table:
        for line in progress(lines, lambda line: line.name):
            ours, baseline = (
                (jax.jit(function).lower(*arguments).compile(), arguments)
                for function, arguments in (
                    (line.function, line.arguments),
                    (line.baseline, line.baseline_arguments),
                )
            )
            calls = {"ours": lambda f=ours: f[0](*f[1]), "baseline": lambda f=baseline: f[0](*f[1])}
            samples = interleaved_seconds(calls, time_budget=options.time_per_case)
            found = ratio(samples["ours"], samples["baseline"])
            times = (milliseconds(float(np.median(samples[name]))) for name in ("ours", "baseline"))
            goal = [f"{line.goal:g}", found.verdict(line.goal)] if options.goals else []
            table.add(line.name, *times, str(found), *goal)


if __name__ == "__main__":
    main()
