"""Lowering for CUDA as on a Hopper GPU, without one: the calls, what is done with them, and the kernels that they bind.

A program is traced in full, which is quick. Of what it lowers to, the kernels of this library are the only part that is
not JAX's own; each of them is lowered by itself, and only once however many programs bind it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_native_flash_attn import flash_attention, flash_attention_with_lse
from jax_native_flash_attn._autodiff.linear import FirstDerivative
from tests.support.cases import (
    FEATURES,
    NEW_FEATURES,
    TRACEABLE,
    Case,
    call_types,
    features,
    over_batch_rows,
    static_options,
)
from tests.support.programs import equations

PRIMITIVES = ("flash_attention", "flash_attention_linear_kernel")

# ---- a grid of cases

# All that is traced here can be: the lengths, the scale and the window.
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (40, 20), "traced": frozenset({"lengths", "scale"})},
    "traced window": {"local_window_size": (40, 0), "is_causal": True},
    "mask of keys": {"mask": (True, False, False, True)},
    "mask of scores": {"mask": (True, False, True, True)},
    "mask of rows": {"mask": (True, False, True, False)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "bias of scores": {"bias": (True, True, True, True)},
    "bias of keys": {"bias": (True, False, False, True)},
    "bias of rows": {"bias": (True, True, True, False)},
    "dropout": {"dropout_rate": 0.1},
    "lengths of keys": {"key_value_seq_lengths": (150, 77)},
    "lengths of both": {"query_seq_lengths": (91, 130), "key_value_seq_lengths": (150, 77)},
    "vmap": {"vmapped": True},
}
# Beside the options: what a call may have that one of `jax.nn` has not.
FEATURE_OPTIONS = {
    name: {key: x for key, x in features(name).items() if key != "traced"}
    for name in NEW_FEATURES
    if "with_lse" not in FEATURES[name]
}
DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (64, 128)


class Point(NamedTuple):
    """A case by its place in the grid."""

    dtype: str
    head_dim: int
    mask: str
    option: str
    x64: bool

    @property
    def case(self) -> Case:
        """With 64-bit types, its bias and scale are float64."""
        return Case(
            (2, 130, 150, 2, 2, self.head_dim),
            self.dtype,
            x64=self.x64,
            scale=0.3,
            bias_dtype="float64" if self.x64 else None,
            mask_density=0.7,
            **{"traced": frozenset(TRACEABLE), **MASKS[self.mask], **(OPTIONS | FEATURE_OPTIONS)[self.option]},
        )

    def __str__(self) -> str:
        return ", ".join([self.dtype, str(self.head_dim), self.mask, self.option, "x64" if self.x64 else "x32"])


def operand_types(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the arrays that a program gets: floats, which can be differentiated, and others. Each batch row of a vmap has
    its own scale, sinks and window."""
    types = call_types(case)
    rows = case.shape[:1] if case.vmapped else ()
    wide = jnp.dtype("float64" if case.x64 or case.dtype == "float64" else "float32")
    types["scale"] = jax.ShapeDtypeStruct(rows, wide)
    if "local_window_size" in types:
        window = types["local_window_size"]
        types["local_window_size"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(rows, x.dtype), window)
    if "sinks" in types:
        types["sinks"] = jax.ShapeDtypeStruct((*rows, *types["sinks"].shape), types["sinks"].dtype)
    return _split(types, ("query", "key", "value", "bias", "scale", "sinks"))


# ---- transformations: (case) -> a program of (floats, others)

Program = Callable[[dict[str, Any], dict[str, Any]], Any]
QKV = ("query", "key", "value")


