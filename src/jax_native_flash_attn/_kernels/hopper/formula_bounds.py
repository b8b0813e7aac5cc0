"""Between which numbers the integers of a formula lie, and what that decides."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Bounds(NamedTuple):
    """Both included."""

    low: int
    high: int

    @property
    def largest(self) -> int:
        """Of the magnitudes."""
        return max(abs(self.low), abs(self.high))


_INT32 = np.iinfo(np.int32)
_COMPARE = {"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
_FOLDED = {
    **_COMPARE,
    "eq": operator.eq,
    "ne": operator.ne,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "abs": np.abs,
    "sign": np.sign,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": np.invert,
}


def decided(name: str, params: Any, nodes: Sequence[Any]) -> np.ndarray | int | None:
    """What an operation gives, as a number; or which of its inputs; or None, if that is not known."""
    literals = [x.params if x.op == "literal" else None for x in nodes]
    if all(x is not None for x in literals):
        if name in _FOLDED:
            with np.errstate(all="ignore"):
                return np.asarray(_FOLDED[name](*literals))
        if name == "convert_element_type":
            return np.asarray(literals[0])
    if name == "select_n" and literals[0] is not None:
        return 1 + int(literals[0])
    if nodes[0].dtype == bool and len(nodes) == 2 and any(x is not None for x in literals):
        known = 0 if literals[0] is not None else 1
        if (name, bool(literals[known])) in (("and", True), ("or", False), ("xor", False), ("ne", False), ("eq", True)):
            return 1 - known
        if name in ("and", "or"):
            return known
    if name == "mul" and 1 in literals:
        return 1 - literals.index(1)
    bounds = [x.bounds for x in nodes]
    if name in _COMPARE and None not in bounds:
        (a, b), compare = bounds, _COMPARE[name]
        found = {compare(x, y) for x in a for y in b}
        if len(found) == 1:
            return np.asarray(found.pop())
    if name == "max" and None not in bounds:
        return next((i for i in range(2) if bounds[i].low >= bounds[1 - i].high), None)
    if name == "min" and None not in bounds:
        return next((i for i in range(2) if bounds[i].high <= bounds[1 - i].low), None)
    return None


def bounds_of(name: str, params: Any, nodes: Sequence[Any]) -> Bounds | None:
    """Of an int32; None where it may pass an end of the range, or nothing is known."""
    given = [x.bounds for x in nodes]
    if name == "select_n":
        given = given[1:]
    if None in given or not given:
        return None
    corners = _corners(name, given)
    if corners is None or min(corners) < _INT32.min or max(corners) > _INT32.max:
        return None
    return Bounds(min(corners), max(corners))


def _corners(name: str, given: Sequence[Bounds]) -> list[int] | None:
    a, b = given[0], given[-1]
    if name in ("add", "sub", "mul", "max", "min"):
        apply: Any = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "max": max, "min": min}[name]
        return [apply(x, y) for x in a for y in b]
    if name == "neg":
        return [-a.low, -a.high]
    if name == "abs":
        return [0 if a.low <= 0 <= a.high else min(abs(a.low), abs(a.high)), a.largest]
    if name == "sign":
        return [(x > 0) - (x < 0) for x in a]
    if name in ("select_n", "convert_element_type"):
        return [x for bounds in given for x in bounds]
    if name == "div" and b.low > 0:
        return [int(x / y) for x in a for y in b]
    if name == "rem" and b.low > 0:
        return [0 if a.low >= 0 else 1 - b.high, b.high - 1 if a.high > 0 else 0]
    return None
