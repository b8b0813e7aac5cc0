"""The random arrays of one call."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from harness.shapes import AttentionShape


class AttentionInputs(NamedTuple):
    """Arrays of one call; `cotangent` is what the gradient call is given for the output."""

    query: Any
    cotangent: Any
    key: Any
    value: Any
    bias: Any = None
    mask: Any = None
    key_value_seq_lengths: Any = None

    @property
    def differentiated(self) -> tuple[Any, ...]:
        """Query, key, value and bias: the gradient call returns their gradients."""
        return self.query, self.key, self.value, self.bias


# Names of `AttentionInputs.differentiated`, and of their gradients.
DIFFERENTIATED = ("query", "key", "value", "bias")


def input_types(shape: AttentionShape) -> AttentionInputs:
    """The inputs without numbers: enough to compile a call."""

    def array(of_shape: tuple[int, ...] | None, dtype: Any) -> jax.ShapeDtypeStruct | None:
        return None if of_shape is None else jax.ShapeDtypeStruct(of_shape, dtype)

    dtype = jnp.dtype(shape.dtype)
    queries = array((shape.batch, shape.query_length, shape.num_heads, shape.head_dim), dtype)
    keys = array((shape.batch, shape.key_value_length, shape.num_key_value_heads, shape.head_dim), dtype)
    lengths = None if shape.key_value_lengths is None else (len(shape.key_value_lengths),)
    return AttentionInputs(
        query=queries,
        cotangent=queries,
        key=keys,
        value=keys,
        bias=array(shape.bias_shape, dtype),
        mask=array(shape.mask_shape, jnp.bool_),
        key_value_seq_lengths=array(lengths, jnp.int32),
    )


def make_inputs(shape: AttentionShape, seed: int = 0) -> AttentionInputs:
    """Random normal inputs for `shape`; the same for a given seed and kind of platform.

    A boolean mask keeps about four keys in five, and always the first one, so that no row is
    without a key.
    """
    types = input_types(shape)
    draw = _draw_on_host(seed) if jax.default_backend() == "cpu" else _draw_on_device(seed)
    arrays = {
        name: None if x is None else draw(x.shape, x.dtype)
        for name, x in types._asdict().items()
        if name != "key_value_seq_lengths"
    }
    if arrays["mask"] is not None:
        arrays["mask"] = arrays["mask"].at[..., 0].set(True)
    if shape.key_value_lengths is not None:
        arrays["key_value_seq_lengths"] = jnp.asarray(shape.key_value_lengths, jnp.int32)
    return AttentionInputs(**arrays)


def _draw_on_host(seed: int) -> Any:
    """Compiles nothing: a grid of shapes would spend its time on that."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if dtype == jnp.bool_:
            return jnp.asarray(rng.random(shape) < 0.8)
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32), dtype)

    return draw


def _draw_on_device(seed: int) -> Any:
    """Arrays of gigabytes are neither drawn on the host nor copied."""
    keys = iter(jax.random.split(jax.random.key(seed), len(AttentionInputs._fields)))

    def draw(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if dtype == jnp.bool_:
            return jax.random.uniform(next(keys), shape) < 0.8
        return jax.random.normal(next(keys), shape, dtype)

    return draw
