#!/usr/bin/env bash
# JAX 0.12.0.1 (Pallas): GPU interpret mode runs a wgmma into a scoped accumulator, and not into one that has a value.
#
# Seen in November 2026, CPU, Python 3.12. A 64 x 64 product of bfloat16 from shared memory, with `InterpretGPUParams`:
#     accumulator of pl.run_scoped: right
#     accumulator of pl.run_state, plgpu.ACC.init(zeros): NotImplementedError, no translation rule of wgmma for the CPU
#
# Why one guesses otherwise: the interpreter has an implementation of `wgmma` and of reading its accumulator, and the two
# forms differ in where the accumulator starts, nothing else. `run_state` with `ACC.init` is how Mosaic GPU kernels keep
# a sum from step to step of a loop, so every attention kernel has it. The interpreter leaves `run_state` to ordinary
# lowering, and the message then speaks of a missing rule of the primitive that the interpreter does know.
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
cat >"$folder/product.py" <<'EOF'
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def scoped(a, b):
    def product(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((64, 64), jnp.float32))


def initialised(a, b):
    zeros = plgpu.layout_cast(jnp.zeros((64, 64), jnp.float32), plgpu.Layout.WGMMA)
    return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(zeros))


def run(multiply, x, y):
    def kernel(x, y, out, a, b, barrier):
        plgpu.copy_gmem_to_smem(x, a, barrier)
        plgpu.copy_gmem_to_smem(y, b, barrier)
        plgpu.barrier_wait(barrier)
        out[...] = multiply(a, b)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
        scratch_types=[plgpu.SMEM((64, 64), jnp.bfloat16, transforms=TILES)] * 2 + [plgpu.Barrier(num_arrivals=2)],
        interpret=plgpu.InterpretGPUParams(),
    )(x, y)


x, y = (jax.random.normal(jax.random.key(i), (64, 64), jnp.bfloat16) for i in range(2))
expected = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
found = {}
for multiply in (scoped, initialised):
    try:
        error = np.abs(run(multiply, x, y) - expected).max()
        found[multiply.__name__] = "right" if error < 1e-4 else f"off by {error}"
    except Exception as error:
        found[multiply.__name__] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
for name, text in found.items():
    print(f"{name}: {text}")
assert found["scoped"] == "right", found
assert found["initialised"].startswith("NotImplementedError") and "wgmma" in found["initialised"], found
EOF
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/product.py"
