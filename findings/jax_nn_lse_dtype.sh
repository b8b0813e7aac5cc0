#!/usr/bin/env bash
# JAX 0.12.0.1: jax.nn.dot_product_attention(return_residual=True) rounds the log-sum-exp to the query's dtype.
#
# Seen in November 2026, CPU, Python 3.13. bfloat16 arrays, 64 rows, 4096 keys, log-sum-exp about 8.8:
#     the log-sum-exp is bfloat16, wrong by up to 0.031
#     error of attention over all keys: 0.0023
#     error of two halves of the keys, merged with the log-sum-exp that is returned: 0.0123
#     the same with a log-sum-exp in float32: 0.0022
#
# Why one guesses otherwise: the log-sum-exp is there to merge parts, or for a backward pass. FlashAttention, to whose
# paper the documentation points, and cuDNN give it in float32 for any dtype, and the softmax here is in float32 too.
# In bfloat16 the number after 8.75 is 8.8125: that is a factor of 1.06 on a weight.
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
import jax, jax.numpy as jnp

T, S = 64, 4096
q, k, v = (jax.random.normal(jax.random.key(i), (1, n, 4, 64), jnp.bfloat16) for i, n in enumerate((T, S, S)))
halves = (slice(S // 2), slice(S // 2, S))
wide_q, wide_k, wide_v = (x.astype(jnp.float32) for x in (q, k, v))
logits = jnp.einsum("btnh,bsnh->btns", wide_q, wide_k, precision="highest") / 8
exact = jnp.einsum("btns,bsnh->btnh", jax.nn.softmax(logits), wide_v, precision="highest")
attend = lambda k, v: jax.nn.dot_product_attention(q, k, v, return_residual=True)
parts = [attend(k[:, i], v[:, i]) for i in halves]


def merged(left, right):
    weight = jax.nn.sigmoid(left.astype(jnp.float32) - right.astype(jnp.float32))[..., None]
    return weight * parts[0][0].astype(jnp.float32) + (1 - weight) * parts[1][0].astype(jnp.float32)


def error(x):
    return float(jnp.linalg.norm(x.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))


out, lse = attend(k, v)
print("log-sum-exp:", lse.dtype, "about", float(lse.mean()))
print("wrong by up to", float(jnp.abs(lse - jax.nn.logsumexp(logits, -1)).max()))
errors = error(out), error(merged(*(lse for _, lse in parts)))
wide = error(merged(*(jax.nn.logsumexp(logits[..., i], -1) for i in halves)))
print("error of all keys", errors[0], "merged", errors[1], "merged in float32", wide)
assert lse.dtype == jnp.bfloat16
assert errors[1] > 4 * errors[0] and wide < 1.1 * errors[0]
EOF
