# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "paddlepaddle==3.3.1",
#     "setuptools",
#     "numpy==2.5.5",
# ]
# ///
"""`paddle.nn.functional.scaled_dot_product_attention` on a CPU."""

import paddle
from frameworks import main
from paddle.nn.functional import scaled_dot_product_attention as attend
from probes import Adapter


class Paddle(Adapter):
    name = "paddle"
    packages = ("paddlepaddle",)
    functions = (attend,)

    def native(self, query, key, value):
        return attend(*map(paddle.to_tensor, (query, key, value))).numpy()

    def apply(
        self,
        query,
        key,
        value,
        *,
        causal=False,
        raw_mask=None,
        mask=None,
        bias=None,
        scale=None,
        dropout=None,
        **options,
    ):
        self.refuse(options)
        raw_mask = next((x for x in (mask, raw_mask, bias) if x is not None), None)
        raw_mask = raw_mask if raw_mask is None or paddle.is_tensor(raw_mask) else paddle.to_tensor(raw_mask)
        rate, seed = dropout or (0.0, 0)
        paddle.seed(seed)
        return attend(query, key, value, raw_mask, rate, causal, bool(rate), scale=scale)

    def attention(self, query, key, value, **options):
        return self.apply(*map(paddle.to_tensor, (query, key, value)), **options).numpy()

    def gradient(self, query, key, value, bias, weights):
        bias = paddle.to_tensor(bias, stop_gradient=False)
        out = self.apply(*map(paddle.to_tensor, (query, key, value)), bias=bias)
        (out * paddle.to_tensor(weights)).sum().backward()
        return bias.grad.numpy()

    def jvp(self, query, key, value, tangent):
        query, key, value, tangent = map(paddle.to_tensor, (query, key, value, tangent))
        return paddle.incubate.autograd.jvp(lambda q: self.apply(q, key, value), query, tangent)[1].numpy()

    def second(self, query, key, value):
        key, value = map(paddle.to_tensor, (key, value))
        query = paddle.to_tensor(query, stop_gradient=False)
        gradient = paddle.grad((self.apply(query, key, value) ** 2).sum(), query, create_graph=True)[0]
        return paddle.grad((gradient**2).sum(), query)[0].numpy()


if __name__ == "__main__":
    main(Paddle())
