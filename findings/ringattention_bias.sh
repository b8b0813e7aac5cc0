#!/usr/bin/env bash
# ringattention 0.1.2: causal attention drops the positive part of a bias; each chunk of queries gets the first rows of it.
#
# Seen in November 2026, with JAX 0.6.2, CPU, Python 3.13. A bias (1, heads, T, S), as the function takes it.
#     no causal mask, one chunk of queries: right
#     causal: exactly the output for min(bias, 0)
#     two chunks of queries: exactly the output for the first half of the bias' rows, repeated
#     gradient with respect to the bias: 0 everywhere
#
# Why one guesses otherwise: a bias is added and a mask hides, so their order should not matter. Here both are joined by a
# minimum, in which a visible key counts as 0. ALiBi's bias is never positive, so that it works, and a learned bias loses
# half of its values as soon as the attention is causal. The size of a chunk is a matter of memory, not of results. And
# nothing is NaN, raises or warns.
set -euo pipefail
python=
for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "This needs Python 3.12 or newer; none was found." >&2; exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ringattention==0.1.2 jax==0.6.2 jaxlib==0.6.2 numpy==2.2.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from ringattention import ringattention

query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 16))
bias = 3 * jax.random.normal(jax.random.key(1), (1, 2, 8, 8))
mesh = Mesh(np.array(jax.devices()[:1]), ("ring",))


def ring(bias, causal=False, chunk=8):
    options = {
        "causal_block_size": 1 if causal else None, "deterministic": True, "dropout_rng": None, "attn_pdrop": 0.0,
        "query_chunk_size": chunk, "key_chunk_size": 8, "dtype": jnp.float32, "precision": None, "prevent_cse": True,
        "policy": jax.checkpoint_policies.nothing_saveable,
    }
    call = lambda q, k, v, b: ringattention(q, k, v, b, None, None, "ring", True, options)
    specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(), "check_vma": False}
    return jax.shard_map(call, mesh=mesh, **specs)(query, key, value, bias)


def dense(bias, causal=False):
    return jax.nn.dot_product_attention(query, key, value, bias=bias, is_causal=causal)


def says(words, actual, right, wrong):
    error, explained = float(abs(actual - right).max()), float(abs(actual - wrong).max())
    print(f"{words}: differs from the right output by {error:.2g}, from the explanation by {explained:.2g}")
    assert explained < 1e-5 and error > 0.1


assert float(abs(ring(bias) - dense(bias)).max()) < 1e-5
says("causal", ring(bias, causal=True), dense(bias, True), dense(jnp.minimum(bias, 0), True))
says("two chunks", ring(bias, chunk=4), dense(bias), dense(jnp.tile(bias[:, :, :4], (1, 1, 2, 1))))
gradients = [jax.grad(lambda b: (call(b) ** 2).sum())(bias) for call in (ring, dense)]
print("largest gradient of the bias:", *(float(abs(g).max()) for g in gradients), "(ringattention, dense)")
assert not gradients[0].any() and gradients[1].any()
PYTHON
