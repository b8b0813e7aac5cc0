#!/usr/bin/env bash
# marin-levanter 0.2.227.dev40316220070: with dropout, long sequences on CPU attend to future keys; short ones do not.
#
# Seen in November 2026, with JAX 0.11.2, CPU, Python 3.12. Causal mask, dropout of 0.5, all logits equal. The values are
# a unit matrix, so that the output is the matrix of weights:
#     16 tokens, backend vanilla: no weight on future keys
#     16 tokens, backend jax_flash, blocks of 8: 3.3 of 16.0 on future keys; each row sums to 1
#     512 tokens, backend left out: none
#     1024 tokens, backend left out: 395 of 1024 on future keys
#     16 tokens, backend jax_flash, without dropout: none
#
# Why one guesses otherwise: a backend or a block size is a matter of speed, and dropout takes away, it does not add. The
# flash backend, chosen by itself from 1024 tokens on, drops logits and not weights, and does it after the mask. A
# dropped logit is 0, also where the mask had put a very low number, so the key is seen again. The rows still sum
# to 1 and nothing is NaN. A test with a short sequence runs the other backend and passes.
set -euo pipefail
python=
for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "This needs Python 3.12 or newer; none was found." >&2; exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
# Some of its parts are published as development versions only; the exact versions that it asks for let them in.
packages=(marin-levanter==0.2.227.dev40316220070 jax==0.11.2 jaxlib==0.11.2 equinox==0.13.8)
if command -v uv >/dev/null; then
  uv pip install -q --prerelease=if-necessary-or-explicit -p "$folder/venv/bin/python" "${packages[@]}"
else
  "$folder/venv/bin/pip" install -q "${packages[@]}"
fi
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import haliax as hax, jax, jax.numpy as jnp, numpy as np
from levanter.layers.attention import AttentionBackend, AttentionMask, dot_product_attention


def weights(T, backend=None, block=None, dropout=0.5):
    batch, head, size = hax.Axis("batch", 1), hax.Axis("head", 1), hax.Axis("size", T)
    queries, keys = hax.Axis("queries", T), hax.Axis("keys", T)
    out = dot_product_attention(
        queries, keys, size,
        hax.zeros((batch, head, queries, size)), hax.zeros((batch, head, keys, size)),
        hax.named(jnp.eye(T)[None, None], (batch, head, keys, size)),
        mask=AttentionMask.causal(), attn_backend=backend, flash_block_size=block,
        dropout=dropout, inference=False, prng=jax.random.key(0),
    )  # fmt: skip
    return np.asarray(out.rearrange((batch, head, queries, size)).array)[0, 0]


for leaks, arguments in (
    (False, dict(T=16, backend=AttentionBackend.VANILLA)),
    (True, dict(T=16, backend=AttentionBackend.JAX_FLASH, block=8)),
    (False, dict(T=512)),
    (True, dict(T=1024)),
    (False, dict(T=16, backend=AttentionBackend.JAX_FLASH, block=8, dropout=0.0)),
):
    matrix = weights(**arguments)
    future = np.triu(matrix, 1).sum()
    print(arguments, "on future keys:", future, "of", matrix.sum())
    assert future > 1 if leaks else future == 0
    if leaks:
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-5)
EOF
