"""The columns of a GPU: run each in processes of its own, compare with what is committed. `run.py --gpu` calls this."""

import datetime
import json
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_columns import BROKEN, COLUMNS
from probes import MEANINGS

HERE = Path(__file__).parent
RECORDED = HERE / "results" / "h200.json"
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the GPU is shared by all processes
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0",  # which would take most of the time
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PYTHONUNBUFFERED": "1",
}
Result = dict[str, Any]


def recorded() -> Result:
    return json.loads(RECORDED.read_text()) if RECORDED.exists() else {}


def measure(names: list[str], *, seconds: float, cell_seconds: float = 100) -> Result:
    """All cells of these columns that are known after `seconds`. No call may take more than `cell_seconds`."""
    deadline = time.monotonic() + seconds
    columns: Result = {name: {"cells": {}, "messages": {}} for name in names}
    parts = [(name, list(MEANINGS)[i :: COLUMNS[name].parts]) for name in names for i in range(COLUMNS[name].parts)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, lines in pool.map(lambda part: (part[0], _part(*part, deadline, cell_seconds)), parts):
            for line in lines:
                if "key" not in line:
                    columns[name] |= line
                    continue
                columns[name]["cells"][line["key"]] = line["cell"]
                if line["message"]:
                    columns[name]["messages"][line["key"]] = _clean(line["message"])
    for column in columns.values():
        for what in ("cells", "messages"):  # in the order of the tables
            column[what] = {key: column[what][key] for key in MEANINGS if key in column[what]}
    return {"machine": machine(), "date": datetime.date.today().isoformat(), "columns": columns}


def machine() -> str:
    python = f"Python {platform.python_version()}"
    if shutil.which("nvidia-smi") is None:
        return f"no GPU, {python}"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    return f"{name}, driver {driver}, {python}"


def _clean(message: str) -> str:
    """Without what another run or machine has otherwise: folders and addresses."""
    return re.sub(r"0x[0-9a-f]+", "0x...", re.sub(r"(?<![\w:/])(/[\w.+-]+)+/", ".../", message))


def _part(name: str, keys: list[str], deadline: float, cell_seconds: float) -> list[Result]:
    """Lines of `gpu_columns.py`, which is started anew behind a meaning that ends it."""
    found: list[Result] = []
    start = time.monotonic()
    while keys and time.monotonic() < deadline:
        with tempfile.TemporaryFile("w+") as errors:
            command = [sys.executable, str(HERE / "gpu_columns.py"), name, *keys]
            options = {"stdout": subprocess.PIPE, "stderr": errors, "text": True, "start_new_session": True}
            with subprocess.Popen(command, env=os.environ | ENVIRONMENT, **options) as process:
                text = _read(process, keys, found, deadline, cell_seconds)
            errors.seek(0)
            log = errors.read()
        if text is not None:
            of_errors = [line for line in log.splitlines() if re.search("error|fatal|check fail", line, re.IGNORECASE)]
            found.append({"key": keys.pop(0), "cell": text, "message": " ".join(of_errors[-1:])[:200]})
        elif keys and process.returncode != BROKEN and time.monotonic() < deadline:
            print(f"{name} does not run:\n{log[-3000:]}", file=sys.stderr, flush=True)
            break
    print(f"{name}: {time.monotonic() - start:.0f} s, not run: {keys or 'none'}", file=sys.stderr, flush=True)
    return found


def _read(
    process: subprocess.Popen[str], keys: list[str], found: list[Result], deadline: float, cell_seconds: float
) -> str | None:
    """Take lines as they come, and keys off the list. The cell of a meaning that ended the process, if one did."""
    lines: queue.Queue[str | None] = queue.Queue()

    def forward() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=forward)
    reader.start()
    has_started = False
    while True:
        try:
            left = max(0.0, deadline - time.monotonic())
            line = lines.get(timeout=min(cell_seconds, left) if has_started else left)
        except queue.Empty:
            os.killpg(process.pid, signal.SIGKILL)
            reader.join()
            return None if time.monotonic() >= deadline or not keys else f"no answer in {cell_seconds:.0f} s"
        if line is None:
            reader.join()
            code = process.wait()
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            return f"ends the process: {how}" if has_started and keys and code != BROKEN else None
        if line.startswith(('{"key":', '{"name":')):
            found.append(json.loads(line))
            has_started = True
            if found[-1].get("key") in keys:
                keys.remove(found[-1]["key"])


def differences(old: Result, new: Result) -> list[str]:
    """What a run has otherwise than the committed one has; and meanings that were not run."""
    failures = []
    for name, column in new["columns"].items():
        failures += [f"{name}, {key}: not run" for key in MEANINGS if key not in column["cells"]]
        for what in ("versions", "cells") if name in old.get("columns", {}) else ():
            before, after = old["columns"][name][what], column.get(what, {})
            for key in after:
                if before.get(key) != after[key]:
                    failures.append(f"{name}, {key}: was {before.get(key)!r}, is {after[key]!r}")
    return failures


def shown(column: Result) -> Result:
    """The column with the first words of the message behind an error."""
    cells = {key: column["cells"].get(key, "not run") for key in MEANINGS}
    for key, message in column["messages"].items():
        if message and re.fullmatch(r"\w+", cells[key]):
            cells[key] += f": {textwrap.shorten(message.replace('|', chr(92) + '|'), 80, placeholder=' ...')}"
    return column | {"cells": cells}
