"""Are the lowered programs of two checkouts the same? No call runs, and no GPU is needed.

    python benchmarks/compare_programs.py --before ../before/src --after src
    python benchmarks/compare_programs.py --before ../before/src --after src --only 'cuda .*dropout' --save programs

One process for each checkout, both at once, lowers the same calls: for the CPU, shapes of the CPU grid and small
shapes with every mask and option; for CUDA, as on a Hopper GPU, kernels of Mosaic GPU. Compared are StableHLO and the
modules of the Mosaic kernels, both without source locations and names of functions, so moved and renamed code makes no
difference. What a call raises is compared as its program is. Exits with 1 if any differ.
"""

import argparse
import contextlib
import difflib
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from harness.options import command_line
from harness.shapes import AttentionShape
from harness.suites import GPU_SHAPES, grid_shapes

_PACKAGE = "jax_native_flash_attn"
_LINES_OF_DIFF = 20

# Strings keep what looks like a symbol in them, and calls of other libraries keep their names.
_SYMBOL = re.compile(r'custom_call @[\w$.]+|@"[^"]*"|@[\w$.-]+|"(?:[^"\\]|\\.)*"')
_PAYLOAD = re.compile(r'\b(kernel_hash|module|mosaic_gpu\.dump_basename) = "(?:[^"\\]|\\.)*"')

_Arrays = dict[str, Any]


class _Call(NamedTuple):
    """One call of `flash_attention`: what is differentiated, other arrays, and static arguments."""

    name: str
    platform: str
    floats: _Arrays
    others: _Arrays
    static: _Arrays
    is_vmapped: bool
    transformations: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Lower in two processes and compare; 1 if programs differ, 2 if there are none, else 0."""
    options = _parse(argv)
    if options.write is not None:
        options.write.write_text(json.dumps(_lower_all(options.only, options.after)))
        return 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.save or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sources = {"before": options.before, "after": options.after}
        before, after = _lower_in_processes(sources, folder, options.only)
    differing = [name for name in before | after if before.get(name) != after.get(name)]
    for name in differing:
        print(f"\n{name}")
        for line in _first_difference(before.get(name, ""), after.get(name, "")):
            print(f"  {line[:200]}")
    raising = sum(text.startswith("raises ") for text in after.values())
    seconds = time.perf_counter() - start
    print(f"{len(before | after)} calls, {len(differing)} differ")
    print(f"{raising} of them raise; JAX {jax.__version__}, {seconds:.0f} s")
    return int(bool(differing)) if after else 2


def _lower_in_processes(sources: dict[str, Path], folder: Path, only: str) -> list[dict[str, str]]:
    children = []
    for name, source in sources.items():
        environment = os.environ | {"PYTHONPATH": str(source.resolve()), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, "--before", source, "--after", source, "--only", only]
        children.append(subprocess.Popen([*command, "--write", folder / f"{name}.json"], env=environment))
    if any([child.wait() for child in children]):
        sys.exit("a process that lowers failed")
    return [json.loads((folder / f"{name}.json").read_text()) for name in sources]


def _first_difference(before: str, after: str) -> list[str]:
    """A unified diff from the first line that differs; of whole programs it would take minutes."""
    old, new = before.splitlines(), after.splitlines()
    first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    lines = slice(max(0, first - 3), first + 2 * _LINES_OF_DIFF)
    diff = list(difflib.unified_diff(old[lines], new[lines], lineterm="", n=3))
    return [f"line {first + 1} of {len(old)} before, {len(new)} after", *diff[3 : 3 + _LINES_OF_DIFF]]


def _lower_all(only: str, source: Path) -> dict[str, str]:
    """Every program, or the text of what it raises, by its name."""
    package = importlib.import_module(_PACKAGE)
    if Path(str(package.__file__)).parent.parent != source.resolve():
        raise RuntimeError(f"{package.__file__} was imported, not the package in {source}")
    _pretend_hopper()
    kernels = _record_mosaic_modules()
    programs = {}
    for call in _calls():
        for transformation in call.transformations:
            name = f"{call.name}, {transformation}"
            if not re.search(only, name):
                continue
            kernels.clear()
            function = jax.jit(_transformed(package.flash_attention, call, transformation))
            try:
                lowered = function.trace(call.floats, call.others).lower(lowering_platforms=(call.platform,))
                programs[name] = "\n".join(map(_normalised, (lowered.as_text(), *kernels)))
            except Exception as error:  # compared as programs are
                programs[name] = f"raises {type(error).__name__}: {error}"
    return programs


def _pretend_hopper() -> None:
    for name in ("_kernels.hopper.support", "_dispatch"):  # where devices are probed, today and before
        with contextlib.suppress(ModuleNotFoundError):
            module: Any = importlib.import_module(f"{_PACKAGE}.{name}")
            module._compute_capabilities = lambda: frozenset({"9.0"})
            return
    raise RuntimeError("no module is known that has _compute_capabilities")


def _record_mosaic_modules() -> list[str]:
    """The list that each Mosaic kernel's module is appended to, before it is serialised with its locations."""
    core: Any = importlib.import_module("jax.experimental.mosaic.gpu.core")
    serialise = core._run_serde_pass
    kernels: list[str] = []

    def record(module: Any, **options: Any) -> Any:
        kernels.append(module.operation.get_asm(enable_debug_info=False))
        return serialise(module, **options)

    core._run_serde_pass = record
    return kernels


