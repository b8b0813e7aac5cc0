"""What errors say of an argument."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def describe(x: Any) -> str:
    """What was given, in a few words."""
    if isinstance(x, np.ndarray | jax.Array):
        kind = "a traced array" if isinstance(x, Tracer) else "an array"
        return f"{kind} of dtype {x.dtype} and shape {x.shape}"
    if isinstance(x, tuple | list) and any(isinstance(part, np.ndarray | jax.Array) for part in x):
        return f"a {type(x).__name__} of {len(x)}"
    is_plain = x is None or isinstance(x, bool | int | float | complex | str | list | tuple | dict)
    return reprlib.repr(x) if is_plain else f"a value of type {type(x).__name__}"


def did_you_mean(given: Any, accepted: Iterable[str]) -> str:
    """The end of an error, if what was given is nearly one of these."""
    similar = difflib.get_close_matches(given, accepted, n=1) if isinstance(given, str) else []
    return f": did you mean {similar[0]!r}?" if similar else ""


def refuse_traced(x: Any, name: str) -> None:
    """A TypeError for what must be known while a program is traced."""
    if isinstance(x, Tracer):
        raise TypeError(
            f"{name} must be static, got a traced value: name it in static_argnames of jax.jit, "
            f"or bind it beforehand with functools.partial(..., {name}=...)"
        )
