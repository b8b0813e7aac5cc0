"""Run every library and the cases of their tests, compare with what is committed, and print the tables.

    python conformance/run.py                         # all; exit status 1 if a cell, a count or a page differs
    python conformance/run.py torch_sdpa keras_tests  # some
    python conformance/run.py --only-tables           # none: are tables.md and the pages those of the committed cells?
    python conformance/run.py --update                # write what was seen: results, tables.md and the pages
    python conformance/run.py --gpu h200.json         # the columns of this machine's GPU, into that file; needs no uv

Needs uv, a network, about 14 GB of disk (PyTorch, two versions) and Python 3.12 or newer. Each script runs in its own
environment, that of the versions in its head.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import gpu
from probes import MEANINGS

HERE = Path(__file__).parent
ROOT = HERE.parent
MARKED = re.compile(r"(<!-- conformance: (.*?) -->\n).*?(<!-- end of conformance -->)", re.DOTALL)
ORDER = ["ours", "jax_nn", "tokamax_api", "splash", "keras_ops", "keras_layer", "flax_nnx", "flax_linen"]
ORDER += ["equinox_layer", "haiku_layer", "haliax_nn", "levanter_attention", "levanter_flash", "ejkernel_flash"]
ORDER += ["cuequivariance_triangle", "flash_attention_jax_api", "ringattention_jax"]
ORDER += ["torch_sdpa", "torch_layer", "torch_flex", "flash_attn_api", "transformers_eager", "transformers_sdpa"]
ORDER += ["x_transformers_attend", "x_transformers_flash", "mlx_fast", "paddle_sdpa", "tinygrad_tensor"]
ORDER += ["onnx_reference", "onnxruntime_cpu", "openvino_sdpa"]
TESTS = ["jax_nn_tests", "tokamax_tests", "keras_tests", "flax_tests", "flash_attn_tests"]
Result = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", help=f"of {', '.join(ORDER + TESTS)}; all, if none is given")
    parser.add_argument("--gpu", metavar="FILE", type=Path, help=f"run columns on this GPU: {', '.join(gpu.COLUMNS)}")
    parser.add_argument("--seconds", type=float, default=225, help="with --gpu: to take at most, 225 by default")
    parser.add_argument("--only-tables", action="store_true", help="run nothing: tables of the committed results")
    parser.add_argument("--update", action="store_true", help="write results, tables.md and the pages")
    arguments = parser.parse_args()
    there_are = [*gpu.COLUMNS] if arguments.gpu else ORDER + TESTS
    for name in arguments.libraries:
        if name not in there_are:
            parser.error(f"no library {name!r}; there are {', '.join(there_are)}")
    if arguments.gpu:
        return on_gpu(arguments.libraries or there_are, arguments.gpu, arguments.seconds)

    results = {name: committed(name) for name in ORDER + TESTS}
    not_run: list[str] = []
    failures: list[str] = []
    for name in [] if arguments.only_tables else arguments.libraries or ORDER + TESTS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            seen = run(name)
        except (RuntimeError, subprocess.TimeoutExpired) as error:  # the others run all the same
            not_run.append(f"{name} does not run: {error}")
            continue
        changed = differences(name, results[name], seen)
        failures += changed
        if changed or arguments.update:  # else the pages keep the date
            results[name] = seen
        if arguments.update:
            path(name).write_text(json.dumps(seen, indent=2) + "\n")
    results = {name: result for name, result in results.items() if result}
    text = tables([results[name] for name in ORDER if name in results], gpu.recorded())
    print(text, peer_table(results), sep="\n")
    pages = {HERE / "tables.md": text}
    for page in [ROOT / "docs" / "conformance.md", *sorted((ROOT / "docs" / "guides").glob("coming_from_*.md"))]:
        pages[page] = MARKED.sub(lambda match: match[1] + page_table(match[2], results) + match[3], page.read_text())
    for page, new in pages.items():
        if arguments.update:
            page.write_text(new)
        elif not page.exists() or page.read_text() != new:
            failures.append(f"{page.relative_to(ROOT)} does not show these cells")
    for failure in failures + not_run:
        print(failure, file=sys.stderr)
    return int(bool(not_run or (failures and not arguments.update)))


def on_gpu(names: list[str], path: Path, seconds: float) -> int:
    seen = gpu.measure(names, seconds=seconds)
    path.write_text(json.dumps(seen, indent=2) + "\n")
    print(gpu_table(seen))
    failures = gpu.differences(gpu.recorded(), seen)
    for failure in failures:
        print(failure, file=sys.stderr)
    return int(bool(failures))


def path(name: str) -> Path:
    return HERE / "results" / f"{name}.json"


def committed(name: str) -> Result:
    return json.loads(path(name).read_text()) if path(name).exists() else {}


def run(name: str) -> Result:
    environment = os.environ | {"PYTHONPATH": str(HERE), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [
        "uv",
        "run",
        "-q",
        "--no-project",
        "--python",
        python(),
        "--script",
        str(HERE / ("peer_tests" if name in TESTS else "libraries") / f"{name}.py"),
    ]
    process = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=7200)
    if process.returncode:
        raise RuntimeError(f"\n{process.stderr[-3000:]}")
    seen = json.loads(process.stdout.rstrip().splitlines()[-1])
    return {"name": seen.pop("name"), "date": datetime.date.today().isoformat(), **seen}


def python() -> str:
    """A Python of 3.12 or newer: UV_PYTHON, one on the path, or one of pyenv's."""
    if "UV_PYTHON" in os.environ:
        return os.environ["UV_PYTHON"]
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which(name) for name in ("python3.13", "python3.12")]
    for candidate in (*found, *map(str, sorted(root.glob("versions/3.1[23]*/bin/python"), reverse=True))):
        if candidate and not subprocess.run([candidate, "-c", ""], capture_output=True).returncode:
            return candidate
    return "3.13"


