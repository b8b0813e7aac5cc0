"""The benchmarks' errors, ratios and verdicts, the processes that measure them, and the counters beside them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import hardware_counters
import jax.numpy as jnp
import numpy as np
import pytest
from harness.errors import largest_error, reference_results, select, with_cotangent_on
from harness.implementations import compile_attention, repeated
from harness.inputs import make_inputs
from harness.measure import Case, Measurement
from harness.processes import run_in_turn
from harness.report import peer_table
from harness.shapes import GRADIENT, AttentionShape, parse_dimensions
from harness.timing import Ratio, ratio

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _case(**seconds: float) -> Case:
    measurements = {
        name.replace("__", ":"): Measurement(samples=np.full((3, 1), s), temporary_bytes=0, error=1e-3)
        for name, s in seconds.items()
    }
    return Case(parse_dimensions("1x64x1x16"), "forward", measurements)


def test_ours_is_compared_with_the_best_peer() -> None:
    case = _case(flash=2e-3, flash__pure_jax=3e-3, jax__nn=5e-3, jax__nn__cudnn=1e-3)
    assert case.best_peer == "jax:nn:cudnn"
    assert case.ratio_to_best == Ratio(2.0, 2.0, 2.0)
    assert _case(flash=2e-3).ratio_to_best is None
    assert _case(jax__nn=2e-3).best_peer == "jax:nn"


def test_a_peer_with_a_wrong_result_is_none() -> None:
    case = _case(flash=2e-3, cudnn=1e-3, triton=4e-3)
    case.measurements["cudnn"].error = 1.0
    assert case.best_peer == "triton"


def test_verdicts_and_reasons_are_in_the_table() -> None:
    met, missed = _case(flash=1e-3, peer=1e-3), _case(flash=2e-3, peer=1e-3)
    missed.measurements["other"] = Measurement(reason="ValueError: no")
    lines = [str(peer_table([met, missed], ["flash", "peer", "other"], 1e12, goals=goals)) for goals in (True, False)]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[0].splitlines()[-2:]]
    assert cells[0][-4:-1] == ["peer", "1.000 [1.000, 1.000]", "met"]
    assert cells[1][-5:-1] == ["ValueError: no", "peer", "2.000 [2.000, 2.000]", "missed"]
    assert "missed" not in lines[1]


def test_a_case_survives_json() -> None:
    case = _case(flash=2e-3, peer=1e-3)
    assert Case.from_json(case.as_json()).as_json() == case.as_json()


def test_noise_misses_no_goal() -> None:
    """Both calls take as long, and the machine is slow for half of the rounds."""
    rng = np.random.default_rng(0)
    slow = np.repeat((1.0, 3.0), 20)[:, None]
    found = ratio(slow * rng.normal(1.0, 0.1, (40, 5)), slow * rng.normal(1.0, 0.1, (40, 1)))
    assert found.low < 1.0 < found.high
    assert found.verdict(0.999 * found.value) == "met"
    assert found.verdict(0.999 * found.low) == "missed"


SHAPE = dataclasses.replace(parse_dimensions("2x40/56x4/2x8"), is_causal=True)
SHAPES = {
    "lengths": dataclasses.replace(SHAPE, key_value_lengths=(56, 9)),
    "window": dataclasses.replace(SHAPE, local_window_size=(9, 3)),
    "bias and mask": dataclasses.replace(SHAPE, bias_shape=(1, 4, 40, 56), mask_shape=(2, 1, 1, 56)),
    "bias of keys": dataclasses.replace(SHAPE, bias_shape=(2, 1, 1, 56)),
}


@pytest.mark.parametrize("max_scores", [2**23, 2**10])
@pytest.mark.parametrize("name", SHAPES)
def test_errors_of_all_and_of_some_rows(name: str, max_scores: int) -> None:
    shape: AttentionShape = SHAPES[name]
    selection = select(shape, max_scores)
    assert (len(selection.rows) < shape.query_length) == (max_scores == 2**10)
    inputs = with_cotangent_on(make_inputs(shape), selection)
    reference = reference_results(shape, inputs, selection)
    for implementation in ("flash", "jax.nn"):
        compiled = compile_attention(implementation, shape, GRADIENT)
        results = compiled.named_results(compiled.bind(inputs)())
        assert set(results) == set(reference)
        assert largest_error(results, reference, selection) < 2e-6
        for result in results:
            wrong = {**results, result: results[result] * 1.01}
            assert largest_error(wrong, reference, selection) > 1e-3


def test_processes_measure_one_after_the_other_and_late_ones_are_killed() -> None:
    start = f"import sys, time; sys.path.insert(0, {str(BENCHMARKS)!r}); from harness.processes import wait_for_turn; "
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
    table = [
        [cell.strip() for cell in line.split(" | ")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| gpu")
    ]
    assert [(kernel, float(us)) for _, kernel, us, *_ in table] == [("attention", 1500.0), ("delta", 95.0)]
    assert table[0][3] == "72"
