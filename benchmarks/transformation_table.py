"""Print the table "transformation | jax.nn | cudnn | tokamax | ours" of docs/transformations.md, all from runs.

uv run python benchmarks/transformation_table.py
uv run python benchmarks/transformation_table.py --columns ours --dtype bfloat16 --head-dim 64 --x64   # on a GPU

A cell says "works", or what goes wrong: the error's class, or the largest error relative to dense attention in float64.
Peers that this machine lacks (cudnn needs a GPU, tokamax its package) get a dash. Shapes are tiny.
The options say in which dtype "ours" runs, and whether with 64-bit types.
"""

import dataclasses
import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

# Sharding needs several devices, which a processor can pretend to have. Before JAX starts.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import jax.numpy as jnp
import numpy as np
from harness.machine import header
from harness.options import command_line
from harness.oracle import enable_x64, float64_oracle
from harness.report import Table, progress
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_native_flash_attn import flash_attention

Attention = Callable[..., jax.Array]
Function = Callable[..., Any]

B, T, N = 2, 16, 2
LENGTHS = np.array([16, 9], np.int32)
RATE, SEED = 0.3, 7
ABSENT = "-"
WORKS = "works"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One column."""

    call: Attention
    dtype: str
    tolerance: float  # of the error relative to the largest expected element
    head_dim: int = 16


# Of the error relative to the largest expected element.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


def implementations(dtype: str, head_dim: int) -> dict[str, Implementation | None]:
    """The columns in order, "ours" in `dtype`; None where this machine cannot run it."""
    has_gpu = jax.default_backend() == "gpu"
    # Matrix products of float32 run in TensorFloat-32 on a GPU.
    float32 = ("float32", 5e-3 if has_gpu else TOLERANCES["float32"])
    columns: dict[str, Implementation | None] = {
        "jax.nn": Implementation(jax.nn.dot_product_attention, *float32),
        "cudnn": None,
        "tokamax": None,
        "ours": Implementation(flash_attention, *(float32 if dtype == "float32" else (dtype, TOLERANCES[dtype]))),
    }
    if has_gpu:

        def cudnn(*arrays: Any, **options: Any) -> jax.Array:
            return jax.nn.dot_product_attention(*arrays, implementation="cudnn", **options)

        columns["cudnn"] = Implementation(cudnn, "bfloat16", TOLERANCES["bfloat16"])
    if importlib.util.find_spec("tokamax") is not None:
        importlib.import_module("absl.flags").FLAGS(["transformation_table"])
        columns["tokamax"] = Implementation(importlib.import_module("tokamax").dot_product_attention, *float32)
    return {name: x and dataclasses.replace(x, head_dim=head_dim) for name, x in columns.items()}


def dense(*arrays: Any, dropout_rng: Any = None, **options: Any) -> jax.Array:
    """The tests' oracle, in float64, as an implementation: `flash_attention` with the mask of `keep` for any key."""
    return float64_oracle(*arrays, keep=None if dropout_rng is None else keep(), **options)[0]


@functools.cache
def keep() -> np.ndarray:
    """The dropout mask. With 64-bit types on, bernoulli draws other numbers: so first called before `enable_x64`."""
    return np.asarray(jax.random.bernoulli(jax.random.key(SEED), 1 - RATE, (B, N, T, T)))


def inputs(dtype: str, head_dim: int) -> dict[str, np.ndarray]:
    """Arguments, rounded to bfloat16 first so that every implementation gets the same numbers."""
    rng = np.random.default_rng(0)
    array = B, T, N, head_dim
    shapes = {"query": array, "key": array, "value": array, "bias": (1, N, T, T), "scale": ()}
    rounded = {name: np.asarray(rng.standard_normal(shape)).astype(jnp.bfloat16) for name, shape in shapes.items()}
    return {name: x.astype(jnp.dtype(dtype)) for name, x in rounded.items()}


# ---- rows that compare numbers: (attention, arguments) -> results


def loss(attention: Attention) -> Function:
    # float32 sums for 16-bit results.
    def scalar(*arrays: Any, **options: Any) -> jax.Array:
        out = attention(*arrays, **options)
        return jnp.sin(out.astype(jnp.promote_types(out.dtype, jnp.float32))).sum()

    return scalar


