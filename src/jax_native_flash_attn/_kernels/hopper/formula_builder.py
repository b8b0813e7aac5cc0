"""From a traced `score_mod` or `mask_mod` to its formula, or to the reason why it has none."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from ..._semantics.call import Call, Config
from ..._semantics.mods import INDICES, Program, with_slope
from .formula_addends import added_terms
from .formula_bounds import Bounds, bounds_of, decided
from .formula_views import View, fill_value_of, known_axis, reshaped, view_of, why_not_read
from .formulas import (
    BOOL,
    COMPARISONS,
    FLOAT,
    INTEGER,
    LOWERED,
    OF_FLOATS,
    OF_INTEGERS,
    Formula,
    Kind,
    Node,
    NotLowered,
    Numbers,
    Read,
    Whole,
)

_SAME = frozenset({"copy", "copy_p", "pvary", "pcast", "stop_gradient", "optimization_barrier"})
_CALLS = {
    name: key
    for key, names in {
        "jaxpr": ("jit", "pjit", "closed_call", "checkpoint", "remat2"),
        "call_jaxpr": ("custom_jvp_call", "custom_vjp_call", "core_call"),
    }.items()
    for name in names
}
_ALIASES = {"add_any": "add"}
_SHAPES = frozenset({"squeeze", "reshape", "broadcast_in_dim", "concatenate", "expand_dims"})
_MOST_NODES = 400


@functools.lru_cache(maxsize=256)
def make_formula(program: Program, numbers: Numbers, *, needs_slope: bool) -> "Formula | str":
    """Or why there is none, as a clause about the function."""
    try:
        jaxpr = with_slope(program) if needs_slope else program.jaxpr
        return _Builder(program, numbers).build(jaxpr)
    except NotLowered as reason:
        return str(reason)


def formulas(config: Config, T: int, S: int, *, needs_slope: bool) -> dict[str, Formula | str]:
    """Of each function of a call, by its name; or why there is none."""
    numbers = Numbers(T, S, config.first_row)
    programs = {"score_mod": config.score_mod, "mask_mod": config.mask_mod}
    return {
        name: make_formula(program, numbers, needs_slope=needs_slope and program.has_score)
        for name, program in programs.items()
        if program is not None
    }


def why_not_lowered(call: Call, *, needs_slope: bool) -> str | None:
    """Why kernels cannot evaluate the functions of a call."""
    found = formulas(call.config, call.sizes.T, call.sizes.S, needs_slope=needs_slope)
    return next((f"{name} {reason}" for name, reason in found.items() if isinstance(reason, str)), None)


class _Builder:
    def __init__(self, program: Program, numbers: Numbers):
        self.program, self.numbers = program, numbers
        self.nodes: list[Node] = []
        self._known: dict[Any, int] = {}
        self._wholes: dict[Any, Whole] = {}

    def build(self, jaxpr: Any) -> Formula:
        T, S, first_row = self.numbers
        most = np.iinfo(np.int32).max
        rows = None if first_row is None else Bounds(first_row, first_row + T - 1)
        ranges = (Bounds(0, most), Bounds(0, most), rows, None if first_row is None else Bounds(0, S - 1))
        kinds = (Kind.SCALAR, Kind.SCALAR, Kind.ROWS, Kind.KEYS)
        given: list[Any] = [self._add(Node(Kind.TILE, FLOAT, "score"))] if self.program.has_score else []
        for name, kind, bounds in zip(INDICES, kinds, ranges, strict=True):
            given.append(self._add(Node(kind, INTEGER, name, bounds=bounds)))
        self.query, self.key = given[-2:]
        for i, variable in enumerate(getattr(jaxpr, "jaxpr", jaxpr).invars[len(given) :]):
            given.append(view_of(Whole(variable.aval.shape, np.dtype(variable.aval.dtype), i)))
        outputs = tuple(self._scalar(x) for x in self._run(jaxpr, given))
        addend = self._addend(outputs) if self.program.has_score else None
        needed = self._needed(outputs if addend is None else (*outputs, addend))
        reads = tuple(i for i in needed if self.nodes[i].op == "read")
        return Formula(tuple(self.nodes), outputs, addend, tuple(needed), reads)

    def _addend(self, outputs: Sequence[int]) -> int | None:
        terms = added_terms(self.nodes, outputs[0])
        # A derivative may have been stopped.
        if terms is None or any(self.nodes[i].op != "literal" or self.nodes[i].params != 1 for i in outputs[1:]):
            return None
        result = None
        for op, term in terms:
            if result is not None:
                result = self._operation(op, {}, FLOAT, [result, term])
            else:
                result = term if op == "add" else self._operation("neg", {}, FLOAT, [term])
        return self._literal(np.asarray(0, FLOAT)) if result is None else result

    def _needed(self, outputs: Sequence[int]) -> list[int]:
        needed = set(outputs)
        for i in reversed(range(len(self.nodes))):
            if i in needed:
                needed.update(self._inputs(self.nodes[i]))
        return sorted(needed)

    @staticmethod
    def _inputs(node: Node) -> tuple[int, ...]:
        return tuple(x for x in node.params.at if not isinstance(x, Kind)) if node.op == "read" else node.inputs

    def _run(self, jaxpr: Any, given: Sequence[Any]) -> list[Any]:
        closed, jaxpr = jaxpr, getattr(jaxpr, "jaxpr", jaxpr)
        consts = [self._constant(x) for x in getattr(closed, "consts", ())]
        values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *given), strict=True))

        def read(x: Any) -> Any:
            return self._constant(x.val) if isinstance(x, jax.extend.core.Literal) else values[x]

        for eqn in jaxpr.eqns:
            values.update(zip(eqn.outvars, self._results(eqn, list(map(read, eqn.invars))), strict=True))
        return list(map(read, jaxpr.outvars))

    def _results(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        name, (out, *others) = eqn.primitive.name, eqn.outvars
        if name in _CALLS:
            return self._run(eqn.params[_CALLS[name]], inputs)
        if name in _SAME:
            return inputs
        if others:
            raise NotLowered(f"has the primitive {name}, which these kernels do not lower")
        shape, wholes = out.aval.shape, [self._as_whole(x) for x in inputs]
        is_array = shape != () or any(isinstance(x, Whole) for x in wholes)
        if is_array and all(x is not None for x in wholes):
            return [view_of(Whole(shape, np.dtype(out.aval.dtype), None, eqn.primitive, eqn.params, tuple(wholes)))]
        if name in ("dynamic_slice", "gather") and isinstance(inputs[0], View):
            return [self._read(eqn, inputs)]
        if name == "squeeze" and isinstance(inputs[0], View):
            view, left = inputs[0], eqn.params["dimensions"]
            axes = tuple(a for i, a in enumerate(view.axes) if i not in left)
            return [View(view.array, view.at, axes, view.fill)]
        if not inputs:
            raise NotLowered(f"has the primitive {name}, which these kernels do not lower")
        elements = [self._elements(x, name) for x in inputs]
        if name in _SHAPES:
            return [reshaped(name, eqn.params, elements, shape)]
        name, dtype = _ALIASES.get(name, name), np.dtype(out.aval.dtype)
        apply = np.vectorize(lambda *x: self._operation(name, eqn.params, dtype, list(x)), otypes=[object])
        return [apply(*elements)]

    # ---- single numbers

    def _add(self, node: Node) -> int:
        """Its number; that of an equal one, if there is one."""
        if len(self.nodes) >= _MOST_NODES:
            raise NotLowered(f"has more than {_MOST_NODES} operations")
        number = len(self.nodes)
        if node.op not in LOWERED:
            params = np.asarray(node.params).tobytes() if node.op == "literal" else node.params
            number = self._known.setdefault((node.dtype, node.op, params), number)
        if number == len(self.nodes):
            self.nodes.append(node)
        return number

    def _constant(self, x: Any) -> Any:
        x = np.asarray(x)
        if x.shape != ():
            return view_of(Whole(x.shape, x.dtype, inputs=(x,)))
        return self._literal(x)

    def _literal(self, x: np.ndarray) -> int:
        bounds = Bounds(int(x), int(x)) if jnp.issubdtype(x.dtype, jnp.integer) else None
        return self._add(Node(Kind.SCALAR, x.dtype, "literal", params=x[()], bounds=bounds))

    def _scalar(self, x: Any) -> int:
        (element,) = self._elements(x, "").reshape(-1)
        return element

    def _elements(self, x: Any, name: str) -> np.ndarray:
        """As an array of the numbers of nodes."""
        if isinstance(x, View):
            if any(a is not None for a in x.axes) or any(at is None for at in x.at):
                raise NotLowered(f"applies {name} to an array and an index or score together")
            elements = np.empty((1,) * len(x.axes), object)
            elements[...] = self._read_node(x)
            return elements
        if isinstance(x, np.ndarray):
            return x
        elements = np.empty((), object)
        elements[()] = x
        return elements

    def _as_whole(self, x: Any) -> Any | None:
        if isinstance(x, View):
            return x.array if all(at is None for at in x.at) and None not in x.axes else None
        if isinstance(x, int) and self.nodes[x].op == "literal":
            return np.asarray(self.nodes[x].params)
        return None

    def _operation(self, name: str, params: Any, dtype: np.dtype, inputs: list[int]) -> int:
        nodes = [self.nodes[i] for i in inputs]
        if name not in LOWERED:
            raise NotLowered(f"has the primitive {name}, which these kernels do not lower")
        known = decided(name, params, nodes)
        if isinstance(known, np.ndarray):
            return self._literal(known.astype(dtype))
        if known is not None:
            return inputs[known]
        if name == "convert_element_type" and nodes[0].op == "read":
            return self._converted(inputs[0], dtype)
        if name in COMPARISONS and all(x.op == "read" and _is_short(x.dtype) for x in nodes):
            inputs = [self._converted(x, INTEGER) for x in inputs]
            nodes = [self.nodes[i] for i in inputs]
        operands = [x.dtype for x in nodes]
        if name == "convert_element_type" and dtype == operands[0]:
            return inputs[0]
        for x in (*operands, dtype):
            if x not in (FLOAT, INTEGER, BOOL):
                raise NotLowered(f"computes in {x}: these kernels do in float32, int32 and bool")
        if (name in OF_FLOATS and operands[0] != FLOAT) or (name in OF_INTEGERS and operands[0] != INTEGER):
            raise NotLowered(f"has the primitive {name} of {operands[0]}, which these kernels do not lower")
        kind = Kind(functools.reduce(int.__or__, (x.kind for x in nodes), 0))
        bounds = bounds_of(name, params, nodes) if dtype == INTEGER else None
        return self._add(Node(kind, dtype, name, tuple(inputs), params, bounds))

    # ---- reads

    def _read(self, eqn: Any, inputs: list[Any]) -> Any:
        view, params = inputs[0], eqn.params
        sizes, fill, collapsed = params["slice_sizes"], None, ()
        starts: dict[int, int] = {}
        if eqn.primitive.name == "gather":
            numbers = params["dimension_numbers"]
            indices = self._elements(inputs[1], "gather")
            if indices.ndim != 1 or numbers.operand_batching_dims:
                raise NotLowered("gathers several elements of an argument for one score")
            starts = dict(zip(numbers.start_index_map, indices, strict=True))
            collapsed = numbers.collapsed_slice_dims
            if "FILL" in str(params["mode"]):
                fill = fill_value_of(params["fill_value"], view.array.dtype)
        else:
            starts = {axis: self._scalar(x) for axis, x in enumerate(inputs[1:])}
        at, axes = list(view.at), list(view.axes)
        for axis, size in enumerate(sizes):
            if size == view.shape[axis] and (size != 1 or axes[axis] is None):
                continue
            if size != 1:
                raise NotLowered("reads a part of an argument for each score")
            at[known_axis(axes[axis])], axes[axis] = starts.get(axis, self._constant(np.int32(0))), None
        axes = [a for i, a in enumerate(axes) if i not in collapsed]
        return View(view.array, tuple(at), tuple(axes), view.fill if fill is None else fill)

    def _read_node(self, view: View) -> int:
        at: list[Any] = []
        for axis, index in enumerate(view.at):
            assert index is not None
            kind, size = self.nodes[index].kind, view.array.shape[axis]
            if size == 0:
                raise NotLowered("reads an argument without elements")
            vector = {self.query: Kind.ROWS, self.key: Kind.KEYS}.get(index)
            if vector is not None and self.numbers.first_row == 0:
                at.append(vector)
            elif kind is Kind.SCALAR and self.nodes[index].dtype == INTEGER:
                at.append(index)
            else:
                raise NotLowered(why_not_read(kind, are_places=self.numbers.first_row == 0))
        vectors = [x for x in at if isinstance(x, Kind)]
        if len(vectors) > 1:
            raise NotLowered("reads an argument by query_index and key_index: give that as bias or mask")
        read = Read(view.array, tuple(at), view.fill)
        return self._add(Node(vectors[0] if vectors else Kind.SCALAR, view.array.dtype, "read", params=read))

    def _converted(self, number: int, dtype: np.dtype) -> int:
        """A read of another dtype: that of the array, which XLA converts."""
        node = self.nodes[number]
        array, at, fill = node.params
        if array.dtype == dtype:
            return number
        params = {"new_dtype": dtype, "weak_type": False, "sharding": None}
        whole = Whole(array.shape, dtype, None, jax.lax.convert_element_type_p, params, (array,))
        whole = self._wholes.setdefault((array, dtype), whole)
        fill = None if fill is None else np.asarray(fill, array.dtype).astype(dtype)[()]
        return self._add(Node(node.kind, dtype, "read", params=Read(whole, at, fill)))


def _is_short(dtype: np.dtype) -> bool:
    """Whether int32 holds every number of a dtype."""
    return dtype.kind in "iu" and dtype.itemsize < 4
