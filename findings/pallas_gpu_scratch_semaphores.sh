#!/usr/bin/env bash
# JAX 0.12.0.1 (Pallas for NVIDIA GPUs): a semaphore of `scratch_types` is another one in each block of the grid.
#
# Seen in November 2026, on an H200 (JAX 0.11.2) and, as here, in programs lowered for a GPU on a CPU. Eight semaphores,
# in a kernel with a grid of 4 blocks; the int32 counters in global memory that the lowered program sets to zero:
#     scratch_types=[plgpu.SemaphoreType.REGULAR((8,))]:              32
#     pl.get_global(plgpu.SemaphoreType.REGULAR((8,))) in the kernel:  8
#
# Why one guesses otherwise: barriers in shared memory belong to a block, and semaphores are there for what those cannot
# do: they lie in global memory, where all blocks see them, and another device may signal them. So blocks that are to
# wait for each other seem to need nothing but a semaphore. The kernel compiles, and a block that waits for another's
# signal waits for ever, as it reads a counter of its own. The docstrings do not say so of either form.
set -euo pipefail
python=
for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "This needs Python 3.12 or newer; none was found." >&2; exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 absl-py==2.3.1
cat >"$folder/semaphores.py" <<'EOF'
import re

import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

GRID, COUNT = 4, 8
SEMAPHORES = plgpu.SemaphoreType.REGULAR((COUNT,))


def counters(scratch):
    def kernel(x, out, *semaphores):
        (semaphore,) = semaphores or (pl.get_global(SEMAPHORES),)
        plgpu.semaphore_signal(semaphore.at[jax.lax.axis_index("block")])
        out[...] = x[...]

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        scratch_types=scratch,
        grid=(GRID,),
        grid_names=("block",),
    )
    types = jax.ShapeDtypeStruct((128,), jnp.float32)
    text = jax.jit(call).trace(types).lower(lowering_platforms=("cuda",)).as_text()
    return [int(n) for n in re.findall(r"-> tensor<(\d+)xi32>", text)][-1]


found = {"scratch_types": counters([SEMAPHORES]), "pl.get_global": counters([])}
for name, n in found.items():
    print(f"{name}: {n} counters")
assert found == {"scratch_types": GRID * COUNT, "pl.get_global": COUNT}, found
EOF
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/semaphores.py"
