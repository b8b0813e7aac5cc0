"""A `score_mod` and a `mask_mod` for tiles in registers."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..formula_addends import magnitude, span, within
from ..formulas import Formula, Kind
from .evaluation import Evaluation
from .mod_reads import ModTile, Place

_ORDINARY = 2.0**80  # no addend up to here needs to be clipped, whatever the unit of logits


class TileMods(ModTile):
    """The functions of a call."""

    def load_rows(self, row: Any) -> None:
        """Load what formulas read of the rows from one on, before the tiles of these rows."""
        place = Place(row, jnp.int32(0))
        for formula, i in self.mods.vectors(Kind.ROWS):
            self.of_rows[formula, i] = Evaluation(self, formula, place).vector(i)

    def read_keys(self, place: Place, *, masked: bool) -> tuple[jax.Array, ...]:
        """What formulas read of the keys of a tile, that of the mask only if the tile may be `masked`."""
        wanted = [(x, i) for x, i in self.mods.vectors(Kind.KEYS) if masked or x is self.mods.score]
        return tuple(Evaluation(self, x, place).vector(i) for x, i in wanted)

    def score(self, score: jax.Array, place: Place) -> tuple[jax.Array, jax.Array | None]:
        """What becomes of scores, in base e; and its derivative, if the formula has it, and it is not always 1."""
        formula = self.mods.score
        assert formula is not None
        evaluation = Evaluation(self, formula, place, score)
        has_slope = len(formula.outputs) > 1 and formula.literal(1) != 1
        value, *slopes = map(evaluation.tile, formula.outputs[: 1 + has_slope])
        return value, slopes[0] if has_slope else None

    @property
    def adds(self) -> bool:
        """Whether the `score_mod` is an addend."""
        return self.mods.score is not None and self.mods.score.addend is not None

    def added(
        self, place: Place, then: Callable[[jax.Array], jax.Array], factor: Any = None, floor: Any = None
    ) -> jax.Array:
        """`then` of what a score is added to, times a scalar, and not below `floor`.

        Most tiles lie on one side of where an absolute value is 0, and most numbers are far from the floor. Both are
        known before: so such tiles take neither, and maybe no more than a multiply-add for each element.
        """
        formula = self.mods.score
        assert formula is not None
        assert formula.addend is not None
        number, scalars = formula.addend, self.scalars_of(formula)
        largest = None if floor is None else magnitude(formula, number, scalars.__getitem__)
        signs, cases = self._signs(formula, place, scalars)
        usual_floor = floor
        if isinstance(largest, float):
            usual_floor = floor = None if largest <= _ORDINARY else floor
        elif largest is not None:
            usual_floor = None
            cases.append(largest <= _ORDINARY)

        def made(signs: Mapping[int, Any], floor: Any) -> jax.Array:
            x = Evaluation(self, formula, place, signs=signs).scaled(number, factor)
            return then(x if floor is None else jnp.maximum(x, floor))

        if not cases:
            return made(signs, floor)
        return lax.cond(
            functools.reduce(jnp.logical_and, cases), lambda: made(signs, usual_floor), lambda: made({}, floor)
        )

    def _signs(self, formula: Formula, place: Place, scalars: Mapping[int, Any]) -> tuple[dict[int, Any], list[Any]]:
        """By which absolute values are their inputs, by number, each where the condition beside is true."""
        signs, conditions = {}, []
        assert formula.addend is not None

        def index(kind: Kind) -> tuple[Any, Any] | None:
            if not self.is_computed(kind):
                return None
            first = self.first(kind, place)
            return first, first + (self.count(kind) - 1)

        for i in within(formula.nodes, formula.addend):
            node = formula.nodes[i]
            known = span(formula, node.inputs[0], index, scalars.__getitem__) if node.op == "abs" else None
            if known is not None:
                low, high = known
                signs[i] = jnp.where(low >= 0, jnp.float32(1.0), jnp.float32(-1.0))
                conditions.append((low >= 0) | (high <= 0))
        return signs, conditions

    def mask(self, place: Place) -> jax.Array:
        formula = self.mods.mask
        assert formula is not None
        return Evaluation(self, formula, place).tile(formula.outputs[0])
