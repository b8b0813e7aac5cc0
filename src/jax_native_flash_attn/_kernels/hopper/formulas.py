"""A `score_mod` or `mask_mod` as a kernel evaluates it: a list of operations, each on as few numbers as it depends on.

A number of a tile is one for the whole tile, for each query row, for each key, or for each score (`Kind`). Reads of
arguments are by indices of the first three kinds: a number, or a vector along rows or keys. Signs of indices are known,
so that what `jnp` does with a negative one is left out.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from .formula_bounds import Bounds

FLOAT, INTEGER, BOOL = (np.dtype(x) for x in ("float32", "int32", "bool"))
# What `device/mods.py` computes.
ARITHMETIC = frozenset(
    {"add", "sub", "mul", "div", "max", "min", "neg", "abs", "sign", "square", "integer_pow", "clamp"}
)
OF_FLOATS = frozenset({"exp", "exp2", "log", "tanh", "logistic", "sqrt", "rsqrt", "one_minus_square"})
OF_INTEGERS = frozenset({"rem", "shift_left", "shift_right_arithmetic"})
LOGICAL = frozenset({"and", "or", "xor", "not"})
COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
CHOICES = frozenset({"select_n", "convert_element_type"})
LOWERED = ARITHMETIC | OF_FLOATS | OF_INTEGERS | LOGICAL | COMPARISONS | CHOICES


class NotLowered(Exception):
    """Why kernels cannot evaluate a function."""


class Kind(IntEnum):
    """What a number is one of; as bits."""

    SCALAR = 0
    ROWS = 1
    KEYS = 2
    TILE = 3


@dataclass(frozen=True, eq=False)
class Whole:
    """An array that arguments alone decide, which XLA computes beforehand.

    Attributes:
      argument: the number of the argument that it is, or None.
      primitive, params, inputs: else, what it is made by, and of which others (or NumPy arrays).
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    argument: int | None = None
    primitive: Any = None
    params: Any = None
    inputs: tuple[Any, ...] = ()


class Read(NamedTuple):
    """An element of an array: at each axis the number of a node, or ROWS or KEYS for all of these, in order.

    `fill` is what stands outside; None: the nearest element.
    """

    array: Whole
    at: tuple[Any, ...]
    fill: Any | None


class Node(NamedTuple):
    """One number, of a kind.

    Attributes:
      op: 'score', one of `INDICES`, 'literal', 'read', or a primitive.
      inputs: of a primitive, the numbers of nodes.
      params: of a primitive; the value of a literal; a `Read`.
      bounds: between which an integer lies.
    """

    kind: Kind
    dtype: np.dtype
    op: str
    inputs: tuple[int, ...] = ()
    params: Any = None
    bounds: Bounds | None = None


@dataclass(frozen=True, eq=False)
class Formula:
    """Attributes:

    nodes: in the order in which they can be computed.
    outputs: what the function gives; and of a score's, beside that, its derivative with respect to the score.
    addend: the number of what a score is added to, if it is no more than that; see `added_terms`.
    needed: the numbers of the nodes that these depend on, and `reads` of those that are reads.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    addend: int | None
    needed: tuple[int, ...]
    reads: tuple[int, ...]

    def literal(self, output: int) -> Any | None:
        """An output that is the same number for all scores, or None."""
        node = self.nodes[self.outputs[output]]
        return node.params if node.op == "literal" else None


class Numbers(NamedTuple):
    """What rows and keys of a call are numbered: from `first_row` and from 0 on; with None, anyhow."""

    T: int
    S: int
    first_row: int | None
