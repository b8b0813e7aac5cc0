#!/usr/bin/env bash
# Keras 3.15.1 (JAX backend): asking MultiHeadAttention for its scores changes its output, for a row without keys.
#
# Seen in November 2026, with JAX 0.12.0.1, CPU, Python 3.12. The second token may see no key; the bias of the last
# projection is 3, and the attention adds 0 to it or the mean of the values:
#     layer(x, x, attention_mask=mask): the mean of the values
#     layer(x, x, attention_mask=mask, return_attention_scores=True): 0
#     a layer with dropout=0.1, in evaluation: 0
#     keras.ops.dot_product_attention: the mean of the values
#
# Why one guesses otherwise: return_attention_scores says what else comes back, and dropout does nothing in evaluation.
# Both make the layer leave the fused function for its own softmax, where masked scores are set to 0 again after the
# softmax. All other rows agree. Whoever looks into the scores to find why a padded row is odd finds it in order.
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
KERAS_HOME="$folder" KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import keras, numpy as np

x = np.random.default_rng(0).standard_normal((1, 4, 16)).astype(np.float32)
mask = np.ones((1, 4, 4), bool)
mask[:, 1] = False
plain, dropout = keras.layers.MultiHeadAttention(2, 8), keras.layers.MultiHeadAttention(2, 8, dropout=0.1)
for layer in (plain, dropout):
    layer(x, x)
weights = plain.get_weights()
weights[-1] = np.full_like(weights[-1], 3.0)
for layer in (plain, dropout):
    layer.set_weights(weights)
value_kernel, value_bias, out_kernel = weights[4:7]
values = np.einsum("btd,dnh->btnh", x, value_kernel) + value_bias
mean = 3 + np.einsum("nh,nhd->d", values.mean(1)[0], out_kernel)
outputs = {
    "plain": plain(x, x, attention_mask=mask),
    "with scores": plain(x, x, attention_mask=mask, return_attention_scores=True)[0],
    "dropout, evaluation": dropout(x, x, attention_mask=mask, training=False),
}
for name, out in outputs.items():
    row = np.asarray(out)[0, 1]
    print(f"{name}: {row[:3]} (mean of the values: {mean[:3]})")
    np.testing.assert_allclose(row, mean if name == "plain" else 3.0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(out)[0, [0, 2, 3]], np.asarray(outputs["plain"])[0, [0, 2, 3]], atol=1e-4)
heads = x.reshape(1, 4, 2, 8)
out = np.asarray(keras.ops.dot_product_attention(heads, heads, heads, mask=mask[:, None]))
np.testing.assert_allclose(out[0, 1], heads.mean(1)[0], atol=1e-5)
EOF
