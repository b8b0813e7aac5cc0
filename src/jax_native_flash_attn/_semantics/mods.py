"""Functions of scores and of indices, given by users: traced once, for one score, and evaluated for a tile of them.

A function is traced for numbers, so that it holds for arrays of any shape by `vmap`, and depends on no tile. What it
closes over becomes an argument like those that it is given: so derivatives reach it, and batching and sharding too.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike

from .errors import describe
from .varying import vary_alike

INDICES = ("batch", "head", "query_index", "key_index")
Arrays = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Program:
    """A traced function of numbers: a score if it takes one, `INDICES`, and arguments; hashable by what it says.

    Two traces of one function, or of two that say the same, are equal: so they share what was compiled for one.

    Attributes:
      jaxpr: without constants.
      has_score: whether the first of its numbers is a score; else it is a mask.
      uses: for each of `INDICES`, whether the result depends on it.
      key: what is compared.
    """

    jaxpr: Any
    has_score: bool
    uses: tuple[bool, ...] = field(init=False)
    key: Any = field(init=False)

    def __post_init__(self) -> None:
        needed = _needed(self.jaxpr)
        first = int(self.has_score)
        object.__setattr__(self, "uses", tuple(x in needed for x in self.jaxpr.invars[first : first + len(INDICES)]))
        object.__setattr__(self, "key", (self.has_score, _key(self.jaxpr)))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Program) and self.key == other.key)

    def __repr__(self) -> str:
        return f"{'score_mod' if self.has_score else 'mask_mod'} of {len(self.jaxpr.eqns)} operations"

    def __call__(self, numbers: Sequence[jax.Array], args: Sequence[jax.Array]) -> jax.Array:
        """Elementwise.

        Args:
          numbers: score if there is one, then the indices: arrays of one rank that broadcast.
          args: each with leading axes of the same rank, which broadcast likewise, and behind them its own.

        Returns:
          An array of that rank, in the dtype of the score, or bool; axes in which all have size 1 have size 1.
        """
        operands = [x.astype(v.aval.dtype) for x, v in zip((*numbers, *args), self.jaxpr.invars, strict=True)]

        def of_one(*operands: jax.Array) -> jax.Array:
            (result,) = _evaluate(self.jaxpr, operands)
            return result.astype(numbers[0].dtype if self.has_score else jnp.bool_)

        return map_axes(of_one, operands, numbers[0].ndim)


def map_axes(function: Any, operands: Sequence[jax.Array], rank: int) -> jax.Array:
    """A function of operands without their `rank` leading axes, which broadcast; axes in which all have size 1 stay."""
    single = []
    for axis in reversed(range(rank)):
        in_axes = tuple(0 if x.shape[axis] != 1 else None for x in operands)
        if all(x is None for x in in_axes):
            single.append(axis)
        else:
            function = jax.vmap(function, in_axes=in_axes)
    result = function(*(x.reshape([n for i, n in enumerate(x.shape) if i >= rank or n != 1]) for x in operands))
    return jnp.expand_dims(result, single)


def trace_mod(function: Any, name: str, args: Any, score_dtype: DTypeLike | None) -> tuple[Program, dict[str, Any]]:
    """A function as a program, and its arguments by the names that `OPERANDS` has for them, captured arrays first.

    Args:
      function: `score_mod`, or, without a dtype of its score, `mask_mod`.
      name: that of the public argument.
      args: its further arguments, a tuple of pytrees of arrays; floats of 16 bits become float32.

    Raises:
      TypeError: it is no function, or gives anything but one number, real or for a mask bool; args are no tuple, or
        hold what is not real, integer or bool.
      NotImplementedError: it has effects, such as printing.
    """
    if not callable(function):
        raise TypeError(f"{name} must be a function or None, got {describe(function)}")
    if not isinstance(args, tuple | list):
        raise TypeError(f"{name}_args must be a tuple, got {describe(args)}: for one argument pass (x,)")
    leaves, structure = jax.tree.flatten(tuple(args))
    # Gradients of single scores are added up in the dtype that the function gets.
    leaves = [_widened(_as_argument(x, name)) for x in leaves]
    scores = [] if score_dtype is None else [jax.ShapeDtypeStruct((), score_dtype)]
    numbers = scores + [jax.ShapeDtypeStruct((), jnp.int32)] * len(INDICES)

    def of_leaves(*operands: Any) -> Any:
        return function(*operands[: len(numbers)], *jax.tree.unflatten(structure, operands[len(numbers) :]))

    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    try:
        closed, result = jax.make_jaxpr(of_leaves, return_shape=True)(*numbers, *types)
    except Exception as error:
        given = ", ".join((["score"] if scores else []) + list(INDICES))
        error.add_note(f"This error is from {name}, which was called with scalars ({given}) and {name}_args.")
        raise
    kind = "a real number" if scores else "bool"
    is_number = isinstance(result, jax.ShapeDtypeStruct) and result.shape == ()
    if not is_number or not jnp.issubdtype(result.dtype, jnp.floating if scores else jnp.bool_):
        got = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", result)
        raise TypeError(
            f"{name} must give {kind} for each score, of shape () as the scalars that it is called with, got {got}"
        )
    if closed.effects:
        raise NotImplementedError(f"{name} must have no effects, such as jax.debug.print, got {closed.effects}")
    captured = [_as_argument(x, name) for x in closed.consts]

    def without_constants(*operands: Any) -> Any:
        first, last = len(numbers), len(numbers) + len(captured)
        return _evaluate(_opened(closed), (*operands[first:last], *operands[:first], *operands[last:]))

    operands = [*captured, *leaves]
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    jaxpr = _opened(jax.make_jaxpr(without_constants)(*numbers, *types))
    named = {f"{name}_args.{i}.{'W' * x.ndim}": x for i, x in enumerate(operands)}
    return Program(jaxpr, bool(scores)), named


@functools.lru_cache(maxsize=256)
def with_slope(program: Program) -> Any:
    """A jaxpr of a function of a score, that gives its derivative with respect to the score too, in the same dtype.

    It is traced without a mesh: where types name different ones, JAX adds operations between them.
    """
    variables = program.jaxpr.invars

    def both(score: Any, *others: Any) -> tuple[Any, Any]:
        def of_score(score: Any) -> Any:
            (result,) = _evaluate(program.jaxpr, (score, *others))
            return result.astype(score.dtype)

        result, pull = jax.vjp(of_score, score)
        return result, *pull(jnp.ones((), score.dtype))

    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return jax.make_jaxpr(both)(*(jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in variables))


def _as_argument(x: Any, name: str) -> Any:
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        raise TypeError(f"{name}_args, and what {name} captures, must be real, integer or bool, got {describe(x)}")
    return x


def args_of(program: Program, args: Arrays) -> dict[str, Any]:
    """Of the arguments of both functions, those of this one, by name, in its order."""
    kind = "score_mod_args." if program.has_score else "mask_mod_args."
    names = sorted((name for name in args if name.startswith(kind)), key=lambda name: int(name.split(".")[1]))
    return {name: args[name] for name in names}


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4 else x


# ---- what a program is made of

_OF_MESHES = ("pvary", "pcast")  # the identity, but for types
_CALLS = ("jit", "pjit", "closed_call")
_SHARDINGS = ("sharding", "out_sharding")


def _evaluate(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """As `jax.core.eval_jaxpr`, wherever on a mesh: a program is traced for a user's arrays, and runs on their shards.

    So it says nothing of meshes. (`operands` are constants, then arguments.)
    """
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), operands, strict=True))

    def read(x: Any) -> Any:
        if isinstance(x, jax.extend.core.Literal):
            aval: Any = x.aval
            return np.asarray(x.val, aval.dtype)[()]  # JAX's own may name a mesh
        return values[x]

    for eqn in jaxpr.eqns:
        inputs, params = tuple(map(read, eqn.invars)), eqn.params
        if eqn.primitive.name in _OF_MESHES:
            results = inputs
        elif eqn.primitive.name in _CALLS:
            inner = params["jaxpr"]
            results = _evaluate(_opened(inner), (*getattr(inner, "consts", ()), *inputs))
        else:
            params = {name: None if name in _SHARDINGS else x for name, x in params.items()}
            found = eqn.primitive.get_bind_params(params)
            functions, params = found if isinstance(found, tuple) else ((), found)  # JAX before 0.10 gives both
            results = eqn.primitive.bind(*functions, *vary_alike(inputs), **params)
        values.update(zip(eqn.outvars, results if isinstance(results, list | tuple) else [results], strict=True))
    return list(map(read, jaxpr.outvars))


def _opened(closed: Any) -> Any:
    return getattr(closed, "jaxpr", closed)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


def _needed(jaxpr: Any) -> set[Any]:
    """The variables that the result depends on."""
    needed = {x for x in jaxpr.outvars if not isinstance(x, jax.extend.core.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(x for x in eqn.invars if not isinstance(x, jax.extend.core.Literal))
    return needed


def _key(jaxpr: Any) -> Any:
    """What a jaxpr says, whatever its variables are called; hashable."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    numbers: dict[Any, int] = {}

    def bound(variables: Sequence[Any]) -> tuple:
        numbers.update((x, len(numbers) + i) for i, x in enumerate(variables))
        return tuple((x.aval.shape, x.aval.dtype) for x in variables)

    def read(x: Any) -> Any:
        if isinstance(x, jax.extend.core.Literal):
            aval: Any = x.aval
            return (np.asarray(x.val).tobytes(), aval.shape, aval.dtype)
        return numbers[x]

    inputs = bound([*inner.constvars, *inner.invars])
    eqns = []
    for eqn in inner.eqns:
        operands = tuple(map(read, eqn.invars))
        params = tuple((name, _param_key(x)) for name, x in sorted(eqn.params.items()))
        eqns.append((eqn.primitive, params, operands, bound(eqn.outvars)))
    consts = tuple(id(x) for x in getattr(jaxpr, "consts", ()))  # which live as long as the program
    return inputs, tuple(eqns), tuple(map(read, inner.outvars)), consts


def _param_key(x: Any) -> Any:
    if _is_jaxpr(x):
        return _key(x)
    if isinstance(x, tuple | list):
        return tuple(map(_param_key, x))
    if isinstance(x, Mapping):
        return tuple((name, _param_key(value)) for name, value in x.items())
    try:
        hash(x)
    except TypeError:
        return id(x)
    return x
