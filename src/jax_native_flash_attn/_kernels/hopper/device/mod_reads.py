"""A tile as formulas see it, and what they read of arguments: numbers once for a head, vectors along rows or keys."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..formulas import BOOL, Formula, Kind, Read
from ..operands import Mods
from ..pallas import broadcast_index, pl
from .mod_operations import apply


class Place(NamedTuple):
    """Number of the first row and of the first key of a tile; and what was read of its keys before."""

    row: Any
    key: Any
    read: tuple[jax.Array, ...] = ()


def scalar_nodes(formula: Formula) -> list[int]:
    """Of numbers that are the same for a head, and not always."""
    return [i for i in formula.needed if formula.nodes[i].kind is Kind.SCALAR and formula.nodes[i].op != "literal"]


def read_scalars(mods: Mods, head: tuple) -> tuple[jax.Array, ...]:
    """Of both formulas, in the order of `scalar_nodes`."""
    found: list[jax.Array] = []
    for formula, _ in mods.formulas:
        values: dict[int, Any] = {}
        for i in formula.needed:
            node = formula.nodes[i]
            if node.op == "literal":
                values[i] = node.params
            if i not in scalar_nodes(formula):
                continue
            if node.op in ("batch", "head"):
                ref = mods.batch_number if node.op == "batch" else mods.head_number
                at = head[:-1] if node.op == "batch" else head
                values[i] = ref[broadcast_index(at, ref.shape)]
            elif node.op == "read":
                ref = mods.array(formula, i)
                index, is_inside = index_of(node.params, values, ref, head, None)
                x = ref[index]
                x = x if is_inside is None else jnp.where(is_inside, x, jnp.asarray(node.params.fill, x.dtype))
                values[i] = x != 0 if node.dtype == BOOL else x
            else:
                values[i] = apply(node, [values[j] for j in node.inputs])
            found.append(values[i])
    return tuple(found)


def index_of(read: Read, values: Any, ref: Any, head: tuple, vector: Any) -> tuple[tuple, Any]:
    """Into what `host/mods.py` made of an array; and whether that is inside, where that is asked."""
    num_batch = len(head) - 1
    index, inside = list(broadcast_index(head[:-1], ref.shape[:num_batch])), None
    for at, size in zip((x for x in read.at if not isinstance(x, Kind)), ref.shape[num_batch:], strict=False):
        i = values[at]
        if read.fill is not None:
            is_inside = (i >= 0) & (i < size)
            inside = is_inside if inside is None else inside & is_inside
        index.append(jnp.minimum(jnp.maximum(jnp.int32(i), 0), size - 1))
    return (*index, *(() if vector is None else (vector,))), inside


class ModTile:
    """Tiles of one head, (rows, keys) or transposed, and numbers that are the same for all of them."""

    def __init__(
        self, mods: Mods, head: tuple, shape: tuple[int, int], q_axis: int, layouts: tuple[Any, Any], scalars: Any
    ):
        """`layouts`: of vectors along rows and keys; `scalars`: as `read_scalars` gives them, or None."""
        self.mods, self.head, self.shape, self.q_axis, self.layouts = mods, head, shape, q_axis, layouts
        self.along = Kind.ROWS if q_axis == 1 else Kind.KEYS  # what lies along the columns
        self.scalars = read_scalars(mods, head) if scalars is None else scalars
        self.of_rows: dict[tuple[Formula, int], jax.Array] = {}
        self.staged: dict[tuple[Formula, int], Any] = {}  # what of them is in shared memory

    def axis_of(self, kind: Kind) -> int:
        return self.q_axis if kind is Kind.ROWS else 1 - self.q_axis

    def count(self, kind: Kind) -> int:
        return self.shape[self.axis_of(kind)]

    def is_computed(self, kind: Kind) -> bool:
        return (self.mods.query_number if kind is Kind.ROWS else self.mods.key_number) is None

    def first(self, kind: Kind, place: Place) -> Any:
        return place.row + self.mods.first_row if kind is Kind.ROWS else place.key

    def source(self, formula: Formula, i: int, place: Place) -> tuple[Any, Any]:
        """Where in global memory a vector along rows or keys is, and whether that is inside, where that is asked."""
        node, ref = formula.nodes[i], self.mods.array(formula, i)
        at = pl.ds(place.row if node.kind is Kind.ROWS else place.key, self.count(node.kind))
        if node.op != "read":
            return ref.at[(*broadcast_index(self.head[:-1], ref.shape[:-1]), at)], None
        nodes, scalars = formula.nodes, self.scalars_of(formula)
        numbers = (j for j in node.params.at if not isinstance(j, Kind))
        values = {j: nodes[j].params if nodes[j].op == "literal" else scalars[j] for j in numbers}
        index, inside = index_of(node.params, values, ref, self.head, at)
        return ref.at[index], inside

    def scalars_of(self, formula: Formula) -> dict[int, Any]:
        """By the numbers of their nodes."""
        scalars = iter(self.scalars)
        found = {x: dict(zip(scalar_nodes(x), scalars, strict=False)) for x, _ in self.mods.formulas}
        return found[formula]