def _normalised(text: str) -> str:
    """The program with functions named in the order in which they appear, without serialised kernels."""
    names: dict[str, str] = {}

    def rename(match: re.Match[str]) -> str:
        return names.setdefault(match[0], f"@f{len(names)}") if match[0].startswith("@") else match[0]

    return _SYMBOL.sub(rename, _PAYLOAD.sub(r"\1", text))


def _transformed(attention: Callable[..., Any], call: _Call, transformation: str) -> Callable[..., Any]:
    def value(floats: _Arrays, others: _Arrays) -> Any:
        def one(arrays: _Arrays) -> Any:
            arguments = others | arrays
            window = [arguments.pop("left"), 0] if "left" in arguments else call.static.get("local_window_size")
            return attention(**arguments, **(call.static | {"local_window_size": window}))

        return (jax.vmap(one) if call.is_vmapped else one)(floats)

    def gradient(floats: _Arrays, others: _Arrays) -> Any:
        def loss(arrays: _Arrays) -> jax.Array:
            leaves = jax.tree.leaves(value(arrays, others))
            return sum((jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in leaves), jnp.float32(0))

        return jax.grad(loss)(floats)

    def jvp_of(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda floats, others: jax.jvp(lambda arrays: function(arrays, others), (floats,), (floats,))

    return {"value": value, "gradient": gradient, "jvp": jvp_of(value), "hvp": jvp_of(gradient)}[transformation]


def _array(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))


def _call(name: str, platform: str, sizes: Sequence[int], dtype: str, options: str, *transformations: str) -> _Call:
    """A call with sizes (B, T, S, N, K, H) and `options`, keys of the tables below joined by '+'."""
    b, t, s, n, k, h = sizes
    query, key = _array((b, t, n, h), dtype), _array((b, s, k, h), dtype)
    floats: _Arrays = {"query": query, "key": key, "value": key}
    others: _Arrays = {}
    static: _Arrays = {}
    table: dict[str, tuple[_Arrays, _Arrays]] = {
        "score bias": (floats, {"bias": _array((b, n, t, s), dtype)}),
        "key bias": (floats, {"bias": _array((b, 1, 1, s), dtype)}),
        "row bias": (floats, {"bias": _array((1, n, t, 1), dtype)}),
        "scale": (floats, {"scale": _array((), "float32")}),
        "traced window": (others, {"left": _array((), "int32")}),
        "key mask": (others, {"mask": _array((b, 1, 1, s), "bool")}),
        "score mask": (others, {"mask": _array((b, n, t, s), "bool")}),
        "row mask": (others, {"mask": _array((b, 1, t, 1), "bool")}),
        "key lengths": (others, {"key_value_seq_lengths": _array((b,), "int32")}),
        "row lengths": (others, {"query_seq_lengths": _array((b,), "int32")}),
        "dropout": (others, {"dropout_rng": jax.eval_shape(lambda: jax.random.key(0))}),
        "causal": (static, {"is_causal": True}),
        "window": (static, {"local_window_size": (40, 8)}),
        "tiles": (static, {"block_q": 32, "block_kv": 64}),
        "residual": (static, {"return_residual": True}),
        "precision": (static, {"precision": "highest"}),
        "vmap": (static, {}),
    }
    chosen = options.split("+") if options else []
    for arguments, more in map(table.__getitem__, chosen):
        arguments |= more
    static["dropout_rate"] = 0.25 if "dropout" in chosen else 0.0
    if "vmap" in chosen:
        floats = {name: _array((3, *array.shape), array.dtype) for name, array in floats.items()}
    name = f"{platform} {name} {options or 'plain'} {dtype}"
    return _Call(name, platform, floats, others, static, "vmap" in chosen, transformations)