def qkv(x: dict[str, Any]) -> tuple[Any, Any, Any]:
    return x["query"], x["key"], x["value"]


def gradient(attention: Attention) -> Function:
    return jax.grad(loss(attention), (0, 1, 2))


def slope(attention: Attention, x: dict[str, Any]) -> Function:
    """The gradient along the arguments, a scalar."""
    return lambda *a: sum(jnp.vdot(g, t) for g, t in zip(gradient(attention)(*a), qkv(x), strict=True))


def vmapped(attention: Attention, x: dict[str, Any]) -> Any:
    stacked = (jnp.stack([a, 2 * a]) for a in qkv(x))
    return jax.vmap(attention)(*stacked)


def vmapped_with_shared_bias(attention: Attention, x: dict[str, Any]) -> Any:
    query = jnp.stack([x["query"], 2 * x["query"]])

    def value_and_gradient(query: Any, bias: Any) -> Any:
        def f(query: Any) -> jax.Array:
            return loss(attention)(query, x["key"], x["value"], bias)

        return attention(query, x["key"], x["value"], bias), jax.grad(f)(query)

    return jax.vmap(value_and_gradient, (0, None))(query, x["bias"])


def bias_gradient(attention: Attention, x: dict[str, Any]) -> Any:
    return jax.grad(lambda bias: loss(attention)(*qkv(x), bias))(x["bias"])


def scale_gradient(attention: Attention, x: dict[str, Any]) -> Any:
    return jax.grad(lambda scale: loss(attention)(*qkv(x), scale=scale))(x["scale"])


def dropped_out(attention: Attention, x: dict[str, Any]) -> Any:
    def f(*a: Any) -> jax.Array:
        return attention(*a, dropout_rate=RATE, dropout_rng=jax.random.key(SEED))

    return f(*qkv(x)), gradient(f)(*qkv(x))


def padded(attention: Attention, x: dict[str, Any]) -> Any:
    """NaN in the padding of key and value; results of real tokens."""
    padding = np.arange(T)[None, :, None, None] >= LENGTHS[:, None, None, None]
    key, value = (jnp.where(padding, jnp.nan, x[name]) for name in ("key", "value"))

    def f(query: Any) -> jax.Array:
        return attention(query, key, value, key_value_seq_lengths=LENGTHS)

    return f(x["query"]), jax.grad(loss(f))(x["query"])


COMPARED: dict[str, Callable[[Attention, dict[str, Any]], Any]] = {
    "jit": lambda f, x: f(*qkv(x)),
    "vjp (gradient)": lambda f, x: gradient(f)(*qkv(x)),
    "jvp": lambda f, x: jax.jvp(f, qkv(x), qkv(x))[1],
    "jacfwd": lambda f, x: jax.jacfwd(f)(*qkv(x)),
    "jacrev": lambda f, x: jax.jacrev(f)(*qkv(x)),
    "hessian": lambda f, x: jax.hessian(loss(f))(*qkv(x)),
    "forward over reverse (hvp)": lambda f, x: jax.jvp(gradient(f), qkv(x), qkv(x))[1],
    "reverse over reverse": lambda f, x: jax.grad(slope(f, x), (0, 1, 2))(*qkv(x)),
    "third order": lambda f, x: jax.jvp(jax.grad(slope(f, x), (0, 1, 2)), qkv(x), qkv(x))[1],
    "vmap": vmapped,
    "vmap of query, shared bias, and its gradient": vmapped_with_shared_bias,
    "gradient of bias": bias_gradient,
    "gradient of scale": scale_gradient,
    "dropout": dropped_out,
    "NaN in padding is harmless": padded,
}


def compare(results: Callable[[Attention, dict[str, Any]], Any], implementation: Implementation) -> str:
    """Run one row, jitted, and compare it with the same transformation of dense attention in float64."""

    def transformed(attention: Attention, dtype: str) -> list[np.ndarray]:
        leaves = jax.tree.leaves(jax.jit(lambda x: results(attention, x))(inputs(dtype, implementation.head_dim)))
        return [np.asarray(leaf).astype(np.float64) for leaf in leaves]

    actual = transformed(implementation.call, implementation.dtype)
    with enable_x64():
        expected = transformed(dense, "float64")
    return verdict(actual, expected, implementation.tolerance)


