"""CPU seconds of functions of scores and indices, beside the same call with an argument that says the same.

    python benchmarks/mods_on_cpu.py --tokens 4096 --repeats 5

Forward, 8 heads of 64, float32; each line is the ratio of medians of interleaved runs.
"""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_native_flash_attn import flash_attention, mods


def calls(T: int) -> dict[str, list[dict[str, Any]]]:
    """Options of a call with a function, and of the one that it is compared with."""
    slopes, table = jnp.asarray(mods.alibi_slopes(8)), jax.random.normal(jax.random.key(1), (32, 8))
    distance = jnp.arange(T)[None] - jnp.arange(T)[:, None]
    t5, window, ids = mods.T5RelativeBias(), T * 3 // 8, (jnp.arange(T) // (T // 8))[None]
    by_table = {"score_mod": t5, "score_mod_args": (table,)}
    return {
        "ALiBi": [
            {"score_mod": mods.alibi, "score_mod_args": (slopes,)},
            {"bias": -slopes[:, None, None] * jnp.abs(distance)},
        ],
        "T5's buckets": [by_table, {"bias": jnp.moveaxis(table[t5.bucket(distance)], -1, 0)}],
        "causal": [{"mask_mod": mods.causal}, {"is_causal": True}],
        "window": [{"mask_mod": mods.SlidingWindow(window)}, {"local_window_size": (window, 0)}],
        "documents": [
            {"mask_mod": mods.document, "mask_mod_args": (ids, ids)},
            {"query_segment_ids": ids, "key_value_segment_ids": ids},
        ],
    }


def program(arrays: Any, options: dict[str, Any]) -> Any:
    """What runs a call; its arrays are no constants."""
    given = {name: x for name, x in options.items() if name.endswith(("_args", "_ids")) or name == "bias"}
    static = {name: x for name, x in options.items() if name not in given}
    run = jax.jit(lambda arrays, given: flash_attention(*arrays, **given, **static))
    return functools.partial(run, arrays, given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    arrays = tuple(jax.random.normal(jax.random.key(0), (3, 1, arguments.tokens, 8, 64)))
    for name, pair in calls(arguments.tokens).items():
        programs = [program(arrays, options) for options in pair]
        seconds: list[list[float]] = [[], []]
        for repeat in range(arguments.repeats + 1):
            for run, times in zip(programs, seconds, strict=True):
                start = time.process_time()
                jax.block_until_ready(run())
                times += [time.process_time() - start] if repeat else []  # the first one compiles
        ours, other = map(float, map(np.median, seconds))
        print(f"{name:14} {ours:.3f} s, {other:.3f} s: {ours / other:.2f}")


if __name__ == "__main__":
    main()
