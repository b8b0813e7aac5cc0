"""The tables of docs/conformance.md and the pages "Coming from" are those of the committed cells. No library is run."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_pages_show_the_committed_cells():
    command = [sys.executable, "conformance/run.py", "--only-tables"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not run.returncode, run.stderr
