#!/usr/bin/env bash
# Keras 3.15.1 on JAX: attention of float64 arrays is computed in float32, unless the scores are asked for.
#
# Seen in November 2026, CPU, Python 3.13, jax_enable_x64 on.
#     keras.ops.matmul, softmax and einsum of float64 arrays: float64
#     keras.ops.dot_product_attention of float64 arrays: float32, with floatx float32 and with floatx float64
#     MultiHeadAttention(dtype="float64"): output float64, error about 1e-7
#     the same layer and input, return_attention_scores=True: output float64, error about 1e-16
#
# Why one guesses otherwise: the other operations keep float64, and the layer's output says float64. The common type of
# float64 and float64 is float32 in Keras' own rules, and the fused function asks them. The layer casts its float32
# result up again. A check of gradients by differences, the reason to choose float64, then sees noise of 1e-7.
set -euo pipefail
python=
for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "This needs Python 3.12 or newer; none was found." >&2; exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5
JAX_PLATFORMS=cpu JAX_ENABLE_X64=1 KERAS_BACKEND=jax KERAS_HOME="$folder" "$folder/venv/bin/python" - <<'EOF'
import jax.numpy as jnp
import keras
import numpy as np

x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 4, 8)))
assert x.dtype == jnp.float64
for floatx in ("float32", "float64"):
    keras.config.set_floatx(floatx)
    others = keras.ops.matmul(x, x.swapaxes(2, 3)), keras.ops.softmax(x), keras.ops.einsum("btnh,bsnh->bnts", x, x)
    out = keras.ops.dot_product_attention(x, x, x)
    print(f"{floatx=}: other operations {[str(o.dtype) for o in others]}, attention {out.dtype}")
    assert {o.dtype for o in others} == {jnp.dtype("float64")} and out.dtype == jnp.float32

tokens = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 16)))
layer = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, dtype="float64")
out = np.asarray(layer(tokens, tokens))
q, k, v, o = (np.asarray(w) for w in layer.get_weights()[::2])  # kernels; biases are zero
assert not any(np.asarray(w).any() for w in layer.get_weights()[1::2])
query, key, value = (np.einsum("btd,dnh->btnh", np.asarray(tokens), w) for w in (q, k, v))
weights = np.exp(np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(8))
weights /= weights.sum(-1, keepdims=True)
exact = np.einsum("btnh,nhd->btd", np.einsum("bnts,bsnh->btnh", weights, value), o)
with_scores = np.asarray(layer(tokens, tokens, return_attention_scores=True)[0])
errors = [float(np.abs(x - exact).max()) for x in (out, with_scores)]
print(f"layer of float64: {out.dtype}, error {errors[0]:.0e}; with return_attention_scores {errors[1]:.0e}")
assert out.dtype == with_scores.dtype == np.float64
assert 1e-9 < errors[0] < 1e-5 and errors[1] < 1e-13
EOF
