# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "torch==2.15.0",
#     "numpy==2.5.5",
#     "transformers==5.23.0",
# ]
# ///
# ruff: noqa: RUF012
"""Hugging Face's `sdpa_attention_forward`, with masks by `masking_utils.sdpa_mask` and `is_causal=True` without one."""

from types import SimpleNamespace

import numpy as np
import torch
from frameworks import TorchAdapter, main, tensors
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward


class Sdpa(TorchAdapter):
    name = "transformers (sdpa)"
    packages = ("transformers", "torch")
    functions = (sdpa_attention_forward,)
    windows = {"sliding_window_causal_mask_function(3)": {"window": 3}}
    by = {"segments": "`packed_sequence_mask_function`", "bias": "`position_bias`", "bias_gradient": "`position_bias`"}

    def native(self, query, key, value):
        return self.run(*tensors(query, key, value), None).transpose(1, 2).numpy()

    def run(self, query, key, value, mask, causal=False, **options):
        module = SimpleNamespace(num_key_value_groups=query.shape[1] // max(1, key.shape[1]), is_causal=causal)
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]

    def mask(self, query, key, function):
        return masking_utils.sdpa_mask(
            len(query), query.shape[1], key.shape[1], mask_function=function, use_vmap=True, allow_is_causal_skip=False
        )

    def apply(
        self, query, key, value, *, causal=False, raw_mask=None, mask=None, bias=None, scale=None, dropout=None,
        window=None, segments=None, soft_cap=None, **options,
    ):  # fmt: skip
        self.refuse(options, sinks="sink|s_aux", lengths="length")
        raw_mask = torch.from_numpy(raw_mask) if isinstance(raw_mask, np.ndarray) else raw_mask
        if window:
            raw_mask = self.mask(query, key, masking_utils.sliding_window_causal_mask_function(window))
        elif segments is not None:
            ids = torch.from_numpy(segments).expand(query.shape[:2])
            raw_mask = self.mask(query, key, masking_utils.packed_sequence_mask_function(ids))
        elif mask is not None:
            array = torch.from_numpy(mask)
            raw_mask = self.mask(query, key, lambda b, h, i, j: array[0, 0, i, j])
        rate, seed = dropout or (0.0, 0)
        torch.manual_seed(seed)
        if bias is not None:
            options["position_bias"] = torch.as_tensor(bias)
        if soft_cap is not None:
            options["softcap"] = soft_cap
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return self.run(query, key, value, raw_mask, causal, dropout=rate, scaling=scale, **options)


if __name__ == "__main__":
    main(Sdpa())
