# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "tinygrad==0.14.0",
#     "numpy==2.5.5",
# ]
# ///
"""`tinygrad.Tensor.scaled_dot_product_attention` on its device PYTHON, which needs no compiler."""

import os

os.environ["DEV"] = "PYTHON"

from frameworks import main
from probes import Adapter
from tinygrad import Context, Tensor


class Tinygrad(Adapter):
    name = "tinygrad"
    packages = ("tinygrad",)
    functions = (Tensor.scaled_dot_product_attention,)
    by = {"heads": "`enable_gqa=True`"}  # noqa: RUF012

    def native(self, query, key, value):
        return Tensor(query).scaled_dot_product_attention(Tensor(key), Tensor(value)).numpy()

    def apply(self, query, key, value, *, causal=False, raw_mask=None, mask=None, bias=None, dropout=None, **options):
        self.refuse(options, scale="scal")
        raw_mask = next((x for x in (mask, raw_mask, bias) if x is not None), None)
        raw_mask = raw_mask if raw_mask is None or isinstance(raw_mask, Tensor) else Tensor(raw_mask)
        rate, seed = dropout or (0.0, 0)
        Tensor.manual_seed(seed)
        with Context(TRAINING=int(bool(rate))):
            gqa = key.shape[2] != query.shape[2]
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            return (
                query.scaled_dot_product_attention(key, value, raw_mask, rate, causal, gqa).transpose(1, 2).contiguous()
            )

    def attention(self, query, key, value, **options):
        return self.apply(*map(Tensor, (query, key, value)), **options).numpy()

    def gradient(self, query, key, value, bias, weights):
        bias = Tensor(bias)
        out = self.apply(*map(Tensor, (query, key, value)), bias=bias)
        return (out * Tensor(weights)).sum().gradient(bias)[0].numpy()

    def second(self, query, key, value):
        query, key, value = map(Tensor, (query, key, value))
        gradient = (self.apply(query, key, value) ** 2).sum().gradient(query)[0]
        return (gradient**2).sum().gradient(query)[0].numpy()


if __name__ == "__main__":
    main(Tinygrad())
