#!/usr/bin/env bash
# flash-attention-jax 0.3.1: above 1024 keys, some are counted twice unless their number is a multiple of 1024.
#
# Seen in November 2026, with JAX 0.12.0.1, CPU, Python 3.13. 1024 queries, a mask of ones.
#     1000, 1024 and 2048 keys: as the library's own plain_attention
#     1500 keys: exactly plain_attention over keys 0 to 1023 and then 476 to 1499
#
# Why one guesses otherwise: a rest that is no full block is the first thing that one tests, and short sequences work, since
# there the block is as long as the sequence. The last slice begins at 1024 and is 1024 long; lax.dynamic_slice does not
# raise and does not pad, it moves the start back to where the slice fits. The shape is right, and nothing is NaN.
set -euo pipefail
python=
for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "This needs Python 3.12 or newer; none was found." >&2; exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q flash-attention-jax==0.3.1 jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from flash_attention_jax import flash_attention, plain_attention

query = jax.random.normal(jax.random.key(0), (1, 1, 1024, 16))
for S in (1000, 1024, 1500, 2048):
    key, value = jax.random.normal(jax.random.key(S), (2, 1, 1, S, 16))
    out = flash_attention(query, key, value, jnp.ones((1, S), bool))
    expected = plain_attention(query, key, value, jnp.ones((1, S), bool))
    print(S, "keys: largest difference", abs(out - expected).max())
    assert (abs(out - expected).max() > 0.05) == (S == 1500)
    if S == 1500:
        twice = jnp.concatenate([jnp.arange(1024), jnp.arange(S - 1024, S)])
        explained = plain_attention(query, key[:, :, twice], value[:, :, twice], jnp.ones((1, 2048), bool))
        print("with keys", S - 1024, "to 1023 twice:", abs(out - explained).max())
        assert abs(out - explained).max() < 1e-5
PYTHON
