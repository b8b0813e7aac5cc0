"""Elements of arrays in a formula: an array some of whose axes are at one index, and shapes of a few numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from .formulas import BOOL, Kind, Whole


@dataclass(frozen=True, eq=False)
class View:
    """An array, or what is left of it where some axes are at one index; `axes`: those of the array, None of size 1."""

    array: Whole
    at: tuple[int | None, ...]
    axes: tuple[int | None, ...]
    fill: Any | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(1 if a is None else self.array.shape[a] for a in self.axes)


def view_of(whole: Whole) -> View:
    return View(whole, (None,) * len(whole.shape), tuple(range(len(whole.shape))))


def known_axis(axis: int | None) -> int:
    assert axis is not None
    return axis


def why_not_read(kind: Kind, *, are_places: bool) -> str:
    """By an index of a kind; `are_places`: whether numbers of rows and keys are their places in arrays."""
    name = {Kind.ROWS: "query_index", Kind.KEYS: "key_index", Kind.TILE: "query_index and key_index, or a score"}
    if not are_places and kind in (Kind.ROWS, Kind.KEYS):
        return f"reads an argument by {name[kind]}, which positions, an offset or a ring make another than its place"
    return f"gathers from an argument by an index that it computes from {name.get(kind, 'others')}"


def fill_value_of(given: Any, dtype: np.dtype) -> Any:
    if given is not None:
        return given
    if jnp.issubdtype(dtype, jnp.floating):
        return np.nan
    if dtype == BOOL:
        return True
    return np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max


def reshaped(name: str, params: Any, elements: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    if name == "concatenate":
        return np.concatenate(elements, params["dimension"])
    if name == "broadcast_in_dim":
        lead = np.ones(len(shape), int)
        for axis, size in zip(params["broadcast_dimensions"], elements[0].shape, strict=True):
            lead[axis] = size
        return np.broadcast_to(elements[0].reshape(tuple(lead)), shape)
    return elements[0].reshape(shape)
