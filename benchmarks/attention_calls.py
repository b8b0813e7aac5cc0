"""The implementations that the benchmarks compare, each compiled for one shape and mode.

Every one offers the same: a call to time, its results as NumPy arrays, its temporary bytes.
"""

import functools
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from attention_shapes import FORWARD, AttentionInputs, AttentionShape
from machine import usable_cores
from other_tree import flash_attention_of
from timing import Call, temporary_bytes

from jax_native_flash_attn import flash_attention

OURS = "flash"
REFERENCE = "jax.nn"
TORCH = "torch"

# What an implementation raises for a call that it does not support or that memory is too small for.
# jaxlib's own error and NotImplementedError are RuntimeErrors.
UNSUPPORTED = (RuntimeError, ValueError, TypeError, MemoryError, ImportError)


class CompiledAttention(Protocol):
    """One implementation, ready for one shape and mode."""

    temporary_bytes: int | None
    compile_seconds: float | None

    def bind(self, inputs: AttentionInputs) -> Call:
        """The call to time. It returns the output, in the gradient mode the gradients as well."""
        ...

    def named_results(self, result: Any) -> dict[str, np.ndarray]:
        """What the bound call returned: output and gradients by name, shaped as arguments."""
        ...


def default_implementations() -> list[str]:
    """Ours, jax.nn, and what else this machine has."""
    names = [OURS, REFERENCE]
    if jax.default_backend() == "gpu":
        names.append(f"{REFERENCE}:cudnn")
    if jax.default_backend() == "cpu" and importlib.util.find_spec("torch") is not None:
        names.append(TORCH)
    return names


def compile_attention(
    implementation: str, shape: AttentionShape, mode: str, inputs: AttentionInputs
) -> CompiledAttention:
    """Compile `implementation` for one shape and mode.

    Args:
        implementation: `flash` or `jax.nn`, either with `:name` for its `implementation=name`
            argument; `flash@512x1024` for block_q=512 and block_kv=1024; `flash=DIR`, see `other_tree.py`; or `torch`.
        shape: what to compute.
        mode: `forward` or `gradient`.
        inputs: arrays to compile for.
    """
    library, _, name = implementation.partition(":")
    if library.startswith(f"{OURS}="):
        other = flash_attention_of(library.removeprefix(f"{OURS}="))
        return JaxAttention(other, name or None, shape, mode, inputs)
    ours, _, blocks = implementation.partition("@")
    if ours == OURS and blocks:
        block_q, block_kv = map(int, blocks.split("x"))
        tiled = functools.partial(flash_attention, block_q=block_q, block_kv=block_kv)
        return JaxAttention(tiled, None, shape, mode, inputs)
    if library == OURS:
        return JaxAttention(flash_attention, name or None, shape, mode, inputs)
    if library == REFERENCE:
        return JaxAttention(jax.nn.dot_product_attention, name or "xla", shape, mode, inputs)
    if implementation == TORCH:
        return _TorchAttention(shape, mode)
    raise ValueError(
        f"{implementation!r} is not an implementation: {OURS}, {REFERENCE}, either with ':name' "
        f"for its argument implementation=name, or {TORCH}"
    )


class JaxAttention:
    """A function with the arguments of `jax.nn.dot_product_attention`."""

    def __init__(
        self,
        attention: Callable[..., Any],
        implementation: str | None,
        shape: AttentionShape,
        mode: str,
        inputs: AttentionInputs,
    ):
        def forward(arguments: tuple[Any, ...], inputs: AttentionInputs) -> jax.Array:
            return attention(
                *arguments,
                mask=inputs.mask,
                is_causal=shape.is_causal,
                key_value_seq_lengths=inputs.key_value_seq_lengths,
                local_window_size=shape.local_window_size,
                implementation=implementation,
            )

        def output_and_gradients(inputs: AttentionInputs) -> tuple[jax.Array, Any]:
            arguments = (inputs.query, inputs.key, inputs.value, inputs.bias)
            if mode == FORWARD:
                return forward(arguments, inputs), ()
            out, pullback = jax.vjp(functools.partial(forward, inputs=inputs), arguments)
            return out, pullback(inputs.cotangent)[0]

        self._function = jax.jit(output_and_gradients)
        start = time.perf_counter()
        # The jitted function finds this executable in JAX's cache: compiled once, called the way
        # users call it.
        self._executable = self._function.lower(inputs).compile()
        self.temporary_bytes: int | None = temporary_bytes(self._executable)
        self.compile_seconds: float | None = time.perf_counter() - start

    def bind(self, inputs: AttentionInputs) -> Call:
        return functools.partial(self._function, inputs)

    def program(self) -> str:
        """What XLA compiled, as text."""
        return self._executable.as_text() or ""

    def named_results(self, result: Any) -> dict[str, np.ndarray]:
        out, gradients = result
        named = zip(("query", "key", "value", "bias"), gradients, strict=False)
        found = {"out": out} | {name: array for name, array in named if array is not None}
        return {name: np.asarray(array) for name, array in found.items()}


