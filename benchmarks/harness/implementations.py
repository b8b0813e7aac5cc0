"""The implementations that the benchmarks compare, each compiled for one shape and mode.

Every one offers the same: a call to time, its results as NumPy arrays, its temporary bytes.
"""

import functools
import importlib
import importlib.util
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from harness.inputs import DIFFERENTIATED, AttentionInputs, input_types
from harness.memory import temporary_bytes
from harness.other_tree import flash_attention_of
from harness.shapes import FORWARD, AttentionShape
from harness.timing import Call
from jax_native_flash_attn import flash_attention

OURS = "flash"
REFERENCE = "jax.nn"
TORCH = "torch"
TOKAMAX = "tokamax"

HELP = (
    f"{OURS}, {REFERENCE} or {TOKAMAX}, each with ':name' for its argument implementation=name; {OURS}@512x1024 for "
    f"block_q=512 and block_kv=1024; {OURS}=DIR for the package in DIR, as another checkout's "
    f"src/jax_native_flash_attn; or {TORCH}"
)


class CompiledAttention(Protocol):
    """One implementation, ready for one shape and mode."""

    temporary_bytes: int | None
    compile_seconds: float | None
    calls: int

    def bind(self, inputs: AttentionInputs) -> Call:
        """The call to time, which computes attention `calls` times. It returns the output, and any gradients."""
        ...

    def named_results(self, result: Any) -> Mapping[str, np.ndarray]:
        """What the bound call returned: output and gradients by name, shaped as arguments."""
        ...


def default_implementations() -> list[str]:
    """Ours, jax.nn, and what else this machine has."""
    names = [OURS, REFERENCE]
    if jax.default_backend() == "gpu":
        names.append(f"{REFERENCE}:cudnn")
        if importlib.util.find_spec(TOKAMAX) is not None:
            names += [f"{TOKAMAX}:mosaic_gpu", f"{TOKAMAX}:triton"]
    if jax.default_backend() == "cpu" and importlib.util.find_spec(TORCH) is not None:
        names.append(TORCH)
    return names


def is_ours(implementation: str) -> bool:
    """Whether it is the installed package, whatever its settings; another tree is a peer."""
    return implementation.partition(":")[0].partition("@")[0] == OURS


def check_name(implementation: str) -> str:
    """The name itself, if it is one of `HELP`; raises ValueError."""
    if implementation != TORCH:
        _parse(implementation)
    return implementation


def _parse(implementation: str) -> tuple[str, str | None, dict[str, Any]]:
    """Library, its argument `implementation`, and block shapes."""
    library, _, name = implementation.partition(":")
    ours, _, blocks = library.partition("@")
    if library in (OURS, TOKAMAX) or library.startswith(f"{OURS}="):
        return library, name or None, {}
    if library == REFERENCE:
        return library, name or "xla", {}
    if ours == OURS and blocks.count("x") == 1:
        return ours, name or None, dict(zip(("block_q", "block_kv"), map(int, blocks.split("x")), strict=True))
    raise ValueError(f"{implementation!r} is not an implementation: {HELP}")


@functools.cache
def _function(library: str) -> Callable[..., Any]:
    """What has the arguments of `jax.nn.dot_product_attention`."""
    if library == OURS:
        return flash_attention
    if library == REFERENCE:
        return jax.nn.dot_product_attention
    if library == TOKAMAX:
        logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of every call that nobody has tuned
        return importlib.import_module(TOKAMAX).dot_product_attention
    return flash_attention_of(library.removeprefix(f"{OURS}="))


def attention(
    implementation: str, shape: AttentionShape, differentiated: tuple[Any, ...], inputs: AttentionInputs
) -> jax.Array:
    """The output for `differentiated` = (query, key, value, bias) and the other arrays of `inputs`."""
    library, name, settings = _parse(implementation)
    lengths = inputs.key_value_seq_lengths
    if library == REFERENCE and name == "cudnn" and lengths is not None:
        settings["query_seq_lengths"] = jnp.full_like(lengths, shape.query_length)  # cuDNN wants both
    return _function(library)(
        *differentiated,
        mask=inputs.mask,
        is_causal=shape.is_causal,
        key_value_seq_lengths=lengths,
        local_window_size=shape.local_window_size,
        implementation=name,
        **settings,
    )


def jax_call(implementation: str, shape: AttentionShape, mode: str) -> Callable[[AttentionInputs], Any]:
    """A function from inputs to (out, gradients); the latter are empty in the forward mode."""

    def call(inputs: AttentionInputs) -> tuple[jax.Array, Any]:
        function = functools.partial(attention, implementation, shape, inputs=inputs)
        if mode == FORWARD:
            return function(inputs.differentiated), ()
        out, pullback = jax.vjp(function, inputs.differentiated)
        return out, pullback(inputs.cotangent)[0]

    return call


def repeated(function: Callable[[Any], Any], count: int) -> Callable[[Any], Any]:
    """`function` of the same arguments `count` times in one program, each time after the last; the last result.

    Starting a short call from Python takes longer than the call; so this measures what it takes in a larger program.
    """
    if count == 1:
        return function

    def call(arguments: Any) -> Any:
        def step(_: Any, state: tuple) -> tuple:
            arguments, _ = jax.lax.optimization_barrier(state)
            return arguments, function(arguments)

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, arguments))
        return jax.lax.fori_loop(0, count, step, (arguments, nothing))[1]

    return call


def calls_per_program(operations: float, seconds: float = 3e-4, rate: float = 400e12) -> int:
    """How often to repeat a call so that its program takes `seconds` at `rate` operations per second; at most 64."""
    return max(1, min(64, round(seconds * rate / operations)))


def compile_attention(implementation: str, shape: AttentionShape, mode: str, calls: int = 1) -> CompiledAttention:
    """Compile `implementation`, one of `HELP`, for one shape and mode; `calls` of them in one program."""
    if implementation == TORCH:
        from harness.torch_peer import TorchAttention

        return TorchAttention(shape, mode)
    return JaxAttention(implementation, shape, mode, calls)


class JaxAttention:
    """A function with the arguments of `jax.nn.dot_product_attention`."""

    def __init__(self, implementation: str, shape: AttentionShape, mode: str, calls: int = 1):
        function, types = jax_call(implementation, shape, mode), input_types(shape)
        start = time.perf_counter()
        self.executable = jax.jit(function).lower(types).compile()
        self.compile_seconds: float | None = time.perf_counter() - start
        self.temporary_bytes: int | None = temporary_bytes(self.executable)
        self.calls = calls
        if calls > 1:
            self.executable = jax.jit(repeated(function, calls)).lower(types).compile()

    def bind(self, inputs: AttentionInputs) -> Call:
        return functools.partial(self.executable, inputs)

    def program(self) -> str:
        """What XLA compiled, as text."""
        return self.executable.as_text() or ""

    def named_results(self, result: Any) -> dict[str, np.ndarray]:
        out, gradients = result
        named = dict(zip(DIFFERENTIATED, gradients, strict=False))
        return {name: np.asarray(array) for name, array in {"out": out, **named}.items() if array is not None}
