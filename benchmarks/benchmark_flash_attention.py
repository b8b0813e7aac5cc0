"""Time, memory and error of `flash_attention` beside `jax.nn.dot_product_attention`.

    python benchmarks/benchmark_flash_attention.py                 a few representative calls
    python benchmarks/benchmark_flash_attention.py --preset cpu    every CPU goal, with a verdict
    python benchmarks/benchmark_flash_attention.py --shapes 2x1024x8x64 4x512x16/4x128 --causal
    python benchmarks/benchmark_flash_attention.py --plot plot.png  over the sequence length

The mode `forward` is one call; `gradient` is one call that returns the output and the gradients
with respect to query, key, value (and bias, if there is one), the forward pass included. Times are
medians of calls that alternate between the implementations in one process. Errors are against
float64, as a fraction of the largest element of a result.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from attention_calls import OURS, REFERENCE, TORCH, default_implementations
from attention_cases import Case, Settings, measure_case
from attention_shapes import (
    GRADIENT,
    MODES,
    NAMED_SHAPES,
    PLOT_SHAPE,
    PRESETS,
    AttentionShape,
    find_shape,
)
from machine import header
from report import Table, write_json, write_plot
from tqdm import tqdm

_PLOT_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; 1 if ours failed anywhere, else 0."""
    options = _parse(argv)
    if "float64" in (options.dtype, *(shape.dtype for shape in options.shapes)):
        jax.config.update("jax_enable_x64", True)
    implementations = options.implementations or default_implementations()
    shapes = [shape.with_settings(options.dtype, options.causal, options.window) for shape in options.shapes]
    if options.plot:
        shapes = [shapes[0].with_length(length) for length in options.plot_lengths]
    modes = MODES if options.mode == "both" else (options.mode,)
    todo = [(shape, mode) for shape in shapes for mode in modes if options.plot or mode in shape.modes]
    if not todo:
        print(f"none of these shapes has the mode {options.mode}", file=sys.stderr)
        return 2
    settings = Settings(
        repeats=options.repeats,
        time_budget=options.time_budget,
        max_dense_gib=options.max_dense_gib,
        seed=options.seed,
        measure_resident=options.resident,
    )
    goals = any(shape.goal for shape, _ in todo)
    table = Table(
        [shape.name for shape, _ in todo],
        implementations,
        goals=goals,
        resident=options.resident,
    )
    print(header())
    print(f"{GRADIENT} = one call returning output and gradients; error relative, against float64")
    print(table.head(), flush=True)

    cases: list[Case] = []
    # Without a terminal the lines of the table show the progress.
    with tqdm(todo, unit="case", disable=None, leave=False) as progress:
        for shape, mode in progress:

            def report(stage: str, label: str = f"{shape.name} {mode}") -> None:
                progress.set_description_str(f"{label}: {stage}")

            cases.append(measure_case(shape, mode, implementations, settings, report))
            progress.write(table.row(cases[-1]), file=sys.stdout)
            sys.stdout.flush()
    if goals:
        verdicts = [case.verdict for case in cases]
        print(f"goals met: {verdicts.count('met')}, missed: {verdicts.count('missed')}")
    if options.json:
        chosen = {name: value for name, value in vars(options).items() if name != "shapes"}
        write_json(options.json, chosen | {"implementations": implementations}, cases)
        print(f"wrote {options.json}")
    if options.plot:
        write_plot(options.plot, cases, _plot_title(shapes[0]))
        print(f"wrote {options.plot}")
    failed = [
        name
        for case in cases
        for name, measurement in case.measurements.items()
        if measurement.reason and name.partition(":")[0] == OURS
    ]
    return 1 if failed else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        metavar="SHAPE",
        help="named shapes, BxTxNxH, BxT/SxN/KxH or B,T,S,N,K,H, in place of a preset; --list-shapes prints the names",
    )
    parser.add_argument("--list-shapes", action="store_true", help="print all names and stop")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument(
        "--causal",
        action=argparse.BooleanOptionalAction,
        help="in place of the shapes' own setting",
    )
    parser.add_argument(
        "--window",
        nargs=2,
        type=int,
        metavar=("LEFT", "RIGHT"),
        help="local window, in place of the shapes' own",
    )
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both")
    parser.add_argument(
        "--implementations",
        nargs="+",
        metavar="NAME",
        help=f"{OURS} or {REFERENCE}, either with ':name' for its argument implementation=name, or "
        f"{TORCH}; default: all that this machine has",
    )
    parser.add_argument("--repeats", type=int, help="rounds of calls, in place of a time budget")
    parser.add_argument(
        "--time-budget",
        type=float,
        default=3.0,
        metavar="SECONDS",
        help="time for the calls of one case, at least three rounds (default: %(default)s)",
    )
    parser.add_argument(
        "--max-dense-gib",
        type=float,
        default=4.0,
        metavar="GIB",
        help=f"skip {REFERENCE} where its dense code needs more (default: %(default)s)",
    )
    parser.add_argument(
        "--resident",
        action="store_true",
        help="measure the peak of resident memory too, of one call in a process of its own (Linux, "
        "CPU; some seconds for each figure)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="measure the first of --shapes (default: 1xTx4x64 causal) at several lengths instead, "
        "and plot time and memory",
    )
    parser.add_argument("--plot-lengths", nargs="+", type=int, default=list(_PLOT_LENGTHS), metavar="T")
    options = parser.parse_args(argv)
    if options.list_shapes:
        print("\n".join(NAMED_SHAPES))
        parser.exit()
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be positive, got {options.repeats}")
    if options.shapes is None:
        options.shapes = [PLOT_SHAPE] if options.plot else list(PRESETS[options.preset])
    if options.window is not None:
        options.window = tuple(options.window)
    return options


def _shape(text: str) -> AttentionShape:
    """`find_shape` with the error that argparse shows to the user."""
    try:
        return find_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _plot_title(shape: AttentionShape) -> str:
    kind = "causal" if shape.is_causal else "not causal"
    if shape.local_window_size is not None:
        kind += f", window {shape.local_window_size}"
    return (
        f"batch {shape.batch}, {shape.num_heads} query and {shape.num_key_value_heads} key/value "
        f"heads of {shape.head_dim}, {shape.dtype}, {kind}"
    )


if __name__ == "__main__":
    sys.exit(main())
