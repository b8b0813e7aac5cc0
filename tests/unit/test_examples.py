"""The examples run as the README says, with fewer steps, and judge themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

for module in ("flax", "optax", "tqdm"):
    pytest.importorskip(module)

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.whole_grid
def test_a_sequence_over_devices_trains_as_on_one() -> None:
    found = run("long_context.py", "--steps", "4", "--context", "64", "--layers", "1")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "of a loss, ok" in found.stdout


def test_a_length_that_devices_do_not_divide_is_an_error() -> None:
    found = run("long_context.py", "--context", "40")
    assert found.returncode != 0
    assert "pad the sequence" in found.stderr
