#!/usr/bin/env bash
# JAX 0.10.2, explicit sharding: jax.nn's attention drops the sharding of the query's heads; JAX 0.12.0.1 raises.
#
# Seen in November 2026, CPU with 2 devices, Python 3.12. Query, key and value of 4 heads, axis "tp" of 2 devices.
#     sharded over heads      jax.nn, 0.10.2     jnp.einsum, 0.10.2   both, 0.12.0.1
#     query, key and value    sharded            sharded              sharded
#     query only              not sharded        sharded              ShardingTypeError
#     key and value only      sharded            not sharded          ShardingTypeError
# (jnp.einsum: the logits alone, "btnh,bsnh->bnts".)
#
# Why one guesses otherwise: with explicit axes the sharding is part of the type, and JAX raises where it cannot decide.
# Multi-query models shard the heads of the query and keep the few keys whole, so this case is usual. 0.10.2 takes the
# sharding of the first operand of each product. In the second product of jax.nn jnp.einsum puts the value first. The
# result is right, but whole on every device, and no message says so. The same code stops with an error in 0.12.
set -euo pipefail
python=
for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "This needs Python 3.12 or newer; none was found." >&2; exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$python" -m venv "$folder/new"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$folder/new/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5
cat >"$folder/heads.py" <<'EOF'
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Explicit,))
x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
expected = jax.nn.dot_product_attention(x, x, x)
whole = jax.device_put(x, NamedSharding(mesh, P()))
split = jax.device_put(x, NamedSharding(mesh, P(None, None, "tp")))


def heads(f, axis):
    try:
        return "sharded" if jax.typeof(f()).sharding.spec[axis] == "tp" else "not sharded"
    except Exception as error:
        return type(error).__name__


raises = ("ShardingTypeError",) * 2
old = jax.__version__ == "0.10.2"
with jax.set_mesh(mesh):
    for name, q, k, known in (
        ("query, key and value", split, split, ("sharded", "sharded")),
        ("query only", split, whole, ("not sharded", "sharded") if old else raises),
        ("key and value only", whole, split, ("sharded", "not sharded") if old else raises),
    ):
        seen = (
            heads(lambda: jax.nn.dot_product_attention(q, k, k), 2),
            heads(lambda: jnp.einsum("btnh,bsnh->bnts", q, k), 1),
        )
        print(jax.__version__, name, seen)
        assert seen == known
        if seen[0].endswith("sharded"):
            assert jnp.allclose(jax.nn.dot_product_attention(q, k, k), expected, atol=1e-5)
EOF
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2
"$folder/venv/bin/python" "$folder/heads.py"
"$folder/new/bin/python" "$folder/heads.py"
