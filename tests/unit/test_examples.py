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
from tests.support.grids import in_part

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


@in_part(0)
def test_a_length_that_devices_do_not_divide_is_an_error() -> None:
    found = run("long_context.py", "--context", "40")
    assert found.returncode != 0
    assert "pad the sequence" in found.stderr


@in_part(1)
def test_a_cache_gives_the_logits_of_one_forward(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--turns 2 --prompt 6 --chunk 3 --reply 2 --window 5 --layers 1 --width 16 --heads 4 --cached-heads 2"
    with lenient_promotion(), jax.default_matmul_precision("highest"):
        assert load("decode_with_cache").main(small.split()) == 0
    assert capsys.readouterr().out.count("  ok\n") == 3


@in_part(0)
def test_second_derivatives_of_a_network_are_those_on_dense_attention(load: Load) -> None:
    from flax import nnx

    example = load("physics_informed")
    points = jnp.linspace(0.1, 0.9, 14).reshape(7, 2)
    model = example.Solution(1, 8, 2, 5, example.flash_attention, nnx.Rngs(0))

    def laplacian_of(solution: Callable[[jax.Array], jax.Array]) -> jax.Array:
        with lenient_promotion(), jax.default_matmul_precision("highest"):
            return jax.jit(lambda points: example.laplacian(solution, points))(points)

    np.testing.assert_allclose(laplacian_of(example.exact), example.source(points), rtol=1e-4, atol=1e-4)
    found = laplacian_of(model)
    model.blocks[0].attention.attention = jax.nn.dot_product_attention
    expected = laplacian_of(model)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(jnp.abs(expected).max()))


@pytest.mark.whole_grid
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vision_transformer", "--epochs 2 --batch-size 256 --layers 1 --width 16 --heads 2"),
        ("physics_informed", "--steps 3 --points 17 --tokens 5 --layers 1 --width 8"),
    ],
    ids=["vision_transformer", "physics_informed"],
)
def test_flash_trains_as_dense(
    load: Load, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, arguments: str
) -> None:
    for module in ("sklearn", "matplotlib"):
        pytest.importorskip(module)
    picture, losses = tmp_path / "picture.png", {}
    for attention, further in {"flash": ("--plot", str(picture)), "dense": ()}.items():
        with lenient_promotion(), jax.default_matmul_precision("highest"):
            assert load(name).main([*arguments.split(), "--attention", attention, *further]) == 0
        # The second number of each row of the table.
        rows = re.findall(r"^ *\d+ +(\S+) +\S+$", capsys.readouterr().out, re.MULTILINE)
        losses[attention] = [float(loss) for loss in rows]
    assert losses["flash"][-1] < losses["flash"][0]
    np.testing.assert_allclose(losses["flash"], losses["dense"], rtol=1e-3)
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
