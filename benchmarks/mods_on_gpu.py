"""Times on a GPU of functions of scores and indices, beside the plain kernel for the same visible tiles.

    python benchmarks/mods_on_gpu.py --flex         # beside PyTorch's FlexAttention too, compiled; needs torch
    python benchmarks/mods_on_gpu.py --only alibi --repeats 30
    python benchmarks/mods_on_gpu.py --only tiles   # what finding the tiles of a long mask takes

Calls of 4 x 4096 x 16 x 128 in bfloat16, causal but for documents: the value, and with gradients of query, key and
value. Masks' tiles are found beforehand, as those of FlexAttention are. Medians of interleaved runs, and ratios.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is in the same process

import argparse
import functools
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_native_flash_attn import explain, flash_attention, mods

Call = Callable[[], Any]
_LONG = 131072


def calls(B: int, T: int, N: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Options of a call with a function, and of the plain one that visits the same tiles."""
    ids, prefixes = _ids(B, T), jnp.arange(B, dtype=jnp.int32) * (T // 35)
    alibi = {"score_mod": mods.alibi, "score_mod_args": (jnp.asarray(mods.alibi_slopes(N)),)}
    document = mods.make_tile_mask(mods.document, T, T, mask_mod_args=(ids, ids), batch=B)
    prefix = mods.make_tile_mask(mods.prefix_lm, T, T, mask_mod_args=(prefixes,), batch=B)
    both = {"query_segment_ids": ids, "key_value_segment_ids": ids}
    return {
        "alibi": (alibi | {"is_causal": True}, {"is_causal": True}),
        "document": ({"mask_mod": document}, both),
        "prefix_lm": ({"mask_mod": prefix}, {"is_causal": True}),
        "document, searched in the call": ({"mask_mod": mods.document, "mask_mod_args": (ids, ids)}, both),
    }


def _ids(B: int, T: int) -> jax.Array:
    """Documents of other lengths in each batch row, T / 8 on average."""
    ends = np.sort(np.random.default_rng(0).integers(1, T, (B, 7)), -1)
    return jnp.asarray((np.arange(T) >= ends[..., None]).sum(1), jnp.int32)


def programs(options: dict[str, Any], arrays: Any) -> dict[str, Call]:
    """The value, and the value with gradients; arrays are no constants of them."""
    traced = {n: x for n, x in options.items() if not (callable(x) or isinstance(x, bool))}
    static = {n: x for n, x in options.items() if n not in traced}

    def value(arrays: Any, traced: Any) -> Any:
        return flash_attention(*arrays, **traced, **static, implementation="mosaic_gpu")

    def gradients(arrays: Any, traced: Any) -> Any:
        out, pull = jax.vjp(lambda *arrays: value(arrays, traced), *arrays)
        return out, pull(out)

    families = explain(*arrays, **options, implementation="mosaic_gpu")
    if {families.forward.family, families.gradient.family} != {"mosaic_gpu"}:
        print(families)
    return {name: functools.partial(jax.jit(f), arrays, traced) for name, f in _both(value, gradients).items()}


def _both(value: Any, gradients: Any) -> dict[str, Any]:
    return {"value": value, "with gradients": gradients}


def flex_programs(B: int, T: int, N: int, arrays: Any) -> dict[str, dict[str, Call]]:
    """The functions of `calls` in PyTorch's FlexAttention, on the same arrays."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]
        create_block_mask,
        flex_attention,
    )

    def tensor(x: Any, dtype: Any) -> Any:
        return torch.from_numpy(np.array(x, np.float32 if dtype == torch.bfloat16 else None)).to("cuda", dtype)

    query, key, value = (tensor(x, torch.bfloat16).transpose(1, 2).contiguous() for x in arrays)
    slopes, ids = tensor(mods.alibi_slopes(N), torch.float32), tensor(_ids(B, T), torch.int32)
    prefixes = torch.arange(B, device="cuda", dtype=torch.int32) * (T // 35)

    def masked(mask: Any, batch: int | None) -> dict[str, Any]:
        return {"block_mask": create_block_mask(mask, batch, None, T, T, device="cuda")}

    given = {
        "alibi": masked(lambda b, h, i, j: i >= j, None)
        | {"score_mod": lambda score, b, h, i, j: score - slopes[h] * (i - j).abs()},
        "document": masked(lambda b, h, i, j: ids[b, i] == ids[b, j], B),
        "prefix_lm": masked(lambda b, h, i, j: (i >= j) | (j < prefixes[b]), B),
    }
    operands = [x.requires_grad_() for x in (query, key, value)]

    def of(options: dict[str, Any]) -> dict[str, Call]:
        run = torch.compile(flex_attention, dynamic=False)

        def value_of() -> Any:
            with torch.no_grad():
                return run(query, key, value, **options)

        def gradients() -> Any:
            out = run(*operands, **options)
            return out, torch.autograd.grad(out, operands, out.detach())

        return _both(value_of, gradients)

    return {name: of(options) for name, options in given.items()}


def _wait(result: Any) -> None:
    leaves = jax.tree.leaves(result)
    if all(isinstance(x, jax.Array) for x in leaves):
        jax.block_until_ready(result)
    else:
        import torch  # pyright: ignore[reportMissingImports]

        torch.cuda.synchronize()


def seconds(call: Call, count: int) -> float:
    """Of one of so many calls, which share one wait."""
    start, result = time.perf_counter(), None
    for _ in range(count):
        result = call()
    _wait(result)
    return (time.perf_counter() - start) / count


def interleaved(named: dict[str, Call], repeats: int) -> dict[str, float]:
    """Medians, in milliseconds."""
    for call in named.values():
        seconds(call, 3)
    samples: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(repeats):
        for name, call in named.items():
            samples[name].append(1e3 * seconds(call, 10))
    return {name: float(np.median(x)) for name, x in samples.items()}


def _compare(
    name: str, ours: dict[str, Call], plain: dict[str, Call], flex: dict[str, Call] | None, repeats: int
) -> None:
    for kind in ours:
        named = {"ours": ours[kind], "plain": plain[kind]} | ({} if flex is None else {"flex": flex[kind]})
        if flex is not None and kind == "value":
            theirs = flex[kind]().transpose(1, 2).float().cpu().numpy()
            np.testing.assert_allclose(np.asarray(ours[kind](), np.float32), theirs, atol=0.03)
        found = interleaved(named, repeats)
        ratios = ", ".join(f"{found['ours'] / found[other]:.2f} of {other}" for other in found if other != "ours")
        times = ", ".join(f"{other} {ms:.3f} ms" for other, ms in found.items())
        print(f"{name:34} {kind:15} {times}; {ratios}", flush=True)


def _all_calls(found: dict[str, list[dict[str, Call]]]) -> list[Call]:
    """Each once."""
    return list({id(call): call for pair in found.values() for kinds in pair for call in kinds.values()}.values())


def _classes(function: Any, args: Any, batch: int | None) -> jax.Array:
    return mods.make_tile_mask(function, _LONG, _LONG, mask_mod_args=args, batch=batch).classes


def _find_tiles() -> None:
    """Of a causal mask and of documents of a long sequence."""
    ids = _ids(1, _LONG)
    functions: dict[str, tuple[Any, Any]] = {"causal": (mods.causal, ()), "document": (mods.document, (ids, ids))}
    for name, (function, args) in functions.items():
        batch = 1 if args else None
        find = jax.jit(lambda args, f=function, b=batch: _classes(f, args, b))
        analysis: Any = find.lower(args).compile().memory_analysis()
        call = functools.partial(find, args)
        ms = interleaved({"jit": call}, 5)["jit"]
        eager = [1e3 * seconds(lambda f=function, a=args, b=batch: _classes(f, a, b), 1) for _ in range(2)]
        print(
            f"tiles of {name}, {_LONG}: {ms:.1f} ms, {analysis.temp_size_in_bytes / 2**20:.1f} MiB beside "
            f"{analysis.output_size_in_bytes / 2**20:.1f} of results; eager {eager[0]:.0f}, then {eager[1]:.1f} ms",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=(4, 4096, 16, 128), metavar=("B", "T", "N", "H"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=4, help="that compile")
    parser.add_argument("--flex", action="store_true", help="PyTorch's FlexAttention as well")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases with such a name; 'tiles' is one")
    arguments = parser.parse_args()
    B, T, N, H = arguments.shape
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, {B} x {T} x {N} x {H}, bfloat16")
    arrays = tuple(jax.random.normal(jax.random.key(0), (3, B, T, N, H), jnp.bfloat16))
    pairs = {name: pair for name, pair in calls(B, T, N).items() if re.search(arguments.only, name)}
    causal = programs({"is_causal": True}, arrays)
    found = {
        name: [causal if options == {"is_causal": True} else programs(options, arrays) for options in pair]
        for name, pair in pairs.items()
    }
    with ThreadPoolExecutor(arguments.threads) as pool:  # to compile
        list(pool.map(lambda call: jax.block_until_ready(call()), _all_calls(found)))
    flex = flex_programs(B, T, N, arrays) if arguments.flex else {}
    for name, (ours, plain) in found.items():
        _compare(name, ours, plain, flex.get(name), arguments.repeats)
    if re.search(arguments.only, "tiles"):
        _find_tiles()


if __name__ == "__main__":
    main()
