"""Time flash_attention over tile sizes: the measurements behind `Limits` and `choose_tile` in `_kernels/xla`.

uv run python benchmarks/tune_tiles.py --shapes 1x4096x8x64 gqa-1x4096x8/2x64-causal --mode forward
uv run python benchmarks/tune_tiles.py --shapes 4x512x16x64 --blocks 512x512 --heads 1 2 4 8 16
"""

import itertools
from collections.abc import Sequence

import numpy as np
from harness.implementations import OURS, REFERENCE, compile_attention
from harness.inputs import make_inputs
from harness.machine import header
from harness.measure import reason_of
from harness.options import chosen_cases, command_line
from harness.report import Table, mebibytes, milliseconds, progress
from harness.shapes import FORWARD, AttentionShape
from harness.suites import find_shape
from harness.timing import interleaved_seconds, ratio

from jax_native_flash_attn._kernels.select import replacing
from jax_native_flash_attn._kernels.xla.family import XlaKernels
from jax_native_flash_attn._kernels.xla.limits import Limits

_BLOCKS = (128, 256, 512, 1024, 2048, 4096)


def main(argv: Sequence[str] | None = None) -> None:
    shapes = [find_shape("1x4096x8x64"), find_shape("1x4096x8x64-causal")]
    parser = command_line(__doc__, shapes=shapes, modes=(FORWARD,), time_per_case=10.0, max_dense_gib=4.0)
    parser.add_argument("--blocks", nargs="*", default=[], metavar="QxKV", help="tile sizes, all pairs by default")
    parser.add_argument("--heads", nargs="*", type=int, default=[], help="key/value heads in a tile")
    options = parser.parse_args(argv)
    print(header(), flush=True)
    blocks = [tuple(map(int, text.split("x"))) for text in options.blocks]
    blocks = blocks or list(itertools.product(_BLOCKS, _BLOCKS))
    for shape, mode in chosen_cases(options):
        _tune(shape, mode, blocks, options.heads, options.time_per_case, options.max_dense_gib)


def _tune(
    shape: AttentionShape,
    mode: str,
    blocks: Sequence[tuple[int, ...]],
    heads: Sequence[int],
    time_per_case: float,
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
    for name, (implementation, limit) in progress(names.items(), lambda item: f"{shape.name} {mode}: {item[0]}"):
        try:
            with replacing(XlaKernels(Limits(heads=limit))):
                compiled = compile_attention(implementation, shape, mode)
                calls[name] = compiled.bind(inputs)
                calls[name]()
        except Exception as error:  # too large for the memory, say
            print(f"{name}: {reason_of(error)}")
            calls.pop(name, None)
            continue
        temporary[name] = compiled.temporary_bytes or 0
    samples = interleaved_seconds(calls, time_budget=time_per_case, sample_seconds=0.01)
    medians = {name: float(np.median(seconds)) for name, seconds in samples.items()}
    unit = REFERENCE if REFERENCE in samples else OURS
    print(f"\n{shape.name} {mode}")
    with Table(["implementation", "ms", f"ratio to {unit} [95%]", "temp MiB"], echoes=False) as table:
        for name in sorted(medians, key=lambda name: medians[name]):
            found = ratio(samples[name], samples[unit])
            table.add(name, milliseconds(medians[name]), str(found), mebibytes(temporary[name]))


if __name__ == "__main__":
    main()
