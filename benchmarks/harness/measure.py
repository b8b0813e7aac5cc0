"""Measures one attention shape in one mode with several implementations side by side."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from harness.errors import Float64Array, Selection, largest_error, reference_results, select, with_cotangent_on
from harness.implementations import REFERENCE, CompiledAttention, calls_per_program, compile_attention, is_ours
from harness.inputs import AttentionInputs, make_inputs
from harness.memory import can_measure_resident, peak_resident_bytes
from harness.shapes import AttentionShape
from harness.suites import goal_of
from harness.timing import Ratio, Samples, interleaved_seconds, ratio, warm_up

Report = Callable[[str], None]

# Waiting for an accelerator costs about as much as a small call, so calls share a wait.
_SAMPLE_SECONDS_ON_ACCELERATOR = 5e-3
# An error of this part of the largest element is no rounding: whoever makes it is no peer.
_WRONG = 0.1


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure."""

    repeats: int | None = None
    max_repeats: int = 100
    time_per_case: float = 3.0
    max_dense_gib: float = 4.0
    seed: int = 0
    check_results: bool = True
    max_checked_scores: int = 2**23
    measure_resident: bool = False
    fills_programs: bool = False  # short calls are repeated within a program (`calls_per_program`)


@dataclasses.dataclass
class Measurement:
    """One implementation's figures; or, in `reason`, why there are none."""

    samples: Samples | None = None
    temporary_bytes: int | None = None
    resident_bytes: int | None = None
    error: float | None = None
    compile_seconds: float | None = None
    reason: str | None = None

    @property
    def seconds(self) -> float | None:
        """Median seconds of a call."""
        return None if self.samples is None else float(np.median(self.samples))

    @property
    def is_right(self) -> bool:
        """Whether it was timed and its result is not plainly wrong."""
        return self.samples is not None and (self.error is None or self.error < _WRONG)

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"samples": None if self.samples is None else self.samples.tolist()}


@dataclasses.dataclass
class Case:
    """One shape in one mode, with a measurement for each implementation."""

    shape: AttentionShape
    mode: str
    measurements: dict[str, Measurement]

    def ratio(self, implementation: str, baseline: str = REFERENCE) -> Ratio | None:
        """Time as a fraction of the baseline's."""
        pair = (self.measurements.get(name, Measurement()).samples for name in (implementation, baseline))
        own, other = pair
        return None if own is None or other is None else ratio(own, other)

    @property
    def ours(self) -> str | None:
        """The first of our own implementations."""
        return next(filter(is_ours, self.measurements), None)

    def _fastest(self, of_ours: bool) -> str | None:
        """Among ours or the others, of those whose result is right."""
        seconds = {
            name: each.seconds or 0.0
            for name, each in self.measurements.items()
            if each.is_right and is_ours(name) == of_ours
        }
        return min(seconds, key=lambda name: seconds[name], default=None)

    @property
    def best_peer(self) -> str | None:
        return self._fastest(of_ours=False)

    @property
    def ratio_to_best(self) -> Ratio | None:
        """Time of our fastest as a fraction of that of the best peer."""
        ours, peer = self._fastest(of_ours=True), self.best_peer
        return None if ours is None or peer is None else self.ratio(ours, peer)

    @property
    def goal(self) -> float | None:
        """The wanted ratio of ours to `REFERENCE`."""
        return goal_of(self.shape, self.mode)

    @property
    def verdict(self) -> str | None:
        """Whether ours meets the goal."""
        found = None if self.ours is None else self.ratio(self.ours)
        return None if self.goal is None or found is None else found.verdict(self.goal)

    def as_json(self) -> dict[str, Any]:
        """The case as plain data; `from_json` reads all but what follows from the rest."""
        return {
            "shape": dataclasses.asdict(self.shape),
            "mode": self.mode,
            "measurements": {
                name: each.as_json() | {"seconds": each.seconds, "ratio": self.ratio(name)}
                for name, each in self.measurements.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Case":
        names = {field.name for field in dataclasses.fields(Measurement)}
        measurements = {}
        for name, each in data["measurements"].items():
            known: dict[str, Any] = {key: value for key, value in each.items() if key in names}
            if known["samples"] is not None:
                known["samples"] = np.array(known["samples"])
            measurements[name] = Measurement(**known)
        shape: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data["shape"].items()
        }
        return cls(AttentionShape(**shape), data["mode"], measurements)


def measure_case(
    shape: AttentionShape,
    mode: str,
    implementations: Sequence[str],
    settings: Settings,
    report: Report = lambda stage: None,
) -> Case:
    """Compile, check and time every implementation that can run the case.

    `report` is told what is being done, for a progress bar.
    """
    return time_case(shape, mode, compile_case(shape, mode, implementations, settings, report), settings, report)


def compile_case(
    shape: AttentionShape,
    mode: str,
    implementations: Sequence[str],
    settings: Settings,
    report: Report = lambda stage: None,
    threads: int = 1,
) -> dict[str, CompiledAttention | str]:
    """Every implementation compiled, or why it is not."""
    calls = calls_per_program(shape.operations(mode)) if settings.fills_programs else 1

    def compiled(name: str) -> CompiledAttention | str:
        dense_gib = shape.dense_bytes(mode) / 2**30
        if name in (REFERENCE, f"{REFERENCE}:xla") and dense_gib > settings.max_dense_gib:
            return f"skipped, dense attention needs about {dense_gib:.1f} GiB (--max-dense-gib)"
        report(f"{name}: compiling")
        try:
            return compile_attention(name, shape, mode, calls)
        except Exception as error:  # whatever an implementation refuses with is its cell of the table
            return reason_of(error)

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(implementations, pool.map(compiled, implementations), strict=True))


