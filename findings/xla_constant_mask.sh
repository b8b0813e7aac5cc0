#!/usr/bin/env bash
# XLA (jaxlib 0.10.2, CPU): any() over a boolean constant of 4 million elements takes seconds to compile.
#
# Seen in November 2026, Python 3.12. x + jnp.any(mask, -1), mask of 2048 x 2048 booleans, compiled and not run:
#     mask closed over: XLA says "Constant folding an instruction is taking > 1s", then "The operation took 5.71s"
#     mask as an argument: XLA says nothing
# max() over a constant of as many float32 or int8 numbers takes 4.1 s and 3.6 s. XLA of jaxlib 0.12.0.1 is silent
# for the mask, both ways.
#
# Why one guesses otherwise: a mask made once, outside of the function, looks like the cheap way, and NumPy reduces it in
# milliseconds. Constant folding is meant to save time. XLA evaluates the reduction while it compiles, far
# slower than the compiled program would. 1024 x 1024 takes 1.3 s: the cost grows with the square of the length.
set -euo pipefail
python=
for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "This needs Python 3.12 or newer; none was found." >&2; exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/compile.py" <<'EOF'
import sys
import jax, jax.numpy as jnp, numpy as np

x, mask = np.zeros(2048, np.float32), np.tril(np.ones((2048, 2048), bool))
if sys.argv[1] == "constant":
    jax.jit(lambda x: x + jnp.any(jnp.asarray(mask), -1)).lower(x).compile()
else:
    jax.jit(lambda x, mask: x + jnp.any(mask, -1)).lower(x, mask).compile()
EOF
for kind in constant argument; do
  JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/compile.py" $kind 2>"$folder/$kind"
  echo "$kind: $(grep -c "Constant folding an instruction is taking" "$folder/$kind" || true) alarm(s)" \
    "$(grep -o "The operation took .*" "$folder/$kind" | head -n 1 || true)"
done
grep -q "Constant folding an instruction is taking" "$folder/constant"
if grep -q "Constant folding" "$folder/argument"; then exit 1; fi
