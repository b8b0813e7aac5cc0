"""CPU seconds of functions of scores and indices, beside the same call with an argument that says the same.

    python benchmarks/mods_on_cpu.py --tokens 4096 --repeats 5
    python benchmarks/mods_on_cpu.py --flex    # beside PyTorch's FlexAttention too, compiled; needs torch and g++

Forward, 8 heads of 64, float32; each line has medians of interleaved runs, and their ratios.
"""

import argparse
import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness.machine import usable_cores

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


def flex_programs(T: int, arrays: Any) -> dict[str, Callable[[], Any]]:
    """The functions of `calls` in PyTorch's FlexAttention, on the same arrays; block masks are made beforehand."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or its waiting threads take the cores from JAX
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]
        create_block_mask,
        flex_attention,
    )

    torch.set_num_threads(usable_cores())
    query, key, value = (torch.from_numpy(np.array(x)).transpose(1, 2).contiguous() for x in arrays)
    slopes, ids = torch.from_numpy(np.array(mods.alibi_slopes(8))), torch.arange(T) // (T // 8)
    table, t5 = torch.from_numpy(np.array(jax.random.normal(jax.random.key(1), (32, 8)))), mods.T5RelativeBias()
    exact = t5.num_buckets // 4
    factor = exact / math.log(t5.max_distance / exact)

    def alibi(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score - slopes[h] * (i - j).abs()

    def t5_bias(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        distance = (j - i).abs()
        far = exact + (torch.log(distance.clamp(min=exact).float() / exact) * factor).int()
        bucket = torch.where(distance < exact, distance, far.clamp(max=2 * exact - 1))
        return score + table[torch.where(j > i, 2 * exact, 0) + bucket, h]

    masks = {
        "causal": lambda b, h, i, j: i >= j,
        "window": lambda b, h, i, j: (i >= j) & (i - j <= T * 3 // 8),
        "documents": lambda b, h, i, j: ids[i] == ids[j],
    }
    options: dict[str, dict[str, Any]] = {"ALiBi": {"score_mod": alibi}, "T5's buckets": {"score_mod": t5_bias}}
    for name, mask in masks.items():
        options[name] = {"block_mask": create_block_mask(mask, None, None, T, T, device="cpu")}

    def program(given: dict[str, Any]) -> Callable[[], Any]:
        run = torch.compile(flex_attention, dynamic=False)
        return lambda: run(query, key, value, **given)

    return {name: program(given) for name, given in options.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--flex", action="store_true", help="PyTorch's FlexAttention as well")
    arguments = parser.parse_args()
    arrays = tuple(jax.random.normal(jax.random.key(0), (3, 1, arguments.tokens, 8, 64)))
    flex = flex_programs(arguments.tokens, arrays) if arguments.flex else {}
    for name, pair in calls(arguments.tokens).items():
        programs = [program(arrays, options) for options in pair] + ([flex[name]] if flex else [])
        results = [np.asarray(run()) for run in programs]
        for out in results[1:]:
            out = out.swapaxes(1, 2) if out.shape != results[0].shape else out
            np.testing.assert_allclose(out, results[0], atol=1e-4)
        seconds: list[list[float]] = [[] for _ in programs]
        for _ in range(arguments.repeats):
            for run, times in zip(programs, seconds, strict=True):
                start = time.process_time()
                jax.block_until_ready(run())
                times.append(time.process_time() - start)
        ours, *others = map(float, map(np.median, seconds))
        print(f"{name:14} {ours:.3f} s; beside", ", ".join(f"{other:.3f} s: {ours / other:.2f}" for other in others))


if __name__ == "__main__":
    main()