class _Checked(NamedTuple):
    """A call whose results are compared."""

    inputs: AttentionInputs
    selection: Selection
    reference: dict[str, Float64Array]


# Both modes of a shape are measured after each other.
_inputs = functools.lru_cache(maxsize=1)(make_inputs)


@functools.lru_cache(maxsize=1)
def _checked(shape: AttentionShape, seed: int, max_scores: int) -> _Checked:
    selection = select(shape, max_scores)
    inputs = with_cotangent_on(_inputs(shape, seed), selection)
    return _Checked(inputs, selection, reference_results(shape, inputs, selection))


def time_case(
    shape: AttentionShape,
    mode: str,
    compiled: Mapping[str, CompiledAttention | str],
    settings: Settings,
    report: Report = lambda stage: None,
) -> Case:
    """Check and time what `compile_case` returned."""
    report("inputs")
    inputs = _inputs(shape, settings.seed)
    if settings.check_results:
        report("float64 reference")
        checked = _checked(shape, settings.seed, settings.max_checked_scores)
    else:
        checked = None
    measurements = {name: Measurement() for name in compiled}
    calls, per_program, estimates = {}, {}, {}
    for name, attention in compiled.items():
        measurement = measurements[name]
        if isinstance(attention, str):
            measurement.reason = attention
            continue
        measurement.temporary_bytes = attention.temporary_bytes
        measurement.compile_seconds = attention.compile_seconds
        try:
            report(f"{name}: first call")
            # The first call also shows whether memory suffices.
            start = time.perf_counter()
            result = jax.block_until_ready(attention.bind(inputs if checked is None else checked.inputs)())
            first_seconds = time.perf_counter() - start
            if checked is not None:
                measurement.error = largest_error(attention.named_results(result), checked.reference, checked.selection)
            del result
            if settings.measure_resident and can_measure_resident():
                report(f"{name}: resident memory")
                measurement.resident_bytes = peak_resident_bytes(name, shape, mode, settings.seed)
        except Exception as error:
            measurement.reason = reason_of(error)
            continue
        calls[name], per_program[name] = attention.bind(inputs), attention.calls
        # Warming up a call of seconds once more gains nothing.
        if first_seconds > 1:
            estimates[name] = first_seconds
    if calls:
        on_accelerator = jax.default_backend() != "cpu"
        if on_accelerator:
            warm_up(calls)
        samples = interleaved_seconds(
            calls,
            repeats=settings.repeats,
            max_repeats=settings.max_repeats,
            estimates=estimates,
            time_budget=settings.time_per_case,
            sample_seconds=_SAMPLE_SECONDS_ON_ACCELERATOR if on_accelerator else 0.0,
            on_round=lambda done, planned: report(f"timing, round {done} of {planned}"),
        )
        for name, seconds in samples.items():
            measurements[name].samples = seconds / per_program[name]
    return Case(shape, mode, measurements)


def reason_of(error: Exception) -> str:
    """An error in one short line."""
    message = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {message[:200]}"
