# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "torch==2.15.0",
#     "numpy==2.5.5",
#     "x-transformers==2.31.10",
# ]
# ///
"""`x_transformers.attend.Attend`."""

import numpy as np
import torch
from frameworks import TorchAdapter, main, tensors
from x_transformers.attend import Attend


class XTransformers(TorchAdapter):
    name = "x-transformers"
    packages = ("x-transformers", "torch")
    functions = (Attend.__init__, Attend.forward)
    flash = False

    def native(self, query, key, value):
        return Attend(flash=self.flash).eval()(*tensors(query, key, value))[0].numpy()

    def apply(
        self, query, key, value, *, causal=False, raw_mask=None, mask=None, bias=None, scale=None, soft_cap=None,
        sinks=None, dropout=None, **options,
    ):  # fmt: skip
        self.refuse(options, segments="segment|seqlens", lengths="length")
        rate, seed = dropout or (0.0, 0)
        torch.manual_seed(seed)
        more = {"softclamp_logits": True, "logit_softclamp_value": soft_cap} if soft_cap else {}
        more |= {"heads": query.shape[2], "head_learned_sink": True} if sinks is not None else {}
        layer = Attend(causal=causal, dropout=rate, scale=scale, flash=self.flash, **more).train(bool(rate))
        if sinks is not None:
            layer.head_attn_sink.data.copy_(torch.from_numpy(sinks))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mask = raw_mask if mask is None else mask
        mask = torch.from_numpy(mask) if isinstance(mask, np.ndarray) else mask
        bias = torch.from_numpy(bias) if isinstance(bias, np.ndarray) else bias
        return layer(query, key, value, mask=mask, attn_bias=bias)[0].transpose(1, 2)


if __name__ == "__main__":
    main(XTransformers())
