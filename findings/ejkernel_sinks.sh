#!/usr/bin/env bash
# ejkernel 0.0.80.3: sinks (heads,) are one for each head in attention, and all for every head in flash_attention.
#
# Seen in November 2026, with JAX 0.10.2, CPU (the XLA implementations), Python 3.13. 4 heads, softmax_aux of shape (4,).
#     attention: the logit of each head is in that head's denominator
#     flash_attention: all 4 logits are in each head's denominator
#     softmax_aux of shape (4, 1), which means the former everywhere: flash_attention refuses it
#
# Why one guesses otherwise: the two take the same arguments and one is the fast form of the other. gpt-oss has one learned
# sink for each head, of shape (heads,), and splash attention, MLX and transformers take it so. Here the array fits
# both, its gradient has the right shape, and outputs are only smaller.
set -euo pipefail
python=
for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "This needs Python 3.12 or newer; none was found." >&2; exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ejkernel==0.0.80.3 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import jax
import jax.numpy as jnp
from ejkernel.modules import attention, flash_attention

query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 8, 4, 16))
sinks = jnp.array([-1.0, 0.0, 1.0, 2.0])


def dense(sinks):  # (heads, sinks of each)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) / 4
    more = jnp.broadcast_to(sinks[None, :, None], (*logits.shape[:3], sinks.shape[-1]))
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.concatenate([logits, more], -1))[..., :8], value)


each, all_of_them = dense(sinks[:, None]), dense(jnp.tile(sinks, (4, 1)))
outs = {
    "attention": attention(query, key, value, None, None, sinks, dtype=jnp.float32),
    "flash_attention": flash_attention(query, key, value, None, None, None, sinks, platform="xla"),
}
for (name, out), right in zip(outs.items(), (each, all_of_them)):
    out = out[0] if isinstance(out, tuple) else out
    errors = [float(abs(out - x).max()) for x in (each, all_of_them)]
    print(f"{name}: differs from one sink for each head by {errors[0]:.2g}, from all for every head by {errors[1]:.2g}")
    assert abs(out - right).max() < 1e-4 and max(errors) > 0.05
try:
    flash_attention(query, key, value, None, None, None, sinks[:, None], platform="xla")
except Exception as error:
    print("flash_attention with (4, 1):", type(error).__name__)
else:
    raise AssertionError("taken")
PYTHON
