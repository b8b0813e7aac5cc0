"""Compiled programs: their text by computations, and where a profiler says that their time goes."""

import glob
import re
import tempfile
from typing import Any

import jax

from harness.timing import Call

_HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) .*\{$")


def computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the entry computation, and the lines of every computation by name."""
    found: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if match := _HEAD.match(line):
            name = match[2]
            found[name] = []
            entry = name if match[1] else entry
        elif line.startswith("  ") and name:
            found[name].append(line.strip())
    return entry, found


def profiled(call: Call, times: int = 1) -> Any:
    """What `jax.profiler` records of `times` calls, as its `ProfileData`."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(times):
                jax.block_until_ready(call())
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        return jax.profiler.ProfileData.from_file(path)
