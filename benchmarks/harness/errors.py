"""Errors against the float64 oracle of the tests, in memory linear in the length.

Chosen query rows of chosen batch elements are compared: their outputs need only those rows, and
when the cotangent is zero on all other rows, so do all gradients, those of key, value and bias
included. Small calls are compared whole.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.inputs import AttentionInputs
from harness.oracle import Masking, allowed_pairs, dense_numpy
from harness.shapes import AttentionShape

Float64Array = NDArray[np.float64]

# Elements of the scores and of the keys that the oracle makes at most, 64 and 128 MiB.
_MAX_SCORES = 2**23
_MAX_KEYS = 2**24
# Rather these many rows of some batch elements than fewer rows of more elements.
_ROWS_BEFORE_BATCHES = 16


class Selection(NamedTuple):
    """What is compared: these query rows of these batch elements."""

    batches: NDArray[np.int64]
    rows: NDArray[np.int64]

    def of_batch(self, array: Any) -> np.ndarray:
        """The chosen elements of the leading axis, unless it is broadcast."""
        return np.asarray(array if array.shape[0] == 1 else array[self.batches])

    def of_rows(self, array: np.ndarray, axis: int) -> np.ndarray:
        """The chosen elements of the axis of query rows, unless it is broadcast."""
        return array if array.shape[axis] == 1 else array.take(self.rows, axis)


def select(shape: AttentionShape, max_scores: int = _MAX_SCORES) -> Selection:
    """Everything if that is cheap, else the last, the first and some between."""
    scores_per_row = shape.num_heads * shape.key_value_length
    keys_per_batch = shape.key_value_length * shape.num_key_value_heads * shape.head_dim
    rows_wanted = min(shape.query_length, _ROWS_BEFORE_BATCHES)
    batches = min(max_scores // (scores_per_row * rows_wanted), _MAX_KEYS // keys_per_batch)
    batches = max(1, min(shape.batch, batches))
    rows = max(1, min(shape.query_length, max_scores // (scores_per_row * batches)))

    def spread(size: int, count: int) -> NDArray[np.int64]:
        return np.unique(np.linspace(size - 1, 0, count).astype(np.int64))

    return Selection(spread(shape.batch, batches), spread(shape.query_length, rows))


def with_cotangent_on(inputs: AttentionInputs, selection: Selection) -> AttentionInputs:
    """The same inputs with the output's cotangent zero outside `selection`."""
    keep = np.zeros((*inputs.query.shape[:2], 1, 1), bool)
    keep[np.ix_(*selection)] = True
    return inputs._replace(cotangent=inputs.cotangent * keep.astype(inputs.cotangent.dtype))


def reference_results(shape: AttentionShape, inputs: AttentionInputs, selection: Selection) -> dict[str, Float64Array]:
    """The selected output and the gradients of a loss of it, in float64.

    Of the gradients, those elements that `selection` leaves nonzero.
    """
    batch, rows = len(selection.batches), len(selection.rows)
    heads, key_heads, keys = shape.num_heads, shape.num_key_value_heads, shape.key_value_length
    group = heads // key_heads

    def float64(array: Any) -> Float64Array:
        return selection.of_batch(array).astype(np.float64)

    # The query heads that share a key/value head are further rows of it: the keys are not repeated.
    def grouped(array: Any) -> Float64Array:
        """(B, T, N, H) as (B, G * rows, K, H)."""
        picked = selection.of_rows(float64(array), 1).reshape(batch, rows, key_heads, group, shape.head_dim)
        return picked.transpose(0, 3, 1, 2, 4).reshape(batch, group * rows, key_heads, shape.head_dim)

    def ungrouped(array: Float64Array) -> Float64Array:
        """The inverse of `grouped`, of the chosen rows."""
        parts = array.reshape(batch, group, rows, key_heads, shape.head_dim)
        return parts.transpose(0, 2, 3, 1, 4).reshape(batch, rows, heads, shape.head_dim)

    def grouped_scores(scores: np.ndarray) -> np.ndarray:
        """Anything that broadcasts to (B, N, rows, S), as (B, K, G * rows, S)."""
        return np.broadcast_to(scores, (batch, heads, rows, keys)).reshape(batch, key_heads, group * rows, keys)

    lengths = inputs.key_value_seq_lengths
    allowed = allowed_pairs(
        (batch, 1 if shape.mask_shape is None else heads, shape.query_length, keys),
        None if inputs.mask is None else selection.of_rows(selection.of_batch(inputs.mask), 2),
        is_causal=shape.is_causal,
        local_window_size=shape.local_window_size,
        key_value_seq_lengths=None if lengths is None else selection.of_batch(lengths),
        rows=selection.rows,
    )
    masks = Masking(
        allowed=grouped_scores(allowed),
        query_valid=np.ones((batch, group * rows), bool),
        key_valid=np.ones((batch, keys), bool),
        factor=1.0,
    )
    bias = np.zeros((1, 1, 1, 1)) if inputs.bias is None else selection.of_rows(float64(inputs.bias), 2)
    exact = dense_numpy(
        grouped(inputs.query),
        float64(inputs.key),
        float64(inputs.value),
        grouped_scores(bias),
        np.float64(shape.head_dim**-0.5),
        masks,
        grouped(inputs.cotangent),
    )
    results = {
        "out": ungrouped(exact.out),
        "query": ungrouped(exact.dquery),
        "key": exact.dkey,
        "value": exact.dvalue,
    }
    if inputs.bias is not None:
        of_scores = exact.dlogits.reshape(batch, heads, rows, keys)
        summed = tuple(axis for axis, size in enumerate(inputs.bias.shape) if size == 1 != of_scores.shape[axis])
        results["bias"] = of_scores.sum(axis=summed, keepdims=True)
    return results


def largest_error(
    results: Mapping[str, np.ndarray], reference: Mapping[str, Float64Array], selection: Selection
) -> float:
    """Largest deviation from the reference, as a fraction of the result's largest element.

    The worst of output and gradients, as far as `results` has them.
    """
    worst = 0.0
    for name, result in results.items():
        actual, expected = selection.of_batch(result), reference[name]
        if name in ("out", "query", "bias"):
            actual = selection.of_rows(actual, 2 if name == "bias" else 1)
        difference = np.abs(actual.astype(np.float64) - expected).max()
        largest = np.abs(expected).max()
        # With a single key the query's gradient is zero: nothing to take a fraction of.
        worst = max(worst, float(difference / largest if largest > 1e-12 else difference))
    return worst
