#!/usr/bin/env bash
# MLX 0.32.4: mask="causal" is aligned to the end, with fewer keys too; a row without keys is a mean or NaN.
#
# Seen in November 2026, mlx with mlx-cpu, Linux, CPU, Python 3.12. All logits are equal; the value of key j is j.
#     2 queries, 4 keys, "causal":  1.0, 1.5             key j is seen from query i when j <= i + 2
#     4 queries, 2 keys, "causal":  0.5, 0.5, 0.0, 0.5   the first two queries see no key: the mean of all values
#     2 queries, 4 keys, second query sees nothing:  boolean mask 1.5 (the mean), the same mask of 0 and -inf NaN
#
# Why one guesses otherwise: is_causal of jax.nn and of PyTorch counts from the first key, so the numbers of a ported
# model differ as soon as the lengths do. With more queries than keys, the end alignment leaves queries that see
# nothing, and these do not get 0: they see every value, the future ones too. And two ways to write one mask disagree.
set -euo pipefail
python=
for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "This needs Python 3.12 or newer; none was found." >&2; exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mlx==0.32.4 mlx-cpu==0.32.4
"$folder/venv/bin/python" - <<'EOF'
import math
import mlx.core as mx


def attention(T, S, mask):
    query, key = mx.zeros((1, 1, T, 8)), mx.zeros((1, 1, S, 8))
    value = mx.broadcast_to(mx.arange(S).astype(mx.float32)[:, None], (1, 1, S, 8))
    out = mx.fast.scaled_dot_product_attention(query, key, value, scale=1.0, mask=mask)[0, 0, :, 0].tolist()
    print(f"{T} queries, {S} keys: {out}")
    return out


assert attention(2, 4, "causal") == [1.0, 1.5]
assert attention(4, 2, "causal") == [0.5, 0.5, 0.0, 0.5]
visible = mx.array([[True] * 4, [False] * 4])
assert attention(2, 4, visible) == [1.5, 1.5]
first, second = attention(2, 4, mx.where(visible, 0.0, -math.inf))
assert first == 1.5 and math.isnan(second)
EOF
