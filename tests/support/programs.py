"""What stands in a program: the equations of a jaxpr, and the arrays and collectives of StableHLO and HLO text."""

import collections
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

_COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def equations(jaxpr: Any, *, leaves: tuple[str, ...] = ()) -> Iterator[Any]:
    """All equations of a jaxpr in order, those of inner jaxprs included, but for those inside the primitives named."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name not in leaves:
            for parameter in equation.params.values():
                for inner in _jaxprs(parameter):
                    yield from equations(inner, leaves=leaves)


def primitives(jaxpr: Any) -> list[str]:
    """Names of the primitives of all equations of a jaxpr."""
    return [equation.primitive.name for equation in equations(jaxpr)]


def _jaxprs(parameter: Any) -> Iterator[Any]:
    if hasattr(parameter, "eqns"):
        yield parameter
    elif hasattr(parameter, "jaxpr"):  # closed
        yield from _jaxprs(parameter.jaxpr)
    elif isinstance(parameter, tuple | list):
        for element in parameter:
            yield from _jaxprs(element)


def largest_in_text(text: str | None) -> tuple[int, str]:
    """The largest array named in optimised HLO (f32[2,3]) or StableHLO (tensor<2x3xf32>)."""
    assert text is not None
    found = [(m[0], m[1].split(",")) for m in re.finditer(r"\b[a-z]+\d*\[([\d,]+)\]", text)]
    found += [(m[0], m[1].split("x")[:-1]) for m in re.finditer(r"tensor<((?:\d+x)+)[a-z]", text)]
    assert found
    return max((int(np.prod([int(n) for n in sizes], dtype=np.int64)), shape) for shape, sizes in found)


class _Collective(NamedTuple):
    kind: str
    elements: int  # of its (first) result
    is_in_loop: bool


def _collectives(text: str | None) -> Iterator[_Collective]:
    """Of optimised HLO."""
    assert text
    bodies = set(re.findall(r"(?:body|condition)=%?([\w.-]+)", text))
    computation = ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = header[1]
        if match := re.search(rf"= \(*\w+\[([\d,]*)\].* ({_COLLECTIVES})(?:-start)?\(", line):
            elements = int(np.prod([int(n) for n in match[1].split(",") if n]))
            yield _Collective(match[2], elements, computation in bodies)


def collective_counts(text: str | None) -> dict[str, int]:
    """How many collectives of each kind a compiled program has."""
    return dict(collections.Counter(x.kind for x in _collectives(text)))


def collective_elements(text: str | None) -> dict[str, int]:
    """Elements that each kind of collective of a compiled program gives, and those inside of loops as "loop"."""
    found: collections.Counter[str] = collections.Counter()
    for x in _collectives(text):
        found.update({kind: x.elements for kind in (x.kind, *(["loop"] if x.is_in_loop else []))})
    return dict(found)
