"""Times of calls that are compared with each other in one process, and their ratios."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

Call = Callable[[], Any]
# Seconds of one call, (rounds, calls in a round). Row i of all calls of a case was measured at about the same time.
Samples = NDArray[np.float64]

# More calls of one function in one round than this tell nothing new.
_MAX_CALLS_PER_ROUND = 5
_RESAMPLES = 2000


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
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Samples]:
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
        on_round: told the number of rounds done and the number to do.
    """
    expected = dict(estimates or {})
    for name, call in calls.items():
        if name not in expected:
            seconds_per_call(call)
            expected[name] = max(seconds_per_call(call), 1e-7)
    shared = {name: max(1, round(sample_seconds / expected[name])) for name in calls}
    sample = {name: shared[name] * expected[name] for name in calls}
    slowest = max(sample.values())
    samples_per_round = {
        name: min(_MAX_CALLS_PER_ROUND, max(1, int(slowest / (len(calls) * each)))) for name, each in sample.items()
    }
    if repeats is None:
        round_seconds = sum(samples_per_round[name] * sample[name] for name in calls)
        repeats = min(max_repeats, max(min_repeats, int(time_budget / round_seconds)))

    seconds = {name: np.empty((repeats, samples_per_round[name])) for name in calls}
    for done in range(repeats):
        order = list(calls)
        if done % 2:
            order.reverse()
        for name in order:
            for i in range(samples_per_round[name]):
                seconds[name][done, i] = seconds_per_call(calls[name], shared[name])
        if on_round is not None:
            on_round(done + 1, repeats)
    return seconds


class Ratio(NamedTuple):
    """A ratio of two medians, and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def verdict(self, goal: float) -> str:
        """A goal is missed where the whole interval is above it: noise misses none."""
        return "met" if self.low <= goal else "missed"


def ratio(samples: Samples, baseline: Samples) -> Ratio:
    """Median of `samples` as a fraction of that of `baseline`.

    The interval is a bootstrap over the rounds, which both of `interleaved_seconds` share: a slow phase of the machine
    is in both medians of a resample.
    """
    rounds = len(samples)
    chosen = np.random.default_rng(0).integers(rounds, size=(_RESAMPLES, rounds))

    def medians(x: Samples) -> NDArray[np.float64]:
        return np.median(x[chosen].reshape(_RESAMPLES, -1), axis=1)

    low, high = np.percentile(medians(samples) / medians(baseline), (2.5, 97.5))
    return Ratio(float(np.median(samples) / np.median(baseline)), float(low), float(high))


def warm_up(calls: Mapping[str, Call], seconds: float = 0.15) -> None:
    """Keep an accelerator busy until its clock has risen."""
    start = time.perf_counter()
    while calls and time.perf_counter() - start < seconds:
        for call in calls.values():
            seconds_per_call(call, 3)


def repeated(function: Callable[[Any], Any], count: int) -> Callable[[Any], Any]:
    """`function` of the same arguments `count` times in one program, each time after the last; the last result.

    Starting a short call from Python takes longer than the call; so this measures what it takes in a larger program.
    """
    if count == 1:
        return function

    def call(arguments: Any) -> Any:
        def step(_: Any, state: tuple) -> tuple:
            arguments, _ = jax.lax.optimization_barrier(state)
            return arguments, function(arguments)

        nothing = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), jax.eval_shape(function, arguments))
        return jax.lax.fori_loop(0, count, step, (arguments, nothing))[1]

    return call