def verdict(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float) -> str:
    if not all(np.isfinite(a).all() for a in actual):
        return "NaN"
    errors = [np.abs(a - e).max() / np.abs(e).max() for a, e in zip(actual, expected, strict=True)]
    return WORKS if max(errors) <= tolerance else f"wrong by {max(errors):.1e}"


# ---- rows that look at the compiled program


def softmax_of_float64(implementation: Implementation) -> str:
    with enable_x64():
        expected = jax.jit(dense)(*qkv(inputs("float64", implementation.head_dim)))
        actual = jax.jit(implementation.call)(*qkv(inputs("float64", implementation.head_dim)))
        return verdict([np.asarray(actual)], [np.asarray(expected)], 1e-13)


def memory_of_the_gradient(implementation: Implementation) -> str:
    """How much the temporary memory grows for twice the length."""

    def temporary_bytes(length: int) -> int:
        x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.dtype(implementation.dtype))
        compiled: Any = jax.jit(gradient(implementation.call)).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    growth = temporary_bytes(8192) / max(1, temporary_bytes(4096))
    return f"{WORKS} (x {growth:.1f})" if growth <= 2.2 else f"quadratic (x {growth:.1f})"


def sharded(implementation: Implementation, kind: AxisType) -> str:
    """Batch and heads over two mesh axes: collectives in the compiled gradient, which needs none."""
    if jax.device_count() < 4:
        return ABSENT
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "model", None))
    x = inputs(implementation.dtype, implementation.head_dim)
    placed = [jax.device_put(a, sharding) for a in qkv(x)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradient(implementation.call)).lower(*placed).compile()
    names = "all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter"
    count = len(re.findall(rf" (?:{names})(?:-start)?\(", compiled.as_text() or ""))
    if count:
        return f"{count} collectives"
    actual = [np.asarray(g).astype(np.float64) for g in compiled(*placed)]
    with enable_x64():
        expected = [np.asarray(g) for g in jax.jit(gradient(dense))(*qkv(inputs("float64", implementation.head_dim)))]
    return verdict(actual, expected, implementation.tolerance)


ROWS: dict[str, Callable[[Implementation], str]] = {
    **{name: lambda column, row=row: compare(row, column) for name, row in COMPARED.items()},
    "float64 softmax": softmax_of_float64,
    "gradient in linear memory": memory_of_the_gradient,
    "sharded batch and heads, auto axes": lambda column: sharded(column, AxisType.Auto),
    "sharded batch and heads, explicit axes": lambda column: sharded(column, AxisType.Explicit),
}


def cell(row: Callable[[Implementation], str], column: Implementation | None) -> str:
    if column is None:
        return ABSENT
    try:
        return row(column)
    except Exception as error:  # whatever a peer raises is what the table says
        return type(error).__name__


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    names = ["jax.nn", "cudnn", "tokamax", "ours"]
    parser.add_argument("--columns", nargs="+", choices=names, default=names, metavar="COLUMN")
    parser.add_argument("--dtype", choices=list(TOLERANCES), default="float32", help="of the column 'ours'")
    parser.add_argument("--head-dim", type=int, default=16, help="of every column")
    parser.add_argument("--x64", action="store_true", help="with jax_enable_x64")
    options = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", options.x64)
    keep()
    columns = {
        name: x for name, x in implementations(options.dtype, options.head_dim).items() if name in options.columns
    }
    print(header(), flush=True)
    what = f"head dimension {options.head_dim}, 64-bit types {'on' if options.x64 else 'off'}"
    titles = [f"{name} ({x.dtype}, {what})" if x else name for name, x in columns.items()]
    print(flush=True)
    with Table(["transformation", *titles], labels=1 + len(columns)) as table:
        for name in progress(options.rows, str):
            table.add(name, *(cell(ROWS[name], column) for column in columns.values()))


if __name__ == "__main__":
    main()
