"""The GPU table's verdicts, the processes that measure it, and the counters beside it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import hardware_counters
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_report import compared, tables
from processes import run_in_turn
from timing import repeated

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _case(**seconds: float) -> dict[str, Any]:
    cells = {
        name.replace("__", ":"): {"seconds": s, "temporary_bytes": 0, "error": 1e-3} for name, s in seconds.items()
    }
    return {"shape": "some", "mode": "forward", "operations": 1e9, "cells": cells}


def test_ours_is_compared_with_the_best_peer() -> None:
    assert compared(_case(flash=2e-3, jax__nn=5e-3, jax__nn__cudnn=1e-3)) == ("jax:nn:cudnn", 2.0)
    assert compared(_case(flash=2e-3)) == (None, None)
    assert compared(_case(jax__nn=2e-3)) == ("jax:nn", None)


def test_a_peer_with_a_wrong_result_is_none() -> None:
    case = _case(flash=2e-3, cudnn=1e-3, triton=4e-3)
    case["cells"]["cudnn"]["error"] = 1.0
    assert compared(case) == ("triton", 0.5)


def test_verdicts_and_reasons_are_in_the_table() -> None:
    met, missed = _case(flash=1e-3, peer=1e-3), _case(flash=2e-3, peer=1e-3)
    missed["cells"]["other"] = {"reason": "ValueError: no"}
    report = {"implementations": ["flash", "peer", "other"], "ceiling": 1e12, "cases": [met, missed]}
    lines = tables(report, "forward").splitlines()
    assert lines[-2].endswith("| peer | 1.000 | met |")
    assert lines[-1].endswith("| ValueError: no | peer | 2.000 | missed |")
    assert tables(report, "gradient") == ""


def test_processes_measure_one_after_the_other_and_late_ones_are_killed() -> None:
    start = f"import sys, time; sys.path.insert(0, {str(BENCHMARKS)!r}); from processes import wait_for_turn; "
    bodies = ["wait_for_turn(); print('a')", "wait_for_turn(); time.sleep(60)", "1 / 0", "wait_for_turn(); print('b')"]
    lines: list[tuple[int, str]] = []
    done = run_in_turn(
        [[sys.executable, "-W", "ignore", "-c", start + body] for body in bodies],
        lambda i, line: lines.append((i, line)),
        preparing_seconds=30,
        measuring_seconds=2,
    )
    assert done == [True, False, False, True]
    assert lines == [(0, "a"), (3, "b")]


def test_a_repeated_call_has_the_result_of_one() -> None:
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(repeated(lambda x: (x * 2, None), 5)(x)[0], x * 2)


def test_hardware_counters_are_printed_for_each_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In microseconds, whatever the unit that Nsight Compute prints; without kernels that take no time."""
    rows = [
        ("0", "attention", "gpu__time_duration.sum", "ms", "1.5"),
        ("0", "attention", "sm__throughput.avg.pct_of_peak_sustained_elapsed", "%", "72.3"),
        ("0", "attention", "dram__throughput.avg.pct_of_peak_sustained_elapsed", "%", "n/a"),
        ("1", "fill", "gpu__time_duration.sum", "us", "2"),
        ("2", "delta", "gpu__time_duration.sum", "ns", "95,000"),
    ]
    names = "ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value"
    lines = ["==PROF== connected", *(",".join(f'"{x}"' for x in row) for row in (names, *rows))]
    done = subprocess.CompletedProcess([], 0, "\n".join(lines), "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    hardware_counters.main(["--shapes", "gpu-8x512x16x64", "--implementations", "flash", "--mode", "forward"])
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| gpu")]
    assert [(kernel, float(us)) for _, kernel, us, *_ in table] == [("attention", 1500.0), ("delta", 95.0)]
    assert table[0][3] == "72"
