"""What kernels read for a `score_mod` and a `mask_mod`: their formulas, and the arrays that these read."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...._semantics.call import Config, Inputs
from ...._semantics.mods import args_of, map_axes
from ..formula_builder import formulas
from ..formulas import FLOAT, INTEGER, Kind, Read, Whole
from ..operands import Mods
from ..pallas import pad_axis, round_up


def prepare_mods(config: Config, inputs: Inputs, block_rows: int, block_kv: int, *, needs_slope: bool) -> Mods | None:
    """Vectors along rows and keys are padded to whole blocks."""
    given, z = inputs.mods, inputs.sizes
    if given is None:
        return None
    found = formulas(config, z.T, z.S, needs_slope=needs_slope)
    score, mask = found.get("score_mod"), found.get("mask_mod")
    assert not isinstance(score, str)
    assert not isinstance(mask, str)
    arrays: list[jax.Array] = []
    for formula, program in ((score, config.score_mod), (mask, config.mask_mod)):
        if formula is None or program is None:
            continue
        args = [
            x.astype(v.aval.dtype)
            for x, v in zip(
                args_of(program, given.args).values(),
                program.jaxpr.invars[int(program.has_score) + 4 :],
                strict=True,
            )
        ]
        rank = given.head_number.ndim - 1
        for i in formula.reads:
            read: Read = formula.nodes[i].params
            arrays.append(_as_read(_evaluated(read.array, args, rank), read, rank, (z.T, block_rows), (z.S, block_kv)))
    is_plain = config.first_row is not None
    return Mods(
        batch_number=given.batch_number,
        head_number=given.head_number,
        query_number=None if is_plain else pad_axis(given.query_number, -1, round_up(z.T, block_rows)),
        key_number=None if is_plain else pad_axis(given.key_number, -1, round_up(z.S, block_kv)),
        arrays=tuple(arrays),
        score=score,
        mask=mask,
        first_row=config.first_row or 0,
    )


def _evaluated(whole: Whole, args: Sequence[jax.Array], rank: int) -> jax.Array:
    """With as many batch axes in front."""

    def of_one(*args: jax.Array) -> Any:
        known: dict[Whole, Any] = {}

        def value(x: Any) -> Any:
            if not isinstance(x, Whole):
                return jnp.asarray(x)
            if x not in known:
                inputs = [value(y) for y in x.inputs]
                if x.argument is not None:
                    known[x] = args[x.argument]
                else:
                    known[x] = inputs[0] if x.primitive is None else x.primitive.bind(*inputs, **x.params)
            return known[x]

        return value(whole)

    if whole.argument is not None:
        return args[whole.argument]
    return map_axes(of_one, args, rank)


def _as_read(x: jax.Array, read: Read, rank: int, rows: tuple[int, int], keys: tuple[int, int]) -> jax.Array:
    """Vectors last, and as long as whole blocks of rows or of keys, where a kernel reads one; in 32 bits."""
    x = x.astype(FLOAT if jnp.issubdtype(x.dtype, jnp.floating) else INTEGER)
    for axis, at in enumerate(read.at):
        if not isinstance(at, Kind):
            continue
        length = round_up(*(rows if at is Kind.ROWS else keys))
        x = jnp.moveaxis(x, rank + axis, -1)[..., :length]
        missing = [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])]
        if read.fill is not None:
            x = jnp.pad(x, missing, constant_values=np.asarray(read.fill).astype(x.dtype))
        elif missing[-1][1]:
            x = jnp.pad(x, missing, mode="edge")
    return x
