#!/usr/bin/env bash
# JAX 0.12.0.1: precision="bfloat16_3x" and "fastest" are fit for a product, not for jax.default_matmul_precision.
#
# Seen in November 2026, CPU, Python 3.12; JAX 0.10.2 does the same.
#     default, high, highest, bfloat16, tensorfloat32, float32, BF16_BF16_F32, F32_F32_F32: both take them
#     bfloat16_3x, fastest: precision= takes them, the context raises ValueError "new enum value must be None or in ..."
#
# Why one guesses otherwise: the context is documented as the way to set the precision of products that one does not
# write oneself, and both take names of jax.lax.DotAlgorithmPreset. "fastest" and "bfloat16_3x" are among the names
# that jax.lax.Precision gives: Precision("fastest") is DEFAULT and Precision("bfloat16_3x") is HIGH. A setting
# that precision= takes may fail when it is moved to the context.
set -euo pipefail
python=
for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "This needs Python 3.12 or newer; none was found." >&2; exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import jax, jax.numpy as jnp, numpy as np

x = np.eye(4, dtype=np.float32)
assert jax.lax.Precision("fastest") is jax.lax.Precision.DEFAULT
assert jax.lax.Precision("bfloat16_3x") is jax.lax.Precision.HIGH
both = ("default", "high", "highest", "bfloat16", "tensorfloat32", "float32", "BF16_BF16_F32", "F32_F32_F32")
for name in (*both, "fastest", "bfloat16_3x"):
    jnp.einsum("ij,jk->ik", x, x, precision=name)
    try:
        with jax.default_matmul_precision(name):
            jnp.einsum("ij,jk->ik", x, x)
        print(name, "both")
        assert name in both
    except ValueError as error:
        print(name, "precision= only:", str(error)[:60])
        assert name not in both
EOF
