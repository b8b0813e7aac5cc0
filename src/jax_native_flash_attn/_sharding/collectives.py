"""What a ring of devices says to each other, as primitives of our own.

Inside a kernel, types do not say over which mesh axes values vary (`lowering.py`); those of JAX's collectives would.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .._semantics.call import Ring

Tree = TypeVar("Tree")


def axis_index(ring: Ring) -> jax.Array:
    """The place of this device in the ring, () int32."""
    return _index_p.bind(axis_name=ring.axis_name)


def shift(tree: Tree, ring: Ring, hop: int) -> Tree:
    """Arrays of this device, of one dtype, to the one `hop` places further on.

    As one: XLA has but one transfer of a kind on its way at a time, and a second would wait for what hides the first.
    """
    arrays, structure = jax.tree.flatten(tree)
    hop %= ring.size
    if hop == 0 or not arrays:
        return tree
    axis_name, places = ring.mesh_order or (ring.axis_name, tuple(range(ring.size)))
    joined = jnp.concatenate([x.reshape(-1) for x in arrays]) if len(arrays) > 1 else arrays[0]
    arrived = _shift_p.bind(joined, axis_name=axis_name, places=places, hop=hop)
    parts = jnp.split(arrived, np.cumsum([x.size for x in arrays])[:-1]) if len(arrays) > 1 else [arrived]
    return jax.tree.unflatten(structure, [part.reshape(x.shape) for part, x in zip(parts, arrays, strict=True)])


_index_p = Primitive("flash_attention_axis_index")
_index_p.def_impl(lambda axis_name: lax.axis_index(axis_name))
_index_p.def_abstract_eval(lambda axis_name: ShapedArray((), jnp.dtype(jnp.int32)))
mlir.register_lowering(_index_p, mlir.lower_fun(lambda axis_name: lax.axis_index(axis_name), multiple_results=False))


def _shift(x: jax.Array, *, axis_name: Any, places: tuple[int, ...], hop: int) -> jax.Array:
    return lax.ppermute(x, axis_name, list(zip(places, places[hop:] + places[:hop], strict=True)))


def _transpose(cotangent: Any, x: Any, *, axis_name: Any, places: tuple[int, ...], hop: int) -> list[Any]:
    return [_shift_p.bind(cotangent, axis_name=axis_name, places=places, hop=len(places) - hop)]


_shift_p = Primitive("flash_attention_shift")
_shift_p.def_impl(_shift)
_shift_p.def_abstract_eval(lambda x, **unused: ShapedArray(x.shape, x.dtype))
mlir.register_lowering(_shift_p, mlir.lower_fun(_shift, multiple_results=False))
ad.deflinear2(_shift_p, _transpose)
batching.defvectorized(_shift_p)
