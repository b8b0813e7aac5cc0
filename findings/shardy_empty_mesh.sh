#!/usr/bin/env bash
# Shardy (JAX 0.12.0.1): a sharding constraint over the empty mesh is valid in a program over any mesh, and exact.
#
# Seen in November 2026, CPU with 8 devices, mesh {dp: 4, tp: 2}, Python 3.12; JAX 0.10.2 does the same. The constraint
# says: first axis open ({?}), second axis closed and not sharded ({}).
#     sharding of the input       empty mesh                 abstract mesh of one axis of size 1
#     P('dp', 'tp')               P('dp',)                   replicated
#     P(('dp', 'tp'),)            P(('dp', 'tp'),), no copy  replicated
#     P(None, 'tp')               P()                        replicated
#
# Why one guesses otherwise: a constraint names the axes of its mesh, so one over no mesh looks empty or illegal. A mesh
# of one axis of size 1 looks like the safe way to write "not sharded, whatever the mesh is". It is the other way round.
# The empty mesh gathers the closed axis and leaves the open one as it was. The mesh of size 1 is accepted too, and
# gathers the open axis as well, though with_sharding_constraint was told UNCONSTRAINED there, and the text says {?}.
# So a library may say "do not shard this axis" from a lowering rule, in a program whose mesh it does not know.
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
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8
"$folder/venv/bin/python" - <<'EOF'
import re
import jax, jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
from jaxlib.mlir.dialects import sdy

close_second = Primitive("close_second")
close_second.def_abstract_eval(lambda x: x)


def lower(ctx, x):
    axes = [sdy.DimensionShardingAttr.get([], is_closed=closed) for closed in (False, True)]
    return [sdy.ShardingConstraintOp(x, sdy.TensorShardingAttr.get(sdy.MeshAttr.get([]), axes)).result]


mlir.register_lowering(close_second, lower)
mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
one = NamedSharding(AbstractMesh((1,), ("z",), axis_types=(AxisType.Auto,)), P(P.UNCONSTRAINED, None))
constraints = {
    "empty": lambda x: 2 * close_second.bind(x),
    "one": lambda x: 2 * jax.lax.with_sharding_constraint(x, one),
}
x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
for spec, expected, copies in (
    (P("dp", "tp"), P("dp"), 1),
    (P(("dp", "tp")), P(("dp", "tp")), 0),
    (P(None, "tp"), P(), 1),
):
    for name, f in constraints.items():
        lowered = jax.jit(f, in_shardings=NamedSharding(mesh, spec)).lower(x)
        assert re.search(r"sdy.sharding_constraint .*\[\{\?\}, \{\}\]", lowered.as_text())
        compiled = lowered.compile()
        gathers = len(re.findall(r" all-gather\(", compiled.as_text()))
        actual = compiled.output_shardings
        print(f"{spec} -> {name}: {actual}, all-gathers: {gathers}")
        if name == "empty":
            assert actual.is_equivalent_to(NamedSharding(mesh, expected), 2) and gathers == copies
        else:
            assert actual.is_fully_replicated and gathers
EOF
