"""Base-2 logits of a tile from its products: scale, bias, masks and dropout, with the meaning of `Tiles.logits`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...._semantics.call import Config
from ...._semantics.numerics import LN2, LOG2E, lowest
from ...._semantics.sizes import Sizes
from ..masks import Intervals
from .overlap import widened
from .pallas import COLUMN, ROW, broadcast_index, columns_of, iota, load, pl, plgpu, spread

_SCORES = ("bias", "allowed")
# Biases are clipped at the first; `MASKED` is below, also with a bias; the second stands in place of logits that a mask
# of rows and keys excludes. All are finite in base 2.
_FLOOR, _OUTSIDE = -(2.0**124), -(2.0**126)
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


class RowVectors(NamedTuple):
    """What the masks and scores of a tile say for each query row, in registers."""

    row: Any  # the first
    intervals: Any  # a pair, None, or a function that loads it where it is needed
    scores: dict[str, jax.Array]

    def pair(self) -> Any:
        return self.intervals() if callable(self.intervals) else self.intervals


class TileLogits:
    """Logits of tiles of one head, in the registers of one warpgroup: (block_q, block_kv), or transposed."""

    def __init__(
        self,
        config: Config,
        sizes: Sizes,
        refs: dict[str, Any],
        buffers: dict[str, Any],
        intervals: Intervals,
        head: tuple,
        block_q: int,
        block_kv: int,
        *,
        row_in_block: Any = 0,
        transposed: bool = False,
        scale: Any = None,
        starts_with_bias: bool = False,
    ):
        """`row_in_block` is where this warpgroup's rows start in the buffers (or, transposed, the number of its tile),
        `head` the index (batch..., N).

        `scale` is read here unless it was read before.
        """
        self.config, self.sizes, self.refs, self.buffers, self.intervals = config, sizes, refs, buffers, intervals
        self.head, self.row_in_block, self.block_q, self.block_kv = head, row_in_block, block_q, block_kv
        self.is_transposed, self.q_axis = transposed, int(transposed)
        self.shape = (block_kv, block_q) if transposed else (block_q, block_kv)
        self.q_layout, self.kv_layout = (COLUMN, ROW) if transposed else (ROW, COLUMN)
        ref = refs["scale"]
        self.scale = ref[broadcast_index(head[:-1], ref.shape)] if scale is None else scale
        self.has_bias = any(name.startswith("bias") for name in refs)
        self.has_mask = any(name.startswith("allowed") for name in refs)
        self.has_scores = self.has_bias or self.has_mask
        self.starts_with_bias = starts_with_bias
        # With such a start, what queries are to be multiplied by, and the unit that logits then come in.
        self.power, self.unit = None, Unit()
        if self.starts_with_bias:
            # A further addend takes the division in, in one multiply-add.
            self.power, self.unit = split_scale(self.scale, into_power="allowed_columns" not in refs)

    def rows(self, row: Any, *, late: bool = False) -> RowVectors:
        """Of the rows from `row` on; `late` loads intervals only in tiles that need a mask."""
        scores = {
            name: self._vector(f"{name}_rows", row, self.block_q, self.q_layout)
            for name in _SCORES
            if f"{name}_rows" in self.refs
        }
        load = functools.partial(self.intervals.rows, self.head, row, self.block_q, self.q_layout)
        return RowVectors(row, load if late else load(), scores)

    def of_rows(self, x: jax.Array) -> jax.Array:
        """A value for each query row, in the shape of a tile."""
        return spread(x, self.shape, self.q_axis)

    def _vector(self, name: str, start: Any, count: int, layout: Any) -> jax.Array:
        ref = self.refs[name]
        index = (*broadcast_index(self.head, ref.shape[:-1]), pl.ds(start, count))
        return load(ref.at[index], layout=layout)

    def _score(self, name: str, rows: RowVectors, tile: Any, slot: Any) -> jax.Array:
        """A tile of bias or mask, in registers."""
        if name in rows.scores:
            return self.of_rows(rows.scores[name])
        columns = f"{name}_columns"
        if columns in self.buffers:
            x = load(self.buffers[columns].at[slot], layout=self.kv_layout)
            return spread(x, self.shape, 1 - self.q_axis)
        if columns in self.refs:
            x = self._vector(columns, tile * self.block_kv, self.block_kv, self.kv_layout)
            return spread(x, self.shape, 1 - self.q_axis)
        if self.q_axis == 1:  # a tile of its own for each warpgroup; `prepare` has transposed the mask
            buffer = self.buffers[name].at[slot, self.row_in_block]
            if name != "allowed":
                return plgpu.layout_cast(load(buffer.T, layout=plgpu.Layout.WGMMA_TRANSPOSED), plgpu.Layout.WGMMA)
        else:
            buffer = self.buffers[name].at[slot, pl.ds(self.row_in_block, self.block_q)]
        # There is no conflict-free way from one byte per element in shared memory to this layout.
        return load(buffer, layout=plgpu.Layout.WGMMA, optimized=name != "allowed")

    def scores(self, rows: RowVectors, tile: Any, slot: Any = None) -> dict[str, jax.Array]:
        """Bias and mask of a tile."""
        present = {"bias": self.has_bias, "allowed": self.has_mask}
        return {name: self._score(name, rows, tile, slot) for name in _SCORES if present[name]}

    def scores_before_products(self, rows: RowVectors, tile: Any, slot: Any) -> dict[str, jax.Array]:
        """As `scores`, read before the next products are issued: behind them, the softmax would wait for it."""
        scores = self.scores(rows, tile, slot)
        # The barrier has no lowering for bytes.
        early = {name: x for name, x in scores.items() if x.dtype != jnp.int8}
        return {**scores, **lax.optimization_barrier(early)} if early else scores

    def start(self, scores: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What the products of a tile are added to, and the scores that are left to be added behind.

        The bias, where `starts_with_bias`: no register then holds it while the products are made, and less is left to
        do between them and the exponentials. It is divided by the unit.
        """
        if not self.starts_with_bias:
            return plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), plgpu.Layout.WGMMA), scores
        left = dict(scores)
        bias = left.pop("bias")
        if "allowed_columns" in self.refs:
            return self._clipped(bias) * (1.0 / self.unit.size) + left.pop("allowed"), left
        whole, divided = self._clipped, lambda bias: self._clipped(bias) * (1.0 / self.unit.size)
        return lax.cond(self.unit.size == 1.0, whole, divided, bias), left

    def __call__(
        self,
        products: jax.Array,
        scores: dict[str, jax.Array],
        rows: RowVectors,
        tile: Any,
        multiplier: Any,
        masked: Any,
        then: Callable[[Any, Any], Any],
    ) -> Any:
        """`then(x, factor)`, where the base-2 logits are x * factor; factor is None for 1.

        With bias or mask, x is in base e and factor LOG2E: what is added then needs no scaling, and base 2 comes with
        the subtraction of the maximum (see `to_base_2`). If the products have started with the bias, x is in `unit`,
        and factor without meaning.

        `multiplier` is that of the products, in base 2. `masked` is True, False, or a scalar known at run time; `then`
        is part of what is chosen by it. (One loop whose step branches is faster than a loop for each kind of tile: the
        compiler keeps the products of several loops from overlapping with other work.)
        """
        is_additive = "allowed_columns" in self.refs
        in_mask = scores.get("allowed")

        def full(products: jax.Array) -> tuple[Any, Any]:
            """In a tile that all rows' intervals cover, which has no dead row."""
            if not self.has_scores:
                return products, multiplier
            x = products if self.starts_with_bias else products * (multiplier * LN2)
            addends = [self._clipped(scores["bias"])] if "bias" in scores else []
            addends += [scores["allowed"]] if is_additive and "allowed" in scores else []
            if addends:
                x = x + functools.reduce(jnp.add, addends)
            return (x if is_additive or in_mask is None else jnp.where(in_mask != 0, x, _OUTSIDE)), LOG2E

        def edge(products: jax.Array) -> tuple[Any, Any]:
            x, factor = full(products)
            outside = _OUTSIDE
            if not self.has_scores:
                x, factor, outside = x * self._apart(factor), None, lowest(jnp.float32)
            pair = rows.pair()
            allowed = self.intervals.allowed(pair, self.head, rows.row, tile * self.block_kv, self.shape, self.q_axis)
            dead = self.intervals.dead(pair, self.head, self.shape, self.q_axis)
            if in_mask is not None:
                in_mask_here = in_mask == 0 if is_additive else in_mask != 0
                allowed = allowed & (in_mask_here if dead is None else in_mask_here | dead)
            if dead is not None:
                x = jnp.where(dead, 0.0, x)
            return jnp.where(allowed, x, outside), factor

        if isinstance(masked, bool):
            return then(*(edge(products) if masked else full(products)))
        # The barrier keeps what both kinds of tile do last in the branch, where it is fused with what comes before.
        return lax.cond(masked, lambda p: lax.optimization_barrier(then(*edge(p))), lambda p: then(*full(p)), products)

    def _apart(self, factor: Any) -> jax.Array:
        """The same numbers, one for each row of the tile; to the compiler, others.

        It would take a product that both kinds of tile compute out of the branch, and out of a fused multiply-add.
        """
        rows = plgpu.layout_cast(jnp.full((self.shape[0],), factor, jnp.float32), ROW)
        return columns_of(lax.optimization_barrier(rows), self.shape)

    def _clipped(self, bias: jax.Array) -> jax.Array:
        """In float32. A bfloat16 bias is clipped before, two elements at a time.

        What it is divided by is above half the ceiling: so is the floor then.
        """
        floor = (0.5 * _FLOOR) * self.unit.ceiling if self.starts_with_bias else _FLOOR
        if bias.dtype == jnp.bfloat16:
            return widened(jnp.maximum(bias, jnp.asarray(floor, jnp.bfloat16)))
        return jnp.maximum(bias.astype(jnp.float32), floor)

    def through_mask(self, x: jax.Array, rows: RowVectors, tile: Any, masked: Any) -> jax.Array:
        """Cotangents of logits: zero in dead rows, whose logits are constant.

        Masked ones have no weight, and so are zero but for NaN in padding (0 * NaN).
        """
        if not (self.intervals.is_traced or self.intervals.is_cut):
            return x

        def edge(x: jax.Array) -> jax.Array:
            pair = rows.pair()
            dead = self.intervals.dead(pair, self.head, self.shape, self.q_axis)
            if "length" in self.refs:
                column = tile * self.block_kv
                allowed = self.intervals.allowed(pair, self.head, rows.row, column, self.shape, self.q_axis)
                x = jnp.where(allowed, x, 0.0)
            return x if dead is None else jnp.where(dead, 0.0, x)

        if isinstance(masked, bool):
            return edge(x) if masked else x
        return lax.cond(masked, edge, lambda x: x, x)

    def drop(self, weights: jax.Array, row: Any, tile: Any) -> jax.Array:
        """Weights (or what multiplies them) that dropout keeps, not yet rescaled; the others zero."""
        dropout = self.config.dropout
        if dropout is None:
            return weights
        key, head = self.refs["dropout_key"], self.refs["head_index"]
        at = broadcast_index(self.head[:-1], key.shape[:-1])
        rows = plgpu.broadcasted_iota(jnp.int32, (self.block_q,), 0, layout=self.q_layout) + row
        positions = iota(self.shape, 1 - self.q_axis) + tile * self.block_kv
        keep = dropout.keep_elements(
            (key[(*at, 0)], key[(*at, 1)]),
            head[broadcast_index(self.head, head.shape)],
            rows.astype(jnp.uint32),
            positions.astype(jnp.uint32),
            self.of_rows,
            self.sizes.T,
            self.sizes.S,
        )
        return jnp.where(keep, weights, 0.0)

    @property
    def rescaling(self) -> float:
        return 1.0 if self.config.dropout is None else self.config.dropout.rescaling
