"""Errors against attention computed in float64 with NumPy, in memory linear in the length.

Chosen query rows of chosen batch elements are compared: their outputs need only those rows, and
when the cotangent is zero on all other rows, so do all gradients, those of key, value and bias
included. Small calls are compared whole.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from attention_shapes import GRADIENT, AttentionInputs, AttentionShape
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

# Elements of the scores and of the keys that the reference makes at most, 64 and 128 MiB.
_MAX_SCORES = 2**23
_MAX_KEYS = 2**24
# Rather these many rows of some batch elements than fewer rows of more elements.
_ROWS_BEFORE_BATCHES = 16


class Selection(NamedTuple):
    """What is compared: these query rows of these batch elements."""

    batches: NDArray[np.int64]
    rows: NDArray[np.int64]


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


def _selected(array: jax.Array | np.ndarray, batches: NDArray[np.int64]) -> np.ndarray:
    """The chosen elements of the leading axis, unless it is broadcast."""
    return np.asarray(array if array.shape[0] == 1 else array[batches])


def reference_results(
    shape: AttentionShape, mode: str, inputs: AttentionInputs, selection: Selection
) -> dict[str, Float64Array]:
    """The selected output, and in the gradient mode the gradients of a loss of it, in float64.

    Of the gradients, those elements that `selection` leaves nonzero.
    """
    batches, rows = selection
    inputs = AttentionInputs(
        *(None if array is None else _selected(array, batches) for array in inputs)  # pyright: ignore
    )
    batch, heads, head_dim = len(batches), shape.num_heads, shape.head_dim
    key_heads = shape.num_key_value_heads
    group = heads // key_heads

    def float64(array: object) -> Float64Array:
        return np.asarray(array).astype(np.float64)

    def by_head(array: object) -> Float64Array:
        """(B, rows, N, H) as (B, K, G * rows, H): a group shares its keys."""
        picked = float64(array)[:, rows].transpose(0, 2, 1, 3)
        return picked.reshape(batch, key_heads, group * len(rows), head_dim)

    def by_row(array: Float64Array) -> Float64Array:
        """The inverse of `by_head`."""
        return array.reshape(batch, heads, len(rows), head_dim).transpose(0, 2, 1, 3)

    def of_rows(scores: np.ndarray) -> np.ndarray:
        """A bias or mask of shape (1 or B, 1 or N, 1 or T, 1 or S), cut to `rows`."""
        return scores if scores.shape[2] == 1 else scores[:, :, rows]

    query, key, value = (
        by_head(inputs.query),
        float64(inputs.key).transpose(0, 2, 1, 3),
        float64(inputs.value).transpose(0, 2, 1, 3),
    )
    scale = head_dim**-0.5
    by_key_head = (batch, key_heads, group * len(rows), shape.key_value_length)
    logits = (scale * (query @ key.swapaxes(2, 3))).reshape(batch, heads, len(rows), shape.key_value_length)
    if inputs.bias is not None:
        logits += of_rows(float64(inputs.bias))
    allowed = np.ones((1, 1, len(rows), shape.key_value_length), bool)
    keys = np.arange(shape.key_value_length)
    if shape.is_causal:
        allowed = allowed & (keys <= rows[:, None])
    if shape.local_window_size is not None:
        left, right = shape.local_window_size
        allowed = allowed & (keys >= rows[:, None] - left) & (keys <= rows[:, None] + right)
    if inputs.key_value_seq_lengths is not None:
        lengths = np.asarray(inputs.key_value_seq_lengths)[:, None, None, None]
        allowed = allowed & (keys < lengths)
    if inputs.mask is not None:
        allowed = allowed & of_rows(np.asarray(inputs.mask))
    # Finite, so that a row without any allowed key becomes the mean of all values.
    np.putmask(logits, ~np.broadcast_to(allowed, logits.shape), -1e300)
    logits -= logits.max(axis=-1, keepdims=True)
    probs = np.exp(logits, out=logits)
    probs /= probs.sum(axis=-1, keepdims=True)
    probs = probs.reshape(by_key_head)
    out = probs @ value
    if mode != GRADIENT:
        return {"out": by_row(out)}

    cotangent = by_head(inputs.cotangent)
    value_gradient = probs.swapaxes(2, 3) @ cotangent
    delta = (cotangent * out).sum(axis=-1, keepdims=True)
    logits_gradient = probs * (cotangent @ value.swapaxes(2, 3) - delta)
    # A row without any allowed key has equal weights whatever its query: nothing flows to logits.
    logits_gradient *= np.broadcast_to(allowed, (batch, heads, *allowed.shape[2:])).reshape(by_key_head)
    results = {
        "out": by_row(out),
        "query": by_row(scale * (logits_gradient @ key)),
        "key": (scale * (logits_gradient.swapaxes(2, 3) @ query)).transpose(0, 2, 1, 3),
        "value": value_gradient.transpose(0, 2, 1, 3),
    }
    if inputs.bias is not None:
        bias_gradient = logits_gradient.reshape(batch, heads, len(rows), shape.key_value_length)
        summed = tuple(
            axis for axis, size in enumerate(inputs.bias.shape) if size == 1 and bias_gradient.shape[axis] != 1
        )
        results["bias"] = bias_gradient.sum(axis=summed, keepdims=True)
    return results


def largest_error(
    results: Mapping[str, np.ndarray], reference: Mapping[str, Float64Array], selection: Selection
) -> float:
    """Largest deviation from the reference, as a fraction of the result's largest element.

    The worst of output and gradients.
    """
    batches, rows = selection
    worst = 0.0
    for name, expected in reference.items():
        actual = _selected(results[name], batches)
        if name in ("out", "query"):
            actual = actual[:, rows]
        elif name == "bias" and actual.shape[2] != 1:
            actual = actual[:, :, rows]
        difference = np.abs(actual.astype(np.float64) - expected).max()
        largest = np.abs(expected).max()
        # With a single key the query's gradient is zero: nothing to take a fraction of.
        worst = max(worst, float(difference / largest if largest > 1e-12 else difference))
    return worst
