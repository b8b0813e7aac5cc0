"""What importing the package brings in, and what it offers."""

import importlib.metadata
import os
import re
import subprocess
import sys

import jax_native_flash_attn

IMPORTS = """
import sys
before = set(sys.modules)
import jax_native_flash_attn
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


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
    output = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    owners = importlib.metadata.packages_distributions()
    allowed = distributions_of_jax() | {"jax-native-flash-attn"}
    top_levels = output.stdout.split()
    assert "jax_native_flash_attn" in top_levels
    foreign = {
        module: names
        for module in top_levels
        if (names := {re.sub(r"[-_.]+", "-", n).lower() for n in owners.get(module, [])}) and not names & allowed
    }
    assert not foreign


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
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", jax_native_flash_attn.__version__)
