"""Measures one attention shape in one mode with several implementations side by side."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from attention_calls import OURS, REFERENCE, UNSUPPORTED, compile_attention
from attention_reference import largest_error, reference_results, select, with_cotangent_on
from attention_shapes import AttentionShape, make_inputs
from resident_memory import can_measure, peak_resident_bytes
from timing import interleaved_seconds

Report = Callable[[str], None]

# Waiting for an accelerator costs about as much as a small call, so calls share a wait.
_SAMPLE_SECONDS_ON_ACCELERATOR = 0.02


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure."""

    repeats: int | None = None
    time_budget: float = 3.0
    max_dense_gib: float = 4.0
    seed: int = 0
    check_results: bool = True
    measure_resident: bool = False


@dataclasses.dataclass
class Measurement:
    """One implementation's figures; or, in `reason`, why there are none."""

    samples: list[float] = dataclasses.field(default_factory=list)
    temporary_bytes: int | None = None
    resident_bytes: int | None = None
    error: float | None = None
    compile_seconds: float | None = None
    reason: str | None = None

    @property
    def seconds(self) -> float | None:
        """Median seconds of a call."""
        return statistics.median(self.samples) if self.samples else None


@dataclasses.dataclass
class Case:
    """One shape in one mode, with a measurement for each implementation."""

    shape: AttentionShape
    mode: str
    measurements: dict[str, Measurement]

    def ratio(self, implementation: str) -> float | None:
        """Time as a fraction of jax.nn's."""
        pair = (self.measurements.get(name) for name in (implementation, REFERENCE))
        own, reference = (None if each is None else each.seconds for each in pair)
        return None if own is None or reference is None else own / reference

    @property
    def ours(self) -> str | None:
        """The first of our own implementations that was measured."""
        names = (name for name in self.measurements if name.partition(":")[0] == OURS)
        return next(names, None)

    @property
    def goal(self) -> float | None:
        """The wanted ratio of ours."""
        return self.shape.goal.get(self.mode)

    @property
    def verdict(self) -> str | None:
        """Whether ours meets the goal."""
        ratio = None if self.ours is None else self.ratio(self.ours)
        if self.goal is None or ratio is None:
            return None
        return "met" if ratio <= self.goal else "missed"

    def as_json(self) -> dict[str, Any]:
        """The case as plain data."""
        return {
            "shape": dataclasses.asdict(self.shape),
            "mode": self.mode,
            "measurements": {
                name: dataclasses.asdict(each) | {"seconds": each.seconds, "ratio": self.ratio(name)}
                for name, each in self.measurements.items()
            },
            "goal": self.goal,
            "verdict": self.verdict,
        }


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
    inputs = make_inputs(shape, settings.seed)
    selection = select(shape)
    checked_inputs = with_cotangent_on(inputs, selection)
    measurements = {name: Measurement() for name in implementations}
    reference = None
    if settings.check_results:
        report("float64 reference")
        reference = reference_results(shape, mode, checked_inputs, selection)
    calls, estimates = {}, {}
    for name, measurement in measurements.items():
        dense_gib = shape.dense_bytes(mode) / 2**30
        if name in (REFERENCE, f"{REFERENCE}:xla") and dense_gib > settings.max_dense_gib:
            measurement.reason = (
                f"skipped, dense attention needs about {dense_gib:.1f} GiB (--max-dense-gib {settings.max_dense_gib:g})"
            )
            continue
        try:
            report(f"{name}: compiling")
            attention = compile_attention(name, shape, mode, inputs)
            measurement.temporary_bytes = attention.temporary_bytes
            measurement.compile_seconds = attention.compile_seconds
            report(f"{name}: first call")
            # The first call also shows whether memory suffices.
            start = time.perf_counter()
            result = jax.block_until_ready(attention.bind(checked_inputs)())
            first_seconds = time.perf_counter() - start
            if reference is not None:
                named = attention.named_results(result)
                measurement.error = largest_error(named, reference, selection)
            del result
            if settings.measure_resident and can_measure():
                report(f"{name}: resident memory")
                measurement.resident_bytes = peak_resident_bytes(name, shape, mode, settings.seed)
            calls[name] = attention.bind(inputs)
            # Warming up a call of seconds once more gains nothing.
            if first_seconds > 1:
                estimates[name] = first_seconds
        except UNSUPPORTED as error:
            message = (str(error).strip() or "no message").splitlines()[0]
            measurement.reason = f"{type(error).__name__}: {message}"
    if calls:
        on_accelerator = jax.default_backend() != "cpu"
        samples = interleaved_seconds(
            calls,
            repeats=settings.repeats,
            estimates=estimates,
            time_budget=settings.time_budget,
            sample_seconds=_SAMPLE_SECONDS_ON_ACCELERATOR if on_accelerator else 0.0,
            on_round=lambda done, planned: report(f"timing, round {done} of {planned}"),
        )
        for name, seconds in samples.items():
            measurements[name].samples = seconds
    return Case(shape, mode, measurements)
