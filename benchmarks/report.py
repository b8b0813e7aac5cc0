"""Cases as lines of a Markdown table, as JSON, and as a plot over the sequence length."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attention_calls import REFERENCE
from attention_cases import Case, Measurement
from attention_shapes import FORWARD, GRADIENT, MODES
from machine import environment, header

_MEBIBYTE = 2**20
_MISSING = "-"


class Table:
    """Lines of a Markdown table, one for each case, that also read well in a terminal."""

    def __init__(
        self,
        case_names: Sequence[str],
        implementations: Sequence[str],
        *,
        goals: bool,
        resident: bool,
    ):
        self._resident = resident
        self._implementations = list(implementations)
        self._goals = goals
        self._compared = [
            name for name in self._implementations if name != REFERENCE and REFERENCE in self._implementations
        ]
        width = 7 * len(implementations)
        self._columns: list[tuple[str, int]] = [
            ("case", max(len("case"), *(len(name) for name in case_names))),
            ("mode", 8),
            *((f"{name} ms", max(9, len(name) + 3)) for name in implementations),
            *((f"{name} / {REFERENCE}", len(name) + 9) for name in self._compared),
            ("temp MiB", width),
            *([("resident MiB", max(12, width))] if resident else []),
            ("error", 8 * len(implementations)),
            *([("goal", 5), ("verdict", 7)] if goals else []),
        ]

    def head(self) -> str:
        """Header of the table, after a line that says how to read it."""
        order = ", ".join(self._implementations)
        return "\n".join(
            (
                f"temp (temporary memory, says the compiler) and error are those of: {order}",
                "",
                self._line([name for name, _ in self._columns]),
                "|" + "|".join("-" * (width + 2) for _, width in self._columns) + "|",
            )
        )

    def row(self, case: Case) -> str:
        """The case's line, followed by one for each implementation that has no figures."""
        measured = [case.measurements[name] for name in self._implementations]
        cells = [
            case.shape.name,
            case.mode,
            *(_format(each.seconds, _milliseconds) for each in measured),
            *(_format(case.ratio(name), "{:.3f}".format) for name in self._compared),
            _joined(measured, lambda each: _format(each.temporary_bytes, _mebibytes)),
        ]
        if self._resident:
            cells.append(_joined(measured, lambda each: _format(each.resident_bytes, _mebibytes)))
        cells.append(_joined(measured, lambda each: _format(each.error, "{:.0e}".format)))
        if self._goals:
            cells += [_format(case.goal, "{:.3g}".format), case.verdict or _MISSING]
        reasons = (
            f"  {name}: {case.measurements[name].reason}"
            for name in self._implementations
            if case.measurements[name].reason
        )
        return "\n".join((self._line(cells), *reasons))

    def _line(self, cells: Sequence[str]) -> str:
        padded = (
            f"{cell:<{width}}" if index < 2 else f"{cell:>{width}}"
            for index, (cell, (_, width)) in enumerate(zip(cells, self._columns, strict=True))
        )
        return "| " + " | ".join(padded) + " |"


def _joined(measured: Sequence[Measurement], text: Callable[[Measurement], str]) -> str:
    return " : ".join(text(each) for each in measured)


def _format(number: float | None, text: Callable[[float], str]) -> str:
    return _MISSING if number is None else text(number)


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _mebibytes(number: float) -> str:
    value = number / _MEBIBYTE
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def write_json(path: Path, settings: dict[str, Any], cases: Sequence[Case], **more: Any) -> None:
    """Everything measured, with the environment and the command's settings."""
    content = {
        "environment": environment(),
        "settings": settings,
        **more,
        "cases": [case.as_json() for case in cases],
    }
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def write_plot(path: Path, cases: Sequence[Case], title: str) -> None:
    """Time and memory over the sequence length, both axes logarithmic.

    Solid lines are the compiler's temporary bytes; dotted ones, if measured, the peak of resident
    memory, which includes the results and the scratch that the compiler does not count.
    """
    import matplotlib

    # No display is needed to write a file.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
