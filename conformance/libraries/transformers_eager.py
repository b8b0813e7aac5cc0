# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "torch==2.15.0",
#     "numpy==2.5.5",
#     "transformers==5.23.0",
# ]
# ///
# ruff: noqa: RUF012
"""`eager_attention_forward` of transformers' Gemma 2 (gpt-oss' for sinks), masks by `masking_utils.eager_mask`."""

from types import SimpleNamespace

import numpy as np
import torch
from frameworks import TorchAdapter, main, tensors
from transformers import masking_utils
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as with_sinks


class Eager(TorchAdapter):
    name = "transformers (eager)"
    packages = ("transformers", "torch")
    functions = (eager_attention_forward,)
    added_masks = True
    windows = {"sliding_window_causal_mask_function(3)": {"window": 3}}
    by = {
        "causal": "`eager_mask`", "causal_more_queries": "`eager_mask`", "sinks": "of gpt-oss",
        "segments": "`packed_sequence_mask_function`",
    }  # fmt: skip

    def native(self, query, key, value):
        query, key, value = tensors(query, key, value)
        return eager_attention_forward(self.module(query, key), query, key, value, None)[0].transpose(1, 2).numpy()

    def module(self, query, key, sinks=None, training=False):
        groups = query.shape[1] // max(1, key.shape[1])
        return SimpleNamespace(head_dim=query.shape[-1], num_key_value_groups=groups, training=training, sinks=sinks)

    def mask(self, query, key, function):
        sizes = len(query), query.shape[1], key.shape[1]
        return masking_utils.eager_mask(*sizes, mask_function=function, dtype=query.dtype, use_vmap=True)

    def apply(
        self, query, key, value, *, causal=False, raw_mask=None, mask=None, bias=None, scale=None, soft_cap=None,
        sinks=None, dropout=None, window=None, segments=None, **options,
    ):  # fmt: skip
        self.refuse(options)
        raw_mask = bias if bias is not None else raw_mask
        raw_mask = torch.from_numpy(raw_mask) if isinstance(raw_mask, np.ndarray) else raw_mask
        if causal:
            raw_mask = self.mask(query, key, masking_utils.causal_mask_function)
        elif window:
            raw_mask = self.mask(query, key, masking_utils.sliding_window_causal_mask_function(window))
        elif segments is not None:
            ids = torch.from_numpy(segments).expand(query.shape[:2])
            raw_mask = self.mask(query, key, masking_utils.packed_sequence_mask_function(ids))
        elif mask is not None:
            array = torch.from_numpy(mask)
            raw_mask = self.mask(query, key, lambda b, h, i, j: array[0, 0, i, j])
        rate, seed = dropout or (0.0, 0)
        torch.manual_seed(seed)
        sinks = None if sinks is None else torch.from_numpy(sinks)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        module = self.module(query, key, sinks, bool(rate))
        if sinks is not None:
            return with_sinks(module, query, key, value, raw_mask, scale, rate)[0]
        return eager_attention_forward(module, query, key, value, raw_mask, rate, scale, soft_cap)[0]


if __name__ == "__main__":
    main(Eager())
