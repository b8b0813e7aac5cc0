# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "torch==2.15.0",
#     "numpy==2.5.5",
# ]
# ///
# ruff: noqa: RUF012
"""`torch.nn.attention.flex_attention`, not compiled, on a CPU."""

import numpy as np
import torch
from frameworks import TorchLseAdapter, array, main, tensors
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention


class Flex(TorchLseAdapter):
    name = "FlexAttention"
    packages = ("torch", "numpy")
    function = staticmethod(flex_attention)
    functions = (flex_attention,)
    windows = {"abs(q_idx - kv_idx) <= 3": {"window": lambda b, h, q, k: (q - k).abs() <= 3}}
    by = {
        name: "`mask_mod`" for name in ("causal", "causal_more_queries", "row_without_keys", "segments", "window")
    } | {
        "bias": "`score_mod`",
        "soft_cap": "`score_mod`",
        "bias_gradient": "captured by `score_mod`",
        "nan_in_padding": "`mask_mod`",
    }

    def native(self, query, key, value):
        return array(self.function(*tensors(query, key, value)))

    def apply(
        self, query, key, value, *, causal=False, raw_mask=None, mask=None, window=None, bias=None, soft_cap=None,
        segments=None, with_lse=False, **options,
    ):  # fmt: skip
        self.refuse(options, "dropout", "sinks", "lengths")
        if raw_mask is not None:
            self.lacks("^(attn_)?mask$")
        mods = [window] if window else []
        if causal:
            mods.append(lambda b, h, q, k: q >= k)
        if mask is not None:
            attends = tensors(mask)[0]
            mods.append(lambda b, h, q, k: attends[0, 0, q, k])
        if segments is not None:
            ids = tensors(segments)[0]
            mods.append(lambda b, h, q, k: ids[q] == ids[k])
        if mods:
            lengths = query.shape[1], key.shape[1]
            options["block_mask"] = create_block_mask(mods[0], None, None, *lengths, device=query.device)
        if bias is not None or soft_cap is not None:
            added = tensors(bias)[0] if isinstance(bias, np.ndarray) else bias

            def score_mod(score, b, h, q, k):
                score = score if added is None else score + added[0, h, q, k]
                return score if soft_cap is None else soft_cap * torch.tanh(score / soft_cap)

            options["score_mod"] = score_mod
        if key.shape[2] != query.shape[2]:
            try:
                self.function(*(x.transpose(1, 2) for x in (query, key, value)))
            except Exception as error:
                self.by = dict(self.by) | {"heads": f"`enable_gqa=True`; {type(error).__name__} without"}
            options["enable_gqa"] = True
        if with_lse:
            options["return_aux"] = AuxRequest(lse=True)
        out = self.function(*(x.transpose(1, 2) for x in (query, key, value)), **options)
        return (out[0].transpose(1, 2), out[1].lse) if with_lse else out.transpose(1, 2)


if __name__ == "__main__":
    main(Flex())
