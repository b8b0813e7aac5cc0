"""Formulas that add to a score: what they add, and how large that can be."""

from collections.abc import Callable, Sequence
from typing import Any

from .formulas import BOOL, Formula, Kind, Node

_SUMS = frozenset({"add", "sub", "max", "min", "select_n"})  # no larger than the sum of their inputs' magnitudes
_SAME = frozenset({"neg", "abs", "convert_element_type"})


def added_terms(nodes: Sequence[Node], output: int) -> list[tuple[str, int]] | None:
    """'add' or 'sub', and the number of what does not depend on the score, in order; None where it is more than added.

    `output` is what becomes of the score.
    """
    depends: list[bool] = []
    for node in nodes:
        is_first = node.op == "score"
        depends.append(is_first or (node.op != "read" and any(depends[i] for i in node.inputs)))
    terms: list[tuple[str, int]] = []
    while (node := nodes[output]).op != "score":
        if node.op not in ("add", "sub") or depends[node.inputs[0]] == depends[node.inputs[1]]:
            return None
        score, term = node.inputs if depends[node.inputs[0]] else node.inputs[::-1]
        if node.op == "sub" and score != node.inputs[0]:
            return None
        terms.append((node.op, term))
        output = score
    return terms[::-1]


def within(nodes: Sequence[Node], output: int) -> list[int]:
    """The numbers of all tiles of numbers that one is made of."""
    found, left = set(), [output]
    while left:
        i = left.pop()
        if i not in found and nodes[i].kind is Kind.TILE:
            found.add(i)
            left.extend(nodes[i].inputs)
    return sorted(found)


def magnitude(formula: Formula, i: int, scalar: Callable[[int], Any]) -> Any:
    """What no absolute value of a number is above; NaN or infinite where one may be; None if nothing is known.

    `scalar` gives the value of a number that is one for the tile.
    """
    node = formula.nodes[i]
    if node.op == "literal":
        return abs(float(node.params))
    if node.kind is Kind.SCALAR:
        return abs(scalar(i))
    if node.bounds is not None:
        return float(node.bounds.largest)
    if node.dtype == BOOL:
        return 1.0
    inputs = node.inputs[1:] if node.op == "select_n" else node.inputs
    known = [magnitude(formula, j, scalar) for j in inputs] if node.op in _SUMS | _SAME | {"mul", "square"} else []
    if not known or any(x is None for x in known):
        return None
    if node.op in ("mul", "square"):
        return known[0] * known[-1]
    return sum(known[1:], known[0])


def span(formula: Formula, i: int, index: Callable[[Kind], Any], scalar: Callable[[int], Any]) -> Any:
    """The least and the largest of an integer in a tile, or of the float of one; None if nothing is known.

    `index` gives these two of the numbers of rows or keys, or None.
    """
    node = formula.nodes[i]
    if node.op in ("query_index", "key_index"):
        return index(node.kind)
    if node.bounds is None and node.op != "convert_element_type":
        return None
    if node.kind is Kind.SCALAR:
        x = node.params if node.op == "literal" else scalar(i)
        return x, x
    if node.op not in ("add", "sub", "neg", "convert_element_type"):
        return None
    known = [span(formula, j, index, scalar) for j in node.inputs]
    if any(x is None for x in known):
        return None
    if node.op == "convert_element_type":
        return known[0]
    (low, high), *others = known
    if node.op == "neg":
        return -high, -low
    other_low, other_high = others[0]
    return (low + other_low, high + other_high) if node.op == "add" else (low - other_high, high - other_low)
