#!/usr/bin/env bash
# JAX 0.12.0.1: NaN in keys past key_value_seq_lengths leaves the output finite and makes the query's gradient NaN.
#
# Seen in November 2026, CPU, Python 3.13. 8 keys and values, key_value_seq_lengths=[6].
#     NaN in keys 6 and 7: the output is right; the gradient of every query row, and only that of the query, is NaN
#     NaN in values 6 and 7: the output of every row is NaN
#     key_value_seq_lengths=[6], zeros in keys and values 6 and 7: output and gradients are right
#
# Why one guesses otherwise: lengths say what is there, so what lies behind them should not be read, and a test of the
# forward pass with NaN in unused keys of a cache passes. Weights there are 0, but 0 times NaN is NaN, in weights times
# values, and in the backward pass in zero gradients of logits times keys.
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
import jax
import jax.numpy as jnp
import numpy as np

query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 16))
padding = (jnp.arange(8) >= 6)[None, :, None, None]
lengths = jnp.array([6], jnp.int32)


def run(key, value):
    def out(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths)

    gradients = jax.grad(lambda *x: (out(*x) ** 2).sum(), argnums=(0, 1, 2))(query, key, value)
    return np.asarray(out(query, key, value)), [np.asarray(x) for x in gradients]


exact = jax.nn.dot_product_attention(query, key[:, :6], value[:, :6])
for words, fill, keys, values, finite in (
    ("zeros in both", 0.0, True, True, [True, True, True, True]),
    ("NaN in keys", jnp.nan, True, False, [True, False, True, True]),
    ("NaN in values", jnp.nan, False, True, [False, False, False, False]),
):
    out, gradients = run(*(jnp.where(padding & chosen, fill, x) for x, chosen in ((key, keys), (value, values))))
    seen = [bool(np.isfinite(x[:, :6]).all()) for x in (out, *gradients)]
    print(f"{words}: out, dquery, dkey, dvalue finite at the first six tokens: {seen}")
    assert seen == finite
    if seen[0]:
        np.testing.assert_allclose(out, exact, atol=1e-5)
    if words == "NaN in keys":
        assert np.isnan(gradients[0]).all()
EOF
