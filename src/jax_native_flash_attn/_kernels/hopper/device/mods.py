"""A `score_mod` and a `mask_mod` for a tile in registers: their formulas, number by number.

What one row or one key decides is a vector in registers, and is spread over the tile where the two meet. Integers
become floats at a fraction of the rate of other operations. So the float of a difference of indices, say, is made of
the floats of those, where these are exact; and a vector of indices along the columns of a tile is none, but a start
that each thread has (`Columns`): adding it to a tile takes one addition of a constant for each element.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..formulas import BOOL, FLOAT, INTEGER, Formula, Kind, Node, Read
from ..operands import Mods
from ..pallas import broadcast_index, load, pl, plgpu, spread
from .mod_operations import add_columns, apply, as_integer, spread_bool

_EXACT = 1 << 24  # up to which all integers are floats
_EXACT_OPERATIONS = frozenset({"add", "sub", "mul", "neg", "abs", "max", "min", "select_n"})


class Columns(NamedTuple):
    """The vector step * c + start over the columns c of a tile; both are scalars."""

    step: Any
    start: Any


class Place(NamedTuple):
    """Number of the first row and of the first key of a tile."""

    row: Any
    key: Any


class TileMods:
    """The functions of a call for tiles of one head, (rows, keys) or transposed."""

    def __init__(
        self, mods: Mods, head: tuple, shape: tuple[int, int], q_axis: int, layouts: tuple[Any, Any], scalars: Any
    ):
        """`layouts`: of vectors along rows and keys; `scalars`: as `read_scalars` gives them, or None."""
        self.mods, self.head, self.shape, self.q_axis, self.layouts = mods, head, shape, q_axis, layouts
        self.along = Kind.ROWS if q_axis == 1 else Kind.KEYS  # what lies along the columns
        self.scalars = read_scalars(mods, head) if scalars is None else scalars
        self.of_rows: dict[tuple[Formula, int], jax.Array] = {}

    def load_rows(self, row: Any) -> None:
        """Load what formulas read of the rows from one on, before the tiles of these rows."""
        place = Place(row, jnp.int32(0))
        for formula, _ in _formulas(self.mods):
            evaluation = _Evaluation(self, formula, place)
            for i in formula.needed:
                node = formula.nodes[i]
                is_number = node.op == "query_index" and self.mods.query_number is not None
                if node.kind is Kind.ROWS and (node.op == "read" or is_number):
                    self.of_rows[formula, i] = evaluation.value(i)

    def score(self, score: jax.Array, place: Place) -> tuple[jax.Array, jax.Array | None]:
        """What becomes of scores, in base e; and its derivative, if the formula has it, and it is not always 1."""
        formula = self.mods.score
        assert formula is not None
        evaluation = _Evaluation(self, formula, place, score)
        has_slope = len(formula.outputs) > 1 and formula.literal(1) != 1
        value, *slopes = map(evaluation.tile, formula.outputs[: 1 + has_slope])
        return value, slopes[0] if has_slope else None

    def mask(self, place: Place) -> jax.Array:
        formula = self.mods.mask
        assert formula is not None
        return _Evaluation(self, formula, place).tile(formula.outputs[0])

    def axis_of(self, kind: Kind) -> int:
        return self.q_axis if kind is Kind.ROWS else 1 - self.q_axis


def scalar_nodes(formula: Formula) -> list[int]:
    """Of numbers that are the same for a head, and not always."""
    return [i for i in formula.needed if formula.nodes[i].kind is Kind.SCALAR and formula.nodes[i].op != "literal"]


def read_scalars(mods: Mods, head: tuple) -> tuple[jax.Array, ...]:
    """Of both formulas, in the order of `scalar_nodes`."""
    found: list[jax.Array] = []
    for formula, first in _formulas(mods):
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
                ref = mods.arrays[first + formula.reads.index(i)]
                index, is_inside = _index(node.params, values, ref, head, None)
                x = ref[index]
                x = x if is_inside is None else jnp.where(is_inside, x, jnp.asarray(node.params.fill, x.dtype))
                values[i] = x != 0 if node.dtype == BOOL else x
            else:
                values[i] = apply(node, [values[j] for j in node.inputs])
            found.append(values[i])
    return tuple(found)


def _formulas(mods: Mods) -> list[tuple[Formula, int]]:
    """Each with the number of its first array."""
    first = 0 if mods.score is None else len(mods.score.reads)
    return [(x, i) for x, i in ((mods.score, 0), (mods.mask, first)) if x is not None]


def _index(read: Read, values: Any, ref: Any, head: tuple, vector: Any) -> tuple[tuple, Any]:
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


class _Evaluation:
    """Of one formula for one tile."""

    def __init__(self, tile: TileMods, formula: Formula, place: Place, score: jax.Array | None = None):
        self.of, self.formula, self.place, self.score = tile, formula, place, score
        self.values: dict[int, Any] = {}
        self.floats: dict[int, Any] = {}
        scalars = iter(tile.scalars)
        for formula, first in _formulas(tile.mods):
            numbers = dict(zip(scalar_nodes(formula), scalars, strict=False))
            if formula is self.formula:
                self.values |= numbers | {i: x for (owner, i), x in tile.of_rows.items() if owner is formula}
                self.first_array = first

    def tile(self, i: int) -> jax.Array:
        """A number for each score."""
        node = self.formula.nodes[i]
        x = self.spread(self.value(i), node.kind, Kind.TILE)
        if node.kind is not Kind.SCALAR:
            return x
        return _full(self.of.shape, x, node.dtype)

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
        if node.op in ("query_index", "key_index"):
            return self._numbers(node.kind)
        if node.op == "read":
            return self._read(node, i)
        if node.op == "convert_element_type" and node.dtype == FLOAT:
            (given,) = node.inputs
            if self.formula.nodes[given].dtype == INTEGER:
                return self.as_float(given)
        return self._applied(node, [self.value(j) for j in node.inputs])

    def _as_float(self, node: Node, i: int) -> Any:
        is_small = node.bounds is not None and node.bounds.largest < _EXACT
        if node.kind is Kind.SCALAR or not is_small:
            return jnp.asarray(self.value(i)).astype(FLOAT)
        if node.kind is self.of.along and node.op in ("query_index", "key_index") and self._is_computed(node.kind):
            return Columns(1.0, jnp.asarray(self._first(node.kind)).astype(FLOAT))
        nodes = [self.formula.nodes[j] for j in node.inputs]
        are_small = all(x.dtype == BOOL or (x.bounds is not None and x.bounds.largest < _EXACT) for x in nodes)
        if node.op in _EXACT_OPERATIONS and are_small:
            given = zip(node.inputs, nodes, strict=True)
            inputs = [self.value(j) if x.dtype == BOOL else self.as_float(j) for j, x in given]
            return self._applied(node._replace(dtype=FLOAT), inputs)
        return self.value(i).astype(FLOAT)

    def _applied(self, node: Node, inputs: list[Any]) -> Any:
        kinds = [self.formula.nodes[j].kind for j in node.inputs]
        if any(isinstance(x, Columns) for x in inputs):
            if (found := self._of_columns(node, inputs, kinds)) is not None:
                return found
            inputs = [self._vector(x) if isinstance(x, Columns) else x for x in inputs]
        inputs = [self.spread(x, kind, node.kind) for x, kind in zip(inputs, kinds, strict=True)]
        return apply(node, inputs)

    def _of_columns(self, node: Node, inputs: list[Any], kinds: list[Kind]) -> Any | None:
        """What needs no vector."""
        if node.op == "neg":
            return Columns(-inputs[0].step, -inputs[0].start)
        if node.op not in ("add", "sub", "mul"):
            return None
        a, b = inputs
        if isinstance(a, Columns) and isinstance(b, Columns):
            sign = -1 if node.op == "sub" else 1
            return None if node.op == "mul" else Columns(a.step + sign * b.step, a.start + sign * b.start)
        columns, other, kind = (a, b, kinds[1]) if isinstance(a, Columns) else (b, a, kinds[0])
        if node.op == "mul":
            return Columns(columns.step * other, columns.start * other) if kind is Kind.SCALAR else None
        if node.op == "sub" and columns is b:
            columns = Columns(-b.step, -b.start)
        if node.op == "sub" and columns is a:
            other = -other
        if kind is Kind.SCALAR:
            return Columns(columns.step, columns.start + other)
        return add_columns(self.spread(other + columns.start, kind, Kind.TILE), columns.step)

    def _vector(self, x: Columns) -> jax.Array:
        layout = self.of.layouts[self.of.along is Kind.KEYS]
        numbers = plgpu.broadcasted_iota(jnp.int32, (self.of.shape[1],), 0, layout=layout).astype(FLOAT)
        return numbers * x.step + x.start

    def spread(self, x: Any, kind: Kind, to: Kind) -> Any:
        if isinstance(x, Columns):
            x = self._vector(x)
        if kind is to or kind is Kind.SCALAR or to is not Kind.TILE:
            return x
        axis = self.of.axis_of(kind)
        return spread_bool(x, self.of.shape, axis) if x.dtype == BOOL else spread(x, self.of.shape, axis)

    # ---- indices and reads

    def _is_computed(self, kind: Kind) -> bool:
        return (self.of.mods.query_number if kind is Kind.ROWS else self.of.mods.key_number) is None

    def _first(self, kind: Kind) -> Any:
        return self.place.row + self.of.mods.first_row if kind is Kind.ROWS else self.place.key

    def _count(self, kind: Kind) -> int:
        return self.of.shape[self.of.axis_of(kind)]

    def _slice(self, kind: Kind) -> Any:
        return pl.ds(self.place.row if kind is Kind.ROWS else self.place.key, self._count(kind))

    def _numbers(self, kind: Kind) -> jax.Array:
        mods, layout = self.of.mods, self.of.layouts[kind is Kind.KEYS]
        ref = mods.query_number if kind is Kind.ROWS else mods.key_number
        if ref is None:
            return plgpu.broadcasted_iota(jnp.int32, (self._count(kind),), 0, layout=layout) + self._first(kind)
        index = (*broadcast_index(self.of.head[:-1], ref.shape[:-1]), self._slice(kind))
        return load(ref.at[index], layout=layout)

    def _read(self, node: Node, i: int) -> jax.Array:
        ref = self.of.mods.arrays[self.first_array + self.formula.reads.index(i)]
        scalars = {j: self.value(j) for j in node.params.at if not isinstance(j, Kind)}
        index, inside = _index(node.params, scalars, ref, self.of.head, self._slice(node.kind))
        x = load(ref.at[index], layout=self.of.layouts[node.kind is Kind.KEYS])
        if inside is not None:
            x = jnp.where(jnp.full(x.shape, as_integer(inside)) != 0, x, jnp.asarray(node.params.fill, x.dtype))
        return x != 0 if node.dtype == BOOL else x


def _full(shape: tuple[int, int], x: Any, dtype: Any) -> jax.Array:
    """A tile of one number."""
    if dtype == BOOL:
        return _full(shape, as_integer(x), INTEGER) != 0
    return plgpu.layout_cast(jnp.full(shape, x, dtype), plgpu.Layout.WGMMA)
