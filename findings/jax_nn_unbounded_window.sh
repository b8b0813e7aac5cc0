#!/usr/bin/env bash
# JAX 0.12.0.1: jax.nn.dot_product_attention takes a window of 2**31 - 1 keys to the left for a very small one.
#
# Seen in November 2026, CPU, Python 3.12; JAX 0.10.2 does the same. Length 10, local_window_size=(left, 0), compared
# to is_causal=True, and (0, right) compared to (0, 10):
#     left 2**31 - 10: difference 0.0
#     left 2**31 - 9: difference 0.10
#     left 2**31 - 1: difference 2.11; every row is exactly the first value
#     right 2**31 - 1: difference 0.0
#
# Why one guesses otherwise: 2**31 - 1 is a usual way to say "unbounded", every window of the length or more means the
# same, and the right side takes it. On the left the position of the key is added to it in int32, which overflows from
# the second key on, so that only the first key is seen. No error and no warning: 2**31 raises OverflowError, but one
# less does not.
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

T, most = 10, 2**31 - 1
q, k, v = (np.random.default_rng(i).standard_normal((1, T, 2, 8)).astype(np.float32) for i in range(3))


def windowed(left, right):
    return jax.nn.dot_product_attention(q, k, v, local_window_size=(left, right))


causal = jax.nn.dot_product_attention(q, k, v, is_causal=True)
for left, right_answer in ((T, True), (most + 1 - T, True), (most + 2 - T, False), (most, False)):
    error = float(jnp.abs(windowed(left, 0) - causal).max())
    print("left", left, "difference", error)
    assert (error < 1e-5) == right_answer and (right_answer or error > 0.01)
assert jnp.abs(windowed(most, 0) - v[:, :1]).max() == 0, "only the first key is seen"
error = float(jnp.abs(windowed(0, most) - windowed(0, T)).max())
print("right", most, "difference", error)
assert error == 0
try:
    windowed(most + 1, 0)
    raise SystemExit("2**31 is accepted")
except OverflowError as raised:
    print("left", most + 1, "OverflowError")
EOF
