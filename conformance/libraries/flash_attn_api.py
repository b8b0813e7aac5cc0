# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==2.5.5",
#     "einops==0.8.2",
#     "flash-attn==2.8.3.post2",
# ]
#
# [tool.uv]
# extra-build-dependencies = { flash-attn = ["torch==2.13.0", "setuptools", "wheel", "psutil", "ninja", "packaging"] }
#
# [tool.uv.extra-build-variables.flash-attn]
# FLASH_ATTENTION_FORCE_BUILD = "TRUE"
# FLASH_ATTENTION_SKIP_CUDA_BUILD = "TRUE"
# ///
# ruff: noqa: RUF012
"""`flash_attn.flash_attn_func`, its Triton kernels (the AMD back end), in Triton's interpreter on a CPU.

The CUDA kernels need a GPU. What the arguments mean is the same function's; what the kernels do with rows without keys,
with NaN and with types is that of the Triton ones.
"""

import os

os.environ |= {"FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE", "TRITON_INTERPRET": "1"}

import flash_attn.flash_attn_interface as interface
import numpy as np
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func
from frameworks import TorchLseAdapter, main, tensors

for operator in (
    interface._flash_attn_forward,
    interface._flash_attn_backward,
    interface._flash_attn_varlen_forward,
    interface._flash_attn_varlen_backward,
):
    operator.register_kernel("cpu")(operator._init_fn)  # they are registered for "cuda" only


class FlashAttn(TorchLseAdapter):
    name = "flash_attn (Triton, interpreted)"
    packages = ("flash-attn", "torch", "triton")
    functions = (flash_attn_func,)
    masks = False
    ids = (0, 0, 1, 1, 1, 1, 2, 2)
    by = {"segments": "`cu_seqlens` of `flash_attn_varlen_func`", "row_without_keys": "`causal=True`"}
    windows = {"window_size=(3, 3)": {"window": (3, 3)}, "(3, -1)": {"window": (3, -1)}}

    def native(self, query, key, value):
        return flash_attn_func(*tensors(query, key, value)).numpy()

    def apply(
        self, query, key, value, *, causal=False, raw_mask=None, mask=None, window=(-1, -1), soft_cap=0.0, scale=None,
        dropout=None, segments=None, with_lse=False, **options,
    ):  # fmt: skip
        self.refuse(options, "bias", "sinks", "lengths")
        if mask is not None or raw_mask is not None:
            self.lacks("mask")
        if dropout:
            torch.manual_seed(dropout[1])
            options["dropout_p"] = dropout[0]
        if segments is not None:
            ends = np.flatnonzero(np.diff(segments, append=-1)) + 1
            ends = torch.tensor([0, *ends], dtype=torch.int32)
            longest = int(ends.diff().max())
            out = flash_attn_varlen_func(query[0], key[0], value[0], ends, ends, longest, longest)
            return out[None]
        out = flash_attn_func(
            query,
            key,
            value,
            causal=causal,
            window_size=window,
            softcap=soft_cap,
            softmax_scale=scale,
            return_attn_probs=with_lse,
            **options,
        )
        return out


if __name__ == "__main__":
    main(FlashAttn())
