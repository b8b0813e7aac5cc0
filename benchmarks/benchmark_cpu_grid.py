"""Is `flash_attention` ever slower than `jax.nn.dot_product_attention` on this machine?

    python benchmarks/benchmark_cpu_grid.py
    python benchmarks/benchmark_cpu_grid.py --limit 20 --mode forward

Measures a fixed list of shapes (see `grid_shapes` in harness/suites.py), forward and gradient, and
prints the median ratio of the times, the largest, the share above 1.1 and the ten worst. Cases above
1.1 are measured once more with four times the time, and the second figure counts, because on a busy
machine some of many short measurements are always wrong; the JSON file keeps both. The exit status is
1 if a call of ours failed.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence

from harness.implementations import OURS, REFERENCE, check_name
from harness.machine import header
from harness.measure import Case, Settings, measure_case
from harness.options import checked, command_line
from harness.report import CaseTable, progress, write_json
from harness.shapes import MODES
from harness.suites import grid_shapes

_MEDIAN_GOAL = 0.6
_LARGEST_GOAL = 1.1
_WORST = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the grid; 1 if a call of ours failed, else 0."""
    parser = command_line(
        __doc__, modes=MODES, seed=0, time_per_case=0.5, time_budget=float("inf"), goals=False, json=None
    )
    parser.add_argument("--limit", type=int, default=160, help="number of shapes (default: %(default)s)")
    parser.add_argument("--implementation", type=checked(check_name), default=OURS, help="default: %(default)s")
    options = parser.parse_args(argv)
    start = time.monotonic()
    names = (options.implementation, REFERENCE)
    settings = Settings(time_per_case=options.time_per_case, check_results=False)
    longer = dataclasses.replace(settings, time_per_case=4 * settings.time_per_case)
    todo = [(shape, mode) for shape in grid_shapes(options.limit, options.seed) for mode in options.modes]
    print(header())
    print(f"{options.limit} shapes, {len(todo)} cases", flush=True)

    cases: list[Case] = []
    table = CaseTable(names)  # its rows are progress; all of them are in the JSON file
    for shape, mode in progress(todo, lambda item: f"{item[0].name} {item[1]}"):
        if time.monotonic() - start > options.time_budget:
            break
        cases.append(measure_case(shape, mode, names, settings))
        table.add_case(cases[-1])
    if len(cases) < len(todo):
        print(f"{len(todo) - len(cases)} cases left out: --time-budget {options.time_budget:g} s is used up")
    ratios = {i: ratio for i, case in enumerate(cases) if (ratio := case.ratio(options.implementation)) is not None}
    slow = [i for i, ratio in ratios.items() if ratio.value > _LARGEST_GOAL]
    first_ratios = {f"{cases[i].shape.name} {cases[i].mode}": ratios[i] for i in slow}
    for i in progress(slow, lambda i: f"again: {cases[i].shape.name} {cases[i].mode}"):
        cases[i] = measure_case(cases[i].shape, cases[i].mode, names, longer)
        table.add_case(cases[i])
    _summarise(cases, options.implementation, len(first_ratios), goals=options.goals)
    if options.json:
        write_json(options.json, options, cases, ratios_before_repetition=first_ratios)
    return int(any(case.measurements[options.implementation].reason for case in cases))


def _summarise(cases: Sequence[Case], implementation: str, repeated: int, *, goals: bool) -> None:
    """Print what the grid is for: median, largest, share above the limit, and the worst cases."""
    found = [(ratio, case) for case in cases if (ratio := case.ratio(implementation)) is not None]
    if not found:
        print("no case was measured")
        return
    found.sort(key=lambda pair: pair[0], reverse=True)
    values = [ratio.value for ratio, _ in found]
    median, largest = statistics.median(values), found[0][0]
    above = sum(value > _LARGEST_GOAL for value in values)
    surely = sum(ratio.low > _LARGEST_GOAL for ratio, _ in found)

    def verdict(is_met: bool, goal: float) -> str:
        return f" (goal at most {goal}: {'met' if is_met else 'missed'})" if goals else ""

    print(f"\n{len(found)} ratios, {len(cases) - len(found)} cases without one; measured again: {repeated}")
    print(f"median  {median:.3f}{verdict(median <= _MEDIAN_GOAL, _MEDIAN_GOAL)}")
    print(f"largest {largest}{verdict(not surely, _LARGEST_GOAL)}")
    print(f"above {_LARGEST_GOAL}: {above} ({above / len(found):.1%}), with the whole interval: {surely}")
    print(f"the worst {min(_WORST, len(found))}:\n")
    worst = CaseTable((implementation, REFERENCE), echoes=False)
    for _, case in found[:_WORST]:
        worst.add_case(case)
    print(worst)


if __name__ == "__main__":
    sys.exit(main())
