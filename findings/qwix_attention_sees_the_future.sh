#!/usr/bin/env bash
# qwix 0.1.8: an int8 rule for "every layer" also quantizes inside jax.nn's attention, and the model sees the future.
#
# Seen in November 2026, with JAX 0.12.0.1 and flax 0.12.12, CPU, Python 3.12. One causal attention layer of flax.linen
# over 8 tokens. The last token changes; the greatest change of the outputs before it:
#     float model: 0.0
#     int8 rule for the projections: 0.0
#     int8 rule ".*": 0.036
#
# Why one guesses otherwise: quantizing rounds every number a little, but nothing in it should carry information from
# one token to an earlier one. qwix replaces the matrix products of a module, also those inside library functions that
# the module calls. In the product of weights and values all keys share a scale. A large value in the
# future changes that scale, and so the rounding of the past. (QtProvider; the rule for the projections is safe.)
set -euo pipefail
python=
for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "This needs Python 3.12 or newer; none was found." >&2; exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q qwix==0.1.8 jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12 numpy==2.5.5
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import jax, jax.numpy as jnp, qwix
from flax import linen as nn


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        query, key, value = (nn.DenseGeneral((4, 8), name=name)(x) for name in ("query", "key", "value"))
        out = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return nn.DenseGeneral(32, axis=(-2, -1), name="out")(out)


def quantized(path):
    rule = qwix.QuantizationRule(module_path=path, weight_qtype=jnp.int8, act_qtype=jnp.int8)
    return qwix.quantize_model(Layer(), qwix.QtProvider([rule]))


x = jax.random.normal(jax.random.key(0), (1, 8, 32))
changed = x.at[:, 7].multiply(10.0)
parameters = Layer().init(jax.random.key(1), x)
for name, model in (("float", Layer()), ("projections", quantized("query|key|value|out")), (".*", quantized(".*"))):
    out = model.apply(parameters, x)
    past = float(jnp.abs(model.apply(parameters, changed) - out)[:, :7].max())
    rounding = float(jnp.abs(out - Layer().apply(parameters, x)).max())
    print(f"{name}: the past moves by {past}; int8 moves the output by {rounding}")
    assert past > 1e-3 if name == ".*" else past == 0
    assert (rounding > 0) == (name != "float")
EOF