class _TorchAttention:
    """PyTorch's scaled_dot_product_attention on the CPU, on its own (B, N, T, H) layout.

    Inputs are laid out that way beforehand, outside the timed call, which favours it slightly.
    Windows and lengths become a boolean T*S mask, the only form it takes them in.
    """

    temporary_bytes: int | None = None
    compile_seconds: float | None = None

    def __init__(self, shape: AttentionShape, mode: str):
        # Waiting threads of OpenMP otherwise spin, before the next barrier and after the call: they
        # take the cores from the other implementations, and from PyTorch itself on a busy machine
        # (40 ms in place of 3). Counts only before the library is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import torch  # pyright: ignore[reportMissingImports]

        self._torch = torch
        self._shape = shape
        self._mode = mode
        torch.set_num_threads(usable_cores())

    def bind(self, inputs: AttentionInputs) -> Call:
        torch, shape = self._torch, self._shape
        dtype = getattr(torch, shape.dtype)

        def tensor(array: jax.Array) -> Any:
            return torch.from_numpy(np.array(array, np.promote_types(array.dtype, np.float32))).to(dtype)

        def by_head(array: jax.Array) -> Any:
            return tensor(array).transpose(1, 2).contiguous()

        arguments = [by_head(inputs.query), by_head(inputs.key), by_head(inputs.value)]
        cotangent = by_head(inputs.cotangent)
        bias = None if inputs.bias is None else tensor(inputs.bias)
        allowed = self._mask(inputs)
        if bias is not None:
            arguments.append(bias)
        gradient = self._mode != FORWARD
        for argument in arguments:
            argument.requires_grad_(gradient)

        def call() -> Any:
            attn_mask = allowed if bias is None else bias
            if bias is not None and allowed is not None:
                attn_mask = bias.masked_fill(~allowed, -torch.inf)
            # A causal call with a mask has causality in that mask.
            out = torch.nn.functional.scaled_dot_product_attention(
                *arguments[:3],
                attn_mask=attn_mask,
                is_causal=shape.is_causal and attn_mask is None,
                enable_gqa=shape.num_heads != shape.num_key_value_heads,
            )
            return out, torch.autograd.grad(out, arguments, cotangent) if gradient else ()

        return call

    def _mask(self, inputs: AttentionInputs) -> Any:
        """All masks as one boolean array, or None where `is_causal` alone says it."""
        torch, shape = self._torch, self._shape
        rows = torch.arange(shape.query_length)[:, None]
        keys = torch.arange(shape.key_value_length)
        parts = [] if inputs.mask is None else [torch.from_numpy(np.array(inputs.mask))]
        if shape.local_window_size is not None:
            left, right = shape.local_window_size
            parts.append((keys >= rows - left) & (keys <= rows + right))
        if inputs.key_value_seq_lengths is not None:
            lengths = torch.from_numpy(np.array(inputs.key_value_seq_lengths))
            parts.append(keys < lengths[:, None, None, None])
        if shape.is_causal and (parts or inputs.bias is not None):
            parts.append(keys <= rows)
        return functools.reduce(torch.logical_and, parts) if parts else None

    def named_results(self, result: Any) -> dict[str, np.ndarray]:
        out, gradients = result
        found = {"out": out} | dict(zip(("query", "key", "value", "bias"), gradients, strict=False))
        arrays = {name: array.detach().float().numpy() for name, array in found.items()}
        return {name: array if name == "bias" else array.transpose(0, 2, 1, 3) for name, array in arrays.items()}