_KINDS = (
    *("", "causal", "window", "traced window", "key mask", "score mask", "row mask", "key lengths"),
    *("key lengths+row lengths", "score bias", "key bias", "row bias", "dropout", "vmap", "scale"),
    *("tiles+causal+score bias", "tiles+traced window+dropout", "residual", "causal+key mask+precision"),
)
_CPU = (
    ("small", (2, 130, 150, 2, 2, 32), _KINDS),
    ("gqa", (2, 130, 150, 4, 2, 32), ("", "causal", "score bias", "dropout+tiles")),
    ("decoding", (2, 1, 600, 4, 2, 32), ("", "key lengths", "key bias")),
)
_CUDA = (
    ("small", (2, 130, 150, 4, 2, 64), "bfloat16", (*_KINDS[:14], "residual")),
    ("small", (2, 130, 150, 4, 2, 64), "float32", ("", "causal", "score bias")),
    *((f"head {h}", (2, 300, 300, 4, 4, h), "bfloat16", ("causal",)) for h in (128, 256, 80)),
    ("long", (1, 16384, 16384, 32, 8, 128), "bfloat16", ("causal",)),
    ("long", (2, 4096, 4096, 16, 16, 64), "bfloat16", ("",)),
    ("decoding", (4, 1, 32768, 32, 8, 128), "bfloat16", ("", "key lengths")),
)


def _calls() -> Iterator[_Call]:
    both = ("value", "gradient")
    for shape in grid_shapes(80):
        lengths = (shape.batch, shape.query_length, shape.key_value_length)
        sizes = (*lengths, shape.num_heads, shape.num_key_value_heads, shape.head_dim)
        yield _call(f"grid {shape.name}", "cpu", sizes, shape.dtype, "causal" if shape.is_causal else "", *both)
    for dtype, (name, sizes, kinds) in itertools.product(("float32", "bfloat16"), _CPU):
        for options in kinds:
            yield _call(name, "cpu", sizes, dtype, options, *both, "jvp", "hvp")
    for name, sizes, dtype, kinds in _CUDA:
        for options in kinds:
            yield _call(name, "cuda", sizes, dtype, options, *both)
    yield from map(_gpu_row, GPU_SHAPES)


def _gpu_row(shape: AttentionShape) -> _Call:
    """A row of the GPU table."""
    query = _array((shape.batch, shape.query_length, shape.num_heads, shape.head_dim), shape.dtype)
    key = _array((shape.batch, shape.key_value_length, shape.num_key_value_heads, shape.head_dim), shape.dtype)
    floats, others = {"query": query, "key": key, "value": key}, {}
    if shape.bias_shape is not None:
        floats["bias"] = _array(shape.bias_shape, shape.dtype)
    if shape.mask_shape is not None:
        others["mask"] = _array(shape.mask_shape, "bool")
    if shape.key_value_lengths is not None:
        others["key_value_seq_lengths"] = _array((shape.batch,), "int32")
    static = {"is_causal": shape.is_causal, "local_window_size": shape.local_window_size}
    modes = {"forward": "value", "gradient": "gradient"}
    transformations = tuple(modes[mode] for mode in shape.modes)
    return _Call(f"cuda table {shape.name}", "cuda", floats, others, static, False, transformations)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    for name in ("--before", "--after"):
        parser.add_argument(name, type=Path, required=True, metavar="DIR", help="contains the package")
    parser.add_argument("--only", default="", metavar="REGEX", help="the calls with such a name")
    parser.add_argument("--save", type=Path, metavar="DIR", help="keep the programs there, as JSON")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)  # in the process that lowers --after
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
