#!/usr/bin/env bash
# qwix 0.1.8: with a jitted function inside, the model that runs first decides whether the other one is quantized.
#
# Seen in November 2026, with JAX 0.12.0.1 and flax 0.12.12, CPU, Python 3.12. A float module calls
# jax.jit(jax.nn.dot_product_attention); qwix.quantize_model makes an int8 module of it. Distance to the float result:
#     float first, then int8:  2e-07, 2e-07   the quantized model is not quantized
#     int8 first, then float:  0.024, 0.024   the float model is quantized
#     without jax.jit, either order:  float 0.0, int8 0.024
#
# Why one guesses otherwise: these are two models, and quantize_model leaves the first one as it is. jax.jit is meant to
# change the speed only. qwix replaces jax.lax.dot_general while its module runs, and a jitted function that was traced
# before, for these shapes, is not traced again. A comparison of both models in one process, which is how one checks
# a quantized model, then shows no loss at all, or compares int8 with int8.
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
cat >"$folder/order.py" <<'EOF'
import sys
import jax, jax.numpy as jnp, qwix
from flax import linen as nn

jitted, order = sys.argv[1] == "jit", sys.argv[2:]
attention = jax.jit(jax.nn.dot_product_attention) if jitted else jax.nn.dot_product_attention


class Layer(nn.Module):
    def __call__(self, x):
        return attention(x, x, x)


rule = qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8, act_qtype=jnp.int8)
models = {"float": Layer(), "int8": qwix.quantize_model(Layer(), qwix.PtqProvider([rule]))}
x = jax.random.normal(jax.random.key(0), (1, 8, 4, 8))
expected = jax.nn.dot_product_attention(x, x, x)
for name in order:
    error = float(jnp.abs(models[name].apply({}, x) - expected).max())
    print("jit" if jitted else "no jit", order, name, error)
    assert (error > 1e-3) == ((order[0] if jitted else name) == "int8")
EOF
for kind in jit plain; do
  for order in "float int8" "int8 float"; do
    JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/order.py" $kind $order
  done
done
