"""The results of benchmark_gpu_table.py as Markdown tables and as a bar chart.

python benchmarks/gpu_report.py gpu.json --plot docs/gpu_table.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

from attention_shapes import FORWARD, MODES

_OURS = "flash"
_MARGIN = 1.005  # a median is not known better than this
_WRONG = 0.1  # an error of this part of the largest element is no rounding: whoever makes it is no peer


def is_ours(implementation: str) -> bool:
    return implementation.partition(":")[0] == _OURS


def compared(case: dict[str, Any]) -> tuple[str | None, float | None]:
    """The best peer that was measured and is right, and our time as a fraction of its."""
    cells = case["cells"].items()
    seconds = {name: cell["seconds"] for name, cell in cells if "seconds" in cell and cell["error"] < _WRONG}
    peers = {name: value for name, value in seconds.items() if not is_ours(name)}
    ours = [value for name, value in seconds.items() if is_ours(name)]
    if not peers:
        return None, None
    best = min(peers, key=lambda name: peers[name])
    return best, min(ours) / peers[best] if ours else None


def tables(report: dict[str, Any], mode: str) -> str:
    """The Markdown table of one mode."""
    implementations, ceiling = report["implementations"], report["ceiling"]
    cases = [case for case in report["cases"] if case["mode"] == mode]
    if not cases:
        return ""
    rate = "unknown" if ceiling is None else f"{ceiling / 1e12:.0f}"
    lines = [
        f"{mode}: milliseconds, TFLOP/s (fraction of {rate}), temporary MiB, error against float64",
        "",
        f"| case | {' | '.join(implementations)} | best peer | ours / best | verdict |",
        "|---" * (len(implementations) + 4) + "|",
    ]
    for case in cases:
        best, ratio = compared(case)
        cells = [_cell(case["cells"].get(name, {}), case["operations"], ceiling) for name in implementations]
        verdict = "-" if ratio is None else "met" if ratio <= _MARGIN else "missed"
        number = "-" if ratio is None else f"{ratio:.3f}"
        lines.append(f"| {case['shape']} | {' | '.join(cells)} | {best or '-'} | {number} | {verdict} |")
    return "\n".join(lines) + "\n"


def _cell(cell: dict[str, Any], operations: float, ceiling: float | None) -> str:
    if "seconds" not in cell:
        return cell.get("reason", "-").replace("|", "/")
    rate = operations / cell["seconds"]
    fraction = "-" if ceiling is None else f"{rate / ceiling:.2f}"
    memory = "-" if cell["temporary_bytes"] is None else f"{cell['temporary_bytes'] / 2**20:.0f}"
    return f"{cell['seconds'] * 1e3:.3f}, {rate / 1e12:.0f} ({fraction}), {memory}, {cell['error']:.0e}"


def write_plot(path: Path, report: dict[str, Any]) -> None:
    """Time of each implementation relative to the best peer, a group of bars for each case, a panel for each mode."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    implementations = report["implementations"]
    modes = [mode for mode in MODES if any(case["mode"] == mode for case in report["cases"])]
    figure, panels = plt.subplots(len(modes), 1, figsize=(14, 5 * len(modes)), layout="constrained", squeeze=False)
    width, tallest = 0.8 / len(implementations), 3.0
    for axes, mode in zip(panels[:, 0], modes, strict=True):
        cases = [case for case in report["cases"] if case["mode"] == mode and compared(case)[0] is not None]
        for index, name in enumerate(implementations):
            for place, case in enumerate(cases):
                cell, (best, _) = case["cells"].get(name, {}), compared(case)
                if "seconds" not in cell or best is None or cell["error"] >= _WRONG:
                    continue
                ratio = cell["seconds"] / case["cells"][best]["seconds"]
                x = place + (index - (len(implementations) - 1) / 2) * width
                label = name if place == 0 else None
                axes.bar(x, min(ratio, tallest), width, color=f"C{index}", label=label)
                if ratio > tallest:
                    axes.text(x, tallest, f"{ratio:.0f}x", ha="center", va="bottom", fontsize=6, rotation=90)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(
            ylim=(0, 1.1 * tallest),
            ylabel="time / best peer's",
            title="forward" if mode == FORWARD else "forward and gradients",
        )
        axes.set_xticks(range(len(cases)), [case["shape"] for case in cases], rotation=30, ha="right", fontsize=7)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=8, ncols=len(implementations), loc="upper left")
    facts = report["environment"]
    figure.suptitle(f"{facts['device']}, JAX {facts['jax']}; lower is better", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    report = json.loads(options.json.read_text())
    for mode in MODES:
        print(tables(report, mode))
    if options.plot:
        write_plot(options.plot, report)


if __name__ == "__main__":
    main()
