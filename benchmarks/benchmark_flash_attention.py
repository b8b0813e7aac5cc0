"""Time, memory and error of `flash_attention` beside `jax.nn.dot_product_attention`.

    python benchmarks/benchmark_flash_attention.py                 a few representative calls
    python benchmarks/benchmark_flash_attention.py --preset cpu --goals   every CPU goal, with a verdict
    python benchmarks/benchmark_flash_attention.py --shapes 2x1024x8x64 4x512x16/4x128 --causal
    python benchmarks/benchmark_flash_attention.py --plot plot.png  the first shape at several lengths

The mode `forward` is one call; `gradient` is one call that returns the output and the gradients
with respect to query, key, value (and bias, if there is one), the forward pass included. Times are
medians of calls that alternate between the implementations in one process; in brackets the 95%
interval of a ratio of them. Errors are against float64, as a fraction of the largest element of a
result.
"""

import argparse
import sys
from collections.abc import Sequence

import jax
from harness.implementations import default_implementations, is_ours
from harness.machine import header
from harness.measure import Case, Settings, measure_case
from harness.options import chosen_cases, command_line
from harness.report import CaseTable, write_json, write_length_plot
from harness.shapes import MODES, AttentionShape
from harness.suites import PLOT_SHAPE, PRESETS
from tqdm import tqdm

_PLOT_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; 1 if ours failed anywhere, else 0."""
    options = _parse(argv)
    if "float64" in (options.dtype, *(shape.dtype for shape in options.shapes)):
        jax.config.update("jax_enable_x64", True)
    options.implementations = options.implementations or default_implementations()
    shapes = [shape.with_settings(options.dtype, options.causal, options.window) for shape in options.shapes]
    if options.plot:
        shapes = [shapes[0].with_length(length) for length in options.plot_lengths]
    options.shapes = shapes
    todo = chosen_cases(options)
    if not todo:
        print(f"none of these shapes has the mode {' or '.join(options.modes)}", file=sys.stderr)
        return 2
    settings = Settings(
        repeats=options.repeats,
        time_per_case=options.time_per_case,
        max_dense_gib=options.max_dense_gib,
        seed=options.seed,
        measure_resident=options.resident,
    )
    print(header(), flush=True)
    cases: list[Case] = []
    table = CaseTable(options.implementations, goals=options.goals, resident=options.resident)
    with table, tqdm(todo, unit="case", disable=None, leave=False) as progress:
        for shape, mode in progress:

            def report(stage: str, label: str = f"{shape.name} {mode}") -> None:
                progress.set_description_str(f"{label}: {stage}")

            cases.append(measure_case(shape, mode, options.implementations, settings, report))
            table.add_case(cases[-1])
    if options.goals:
        verdicts = [case.verdict for case in cases]
        print(f"goals met: {verdicts.count('met')}, missed: {verdicts.count('missed')}")
    if options.json:
        write_json(options.json, options, cases)
    if options.plot:
        write_length_plot(options.plot, cases, _plot_title(shapes[0]))
    ours = (each for case in cases for name, each in case.measurements.items() if is_ours(name))
    return int(any(each.reason for each in ours))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(
        __doc__,
        shapes=None,
        modes=MODES,
        implementations=None,
        dtype=None,
        repeats=None,
        time_per_case=3.0,
        max_dense_gib=4.0,
        seed=0,
        goals=False,
        json=None,
        plot=None,
        plot_lengths=list(_PLOT_LENGTHS),
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="default", help="shapes where --shapes is absent")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, help="in place of the shapes' own setting")
    parser.add_argument(
        "--window", nargs=2, type=int, metavar=("LEFT", "RIGHT"), help="local window, in place of the shapes' own"
    )
    parser.add_argument(
        "--resident",
        action="store_true",
        help="measure the peak of resident memory too, of one call in a process of its own (Linux, "
        "CPU; some seconds for each figure)",
    )
    options = parser.parse_args(argv)
    if options.shapes is None:
        options.shapes = [PLOT_SHAPE] if options.plot else list(PRESETS[options.preset])
    if options.window is not None:
        options.window = tuple(options.window)
    return options


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
