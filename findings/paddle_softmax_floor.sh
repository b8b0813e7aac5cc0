#!/usr/bin/env bash
# paddlepaddle 3.3.1 (CPU): a masked key keeps a weight of exp(-64), so that large numbers behind a mask change the output.
#
# Seen in November 2026, CPU, Python 3.13.
#     softmax of (0, -inf): (1, 1.6e-28), and not (1, 0), also in float64
#     scaled_dot_product_attention(is_causal=True), all logits equal: 1.6e-28 on each future key
#     a value of 1e30 at the last key: the first row, which may see the first key alone, moves by 160
#
# Why one guesses otherwise: exp(-inf) is 0 everywhere else, and code that hides keys by -inf counts on it. The kernel
# cuts off the exponent at -64. That is far below what float32 resolves beside 1, so that no test of weights with a
# tolerance sees it. But a test that changes the future and asks for equal bits fails, and memory that was never written,
# behind a mask, comes through if its numbers are large.
set -euo pipefail
python=
for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "This needs Python 3.12 or newer; none was found." >&2; exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q paddlepaddle==3.3.1 setuptools numpy==2.5.5
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import numpy as np
import paddle
from paddle.nn.functional import scaled_dot_product_attention, softmax

print("version", paddle.__version__)
for dtype in ("float32", "float64"):
    weights = softmax(paddle.to_tensor([0.0, -float("inf")], dtype=dtype)).numpy()
    print(f"softmax of (0, -inf), {dtype}: {weights}")
    np.testing.assert_allclose(weights, [1.0, np.exp(-64.0)], rtol=1e-3)

zeros, value = paddle.zeros([1, 4, 1, 4]), np.eye(4, dtype=np.float32)[None, :, None]
weights = scaled_dot_product_attention(zeros, zeros, paddle.to_tensor(value), is_causal=True).numpy()[0, :, 0]
print("weights of the first row:", weights[0])
assert (weights[np.triu_indices(4, 1)] > 0).all()
value[:, 3] = 1e30
first = scaled_dot_product_attention(zeros, zeros, paddle.to_tensor(value), is_causal=True).numpy()[0, 0, 0]
print("first row, if the last value is 1e30:", first)
assert (np.abs(first) > 100).all()
PYTHON
