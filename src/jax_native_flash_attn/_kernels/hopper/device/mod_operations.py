"""The operations of a formula on numbers in registers, of one shape or scalars."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math

from ...._semantics.numerics import LOG2E
from ..formulas import BOOL, FLOAT, Node
from ..pallas import plgpu, spread
from .overlap import THREAD_COLUMNS
from .soft_cap import soft_cap


def as_integer(x: Any) -> jax.Array:
    """1 or 0, of a bool."""
    return jnp.where(x, jnp.int32(1), jnp.int32(0))


def spread_bool(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    return spread(as_integer(x), shape, axis) != 0


def apply(node: Node, inputs: Sequence[Any]) -> Any:
    """What an operation gives."""
    return OPERATIONS[node.op](node, *inputs)


def _same_shapes(*given: Any) -> list[Any]:
    """Scalars in the shape of the others."""
    shape = next((x.shape for x in given if np.ndim(x)), ())
    return [x if np.ndim(x) or not shape else jnp.full(shape, x, jnp.asarray(x).dtype) for x in given]


def _divided(node: Node, x: Any, y: Any) -> Any:
    if node.dtype == FLOAT:
        return x * (np.float32(1) / y) if np.ndim(y) < np.ndim(x) else x / y
    return lax.div(*_same_shapes(x, y))


def _tanh(node: Node, x: Any) -> Any:
    """As accurate as float32, which the GPU's own is not."""
    if np.ndim(x) == 2:
        return soft_cap(x, 1.0, 1.0)
    return 1.0 - 2.0 / (jnp.exp2(x * np.float32(2 * LOG2E)) + 1.0)


def _sign(node: Node, x: Any) -> Any:
    one = np.asarray(1, node.dtype)
    return jnp.where(x > 0, one, jnp.where(x < 0, -one, x))


def _power(node: Node, x: Any) -> Any:
    exponent = node.params["y"]
    result = None
    factor, left = x, abs(exponent)
    while left:
        if left & 1:
            result = factor if result is None else result * factor
        factor, left = factor * factor, left >> 1
    result = x * 0 + 1 if result is None else result
    return 1.0 / result if exponent < 0 else result


def _selected(node: Node, which: Any, *cases: Any) -> Any:
    if len(cases) == 1:
        return cases[0]
    if node.dtype == BOOL:
        cases = tuple(map(as_integer, cases))
    if not np.ndim(which) and any(map(np.ndim, cases)):
        which = _same_shapes(as_integer(which), *cases)[0] != 0
    selected = jnp.where(which, cases[1], cases[0])
    return selected != 0 if node.dtype == BOOL else selected


def _converted(node: Node, x: Any) -> Any:
    if node.dtype == BOOL:
        return x != 0
    if x.dtype == BOOL:
        return jnp.where(x, np.asarray(1, node.dtype), np.asarray(0, node.dtype))
    return x.astype(node.dtype)


def _logical(combine: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def operation(node: Node, x: Any, y: Any) -> Any:
        if node.dtype == BOOL and np.ndim(x) != np.ndim(y):
            x, y = (z if np.ndim(z) else as_integer(z) for z in (x, y))
            x, y = (z if z.dtype == BOOL else z != 0 for z in _same_shapes(x, y))
        return combine(x, y)

    return operation


def _not(node: Node, x: Any) -> Any:
    return as_integer(x) == 0 if node.dtype == BOOL else x ^ -1


def _compared(compare: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def operation(node: Node, x: Any, y: Any) -> Any:
        x, y = (as_integer(z) if z.dtype == BOOL else z for z in map(jnp.asarray, (x, y)))
        return compare(x, y)

    return operation


def _shifted(shift: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda node, x, y: shift(*_same_shapes(x, y))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda node, x, y: x + y,
    "sub": lambda node, x, y: x - y,
    "mul": lambda node, x, y: x * y,
    "div": _divided,
    "max": lambda node, x, y: jnp.maximum(x, y),
    "min": lambda node, x, y: jnp.minimum(x, y),
    "neg": lambda node, x: -x,
    "abs": lambda node, x: jnp.abs(x),
    "sign": _sign,
    "square": lambda node, x: x * x,
    "one_minus_square": lambda node, x: 1.0 - x * x,
    "integer_pow": _power,
    "clamp": lambda node, low, x, high: jnp.minimum(jnp.maximum(x, low), high),
    "exp": lambda node, x: jnp.exp(x),
    "exp2": lambda node, x: jnp.exp2(x),
    "log": lambda node, x: jnp.log(x),
    "tanh": _tanh,
    "logistic": lambda node, x: 0.5 * _tanh(node, 0.5 * x) + 0.5,
    "sqrt": lambda node, x: jnp.where(x == 0, x, x * lax.rsqrt(x)),
    "rsqrt": lambda node, x: lax.rsqrt(x),
    "rem": lambda node, x, y: lax.rem(*_same_shapes(x, y)),
    "shift_left": _shifted(lax.shift_left),
    "shift_right_arithmetic": _shifted(lax.shift_right_arithmetic),
    "and": _logical(jnp.bitwise_and),
    "or": _logical(jnp.bitwise_or),
    "xor": _logical(jnp.bitwise_xor),
    "not": _not,
    "lt": _compared(lambda x, y: x < y),
    "le": _compared(lambda x, y: x <= y),
    "gt": _compared(lambda x, y: x > y),
    "ge": _compared(lambda x, y: x >= y),
    "eq": _compared(lambda x, y: x == y),
    "ne": _compared(lambda x, y: x != y),
    "select_n": _selected,
    "convert_element_type": _converted,
}


def add_columns(x: jax.Array, step: Any) -> jax.Array:
    """`x`, float32 in `Layout.WGMMA`, plus step * c for column c; `step` is a scalar.

    A thread adds its part of the number of a column once for each row. The rest is a constant of each element: so it
    takes one multiply-add. (Products with the step, as the compiler sees them, would be kept from tile to tile.)
    """

    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout))
    def emit(_: Any, array: Any, step: Any) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        integer = lambda n: arith.constant(i32, ir.IntegerAttr.get(i32, n))  # noqa: E731
        number = lambda n: arith.constant(f32, ir.FloatAttr.get(f32, n))  # noqa: E731
        step = step.registers.flat[0]
        thread = arith.remui(mgpu.thread_idx(), integer(4))
        first = arith.uitofp(f32, arith.muli(thread, integer(2)))
        registers = np.empty_like(array.registers)
        (axis,) = (a for a, n in enumerate(registers.shape) if n == x.shape[1] // THREAD_COLUMNS)
        for place, register in np.ndenumerate(array.registers):
            for c in range(2):  # elements of a register
                column = THREAD_COLUMNS * place[axis] + c
                element = math.fma(step, first, llvm.extractelement(register, integer(c)))
                if column:
                    element = math.fma(step, number(float(column)), element)
                register = llvm.insertelement(register, element, integer(c))
            registers[place] = register
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return emit(x, jnp.asarray(step, jnp.float32))
