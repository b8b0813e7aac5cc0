"""What bounds our calls on this CPU: for each row of the CPU table, where its time goes, by `jax.profiler`.

    python benchmarks/profile_cpu.py
    python benchmarks/profile_cpu.py --shapes 1x4096x8x64 --mode forward

Kernels of XLA are told apart by what their part of the compiled program holds: a product (with the rate at which all of
them run), an exponential, a reduction, or nothing but moving, choosing and adding elements. "goal" is the time that
`jax.nn`'s, measured in turns with ours, allows.
"""

import argparse
import collections
import glob
import math
import re
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from attention_calls import OURS, REFERENCE, JaxAttention, compile_attention
from attention_shapes import CPU_SHAPES, MODES, find_shape, make_inputs
from machine import header
from timing import interleaved_seconds

_KINDS = ("product", "exponential", "reduction", "move", "other")
_COLUMNS = ("case", "mode", "ms", "goal", "products", "GFLOP/s", "exponentials", "reductions", "moves", "other")
_MOVES = {
    "parameter", "constant", "copy", "transpose", "bitcast", "reshape", "slice", "dynamic-slice", "broadcast", "pad",
    "dynamic-update-slice", "concatenate", "convert", "get-tuple-element", "tuple", "iota", "compare", "select", "add",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=find_shape, default=CPU_SHAPES)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--time-per-case", type=float, default=0.6, metavar="SECONDS")
    options = parser.parse_args(argv)
    print(header())
    print("milliseconds of one call; those by kind are shares of it, as profiled\n")
    print(f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}")
    for shape in options.shapes:
        inputs = make_inputs(shape)
        for mode in (mode for mode in options.mode if mode in shape.modes):
            compiled = {name: compile_attention(name, shape, mode, inputs) for name in (OURS, REFERENCE)}
            calls = {name: each.bind(inputs) for name, each in compiled.items()}
            times = interleaved_seconds(calls, time_budget=options.time_per_case)
            ours, dense = (1e3 * statistics.median(times[name]) for name in (OURS, REFERENCE))
            flash = compiled[OURS]
            assert isinstance(flash, JaxAttention)
            program = Program(flash.program())
            spent, operations = program.profile(calls[OURS])
            total = sum(spent.values())
            product, *others = (ours * spent[kind] / total for kind in _KINDS)
            goal = f"{dense * shape.goal[mode]:.4g}" if mode in shape.goal else ""
            cells = [f"{ours:.4g}", goal, f"{product:.4g}", f"{operations / product / 1e6:.0f}"]
            print(f"| {shape.name} | {mode} | {' | '.join(cells + [f'{x:.3g}' for x in others])} |", flush=True)


class Program:
    """A compiled program: the kind of each of its kernels, and what its products compute."""

    def __init__(self, text: str):
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[str, str] = {}
        self._operations: dict[str, int] = {}
        computations = {}
        for name, lines in _computations(text):
            computations[name] = lines
            for line in lines:
                if match := re.match(r"(?:ROOT )?%([\w.\-]+) = \w+\[([\d,]*)\]", line):
                    self._shapes[match[1]] = tuple(int(n) for n in match[2].split(",") if n)
        for lines in computations.values():
            for line in lines:
                match = re.match(r"(?:ROOT )?%([\w.\-]+) = .*? ([\w\-]+)\(", line)
                if match is None:
                    continue
                called = re.search(r"calls=%([\w.\-]+)", line)
                inner = computations.get(called[1], []) if called and match[2] == "fusion" else [line]
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
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(call())
            (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
            data = jax.profiler.ProfileData.from_file(path)
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


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    for block in re.split(r"\n\n", text):
        head, *lines = block.strip().splitlines() or [""]
        if match := re.match(r"(?:ENTRY )?%([\w.\-]+) ", head):
            yield match[1], [line.strip() for line in lines]


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
