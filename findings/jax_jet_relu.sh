#!/usr/bin/env bash
# JAX 0.12.0.1: Taylor mode (jax.experimental.jet) refuses every function with a derivative rule of its own, even relu.
#
# Seen in November 2026, CPU, Python 3.12; JAX 0.10.2 does the same.
#     jet of jax.nn.relu, jax.nn.relu6, jax.scipy.special.xlogy: UnexpectedTracerError
#     jet of x * x under jax.custom_jvp or jax.custom_vjp: UnexpectedTracerError
#     jet of jnp.maximum(x, 0), jax.nn.silu, jax.nn.softmax, x * x without a rule: right
#
# Why one guesses otherwise: a derivative rule of its own is an addition, and grad, jvp and vmap take all of these. jet
# has rules for what is inside. The message speaks of a side effect that lets a tracer escape, and so blames
# the function, which has none. Which functions of jax.nn have such a rule is not seen from outside.
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
import jax, jax.numpy as jnp
from jax.experimental import jet


def square(x):
    return x * x


with_jvp, with_vjp = jax.custom_jvp(square), jax.custom_vjp(square)
with_jvp.defjvp(lambda primals, tangents: (square(*primals), 2 * primals[0] * tangents[0]))
with_vjp.defvjp(lambda x: (square(x), x), lambda x, g: (2 * x * g,))
functions = {
    "square": (square, True),
    "square, custom_jvp": (with_jvp, False),
    "square, custom_vjp": (with_vjp, False),
    "maximum(x, 0)": (lambda x: jnp.maximum(x, 0.0), True),
    "relu": (jax.nn.relu, False),
    "relu6": (jax.nn.relu6, False),
    "xlogy": (lambda x: jax.scipy.special.xlogy(x, x), False),
    "silu": (jax.nn.silu, True),
    "softmax": (lambda x: jax.nn.softmax(jnp.stack([x, 2 * x]))[0], True),
}
for name, (f, works) in functions.items():
    first = jax.grad(f)(2.0)
    second = jax.grad(jax.grad(f))(2.0)
    try:
        value, terms = jet.jet(f, (2.0,), ([1.0, 0.0],))
    except jax.errors.UnexpectedTracerError:
        print(name, "UnexpectedTracerError")
        assert not works
    else:
        print(name, float(value), [float(term) for term in terms])
        assert works and jnp.allclose(jnp.array(terms), jnp.array([first, second]), atol=1e-4)
EOF
