#!/usr/bin/env bash
# JAX 0.12.0.1 (Pallas for NVIDIA GPUs): `jnp.where` with a condition that is one number does not lower in warpgroup
# semantics, which are the default.
#
# Seen in November 2026, in programs lowered for a GPU on a CPU. x is an array in registers, n one number:
#                                       lane semantics   warpgroup semantics
#     jnp.where(n == 0, x, -x)          lowers           NotImplementedError: Implicit broadcast not implemented ...
#     jnp.where(n == 0, x, 0.0)         lowers           the same
#     jax.lax.select(n == 0, x, -x)     lowers           the same
#     jnp.where(x > 0, x, 0.0)          lowers           lowers
#     jnp.where(n == 0, 1.0, 2.0) * x   lowers           lowers
#     jnp.where(n + 0 * x == 0, x, -x)  lowers           lowers
#
# Why one guesses otherwise: a condition that is one number is the cheap case, one branch-free choice for a whole array,
# and an array condition lowers. Any other operation takes one number beside an array, and `lax.select` documents a
# scalar condition. A condition made an array by arithmetic, which computes more, lowers.
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
cat >"$folder/where.py" <<'EOF'
import jax, jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

FORMS = {
    "jnp.where(n == 0, x, -x)": lambda x, n: jnp.where(n == 0, x, -x),
    "jnp.where(n == 0, x, 0.0)": lambda x, n: jnp.where(n == 0, x, 0.0),
    "jax.lax.select(n == 0, x, -x)": lambda x, n: jax.lax.select(n == 0, x, -x),
    "jnp.where(x > 0, x, 0.0)": lambda x, n: jnp.where(x > 0, x, 0.0),
    "jnp.where(n == 0, 1.0, 2.0) * x": lambda x, n: jnp.where(n == 0, 1.0, 2.0) * x,
    "jnp.where(n + 0 * x == 0, x, -x)": lambda x, n: jnp.where(n + 0 * x == 0, x, -x),
}


def outcome(semantics, choose):
    def kernel(x, n, out):
        out[...] = choose(x[...], n[0])

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((128, 128), jnp.float32),
        compiler_params=plgpu.CompilerParams(lowering_semantics=semantics),
    )
    types = jax.ShapeDtypeStruct((128, 128), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        jax.jit(call).trace(*types).lower(lowering_platforms=("cuda",))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "lowers"


REFUSED = "NotImplementedError: Implicit broadcast not implemented with warpgroup semantics"
for i, (form, choose) in enumerate(FORMS.items()):
    lane = outcome(plgpu.LoweringSemantics.Lane, choose)
    warpgroup = outcome(plgpu.LoweringSemantics.Warpgroup, choose)
    print(f"{form}: lane {lane}; warpgroup {warpgroup}")
    assert (lane, warpgroup) == ("lowers", REFUSED if i < 3 else "lowers"), form
EOF
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/where.py"
