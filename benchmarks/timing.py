"""Time and memory of calls that are compared with each other in one process."""

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

Call = Callable[[], Any]

# More calls of one function in one round than this tell nothing new.
_MAX_CALLS_PER_ROUND = 5


def seconds_per_call(call: Call, calls: int = 1) -> float:
    """Seconds of one call, waiting for its result; `calls` of them share one wait."""
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def interleaved_seconds(
    calls: Mapping[str, Call],
    *,
    repeats: int | None = None,
    estimates: Mapping[str, float] | None = None,
    time_budget: float = 5.0,
    min_repeats: int = 3,
    max_repeats: int = 100,
    sample_seconds: float = 0.0,
    pause_after: Mapping[str, float] = MappingProxyType({}),
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call, measured in turn so that a slow phase of the machine hits them all.

    Each call runs twice before anything is counted, first to compile it where that is left to do.
    Without `repeats`, as many rounds are made as `time_budget` seconds allow. In a round, a call
    much faster than the slowest one is taken up to five times, and the order of the calls is
    reversed from round to round.

    Args:
        calls: functions without arguments, by name.
        repeats: number of rounds, or None to let the budget decide.
        estimates: seconds of calls that ran already, which need no warming up here.
        time_budget: seconds that all rounds together may take, as far as `min_repeats` allows.
        min_repeats: least number of rounds.
        max_repeats: largest number of rounds.
        sample_seconds: where a call is shorter, enough of them share one wait to reach this; for
            accelerators, where waiting for a single short call measures the wait.
        pause_after: seconds of rest after a peer's samples, if its threads go on for a while.
        on_round: told the number of rounds done and the number to do.
    """
    expected = dict(estimates or {})
    for name in calls.keys() - expected.keys():
        seconds_per_call(calls[name])
        expected[name] = max(seconds_per_call(calls[name]), 1e-7)
    shared = {name: max(1, round(sample_seconds / expected[name])) for name in calls}
    sample = {name: shared[name] * expected[name] for name in calls}
    slowest = max(sample.values())
    samples_per_round = {
        name: min(_MAX_CALLS_PER_ROUND, max(1, int(slowest / (len(calls) * each))))
        for name, each in sample.items()
    }
    if repeats is None:
        round_seconds = sum(samples_per_round[name] * sample[name] for name in calls)
        repeats = min(max_repeats, max(min_repeats, int(time_budget / round_seconds)))

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(repeats):
        order = list(calls)
        if done % 2:
            order.reverse()
        for name in order:
            for _ in range(samples_per_round[name]):
                seconds[name].append(seconds_per_call(calls[name], shared[name]))
            if name in pause_after:
                time.sleep(pause_after[name])
        if on_round is not None:
            on_round(done + 1, repeats)
    return seconds


def interleaved_medians(calls: Mapping[str, Call], **settings: Any) -> dict[str, float]:
    """Median seconds of every call; `settings` are those of `interleaved_seconds`."""
    measured = interleaved_seconds(calls, **settings)
    return {name: statistics.median(samples) for name, samples in measured.items()}


def temporary_bytes(compiled: Any) -> int | None:
    """Bytes that the compiler reserves beside inputs and outputs, or None if it does not say.

    On a CPU this misses the scratch of some fused loops; `call_with_peak` does not.
    """
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def call_with_peak(call: Call) -> tuple[Any, int | None]:
    """The result of one call, and how far it raised the process's resident memory at its peak.

    The peak includes the result. It is None where the system does not let a process reset its
    high-water mark (other than Linux).
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kibibytes(field: str) -> int:
        return next(
            int(line.split()[1])
            for line in status.read_text().splitlines()
            if line.startswith(field)
        )

    # Freed memory that the C library keeps would serve the call without raising the mark.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        reset.write_text("5")
        before = kibibytes("VmRSS")
    except (OSError, StopIteration):
        return jax.block_until_ready(call()), None
    result = jax.block_until_ready(call())
    return result, max(0, kibibytes("VmHWM") - before) * 1024
