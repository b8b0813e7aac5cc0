"""What logits come in: base 2 or e, and a unit for products that start with a bias."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...._semantics.numerics import LN2, LOG2E

# A row whose largest logit, in base 2, is below has had no key so far.
NO_KEY = -1.5 * 2.0**125
# From here on logits are multiplied by 2, which is exact, in place of LOG2E: x * LOG2E is rounded for the maximum, and
# not in the multiply-add that subtracts it; exp2 of that error, which is 8 and more here, would overflow in a row of
# which only masked keys were seen. Such logits are multiples of 16: a difference is 0, or decides in either base.
_EXTREME = 2.0**27
_LEAST_UNIT = 2.0**-40
_ROUNDING = 1.5 * 2.0**23  # adding it and taking it away rounds to an integer


class Unit(NamedTuple):
    """What logits of a tile come in: they are `size` times as large. Up to 1; `ceiling` is the next power of two."""

    size: Any = 1.0
    ceiling: Any = 1.0


def to_base_2(largest: jax.Array, unit: Unit = Unit()) -> jax.Array:  # noqa: B008
    """What takes a row's logits from base e (and their unit) to base 2, or so: see `_EXTREME`."""
    return jnp.where(jnp.abs(largest * unit.size) < _EXTREME, unit.size * LOG2E, 2.0 * unit.ceiling)


def from_base_2(x: jax.Array, unit: Unit = Unit()) -> jax.Array:  # noqa: B008
    """The logit, in base e, of which this is the product with `to_base_2`."""
    return x * jnp.where(jnp.abs(x) < 1.7 * _EXTREME, LN2, 0.5 * unit.size / unit.ceiling)


def split_scale(scale: Any, *, into_power: bool) -> tuple[Any, Unit]:
    """`scale` as a signed power of two, by which bfloat16 is multiplied exactly, times a unit.

    Either all of its power of two, so that the unit is in (1/2, 1], and 1 for many a scale; or, unless `into_power`, no
    more than its sign, where it is in an ordinary range. The power of a scale of 0 is 0.
    """
    size = jnp.abs(scale)
    # Rounded up. What the logarithm lacks in accuracy makes a unit that is a little above 1.
    exponent = (jnp.log2(size) + (0.5 - 1e-5) + _ROUNDING) - _ROUNDING
    ceiling = jnp.exp2(jnp.minimum(exponent, 127.0))
    power, unit = ceiling, Unit(jnp.where(ceiling > 0, size / ceiling, 1.0))
    if not into_power:
        is_ordinary = (size >= _LEAST_UNIT) & (size <= 1.0)
        power = jnp.where(is_ordinary, 1.0, power)
        unit = Unit(jnp.where(is_ordinary, size, unit.size), jnp.where(is_ordinary, ceiling, 1.0))
    return jnp.where(scale < 0, -power, power), unit
