"""What importing the package brings in, and what it offers."""

import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import jax_native_flash_attn

ROOT = Path(__file__).parents[2]
IMPORTS = """
import importlib, sys
before = set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(name)
print(*sorted(set(sys.modules) - before))
"""


def modules_after_importing(*names: str) -> set[str]:
    command = [sys.executable, "-c", IMPORTS, *names]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def distributions_of_jax() -> set[str]:
    """jax and everything it requires, without extras."""
    found, queue = set(), ["jax"]
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for requirement in importlib.metadata.requires(name) or []:
            if "extra ==" not in requirement:
                match = re.match(r"[A-Za-z0-9._-]+", requirement)
                assert match
                queue.append(match[0])
    return found


def test_import_needs_nothing_but_jax():
    owners = importlib.metadata.packages_distributions()
    allowed = distributions_of_jax() | {"jax-native-flash-attn"}

    def foreign(modules: set[str]) -> set[str]:
        names = {name for module in modules for name in owners.get(module.partition(".")[0], [])}
        return {re.sub(r"[-_.]+", "-", name).lower() for name in names} - allowed

    modules = modules_after_importing("jax_native_flash_attn.adapters")
    assert "jax_native_flash_attn.adapters" in modules
    # What jax itself imports where it happens to be installed (etils, say) is not ours.
    of_jax = sorted(name for name in modules if re.match(r"jax\.(?!_)[\w.]+$|jax$", name) and "._" not in name)
    assert foreign(modules) <= foreign(modules_after_importing(*of_jax))


def test_import_does_not_initialise_a_backend():
    # A library that touches devices at import breaks jax.distributed and flags set after it.
    code = (
        "import jax_native_flash_attn, jax; jax.config.update('jax_num_cpu_devices', 3); print(len(jax.devices('cpu')))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert output.stdout.split()[-1] == "3"


def test_public_names():
    assert {"flash_attention", "dropout_keep_mask"} <= set(jax_native_flash_attn.__all__)
    for name in jax_native_flash_attn.__all__:
        assert getattr(jax_native_flash_attn, name).__doc__
        assert getattr(jax_native_flash_attn, name).__module__.partition(".")[0] == "jax_native_flash_attn"


def test_version():
    version = jax_native_flash_attn.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_changelog_names_everything_public():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert not [name for name in jax_native_flash_attn.__all__ if f"`{name}`" not in changelog]
    options = inspect.signature(jax_native_flash_attn.flash_attention).parameters
    assert not [name for name in options if f"`{name}`" not in changelog]
