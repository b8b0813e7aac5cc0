#!/usr/bin/env bash
# JAX 0.12.0.1: with implementation='cudnn', jax.nn.dot_product_attention's window (left, 0) lets tokens see the future.
#
# Seen in November 2026, CPU (lowered for CUDA), Python 3.13. local_window_size=(3, 0) ends at the row itself, so with
# is_causal=True it means the same:
#     implementation 'xla': the two calls give the same, and the last key has no effect on the first rows
#     implementation 'cudnn': cuDNN is told mask_type CAUSAL, sliding_window_length 4 with is_causal=True,
#     and mask_type NO_MASK, sliding_window_length 4 without. Nothing tells it where the window ends.
# On an H200 (JAX 0.11.2, cuDNN 9.19.0.56), row t of 64 attends t - 3 to t with is_causal=True, and t - 3 to 63 without.
#
# Why one guesses otherwise: jax.nn refuses windows that cuDNN does not have ("doesn't support right window: 3"), so one
# that it takes looks safe. 0 keys to the right is taken for a window to the left alone. cuDNN's own has no right end.
# No error and no warning. jax-ml/jax pull request 39576 describes it too.
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
import re

import jax, jax.numpy as jnp
import jax._src.cudnn.fused_attention_stablehlo as stablehlo

stablehlo.check_cudnn_version = lambda: 91900  # there is no GPU: the program is lowered for one, and not run
stablehlo.check_compute_capability = lambda *_: True
window = {"local_window_size": (3, 0)}
q, k, v = (jax.random.normal(jax.random.key(i), (1, 64, 1, 64), jnp.bfloat16) for i in range(3))


def function(implementation, **options):
    return lambda *x: jax.nn.dot_product_attention(*x, implementation=implementation, **options)


alone, causal = function("xla", **window), function("xla", **window, is_causal=True)
difference = jnp.abs(alone(q, k, v) - causal(q, k, v)).max()
print("xla: difference", difference)
assert difference == 0
assert (alone(q, k.at[:, -1].set(9), v.at[:, -1].set(9)) == alone(q, k, v))[:, :-1].all()

told = {}
for is_causal in (True, False):
    call = jax.jit(function("cudnn", **window, is_causal=is_causal))
    text = call.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    [config] = re.findall(r'backend_config = "(.*?)"[,}]', text)
    told[is_causal] = config.replace(r"\22", "")
    print(f"cudnn, {is_causal=}:", re.findall(r"mask_type: \w+|sliding_window_length: \d+", told[is_causal]))
assert "mask_type: CAUSAL" in told[True] and "sliding_window_length: 4" in told[True]
assert told[False] == told[True].replace("CAUSAL", "NO_MASK"), "they differ in more than the mask"
try:
    jax.jit(function("cudnn", local_window_size=(3, 3))).trace(q, k, v)
    raise SystemExit("(3, 3) is accepted")
except ValueError as error:
    print(error)
EOF
