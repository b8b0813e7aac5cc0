"""The tables of docs/conformance.md and the pages "Coming from" are those of the committed cells. No library is run."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_pages_show_the_committed_cells():
    command = [sys.executable, "conformance/run.py", "--only-tables"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not run.returncode, run.stderr


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "conformance"))
    module = importlib.import_module("run")
    monkeypatch.setattr(sys, "argv", ["run.py", "jax_nn", "splash"])
    return module


@pytest.mark.parametrize(("cells", "status"), [({}, 0), ({"bias": "0"}, 1)])
def test_a_changed_cell_is_told_and_a_new_date_is_not(run, monkeypatch, capsys, cells, status):
    def seen(name):
        old = run.committed(name)
        return old | {"date": "2000-01-01", "cells": old["cells"] | cells}

    monkeypatch.setattr(run, "run", seen)
    assert run.main() == status
    assert ("jax_nn, bias: was 'added after the scale', is '0'" in capsys.readouterr().err) == bool(cells)


def test_a_library_that_does_not_run_leaves_the_others(run, monkeypatch, capsys):
    def seen(name):
        if name == "jax_nn":
            raise RuntimeError("no such package")
        return run.committed(name) | {"versions": {"jax": "2"}}

    monkeypatch.setattr(run, "run", seen)
    assert run.main() == 1
    told = capsys.readouterr().err
    assert "jax_nn does not run: no such package" in told
    assert "splash, jax: was" in told
