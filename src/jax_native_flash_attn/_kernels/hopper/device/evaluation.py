"""A formula for a tile in registers, number by number.

What one row or one key decides is a vector in registers, and is spread over the tile where the two meet. Integers
become floats at a fraction of the rate of other operations. So the float of a difference of indices, say, is made of
the floats of those, where these are exact; and what rises evenly along the columns of a tile is no tile yet
(`Columns`): making one of it takes one multiply-add with a constant for each element.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..formulas import BOOL, FLOAT, INTEGER, Formula, Kind, Node
from ..pallas import load, plgpu, spread
from .mod_operations import add_columns, apply, as_integer, spread_bool
from .mod_reads import ModTile, Place

_EXACT = 1 << 24  # up to which all integers are floats
_EXACT_OPERATIONS = frozenset({"add", "sub", "mul", "neg", "abs", "max", "min", "select_n"})


class Columns(NamedTuple):
    """step * c + start over the columns c of a tile: a vector, or, where start is one along the rows, a tile."""

    step: Any
    start: Any


class Evaluation:
    """Of one formula for one tile."""

    def __init__(
        self,
        tile: ModTile,
        formula: Formula,
        place: Place,
        score: jax.Array | None = None,
        signs: Mapping[int, Any] | None = None,
    ):
        """`signs`: of absolute values, by which they are their inputs."""
        self.of, self.formula, self.place, self.score, self.signs = tile, formula, place, score, signs or {}
        self.values: dict[int, Any] = tile.scalars_of(formula)
        self.floats: dict[int, Any] = {}
        read = tile.of_rows | dict(zip(tile.mods.vectors(Kind.KEYS), place.read, strict=False))
        self.read = {i: x for (owner, i), x in read.items() if owner is formula}

    def tile(self, i: int) -> jax.Array:
        """A number for each score."""
        node = self.formula.nodes[i]
        x = self.spread(self.value(i), node.kind, Kind.TILE)
        if node.kind is not Kind.SCALAR:
            return x
        return _full(self.of.shape, x, node.dtype)

    def scaled(self, i: int, factor: Any) -> jax.Array:
        """Times a scalar, or as it is for None."""
        node = self.formula.nodes[i]
        if factor is None:
            return self.tile(i)
        kinds = [self.formula.nodes[j].kind for j in node.inputs]
        x = self.value(i)
        if node.kind is Kind.TILE and not isinstance(x, Columns):
            if node.op == "neg":
                return -self.scaled(node.inputs[0], factor)
            if node.op == "mul" and Kind.SCALAR in kinds:
                scalar = node.inputs[kinds.index(Kind.SCALAR)]
                (other,) = (j for j in node.inputs if j != scalar)
                return self.scaled(other, self.value(scalar) * factor)
        x = _times(x, factor) if isinstance(x, Columns) else x * factor
        if node.kind is Kind.SCALAR:
            return _full(self.of.shape, x, FLOAT)
        return self.spread(x, node.kind, Kind.TILE)

    def value(self, i: int) -> Any:
        """In its kind; of floats maybe `Columns`."""
        if i not in self.values:
            self.values[i] = self._value(self.formula.nodes[i], i)
        return self.values[i]

    def as_float(self, i: int) -> Any:
        """Of an integer."""
        if i not in self.floats:
            self.floats[i] = self._as_float(self.formula.nodes[i], i)
        return self.floats[i]

    def _value(self, node: Node, i: int) -> Any:
        if node.op == "literal":
            return node.params
        if node.op == "score":
            return self.score
        if node.op in ("query_index", "key_index") and self.of.is_computed(node.kind):
            return self._numbers(node.kind)
        if node.op in ("query_index", "key_index", "read"):
            x = self.read[i] if i in self.read else self.vector(i)
            return x != 0 if node.dtype == BOOL else x
        if node.op == "convert_element_type" and node.dtype == FLOAT:
            (given,) = node.inputs
            if self.formula.nodes[given].dtype == INTEGER:
                return self.as_float(given)
        return self._applied(i, node, [self.value(j) for j in node.inputs])

    def _as_float(self, node: Node, i: int) -> Any:
        is_small = node.bounds is not None and node.bounds.largest < _EXACT
        if node.kind is Kind.SCALAR or not is_small:
            return jnp.asarray(self.value(i)).astype(FLOAT)
        if node.kind is self.of.along and node.op in ("query_index", "key_index") and self.of.is_computed(node.kind):
            return Columns(1.0, jnp.asarray(self.of.first(node.kind, self.place)).astype(FLOAT))
        nodes = [self.formula.nodes[j] for j in node.inputs]
        are_small = all(x.dtype == BOOL or (x.bounds is not None and x.bounds.largest < _EXACT) for x in nodes)
        if node.op in _EXACT_OPERATIONS and are_small:
            given = zip(node.inputs, nodes, strict=True)
            inputs = [self.value(j) if x.dtype == BOOL else self.as_float(j) for j, x in given]
            return self._applied(i, node._replace(dtype=FLOAT), inputs)
        return self.value(i).astype(FLOAT)

    def _applied(self, i: int, node: Node, inputs: list[Any]) -> Any:
        kinds = [self.formula.nodes[j].kind for j in node.inputs]
        if any(isinstance(x, Columns) for x in inputs):
            if (found := self._of_columns(i, node, inputs, kinds)) is not None:
                return found
            inputs = [self._written_out(x) for x in inputs]
        inputs = [self.spread(x, kind, node.kind) for x, kind in zip(inputs, kinds, strict=True)]
        return apply(node, inputs)

    def _of_columns(self, i: int, node: Node, inputs: list[Any], kinds: list[Kind]) -> Columns | None:
        """What rises evenly still."""
        a, b = inputs[0], inputs[-1]
        if node.op == "neg":
            return _times(a, -1.0)
        if node.op == "abs":
            return _times(a, self.signs[i]) if i in self.signs else None
        if node.op not in ("add", "sub", "mul"):
            return None
        if node.op == "mul":
            columns, other, kind = (a, b, kinds[1]) if isinstance(a, Columns) else (b, a, kinds[0])
            return _times(columns, other) if kind is Kind.SCALAR else None
        if any(
            kind in (self.of.along, Kind.TILE)
            for x, kind in zip(inputs, kinds, strict=True)
            if not isinstance(x, Columns)
        ):
            return None
        (step, start), (other_step, other) = (x if isinstance(x, Columns) else (0.0, x) for x in inputs)
        return (
            Columns(step + other_step, start + other) if node.op == "add" else Columns(step - other_step, start - other)
        )

    def _written_out(self, x: Any) -> Any:
        """As arrays: a vector or a tile."""
        if not isinstance(x, Columns):
            return x
        if np.ndim(x.start):
            return add_columns(spread(x.start, self.of.shape, 0), x.step)
        layout = self.of.layouts[self.of.along is Kind.KEYS]
        numbers = plgpu.broadcasted_iota(jnp.int32, (self.of.shape[1],), 0, layout=layout).astype(FLOAT)
        return numbers * x.step + x.start

    def spread(self, x: Any, kind: Kind, to: Kind) -> Any:
        x = self._written_out(x)
        if kind is to or kind is Kind.SCALAR or to is not Kind.TILE:
            return x
        axis = self.of.axis_of(kind)
        return spread_bool(x, self.of.shape, axis) if x.dtype == BOOL else spread(x, self.of.shape, axis)

    # ---- indices and reads

    def _numbers(self, kind: Kind) -> jax.Array:
        layout, first = self.of.layouts[kind is Kind.KEYS], self.of.first(kind, self.place)
        return plgpu.broadcasted_iota(jnp.int32, (self.of.count(kind),), 0, layout=layout) + first

    def vector(self, i: int) -> jax.Array:
        """What is read for each row or key; of bools, integers."""
        node, key = self.formula.nodes[i], (self.formula, i)
        source, inside = self.of.source(self.formula, i, self.place)
        x = load(self.of.staged.get(key, source), layout=self.of.layouts[node.kind is Kind.KEYS])
        if inside is not None:
            x = jnp.where(jnp.full(x.shape, as_integer(inside)) != 0, x, jnp.asarray(node.params.fill, x.dtype))
        return x


def _times(x: Columns, factor: Any) -> Columns:
    return Columns(x.step * factor, x.start * factor)


def _full(shape: tuple[int, int], x: Any, dtype: Any) -> jax.Array:
    """A tile of one number."""
    if dtype == BOOL:
        return _full(shape, as_integer(x), INTEGER) != 0
    return plgpu.layout_cast(jnp.full(shape, x, dtype), plgpu.Layout.WGMMA)
