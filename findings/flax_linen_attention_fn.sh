#!/usr/bin/env bash
# flax.linen 0.12.12: attention_fn with **kwargs never gets the mask; a causal model then sees the future.
#
# Seen in November 2026, with JAX 0.12.0.1, CPU, Python 3.12. MultiHeadDotProductAttention gets a causal mask and an
# attention_fn that calls flax's own function. The last token changes; the change of the outputs before it:
#     attention_fn=nn.dot_product_attention: 0.0
#     def f(query, key, value, **kwargs): return nn.dot_product_attention(query, key, value, **kwargs): 1.01
#     the same under functools.wraps(nn.dot_product_attention): 0.0
# And a function that names dropout_rate, but not deterministic, gets the full rate in evaluation.
#
# Why one guesses otherwise: a wrapper that passes everything on (to log, to time, to add a scale) is the usual way to
# extend a function, and Python would raise for a keyword that the function cannot take. linen looks at the signature
# first and leaves out, without a word, each keyword that is not a parameter by name. **kwargs names none. So mask,
# dropout, precision and dtype are lost, and the model still runs. flax.nnx passes its keywords to such a function.
set -euo pipefail
python=
for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "This needs Python 3.12 or newer; none was found." >&2; exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q flax==0.12.12 jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import functools
import jax, jax.numpy as jnp
from flax import linen as nn


def passes_on(query, key, value, **kwargs):
    received.update(kwargs)
    return nn.dot_product_attention(query, key, value, **kwargs)


def names_a_rate(query, key, value, mask=None, dropout_rate=0.0):
    received.update(dropout_rate=dropout_rate)
    return nn.dot_product_attention(query, key, value, mask=mask)


x = jax.random.normal(jax.random.key(0), (1, 4, 16))
changed = x.at[:, 3].add(1.0)
causal = nn.make_causal_mask(x[..., 0])
received = {}
for name, f, safe in (
    ("flax's own", nn.dot_product_attention, True),
    ("passes on", passes_on, False),
    ("passes on, wraps", functools.wraps(nn.dot_product_attention)(lambda *a, **k: passes_on(*a, **k)), True),
):
    layer = nn.MultiHeadDotProductAttention(2, attention_fn=f)
    parameters = layer.init(jax.random.key(1), x)
    received.clear()
    out, moved = (layer.apply(parameters, inputs, mask=causal) for inputs in (x, changed))
    past = float(jnp.abs(moved - out)[:, :3].max())
    print(f"{name}: the past moves by {past}; received {sorted(received)}")
    assert past == 0 if safe else past > 0.1 and not received

layer = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, attention_fn=names_a_rate)
received.clear()
layer.apply(parameters, x, deterministic=True)
print("in evaluation:", received)
assert received == {"dropout_rate": 0.5}
EOF