def _split(floats: dict[str, Any], names: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {n: x for n, x in floats.items() if n in names}, {n: x for n, x in floats.items() if n not in names}


def _sum(results: Any) -> jax.Array:
    wide = jnp.float64 if any(x.dtype == jnp.float64 for x in jax.tree.leaves(results)) else jnp.float32
    total = jnp.zeros((), wide)
    for x in jax.tree.leaves(results):
        total += jnp.sin(x.astype(wide)).sum()
    return total


def _weighed(results: Any) -> jax.Array:
    """A linear function of derivatives: the sine of a large one would be noise, as rounding moves it by periods."""
    wide = jnp.float64 if any(x.dtype == jnp.float64 for x in jax.tree.leaves(results)) else jnp.float32
    total = jnp.zeros((), wide)
    for x in jax.tree.leaves(results):
        total += (x.astype(wide) * np.cos(np.arange(x.size)).reshape(x.shape).astype(wide)).sum()
    return total


class Programs:
    """Of one case: each transformation, of queries, keys and values or of everything that is a float."""

    def __init__(self, case: Case, with_lse: Callable | None = None, **options: Any):
        """`with_lse`: another function in place of `flash_attention_with_lse`, and of `flash_attention`."""
        self.case, self.options = case, options
        self._with_lse = with_lse or flash_attention_with_lse
        self._attention = flash_attention if with_lse is None else lambda *args, **kwargs: with_lse(*args, **kwargs)[0]

    def _call(self, function: Callable, floats: dict[str, Any], others: dict[str, Any]) -> Any:
        """Without 'scale' among the floats, that is a Python or NumPy number."""
        options = {**static_options(self.case), **self.options}
        if "scale" not in floats:
            options["scale"] = np.float64(self.case.scale) if self.case.x64 else self.case.scale
        function = over_batch_rows(function) if self.case.vmapped else function
        return function(**floats, **others, **options)

    def out(self, floats: Any, others: Any) -> Any:
        return self._call(self._attention, floats, others)

    def lse(self, floats: Any, others: Any) -> Any:
        """out and lse, which is 0 here in rows without a key."""
        out, lse = self._call(self._with_lse, floats, others)
        return out, jnp.where(lse > -1e30, lse, 0)

    def _of(self, names: Any, transform: Callable, function: Callable | None = None) -> Program:
        """`transform(f, x)` of f(x), a function of the floats named."""

        def program(floats: Any, others: Any) -> Any:
            x, fixed = _split(floats, names)
            if "scale" not in names:
                fixed.pop("scale", None)
            f = lambda x: (function or self.out)({**fixed, **x}, others)  # noqa: E731
            return transform(f, x)

        return program

    def all(self) -> dict[str, Program]:
        names = tuple(operand_types(self.case)[0])
        loss = lambda f: lambda x: _sum(f(x))  # noqa: E731
        gradient = lambda f: jax.grad(loss(f))  # noqa: E731
        corner = lambda f: lambda x: jax.tree.map(lambda y: y[(0,) * (y.ndim - 3) + np.s_[0:2, 0, 0:2]], f(x))  # noqa: E731
        # A Jacobian with respect to a few elements of query; one of all has too many.
        nudged = lambda f, x: lambda c: f({**x, "query": x["query"].at[..., 0:2, 0, 0:2].add(c)})  # noqa: E731
        nothing = lambda x: jnp.zeros((2, 2), x["query"].dtype)  # noqa: E731
        slope = lambda f: lambda x: _weighed(gradient(f)(x))  # noqa: E731
        directional = lambda f: lambda x: _weighed(jax.jvp(f, (x,), (x,))[1])  # noqa: E731
        hvp = lambda f: lambda x: jax.jvp(gradient(f), (x,), (x,))[1]  # noqa: E731
        saved = jax.checkpoint_policies.save_only_these_names("flash_attention_out", "flash_attention_lse")

        def linearized(f: Any, x: Any) -> Any:
            out, pushforward = jax.linearize(f, x)
            return out, pushforward(x)

        def scanned(f: Any, x: Any) -> Any:
            def step(carry: Any, _: Any) -> Any:
                out = f({**x, "query": carry})
                return out, None

            return jax.lax.scan(step, x["query"], None, length=2)[0]

        def transposed(f: Any, x: Any) -> Any:
            value, others = x["value"], {"query": x["query"], "key": x["key"]}
            out = jax.eval_shape(lambda v: f({**others, "value": v}), value)
            transpose = jax.linear_transpose(lambda v: f({**others, "value": v}), value)
            return transpose(jnp.ones(out.shape, out.dtype))

        def axes(x: Any, which: Any) -> Any:
            return {name: 0 if name in which else None for name in x}

        def stacked(x: Any, which: Any) -> Any:
            return {name: jnp.stack([y, y, y]) if name in which else y for name, y in x.items()}

        def vmapped(f: Any, which: Any) -> Any:
            return lambda x: jax.vmap(f, (axes(x, which),))(stacked(x, which))

        programs = {
            "value": self._of(QKV, lambda f, x: f(x)),
            "gradient": self._of(QKV, lambda f, x: gradient(f)(x)),
            "gradient of all": self._of(names, lambda f, x: gradient(f)(x)),
            "jvp": self._of(names, lambda f, x: jax.jvp(f, (x,), (x,))),
            "linearize": self._of(QKV, linearized),
            "jacfwd": self._of(("query",), lambda f, x: jax.jacfwd(nudged(corner(f), x))(nothing(x))),
            "jacrev": self._of(QKV, lambda f, x: jax.jacrev(corner(f))(x)),
            "forward over reverse": self._of(names, lambda f, x: hvp(f)(x)),
            "hessian": self._of(("query",), lambda f, x: jax.hessian(nudged(loss(f), x))(nothing(x))),
            "reverse over reverse": self._of(names, lambda f, x: jax.grad(slope(f))(x)),
            "reverse over forward": self._of(names, lambda f, x: jax.grad(directional(f))(x)),
            "third order": self._of(QKV, lambda f, x: jax.jvp(hvp(f), (x,), (x,))[1]),
            "vmap": self._of(QKV, lambda f, x: vmapped(f, QKV)(x)),
            "vmap of query": self._of(names, lambda f, x: vmapped(f, ("query",))(x)),
            "gradient of vmap": self._of(QKV, lambda f, x: jax.grad(loss(vmapped(f, ("query",))))(x)),
            "vmap of gradient": self._of(QKV, lambda f, x: vmapped(gradient(f), ("query",))(x)),
            "gradient of scale": self._of(("scale",), lambda f, x: gradient(f)(x)),
            "forward over gradient of scale": self._of(("scale",), lambda f, x: jax.jacfwd(gradient(f))(x)),
            "checkpoint": self._of(QKV, lambda f, x: jax.grad(loss(jax.checkpoint(f)))(x)),
            "checkpoint that saves": self._of(QKV, lambda f, x: jax.grad(loss(jax.checkpoint(f, policy=saved)))(x)),
            "scan": self._of(QKV, scanned),
            "gradient of scan": self._of(QKV, lambda f, x: jax.grad(lambda x: _sum(scanned(f, x)))(x)),
            "linear_transpose": self._of(QKV, transposed),
            "lse": self._of(QKV, lambda f, x: f(x), self.lse),
            "gradient of lse": self._of(names, lambda f, x: jax.grad(lambda x: _sum(f(x)[1]))(x), self.lse),
            "gradient of out and lse": self._of(QKV, lambda f, x: gradient(f)(x), self.lse),
            "forward over reverse of lse": self._of(QKV, lambda f, x: hvp(f)(x), self.lse),
        }
        if "bias" in names:
            programs["gradient of bias"] = self._of(("bias",), lambda f, x: gradient(f)(x))
        return programs


# ---- what programs bind


class Bind(NamedTuple):
    """One of this library's primitives on operands of these types. Two that lower alike are equal."""

    primitive: Any
    params: tuple[tuple[str, Any], ...]
    avals: tuple[tuple[tuple[int, ...], Any], ...]

    @property
    def has_float64(self) -> bool:
        return any(dtype == np.float64 for _, dtype in self.avals)

    @property
    def is_first_order(self) -> bool:
        """The forward, tangent or cotangent kernel: what Mosaic GPU has kernels for."""
        kernel = dict(self.params).get("kernel")
        return kernel is None or isinstance(kernel, FirstDerivative)

    def lowered(self) -> str:
        """The program for CUDA; 64-bit types must be on where they were when it was bound."""

        @jax.jit
        def run(*operands: Any) -> Any:
            return self.primitive.bind(*operands, **dict(self.params), partitioning=None)

        operands = [jax.ShapeDtypeStruct(*aval) for aval in self.avals]
        return run.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def binds(program: Program, case: Case) -> dict[Bind, None]:
    """In the order of the program."""
    closed = jax.make_jaxpr(program)(*operand_types(case))
    return dict.fromkeys(
        Bind(
            eqn.primitive,
            tuple((name, x) for name, x in sorted(eqn.params.items()) if name != "partitioning"),
            tuple((v.aval.shape, v.aval.dtype) for v in eqn.invars),
        )
        for eqn in equations(closed.jaxpr, leaves=PRIMITIVES)
        if eqn.primitive.name in PRIMITIVES
    )
