"""PyTorch's attention on a CPU, as a peer."""

import functools
import os
from typing import Any

import jax
import numpy as np

from harness.inputs import DIFFERENTIATED, AttentionInputs
from harness.machine import usable_cores
from harness.shapes import FORWARD, AttentionShape
from harness.timing import Call


class TorchAttention:
    """PyTorch's scaled_dot_product_attention on the CPU, on its own (B, N, T, H) layout.

    Inputs are laid out that way beforehand, outside the timed call, which favours it slightly.
    Windows and lengths become a boolean T*S mask, the only form it takes them in.
    """

    temporary_bytes: int | None = None
    compile_seconds: float | None = None
    calls = 1

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
        found = {"out": out} | dict(zip(DIFFERENTIATED, gradients, strict=False))
        arrays = {name: array.detach().float().numpy() for name, array in found.items()}
        return {name: array if name == "bias" else array.transpose(0, 2, 1, 3) for name, array in arrays.items()}
