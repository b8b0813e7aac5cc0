"""What bounds our calls on this CPU: for each row of the CPU table, where its time goes, by `jax.profiler`.

    python benchmarks/profile_cpu.py
    python benchmarks/profile_cpu.py --shapes 1x4096x8x64 --mode forward

Kernels of XLA are told apart by what their part of the compiled program holds: a product (with the rate at which all of
them run), an exponential, a reduction, or nothing but moving, choosing and adding elements. `--goals` adds the time
that `jax.nn`'s, measured in turns with ours, allows.
"""

import collections
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from harness.implementations import OURS, REFERENCE, JaxAttention
from harness.inputs import make_inputs
from harness.machine import header
from harness.options import chosen_cases, command_line
from harness.programs import computations, profiled
from harness.report import Table, progress
from harness.shapes import MODES
from harness.suites import CPU_SHAPES, goal_of
from harness.timing import interleaved_seconds

_KINDS = ("product", "exponential", "reduction", "move", "other")
_COLUMNS = ("case", "mode", "ms", "products", "GFLOP/s", "exponentials", "reductions", "moves", "other")
_MOVES = {
    "parameter", "constant", "copy", "transpose", "bitcast", "reshape", "slice", "dynamic-slice", "broadcast", "pad",
    "dynamic-update-slice", "concatenate", "convert", "get-tuple-element", "tuple", "iota", "compare", "select", "add",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    options = command_line(__doc__, shapes=CPU_SHAPES, modes=MODES, time_per_case=0.6, goals=False).parse_args(argv)
    print(header())
    print("milliseconds of one call; those by kind are shares of it, as profiled\n", flush=True)
    names = (OURS, REFERENCE) if options.goals else (OURS,)
    with Table([*_COLUMNS, *(["goal ms"] if options.goals else [])], labels=2) as table:
        for shape, mode in progress(chosen_cases(options), lambda case: f"{case[0].name} {case[1]}"):
            inputs = make_inputs(shape)
            compiled = {name: JaxAttention(name, shape, mode) for name in names}
            calls = {name: each.bind(inputs) for name, each in compiled.items()}
            samples = interleaved_seconds(calls, time_budget=options.time_per_case)
            medians = {name: 1e3 * float(np.median(samples[name])) for name in names}
            spent, operations = Program(compiled[OURS].program()).profile(calls[OURS])
            total = sum(spent.values())
            product, *others = (medians[OURS] * spent[kind] / total for kind in _KINDS)
            cells = [f"{medians[OURS]:.4g}", f"{product:.4g}", f"{operations / product / 1e6:.0f}"]
            cells += [f"{x:.3g}" for x in others]
            if options.goals:
                goal = goal_of(shape, mode)
                cells.append("-" if goal is None else f"{medians[REFERENCE] * goal:.4g}")
            table.add(shape.name, mode, *cells)


class Program:
    """A compiled program: the kind of each of its kernels, and what its products compute."""

    def __init__(self, text: str):
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[str, str] = {}
        self._operations: dict[str, int] = {}
        _, found = computations(text)
        for lines in found.values():
            for line in lines:
                if match := re.match(r"(?:ROOT )?%([\w.\-]+) = \w+\[([\d,]*)\]", line):
                    self._shapes[match[1]] = tuple(int(n) for n in match[2].split(",") if n)
        for lines in found.values():
            for line in lines:
                match = re.match(r"(?:ROOT )?%([\w.\-]+) = .*? ([\w\-]+)\(", line)
                if match is None:
                    continue
                called = re.search(r"calls=%([\w.\-]+)", line)
                inner = found.get(called[1], []) if called and match[2] == "fusion" else [line]
                self._kinds[match[1]] = _kind(inner)
                self._operations[match[1]] = sum(map(self._product_operations, inner))

    def _product_operations(self, line: str) -> int:
        match = re.match(r"(?:ROOT )?%([\w.\-]+) = .*? dot\(%([\w.\-]+),.*lhs_contracting_dims=\{([\d,]+)\}", line)
        if match is None:
            return 0
        contracted = (self._shapes[match[2]][int(axis)] for axis in match[3].split(","))
        return 2 * math.prod(self._shapes[match[1]]) * math.prod(contracted)

    def profile(self, call: Any) -> tuple[dict[str, float], int]:
        """Milliseconds of one call by kind, without what nested kernels take, and operations of its products."""
        jax.block_until_ready(call())
        data = profiled(call)
        spent: dict[str, float] = collections.defaultdict(float)
        operations = 0
        for line in (line for plane in data.planes for line in plane.lines):
            events = [(e.start_ns, -e.duration_ns, op) for e in line.events if (op := dict(e.stats).get("hlo_op"))]
            outer: list[tuple[float, str]] = []
            for start, negative, op in sorted(events):
                while outer and outer[-1][0] <= start:
                    outer.pop()
                kind = self._kinds.get(op, "other")
                spent[kind] -= negative / 1e6
                if outer:
                    spent[outer[-1][1]] += negative / 1e6
                outer.append((start - negative, kind))
                operations += self._operations.get(op, 0)
        return spent, operations


def _kind(lines: Sequence[str]) -> str:
    """Of a kernel that computes these lines."""
    names = {match[1] for line in lines if (match := re.match(r"(?:ROOT )?%[\w.\-]+ = .*? ([\w\-]+)\(", line))}
    if "dot" in names:
        return "product"
    if names & {"exponential", "floor"}:  # a polynomial begins with the latter
        return "exponential"
    if names & {"reduce", "reduce-window"}:
        return "reduction"
    return "move" if names <= _MOVES else "other"


if __name__ == "__main__":
    main()
