"""The Taylor rule of attention, for `jax.experimental.jet`: nested directional derivatives along the path.

So it knows no formula of its own, its memory stays linear in T and S, and it takes every mask, bias and dropout. Its
cost doubles with each order.
"""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive


def register(*primitives: Primitive) -> None:
    """Give primitives their rules, if `jax.experimental.jet` was imported, which would slow every import of this."""
    jet = sys.modules.get("jax.experimental.jet")
    if jet is None or primitives[0] in jet.jet_rules:
        return
    # Rules got derivatives, before they got Taylor coefficients (derivatives over factorials).
    has_coefficients = "factorial_scaled" in inspect.signature(jet.jet).parameters

    def rule(
        primitive: Primitive, primals: Sequence[jax.Array], series: Sequence[Sequence[jax.Array]], **params: Any
    ) -> tuple[list, list]:
        order = len(series[0])
        size = [1 if has_coefficients else math.factorial(k) for k in range(order + 1)]
        varying = [jnp.issubdtype(x.dtype, jnp.inexact) for x in primals]

        def at(time: jax.Array) -> list[list[jax.Array]]:
            def operand(x: jax.Array, terms: Sequence[jax.Array]) -> jax.Array:
                for k, term in enumerate(terms, 1):
                    x = x + (time**k / size[k]).astype(x.dtype) * term
                return x

            moved = (operand(x, t) if v else x for x, t, v in zip(primals, series, varying, strict=True))
            return [primitive.bind(*moved, **params)]

        derivatives = at
        for _ in range(order):
            derivatives = _with_next(derivatives)
        values, *rest = derivatives(jnp.zeros((), jnp.float32))
        factor = [size[k] / math.factorial(k) for k in range(order + 1)]
        terms = [[x[i] * factor[k] for k, x in enumerate(rest, 1)] for i in range(len(values))]
        return values, terms

    # Derivatives name their residuals, and jet has no rule for names either.
    named = jax.make_jaxpr(lambda x: checkpoint_name(x, ""))(0.0).eqns[0].primitive
    jet.jet_rules.setdefault(
        named, lambda x, terms, **params: (named.bind(*x, **params), [named.bind(t, **params) for t in terms[0]])
    )
    for primitive in primitives:
        jet.jet_rules[primitive] = functools.partial(rule, primitive)


def _with_next(derivatives: Callable[[jax.Array], list]) -> Callable[[jax.Array], list]:
    """From a function that gives the derivatives up to some order, one that gives the next as well."""

    def to_next(time: jax.Array) -> list:
        known, tangents = jax.jvp(derivatives, (time,), (jnp.ones_like(time),))
        return [*known, tangents[-1]]

    return to_next
