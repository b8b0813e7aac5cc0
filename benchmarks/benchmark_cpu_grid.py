"""Is `flash_attention` ever slower than `jax.nn.dot_product_attention` on this machine?

    python benchmarks/benchmark_cpu_grid.py
    python benchmarks/benchmark_cpu_grid.py --limit 20 --mode forward

Measures a fixed list of shapes (see `grid_shapes` in attention_shapes.py), forward and gradient,
and prints each ratio of the times, then their median, the largest, the share above 1.1 and the ten
worst. Cases above 1.1 are measured once more with four times the time, and the second figure
counts, because on a busy machine some of many short measurements are always wrong; the JSON file
keeps both.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from attention_calls import OURS, REFERENCE
from attention_cases import Case, Settings, measure_case
from attention_shapes import MODES, AttentionShape, grid_shapes
from machine import header
from report import write_json
from tqdm import tqdm

_MEDIAN_GOAL = 0.6
_LARGEST_GOAL = 1.1
_WORST = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the grid; 1 if a call of ours failed, else 0."""
    options = _parse(argv)
    start = time.perf_counter()
    modes = MODES if options.mode == "both" else (options.mode,)
    shapes = grid_shapes(options.limit, options.seed)
    todo = [(shape, mode) for shape in shapes for mode in modes]
    settings = Settings(time_budget=options.time_per_case, check_results=False)
    print(header())
    print(f"{len(shapes)} shapes, {len(todo)} cases; ms and ratio: {options.implementation} / {REFERENCE}")

    measured: dict[tuple[str, str], Case] = {}
    skipped = 0
    with tqdm(todo, unit="case", disable=None, leave=False) as progress:
        for shape, mode in progress:
            if options.time_budget is not None:
                skipped += time.perf_counter() - start > options.time_budget
                if skipped:
                    continue
            progress.set_description_str(f"{shape.name} {mode}")
            case = _measure(shape, mode, options.implementation, settings)
            measured[shape.name, mode] = case
            progress.write(_line(case, options.implementation), file=sys.stdout)
            sys.stdout.flush()
    if skipped:
        print(f"{skipped} cases left out: --time-budget {options.time_budget:g} s is used up")

    longer = dataclasses.replace(settings, time_budget=4 * settings.time_budget)
    first_ratios = {}
    slow = [
        (name, case) for name, case in measured.items() if (case.ratio(options.implementation) or 0) > _LARGEST_GOAL
    ]
    if slow:
        print(f"measured again, {len(slow)} cases above {_LARGEST_GOAL}:")
    for name, case in tqdm(slow, unit="case", disable=None, leave=False):
        first_ratios["{} {}".format(*name)] = case.ratio(options.implementation)
        measured[name] = _measure(case.shape, case.mode, options.implementation, longer)
        tqdm.write(_line(measured[name], options.implementation), file=sys.stdout)
        sys.stdout.flush()

    cases = list(measured.values())
    _summarise(cases, options.implementation)
    if options.json:
        write_json(options.json, vars(options), cases, ratios_before_repetition=first_ratios)
        print(f"wrote {options.json}")
    return int(any(case.measurements[options.implementation].reason for case in cases))


def _measure(shape: AttentionShape, mode: str, implementation: str, settings: Settings) -> Case:
    return measure_case(shape, mode, (implementation, REFERENCE), settings)


def _line(case: Case, implementation: str) -> str:
    label = f"{case.shape.name:<42} {case.mode:<8}"
    seconds = [case.measurements[name].seconds for name in (implementation, REFERENCE)]
    ratio = case.ratio(implementation)
    if ratio is not None:
        times = "".join(f"{1e3 * each:11.3f}" for each in seconds if each is not None)
        return f"{label}{times} {ratio:7.3f}"
    reasons = (f"{name}: {each.reason}" for name, each in case.measurements.items() if each.reason)
    return f"{label} {'; '.join(reasons)}"


def _summarise(cases: Sequence[Case], implementation: str) -> None:
    """Print what the grid is for: median, largest, share above the limit, and the worst cases."""
    found = [(ratio, case) for case in cases if (ratio := case.ratio(implementation)) is not None]
    if not found:
        print("no case was measured")
        return
    found.sort(key=lambda pair: pair[0], reverse=True)
    ratios = [ratio for ratio, _ in found]
    median, largest = statistics.median(ratios), ratios[0]
    above = sum(ratio > _LARGEST_GOAL for ratio in ratios)

    def verdict(value: float, goal: float) -> str:
        return f"{value:.3f} (goal at most {goal}: {'met' if value <= goal else 'missed'})"

    print(f"\n{len(found)} ratios, {len(cases) - len(found)} cases without one")
    print(f"median  {verdict(median, _MEDIAN_GOAL)}")
    print(f"largest {verdict(largest, _LARGEST_GOAL)}")
    print(f"above {_LARGEST_GOAL}: {above} ({above / len(found):.1%})")
    print(f"the worst {min(_WORST, len(found))}:")
    for _, case in found[:_WORST]:
        print(_line(case, implementation))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=160, help="number of shapes (default: %(default)s)")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both")
    parser.add_argument("--seed", type=int, default=0, help="of the list of shapes")
    parser.add_argument("--implementation", default=OURS, help=f"{OURS} or {OURS}:name (default: %(default)s)")
    parser.add_argument(
        "--time-per-case",
        type=float,
        default=0.5,
        metavar="SECONDS",
        help="for the timed calls of a case, at least three rounds (default: %(default)s)",
    )
    parser.add_argument("--time-budget", type=float, metavar="SECONDS", help="start no further case after this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
