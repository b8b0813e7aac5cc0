# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "torch==2.15.0",
#     "numpy==2.5.5",
# ]
# ///
"""`torch.nn.MultiheadAttention`, with projections that are the identity, in evaluation mode."""

import torch
from frameworks import TorchAdapter, main, tensors

Layer = torch.nn.MultiheadAttention


class TorchLayer(TorchAdapter):
    name = "nn.MultiheadAttention"
    packages = ("torch", "numpy")
    functions = (Layer.__init__, Layer.forward)
    true_masks = True
    mask_shapes = ("B N T S", "B T S", "T S")
    by = {name: "`attn_mask` and `is_causal=True`" for name in ("causal", "causal_more_queries")}  # noqa: RUF012

    def native(self, query, key, value):
        return self.layer(3, query.shape[-1], torch.float32)(*tensors(query, key, value))[0].detach().numpy()

    def layer(self, N, features, dtype, dropout=0.0):
        layer = Layer(features, N, dropout, bias=False, batch_first=True, dtype=dtype)
        with torch.no_grad():
            layer.in_proj_weight.copy_(torch.eye(features).repeat(3, 1))
            layer.out_proj.weight.copy_(torch.eye(features))
        return layer.train(bool(dropout))

    def apply(self, query, key, value, *, causal=False, raw_mask=None, mask=None, dropout=None, **options):
        self.refuse(options, "scale", "lengths", "soft_cap", "sinks", "segments")
        (B, T, N, H), S = query.shape, key.shape[1]
        if key.shape[2] != N:
            self.lacks("kv_heads|value_heads|gqa")
        if mask is not None:
            raw_mask = ~mask[0, 0]
        if causal:
            raw_mask = ~torch.ones(T, S, dtype=torch.bool).tril()
        if "bias" in options:
            raw_mask = torch.as_tensor(options["bias"]).expand(B, N, T, S).reshape(B * N, T, S)
        elif raw_mask is not None:
            raw_mask = torch.as_tensor(raw_mask)
            raw_mask = raw_mask[0, 0] if raw_mask.shape[:2] == (1, 1) else raw_mask
        if dropout:
            torch.manual_seed(dropout[1])
        layer = self.layer(N, N * H, query.dtype, dropout[0] if dropout else 0.0)
        flat = [x.reshape(*x.shape[:2], x.shape[2] * x.shape[3]) for x in (query, key, value)]
        return layer(*flat, attn_mask=raw_mask, is_causal=causal)[0].reshape(B, T, N, H)


if __name__ == "__main__":
    main(TorchLayer())
