"""The examples run as the README says, with fewer steps, and judge themselves."""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.environment import lenient_promotion

for module in ("flax", "optax", "tqdm"):
    pytest.importorskip(module)

EXAMPLES = Path(__file__).parents[2] / "examples"
Load = Callable[[str], ModuleType]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports an example into this process: half of the time of a small run is that of Flax's import."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.mark.whole_grid
def test_a_sequence_over_devices_trains_as_on_one() -> None:
    found = run("long_context.py", "--steps", "4", "--context", "64", "--layers", "1")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "of a loss, ok" in found.stdout


def test_a_length_that_devices_do_not_divide_is_an_error() -> None:
    found = run("long_context.py", "--context", "40")
    assert found.returncode != 0
    assert "pad the sequence" in found.stderr


def losses_of(example: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[float]:
    """Of the table that the example prints: the second number of each row."""
    with lenient_promotion(), jax.default_matmul_precision("highest"):
        assert example.main(arguments) == 0
    rows = re.findall(r"^ *\d+ +(\S+) +\S+$", capsys.readouterr().out, re.MULTILINE)
    return [float(loss) for loss in rows]


def test_a_vision_transformer_trains_alike_on_flash_and_dense(
    load: Load, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for module in ("sklearn", "matplotlib"):
        pytest.importorskip(module)
    example, picture = load("vision_transformer"), tmp_path / "digits.png"
    small = "--epochs 2 --batch-size 256 --layers 1 --width 16 --heads 2".split()
    flash = losses_of(example, capsys, *small, "--plot", str(picture))
    dense = losses_of(example, capsys, *small, "--attention", "dense")
    assert len(flash) == 2
    assert flash[1] < flash[0]
    np.testing.assert_allclose(flash, dense, rtol=1e-5)
    assert picture.stat().st_size > 0


def test_a_cache_gives_the_logits_of_one_forward(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--turns 2 --prompt 9 --chunk 3 --reply 2 --window 5 --layers 2 --width 16 --heads 4 --cached-heads 2"
    with lenient_promotion(), jax.default_matmul_precision("highest"):
        assert load("decode_with_cache").main(small.split()) == 0
    assert capsys.readouterr().out.count("  ok\n") == 3


def test_a_network_is_differentiated_twice_alike_on_flash_and_dense(
    load: Load, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    example, picture = load("physics_informed"), tmp_path / "solution.png"
    points = jnp.linspace(0.1, 0.9, 14).reshape(7, 2)
    np.testing.assert_allclose(example.laplacian(example.exact, points), example.source(points), rtol=1e-4, atol=1e-4)
    small = "--steps 3 --points 17 --tokens 5 --layers 1 --width 8".split()
    flash = losses_of(example, capsys, *small, "--plot", str(picture))
    dense = losses_of(example, capsys, *small, "--attention", "dense")
    assert len(flash) == 3
    np.testing.assert_allclose(flash, dense, rtol=1e-3)  # as many digits as are printed
    assert picture.stat().st_size > 0


def test_memory_is_measured_on_every_system(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = load("_memory")
    assert 0.01 < memory.peak_memory_gib() < 1000
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3 * 2**29))
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows, to import it is an error
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: process))
    monkeypatch.setattr(sys, "platform", "win32")
    assert memory.peak_memory_gib() == 1.5
    with pytest.raises(NotImplementedError, match="on Linux only, and this is win32"):
        memory.limit_memory(4)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_need_no_terminal_and_no_unix(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert "resource" not in imported, "Windows has no such module: use _memory"
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "tqdm"]
    for call in calls:
        assert "disable=None" in ast.unparse(call), "a bar is of no use in a file"
