"""Measurements as Markdown tables, as JSON, and as plots."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tabulate import tabulate
from tqdm import tqdm

from harness.implementations import REFERENCE
from harness.machine import environment, header
from harness.measure import Case, Measurement
from harness.shapes import FORWARD, GRADIENT, MODES

_MEBIBYTE = 2**20
_MISSING = "-"

Item = TypeVar("Item")


class Table:
    """A Markdown table, printed when the `with` block ends, also by an error.

    Meanwhile each row is a line of standard error, if it `echoes` and unless that is a terminal, where `progress` shows
    a bar. The first `labels` columns are text, the others numbers.
    """

    def __init__(self, columns: Sequence[str], labels: int = 1, *, echoes: bool = True):
        self.columns = list(columns)
        self.rows: list[list[str]] = []
        self._align = ["left" if i < labels else "right" for i in range(len(columns))]
        self._echoes = echoes and not sys.stderr.isatty()
        self._started = time.monotonic()

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *_: object) -> None:
        print(self, flush=True)

    def add(self, *cells: str) -> None:
        self.rows.append(list(cells))
        if self._echoes:
            elapsed = time.monotonic() - self._started
            print(f"{elapsed:5.0f} s: {' | '.join(self.rows[-1])}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        if not self.rows:
            return "nothing was measured"
        rows = [[cell.replace("|", "/") for cell in row] for row in self.rows]
        return tabulate(rows, self.columns, "github", disable_numparse=True, colalign=self._align)


def progress(items: Iterable[Item], label: Callable[[Item], str]) -> Iterable[Item]:
    """The items, with a progress bar on a terminal."""
    with tqdm(list(items), disable=None, leave=False) as bar:
        for item in bar:
            bar.set_description_str(label(item))
            yield item


class CaseTable(Table):
    """One row for each case: times, ratios to jax.nn with their intervals, memory and errors."""

    def __init__(
        self, implementations: Sequence[str], *, goals: bool = False, resident: bool = False, echoes: bool = True
    ):
        self._implementations = list(implementations)
        self._compared = [x for x in implementations if x != REFERENCE and REFERENCE in implementations]
        self._goals, self._resident = goals, resident
        columns = [
            *("case", "mode"),
            *(f"{name} ms" for name in implementations),
            *(f"{name} / {REFERENCE} [95%]" for name in self._compared),
            "temp MiB",
            *(["resident MiB"] if resident else []),
            "error",
            *(["goal", "verdict"] if goals else []),
        ]
        super().__init__(columns, labels=2, echoes=echoes)
        self._reasons: list[str] = []

    def add_case(self, case: Case) -> None:
        measured = [case.measurements[name] for name in self._implementations]
        self._reasons += [
            f"{case.shape.name} {case.mode}, {name}: {each.reason}"
            for name, each in case.measurements.items()
            if each.reason
        ]
        self.add(
            case.shape.name,
            case.mode,
            *(formatted(each.seconds, milliseconds) for each in measured),
            *(formatted(case.ratio(name), str) for name in self._compared),
            _joined(measured, lambda each: formatted(each.temporary_bytes, mebibytes)),
            *([_joined(measured, lambda each: formatted(each.resident_bytes, mebibytes))] if self._resident else []),
            _joined(measured, lambda each: formatted(each.error, "{:.0e}".format)),
            *([formatted(case.goal, "{:.3g}".format), case.verdict or _MISSING] if self._goals else []),
        )

    def __str__(self) -> str:
        order = " : ".join(self._implementations)
        how_to_read = (
            f"{GRADIENT} = one call returning output and gradients; error relative, against float64;\n"
            f"temp (temporary memory, says the compiler) and error are those of {order}\n"
        )
        return "\n".join((how_to_read, super().__str__(), *(f"  {reason}" for reason in self._reasons)))


def peer_table(cases: Sequence[Case], implementations: Sequence[str], ceiling: float | None, *, goals: bool) -> Table:
    """Cases of one mode beside their best peer; `ceiling` are the operations per second that rates are a part of."""
    columns = ["case", *implementations, "best peer", "ours / best [95%]", *(["verdict"] if goals else [])]
    table = Table(columns, echoes=False)

    def cell(case: Case, each: Measurement) -> str:
        if each.seconds is None:
            return each.reason or _MISSING
        rate = case.shape.operations(case.mode) / each.seconds
        fraction = formatted(ceiling, lambda most: f"{rate / most:.2f}")
        memory = formatted(each.temporary_bytes, lambda number: f"{number / _MEBIBYTE:.0f}")
        error = formatted(each.error, "{:.0e}".format)
        return f"{each.seconds * 1e3:.3f}, {rate / 1e12:.0f} ({fraction}), {memory}, {error}"

    for case in cases:
        found = case.ratio_to_best
        cells = [cell(case, case.measurements.get(name, Measurement())) for name in implementations]
        verdict = [formatted(found, lambda x: x.verdict(1.0))] if goals else []
        table.add(case.shape.name, *cells, case.best_peer or _MISSING, formatted(found, str), *verdict)
    return table


def formatted(value: Any, text: Callable[[Any], str]) -> str:
    return _MISSING if value is None else text(value)


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def mebibytes(number: float) -> str:
    value = number / _MEBIBYTE
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _joined(measured: Sequence[Measurement], text: Callable[[Measurement], str]) -> str:
    return " : ".join(text(each) for each in measured)


def write_json(path: Path, options: argparse.Namespace, cases: Sequence[Case], **more: Any) -> None:
    """Everything measured, with the environment and the command's settings; and says so."""
    settings = {name: value for name, value in vars(options).items() if name != "shapes"}
    content = {
        "environment": environment(),
        "settings": settings,
        **more,
        "cases": [case.as_json() for case in cases],
    }
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")
    print(f"wrote {path}")


