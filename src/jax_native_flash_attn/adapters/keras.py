"""For Keras with its JAX backend: attention layers, and a context manager for those that a model has."""

# Pyright takes this file for the library where that is not installed.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

try:
    import keras
except ModuleNotFoundError as error:
    if error.name != "keras":
        error.add_note("Keras looks for another backend: set the environment variable KERAS_BACKEND=jax before.")
    raise

from .._api import flash_attention
from ._attend import as_bool

if keras.backend.backend() != "jax":
    raise ImportError(
        f"Keras must run on its JAX backend, got {keras.backend.backend()!r}: set the environment variable "
        "KERAS_BACKEND=jax before Keras is imported"
    )

# In place of a key for rows without any: far below all logits, and above what stands for -inf.
_NO_KEY = -1e30


class _Masks(NamedTuple):
    """What a call of a layer may attend: the parts of a mask (B, T, S), and a function that makes it of them."""

    query_mask: Any = None  # (B, T)
    key_mask: Any = None  # (B, S)
    attention_mask: Any = None  # (B, T, S), or broadcastable to (B, N, T, S)
    is_causal: bool = False
    window: tuple[int, int] | None = None
    joined: Callable[[], Any] = lambda: None


def _methods(layer_class: Any) -> dict[str, Callable[..., Any]]:
    """The two methods of a layer of Keras in which attention is computed, with `flash_attention`.

    `_compute_attention` is the one that Keras' documentation has for other implementations of attention. What
    `_compute_attention_mask` gives is handed to it, and to nobody else.
    """
    own_mask, own_attention = layer_class._compute_attention_mask, layer_class._compute_attention

    def _compute_attention_mask(
        self: Any,
        query: Any,
        value: Any,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        use_causal_mask: bool = False,
    ) -> Any:
        joined = functools.partial(
            own_mask, self, query, value, query_mask, value_mask, key_mask, attention_mask, use_causal_mask
        )
        if any(getattr(type(self), name) is not method for name, method in methods.items()):
            return joined()  # a subclass with a method of its own, which expects an array
        key_masks = [as_bool(mask) for mask in (value_mask, key_mask) if mask is not None]
        window = self.get_config().get("sliding_window")
        return _Masks(
            as_bool(query_mask),
            functools.reduce(jnp.logical_and, key_masks) if key_masks else None,
            as_bool(attention_mask),
            use_causal_mask,
            None if window is None else (window - 1, window - 1),
            joined,
        )

    def _compute_attention(
        self: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> tuple[Any, Any]:
        if return_attention_scores or getattr(self, "_return_attention_scores", False):
            mask = attention_mask.joined() if isinstance(attention_mask, _Masks) else attention_mask
            options = {"return_attention_scores": True} if return_attention_scores else {}
            options |= {"use_causal_mask": True} if use_causal_mask else {}
            return own_attention(self, query, key, value, mask, training, **options)
        if query.ndim != 4:
            mask = attention_mask.joined() if isinstance(attention_mask, _Masks) else attention_mask
            return _attend_over_axes(self, query, key, value, as_bool(mask), bool(training)), None
        masks = attention_mask
        if not isinstance(masks, _Masks):
            masks = _Masks(attention_mask=as_bool(attention_mask), is_causal=use_causal_mask)
        return _attend(self, query, key, value, masks, bool(training)), None

    methods = {"_compute_attention_mask": _compute_attention_mask, "_compute_attention": _compute_attention}
    return methods


def _attend(
    layer: Any, query: Any, key: Any, value: Any, masks: _Masks, training: bool, *, has_several_axes: bool = False
) -> Any:
    """As Keras does it: rows without keys give 0 with dropout or several axes, else the mean of all values."""
    B, T, N, _ = query.shape
    S = key.shape[1]
    ids: dict[str, Any] = {}
    if masks.query_mask is not None or masks.key_mask is not None:
        for name, mask, length in ("query", masks.query_mask, T), ("key_value", masks.key_mask, S):
            is_token = jnp.broadcast_to(True if mask is None else mask, (B, length))
            ids[f"{name}_segment_ids"] = jnp.where(is_token, 0, -1)
    mask = masks.attention_mask
    while mask is not None and mask.ndim < 4:
        mask = jnp.expand_dims(mask, -3)
    gives_zeros = layer.dropout > 0 or has_several_axes
    drops = training and layer.dropout > 0
    # Keras repeats the keys and values of a group, once for each query head.
    repeats = getattr(layer, "num_repeats", 1)
    out = flash_attention(
        query,
        key[:, :, ::repeats],
        value[:, :, ::repeats],
        mask=mask,
        is_causal=masks.is_causal,
        query_offset=0,  # as Keras aligns causal masks
        local_window_size=masks.window,
        dropout_rate=layer.dropout if drops else 0.0,
        dropout_rng=layer._dropout_layer.seed_generator.next() if drops else None,
        sinks=jnp.full(N, _NO_KEY, jnp.float32) if gives_zeros else None,
        **ids,
    )
    if masks.query_mask is None or gives_zeros:
        return out
    return jnp.where(masks.query_mask[..., None, None], out, value.mean(1, keepdims=True))


def _attend_over_axes(layer: Any, query: Any, key: Any, value: Any, mask: Any, training: bool) -> Any:
    """Attention over `attention_axes` as over one axis, with all others as one of the batch.

    Keras' masks are broadcastable to (free axes..., N, axes of query..., axes of key...).
    """
    axes = tuple(layer._attention_axes)
    free = tuple(axis for axis in range(query.ndim - 2) if axis not in axes)
    order = (*free, *axes, query.ndim - 2, query.ndim - 1)

    def joined(x: Any) -> Any:
        x = x.transpose(order)
        return x.reshape(math.prod(x.shape[: len(free)]), math.prod(x.shape[len(free) : -2]), *x.shape[-2:])

    if mask is not None:
        while mask.ndim < len(free) + 1 + 2 * len(axes):
            mask = jnp.expand_dims(mask, -2 * len(axes) - 1)
        *batch, num_heads = mask.shape[: len(free) + 1]
        if math.prod(batch) > 1:
            batch = [query.shape[axis] for axis in free]
        rows, columns = (tuple(x.shape[axis] for axis in axes) for x in (query, key))
        mask = jnp.broadcast_to(mask, (*batch, num_heads, *rows, *columns))
        mask = mask.reshape(math.prod(batch), num_heads, math.prod(rows), math.prod(columns))
    arrays = joined(query), joined(key), joined(value)
    out = _attend(layer, *arrays, _Masks(attention_mask=mask), training, has_several_axes=True)
    shape = (*(query.shape[axis] for axis in order[:-1]), out.shape[-1])
    return out.reshape(shape).transpose(sorted(range(query.ndim), key=order.__getitem__))


_METHODS = {
    layer_class: _methods(layer_class)
    for layer_class in (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
}


def _refuse_choice_of_kernel(flash_attention: Any) -> None:
    if flash_attention is not None:
        raise ValueError(
            f"flash_attention chooses among Keras' own kernels and must be None, got {flash_attention!r}: leave it out"
        )


@keras.saving.register_keras_serializable("jax_native_flash_attn")
class MultiHeadAttention(keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` in memory linear in the lengths, with dropout and masks as well.

    Arguments, weights and their names are those of `keras.layers.MultiHeadAttention`; weights load into either. Masks
    of padding, causal masks and sliding windows make no array of T x S elements; an `attention_mask` is one. Dropout
    drops the weights that Keras drops for the same seed. `return_attention_scores=True` asks for an array of T x S
    elements: Keras' own code computes that call. Attention over several axes (`attention_axes`) works; its masks are
    arrays of T x S elements, of any kind.

    Example::

        from jax_native_flash_attn.adapters.keras import MultiHeadAttention

        layer = MultiHeadAttention(num_heads=8, key_dim=64, dropout=0.1)
        out = layer(x, x, use_causal_mask=True, training=True)  # (B, T, features)

    Raises:
      ValueError: `flash_attention`, which chooses among Keras' own kernels.
    """

    def __init__(self, *args: Any, flash_attention: None = None, **kwargs: Any) -> None:
        _refuse_choice_of_kernel(flash_attention)
        super().__init__(*args, **kwargs)

    _compute_attention_mask = _METHODS[keras.layers.MultiHeadAttention]["_compute_attention_mask"]
    _compute_attention = _METHODS[keras.layers.MultiHeadAttention]["_compute_attention"]


@keras.saving.register_keras_serializable("jax_native_flash_attn")
class GroupedQueryAttention(keras.layers.GroupQueryAttention):
    """`keras.layers.GroupQueryAttention`, as `MultiHeadAttention` is `keras.layers.MultiHeadAttention`.

    Keys and values are read once for a group of query heads.

    Example::

        from jax_native_flash_attn.adapters.keras import GroupedQueryAttention

        layer = GroupedQueryAttention(head_dim=64, num_query_heads=8, num_key_value_heads=2)
        out = layer(x, x, use_causal_mask=True)  # (B, T, features)
    """

    def __init__(self, *args: Any, flash_attention: None = None, **kwargs: Any) -> None:
        _refuse_choice_of_kernel(flash_attention)
        super().__init__(*args, **kwargs)

    _compute_attention_mask = _METHODS[keras.layers.GroupQueryAttention]["_compute_attention_mask"]
    _compute_attention = _METHODS[keras.layers.GroupQueryAttention]["_compute_attention"]


@contextlib.contextmanager
def use_flash_attention() -> Iterator[None]:
    """In the block, Keras' own attention layers compute as `MultiHeadAttention` and `GroupedQueryAttention` here.

    What is replaced: the methods `_compute_attention` and `_compute_attention_mask` of the classes
    `keras.layers.MultiHeadAttention` and `keras.layers.GroupQueryAttention`, so in all layers of these classes, in all
    threads, and in subclasses that do not have methods of their own in place of these. Whatever they were told with
    `flash_attention=`, they use this library. For how long: until the block ends, in whatever way.

    Attention is chosen where JAX traces a program. A model that ran `fit`, `predict` or `evaluate` has a compiled one,
    and keeps it, before, in and after the block: call `model.compile(...)` to have it traced again.

    Example::

        from jax_native_flash_attn.adapters.keras import use_flash_attention

        with use_flash_attention():
            model.fit(x, y)
    """
    before = {
        layer_class: {name: getattr(layer_class, name) for name in _METHODS[layer_class]} for layer_class in _METHODS
    }
    _set_methods(_METHODS)
    try:
        yield
    finally:
        _set_methods(before)


def _set_methods(methods: dict[Any, dict[str, Callable[..., Any]]]) -> None:
    for layer_class, of_class in methods.items():
        for name, method in of_class.items():
            setattr(layer_class, name, method)
