#!/usr/bin/env bash
# JAX 0.10.2 on CPUs: jax.checkpoint of attention layers computes them twice and saves no memory, but for those in a scan.
#
# Seen in November 2026, CPU, Python 3.12. Gradient of 8 residual layers of jax.nn.dot_product_attention, 1 x 512 tokens,
# 8 heads of 64, float32. Temporary memory, and exponentials in the compiled program:
#     layers in       jax.checkpoint   0.10.2                    0.12.0.1
#     a Python loop   no               233 MiB, 8                233 MiB, 8
#     a Python loop   yes              228 MiB, 16               51 MiB, 16
#     a scan          no               166 MiB, 1 in the loop    166 MiB, 1
#     a scan          yes              37 MiB, 2                 37 MiB, 2
#
# Why one guesses otherwise: jax.checkpoint is there to buy memory with time, and has prevent_cse=True for layers outside
# of a loop. It works so in a scan, and in the newest version. With 0.10.2, the newest JAX for Python 3.11, the time is
# paid and nothing is bought, and no message says so.
set -euo pipefail
python=
for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "This needs Python 3.12 or newer; none was found." >&2; exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/old"
"$python" -m venv "$folder/new"
"$folder/old/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$folder/new/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5
cat >"$folder/layers.py" <<'EOF'
import sys
import jax, jax.numpy as jnp


def layer(x):
    return x + jax.nn.dot_product_attention(x, x, x)


def in_loop(layer):
    def model(x):
        for _ in range(8):
            x = layer(x)
        return jnp.square(x).sum()
    return model


def in_scan(layer):
    return lambda x: jnp.square(jax.lax.scan(lambda x, _: (layer(x), None), x, None, 8)[0]).sum()


x = jax.ShapeDtypeStruct((1, 512, 8, 64), jnp.float32)
found = {}
for model in (in_loop, in_scan):
    for name, of in (("plain", layer), ("checkpoint", jax.checkpoint(layer))):
        compiled = jax.jit(jax.grad(model(of))).lower(x).compile()
        mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
        found[model.__name__, name] = mib, compiled.as_text().count(" exponential(")
        print(jax.__version__, model.__name__, name, f"{mib:.0f} MiB,", found[model.__name__, name][1], "exponentials")
saved = {name: found[name, "checkpoint"][0] < 0.5 * found[name, "plain"][0] for name in ("in_loop", "in_scan")}
is_twice = found["in_loop", "checkpoint"][1] == 2 * found["in_loop", "plain"][1]
sys.exit(not (is_twice and saved["in_scan"] and saved["in_loop"] == (sys.argv[1] == "new")))
EOF
for version in old new; do JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/layers.py" "$version"; done
