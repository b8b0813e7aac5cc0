"""How the columns of a GPU are run, without one: a call that ends its process is a cell, and a changed cell is told."""

import importlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FAKE = """
import json, os, signal, sys, time
print(json.dumps({"name": "fake", "versions": {"fake": "1"}}), flush=True)
for key in sys.argv[2:]:
    if key == "causal":
        print("fatal error: in /a/folder/file.c at 0x7f01", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if key == "bias":
        time.sleep(60)
    print("noise")
    print(json.dumps({"key": key, "cell": "works", "message": ""}), flush=True)
    if key == "scale":
        sys.exit(3)
"""


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "conformance"))
    module = importlib.import_module("gpu")
    (tmp_path / "gpu_columns.py").write_text(FAKE)
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


def test_a_call_that_ends_its_process_is_a_cell(gpu):
    seen = gpu.measure(["torch_math"], seconds=60, cell_seconds=3)["columns"]["torch_math"]
    others = {key: "works" for key in gpu.MEANINGS}
    assert seen["cells"] == others | {"causal": "ends the process: signal 9", "bias": "no answer in 3 s"}
    assert seen["messages"] == {"causal": "fatal error: in .../file.c at 0x..."}
    assert seen["versions"] == {"fake": "1"}


def test_what_changed_or_was_not_run_is_told(gpu):
    cells = dict.fromkeys(gpu.MEANINGS, "works")
    old = {"columns": {"torch_math": {"versions": {"torch": "1"}, "cells": cells}}}
    assert gpu.differences(old, old) == []
    assert gpu.differences({}, old) == []
    changed = {"versions": {"torch": "1"}, "cells": cells | {"bias": "0"}}
    del changed["cells"]["scale"]
    texts = gpu.differences(old, {"columns": {"torch_math": changed}})
    assert texts == ["torch_math, scale: not run", "torch_math, bias: was 'works', is '0'"]


def test_a_row_without_keys_that_counts_padding_as_keys(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "conformance"))
    empty_row = importlib.import_module("probes").empty_row
    value = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    texts = {"mean of all values": 16, "0.125 times the mean of all values": 128}
    assert {text: empty_row(value.sum(0) / keys, value) for text, keys in texts.items()} == {t: t for t in texts}
    assert empty_row(value[0], value) == "something else"