def write_length_plot(path: Path, cases: Sequence[Case], title: str) -> None:
    """Time and memory over the sequence length, both axes logarithmic.

    Solid lines are the compiler's temporary bytes; dotted ones, if measured, the peak of resident
    memory, which includes the results and the scratch that the compiler does not count.
    """
    plt = pyplot()
    implementations = list(cases[0].measurements)
    modes = [mode for mode in MODES if any(case.mode == mode for case in cases)]
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    markers = {FORWARD: "o", GRADIENT: "s"}

    def draw(axes: Any, values: Callable[[Measurement], float | None], mode: str, style: str, note: str) -> None:
        for index, name in enumerate(implementations):
            points = [
                (case.shape.query_length, value)
                for case in cases
                # A logarithmic axis has no place for zero bytes.
                if case.mode == mode and (value := values(case.measurements[name]))
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    marker=markers[mode],
                    markersize=5,
                    color=f"C{index}",
                    alpha=1 if mode == FORWARD else 0.6,
                    label=f"{name} {mode}{note}",
                )

    def milliseconds(each: Measurement) -> float | None:
        return None if each.seconds is None else each.seconds * 1e3

    def mebibytes(number: int | None) -> float | None:
        return None if number is None else number / _MEBIBYTE

    for mode in modes:
        draw(time_axes, milliseconds, mode, "-", "")
        draw(memory_axes, lambda each: mebibytes(each.temporary_bytes), mode, "-", "")
        draw(memory_axes, lambda each: mebibytes(each.resident_bytes), mode, ":", ", resident")
    time_axes.set(ylabel="milliseconds per call", title="Time")
    memory_axes.set(ylabel="MiB", title="Temporary memory")
    lengths = sorted({case.shape.query_length for case in cases})
    for axes in (time_axes, memory_axes):
        axes.set(xscale="log", yscale="log", xlabel="sequence length")
        axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time_axes.legend(fontsize=8)
    memory_axes.legend(fontsize=8)
    figure.suptitle(f"{title}\n{header()}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def write_peer_plot(path: Path, cases: Sequence[Case], title: str) -> None:
    """Time of each implementation relative to the best peer, a group of bars for each case, a panel for each mode."""
    plt = pyplot()
    implementations = list(dict.fromkeys(name for case in cases for name in case.measurements))
    modes = [mode for mode in MODES if any(case.mode == mode for case in cases)]
    figure, panels = plt.subplots(len(modes), 1, figsize=(14, 5 * len(modes)), layout="constrained", squeeze=False)
    width, tallest = 0.8 / len(implementations), 3.0
    for axes, mode in zip(panels[:, 0], modes, strict=True):
        shown = [case for case in cases if case.mode == mode and case.best_peer is not None]
        for index, name in enumerate(implementations):
            for place, case in enumerate(shown):
                ratio = case.ratio(name, case.best_peer or "")
                if ratio is None or not case.measurements[name].is_right:
                    continue
                x = place + (index - (len(implementations) - 1) / 2) * width
                label = name if place == 0 else None
                axes.bar(x, min(ratio.value, tallest), width, color=f"C{index}", label=label)
                if ratio.value > tallest:
                    axes.text(x, tallest, f"{ratio.value:.0f}x", ha="center", va="bottom", fontsize=6, rotation=90)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(
            ylim=(0, 1.1 * tallest),
            ylabel="time / best peer's",
            title="forward" if mode == FORWARD else "forward and gradients",
        )
        axes.set_xticks(range(len(shown)), [case.shape.name for case in shown], rotation=30, ha="right", fontsize=7)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=8, ncols=len(implementations), loc="upper left")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    return plt