def differences(name: str, old: Result, new: Result) -> list[str]:
    if not old:
        return [f"{name} is new"]
    failures = []
    for what in ("versions", "cells"):
        before, after = old.get(what, {}), new[what]
        for key in [*after, *(before.keys() - after.keys())]:
            if before.get(key) != after.get(key):
                failures.append(f"{name}, {key}: was {before.get(key)!r}, is {after.get(key)!r}")
    return failures


def versions(result: Result) -> str:
    return ", ".join(f"{package} {version}" for package, version in result["versions"].items())


def tables(results: list[Result], on_gpu: Result) -> str:
    """One table for each meaning, with all libraries."""
    lines = [
        "# What attention functions do with the same call",
        "",
        "Written by `python conformance/run.py --update`.",
        "",
    ]
    lines += version_table(results)
    if on_gpu:
        lines += ["", *gpu_versions(on_gpu)]
        columns = [gpu.shown(column) for column in on_gpu["columns"].values()]
        results = results + [column | {"name": f"{column['name']}, on the GPU"} for column in columns]
    for key, (words, _) in MEANINGS.items():
        lines += ["", f"## {words[0].upper()}{words[1:]}", "", "| library | |", "|---|---|"]
        lines += [f"| {result['name']} | {result['cells'][key]} |" for result in results]
    return "\n".join(lines) + "\n"


def version_table(results: list[Result]) -> list[str]:
    lines = ["| library | versions | run on |", "|---|---|---|"]
    return lines + [f"| {result['name']} | {versions(result)} | {result['date']} |" for result in results]


def answers(results: list[Result]) -> list[str]:
    """For each meaning: what libraries do, and which."""
    lines = []
    for key, (words, _) in MEANINGS.items():
        groups: dict[str, list[str]] = {}
        for result in results:
            groups.setdefault(re.sub(r" \([^()]*`.*\)$", "", result["cells"][key]), []).append(result["name"])
        without = {text: groups.pop(text) for text in ("no argument", "no derivatives") if text in groups}
        lines += ["", f"### {words[0].upper()}{words[1:]}", "", "| | |", "|---|---|"]
        for text, names in sorted(groups.items(), key=lambda group: -len(group[1])):
            rows = textwrap.wrap(
                ", ".join(name.replace(" ", "\0") for name in names),
                max(40, 153 - len(text)),
                break_long_words=False,
                break_on_hyphens=False,
            )
            lines += [
                f"| {text if i == 0 else ''} | {row.rstrip(',').replace(chr(0), ' ')} |" for i, row in enumerate(rows)
            ]
        lines += [f"| {text} | {len(names)} of {len(results)} |" for text, names in without.items()]
    return lines[1:]


