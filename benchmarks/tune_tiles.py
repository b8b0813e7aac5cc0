"""Time flash_attention over tile sizes: the measurements behind `choose_tile` in `shapes.py`.

uv run python benchmarks/tune_tiles.py --shapes 1x4096x8x64 gqa-1x4096x8/2x64-causal --mode forward
uv run python benchmarks/tune_tiles.py --shapes 4x512x16x64 --blocks 512x512 --heads 1 2 4 8 16
"""

import argparse
import contextlib
import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence
from unittest import mock

from attention_calls import OURS, REFERENCE, UNSUPPORTED, compile_attention
from attention_shapes import FORWARD, MODES, NAMED_SHAPES, AttentionShape, find_shape, make_inputs
from machine import header
from timing import interleaved_seconds
from tqdm import tqdm

from jax_native_flash_attn._kernels.xla import plan
from jax_native_flash_attn._kernels.xla.shapes import TileShape, choose_tile, largest_divisor

_BLOCKS = (128, 256, 512, 1024, 2048, 4096)


def main(argv: Sequence[str] | None = None) -> None:
    options = _parse(argv)
    print(header(), flush=True)
    blocks = [tuple(map(int, text.split("x"))) for text in options.blocks]
    blocks = blocks or list(itertools.product(_BLOCKS, _BLOCKS))
    for name in options.shapes:
        shape = find_shape(name)
        for mode in options.mode or MODES:
            _tune(shape, mode, blocks, options.heads, options.time_budget, options.max_dense_gib)


def _tune(
    shape: AttentionShape,
    mode: str,
    blocks: Sequence[tuple[int, ...]],
    heads: Sequence[int],
    time_budget: float,
    max_dense_gib: float,
) -> None:
    inputs = make_inputs(shape)
    fitting = {(min(q, shape.query_length), min(kv, shape.key_value_length)) for q, kv in blocks}
    tiled = [f"{OURS}@{q}x{kv}" for q, kv in sorted(fitting)]
    names = {OURS: (OURS, None)} | {name: (name, None) for name in tiled if not heads}
    names |= {f"{name}, heads {n}": (name, n) for name in tiled for n in heads}
    if shape.dense_bytes(mode) <= max_dense_gib * 2**30:
        names[REFERENCE] = (REFERENCE, None)
    calls, temporary = {}, {}
    for name, (implementation, limit) in tqdm(names.items(), desc=f"{shape.name} {mode}: compile", leave=False):
        try:
            with _heads_in_a_tile(limit):
                compiled = compile_attention(implementation, shape, mode, inputs)
                calls[name] = compiled.bind(inputs)
                calls[name]()
        except UNSUPPORTED as error:
            print(f"{name}: {type(error).__name__}")
            calls.pop(name, None)
            continue
        temporary[name] = compiled.temporary_bytes or 0
    seconds = interleaved_seconds(calls, time_budget=time_budget, sample_seconds=0.01)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    unit = medians.get(REFERENCE, medians[OURS])
    print(f"\n{shape.name} {mode}: milliseconds, ratio to {REFERENCE if REFERENCE in medians else OURS}, temporary MiB")
    for name in sorted(medians, key=lambda name: medians[name]):
        print(f"  {name:28} {medians[name] * 1e3:9.3f} {medians[name] / unit:7.3f} {temporary[name] / 2**20:9.1f}")


@contextlib.contextmanager
def _heads_in_a_tile(limit: int | None) -> Iterator[None]:
    """Compile with at most `limit` key/value heads of one batch row in a tile; None leaves the choice."""

    def limited(sizes, *args, **kwargs) -> TileShape:  # pyright: ignore[reportMissingParameterType]
        tile = choose_tile(sizes, *args, **kwargs)
        if limit is None:
            return tile
        return dataclasses.replace(tile, batch=(1,) * len(tile.batch), heads=largest_divisor(sizes.K, limit))

    with mock.patch.object(plan, "choose_tile", limited):
        yield


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1x4096x8x64", "1x4096x8x64-causal"], metavar="SHAPE")
    parser.add_argument("--blocks", nargs="*", default=[], metavar="QxKV", help="tile sizes, all pairs by default")
    parser.add_argument("--heads", nargs="*", type=int, default=[], help="key/value heads in a tile")
    parser.add_argument("--mode", nargs="*", choices=MODES, default=[FORWARD])
    parser.add_argument("--time-budget", type=float, default=10.0, help="seconds of each table")
    parser.add_argument("--max-dense-gib", type=float, default=4.0, help="leave jax.nn out beyond this")
    parser.add_argument("--list-shapes", action="version", version="\n".join(NAMED_SHAPES))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
