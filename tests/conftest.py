"""Configuration of the test run; tests/support/environment.py has what run_generated.py needs as well."""

import collections
import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import environment, grids

environment.configure()

import hypothesis  # noqa: E402  (nothing may come before configure())
import jax  # noqa: E402

_LEFT_OUT = pytest.StashKey[int]()

hypothesis.settings.register_profile(
    "default",
    deadline=None,  # the first example of a shape compiles
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("default"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--x64", action="store_true", help="run with jax_enable_x64: uv run pytest -m gpu --x64")
    parser.addoption("--whole-grid", action="store_true", help="run every point of the grids in tests/support/grids.py")
    parser.addoption("--whole-grid-of", action="append", default=[], metavar="FILE", help="of the grids in this file")
    parser.addoption(
        "--grid-part", type=int, default=0, metavar="N", help="run other points of these grids; 0 is usual"
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CI"):  # elsewhere a library's new deprecation fails no test
        config.addinivalue_line("filterwarnings", "error")
    grids.choose_part(config.getoption("--grid-part"))
    if config.getoption("--x64"):
        environment.use_x64_everywhere()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is left to `--whole-grid`: it is most of the tests, and skipping each takes time.

    Skip the tests marked gpu where JAX has no GPU, but for those that say themselves why they cannot run.
    """
    if not config.getoption("--whole-grid"):
        whole = {(config.invocation_params.dir / name).resolve() for name in config.getoption("--whole-grid-of")}
        rest = {item for item in items if item.get_closest_marker("whole_grid") and item.path not in whole}
        config.hook.pytest_deselected(items=list(rest))
        items[:] = [item for item in items if item not in rest]
        config.stash[_LEFT_OUT] = len(rest)
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason=f"needs a GPU; JAX's backend is {jax.default_backend()}")
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker and not marker.kwargs.get("says_why"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What there is by now stays: the garbage collector, which JAX keeps busy, does not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist tells how much it has left out."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left out"] = session.config.stash.get(_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Each worker has collected all tests; one that crashed tells nothing."""
    left_out = getattr(node, "workeroutput", {}).get("left out", 0)
    node.config.stash[_LEFT_OUT] = max(left_out, node.config.stash.get(_LEFT_OUT, 0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how much was left out, and why tests were skipped, each reason once; `-rs` says it of each test."""
    if left_out := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"{left_out} left out: points that only --whole-grid runs, or another --grid-part")
    skipped = terminalreporter.stats.get("skipped", ())
    reasons = collections.Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")


@pytest.fixture(autouse=True)
def _quick_compilation() -> Iterator[None]:
    """Have XLA compile in less time, without most optimizations, but for programs with `full_optimization()`."""
    if jax.default_backend() != "cpu":
        yield
        return
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