def peer_table(results: dict[str, Result]) -> str:
    """Counts of the cases of other libraries' tests."""
    lines, reasons = ["| tests of | cases | pass | differ | tests left out | run on |", "|---|---|---|---|---|---|"], []
    for result in (results[name] for name in TESTS if name in results):
        cases, passed = (sum(test[count] for test in result["cells"].values()) for count in ("cases", "passed"))
        row = [result["name"], cases, passed, cases - passed, len(result["absent"]), result["date"]]
        lines.append(f"| {' | '.join(map(str, row))} |")
        for name, test in result["cells"].items():
            if test["passed"] < test["cases"]:
                count = f"{test['cases'] - test['passed']} of {test['cases']}"
                reasons.append(f"| {result['name']} | {name} | {count} | {test['differs']} |")
    lines += ["", "| tests of | test | differ | why |", "|---|---|---|---|", *reasons]
    lines += ["", "| tests of | left out | why |", "|---|---|---|"]
    for result in (results[name] for name in TESTS if name in results):
        lines += [f"| {result['name']} | {name} | {why} |" for name, why in result["absent"].items()]
    return "\n".join(lines) + "\n"


def page_table(which: str, results: dict[str, Result]) -> str:
    """The table of a page: names of libraries, after "without" the meanings to leave out; or one of three words."""
    if which == "tests":
        return peer_table(results)
    if which.startswith("h200"):
        return gpu_page(which, results) if which.partition(" ")[2] else gpu_table(gpu.recorded())
    if which in ("versions", "answers"):
        table = {"versions": version_table, "answers": answers}[which]
        return "\n".join(table([results[name] for name in ORDER if name in results])) + "\n"
    names, _, left_out = which.partition(" without ")
    theirs, ours = [results[name] for name in names.split()], results["ours"]
    seen = "; ".join(dict.fromkeys(f"{versions(result)}, {result['date']}" for result in theirs))
    lines = [f"Run on a CPU: {seen}.", ""]
    columns = " | ".join(result["name"] for result in theirs)
    lines += [f"| | {columns} | here |", "|---" * (len(theirs) + 2) + "|"]
    for key, (words, _) in MEANINGS.items():
        if key not in left_out.split():
            cells, here = [result["cells"][key] for result in theirs], ours["cells"][key]
            here = "the same" if {*cells} == {here} else here
            lines.append(f"| {words} | {' | '.join(cells)} | {here} |")
    long = [line for line in lines if len(line) > 160]
    assert not long, long
    return "\n".join(lines) + "\n"


def gpu_versions(seen: Result) -> list[str]:
    lines = [f"{seen['machine']}, {seen['date']}. Arrays in bfloat16.", "", "| on the GPU | versions |", "|---|---|"]
    return lines + [f"| {column['name']} | {versions(column)} |" for column in seen["columns"].values()]


def gpu_table(seen: Result) -> str:
    columns = [gpu.shown(column) for column in seen["columns"].values()]
    return "\n".join([*gpu_versions(seen), "", *answers(columns)]) + "\n"


def gpu_page(which: str, results: dict[str, Result]) -> str:
    """Where these columns differ from a library's on a CPU: "h200 COLUMNS beside LIBRARY"."""
    names, _, beside = which.removeprefix("h200 ").partition(" beside ")
    seen, on_cpu = gpu.recorded(), results[beside]
    theirs = [seen["columns"][name] for name in names.split()]
    known = versions({"versions": {name: text for column in theirs for name, text in column["versions"].items()}})
    lines = [f"Run on {seen['machine']}, {seen['date']}, in bfloat16: {known}."]
    lines += ["What is not listed is the same as on a CPU, in the versions above.", ""]
    lines += ["| | on the GPU | |", "|---|---|---|"]
    for key, (words, _) in MEANINGS.items():
        if {on_cpu["cells"][key]} != {column["cells"][key] for column in theirs}:
            groups: dict[str, list[str]] = {}
            for column in map(gpu.shown, theirs):
                groups.setdefault(column["cells"][key], []).append(re.sub(r".*\((.*)\)$", r"\1", column["name"]))
            for text, who in groups.items():
                lines.append(f"| {words} | {text} | {'all' if len(groups) == 1 else ', '.join(who)} |")
                words = ""
    long = [line for line in lines if len(line) > 160]
    assert not long, long
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
