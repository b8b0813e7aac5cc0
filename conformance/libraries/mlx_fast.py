# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "mlx==0.32.4",
#     "mlx-cpu==0.32.4",
#     "numpy==2.5.5",
# ]
# ///
"""`mlx.core.fast.scaled_dot_product_attention` on a CPU."""

import re

import mlx.core as mx
import numpy as np
from frameworks import main
from probes import Adapter

attend = mx.fast.scaled_dot_product_attention


class MLX(Adapter):
    name = "MLX"
    packages = ("mlx",)
    functions = ()
    scale_is_required = True

    def arguments(self):  # it has no signature, but its first line
        return re.findall(r"(\w+):", attend.__doc__.splitlines()[0])

    def native(self, query, key, value):
        return np.asarray(attend(*map(mx.array, (query, key, value)), scale=query.shape[-1] ** -0.5))

    def apply(self, query, key, value, *, causal=False, raw_mask=None, mask=None, bias=None, scale=None, **options):
        sinks = options.pop("sinks", None)
        self.refuse(options, causal="causal")
        raw_mask = "causal" if causal else next((x for x in (mask, raw_mask, bias) if x is not None), None)
        raw_mask = mx.array(raw_mask) if isinstance(raw_mask, np.ndarray) else raw_mask
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        sinks = None if sinks is None else mx.array(sinks)
        return attend(query, key, value, scale=scale, mask=raw_mask, sinks=sinks).swapaxes(1, 2)

    def attention(self, query, key, value, **options):
        out = self.apply(*arrays(query, key, value), **options)
        return np.asarray(out)

    def gradient(self, query, key, value, bias, weights):
        query, key, value, bias, weights = arrays(query, key, value, bias, weights)
        return np.asarray(mx.grad(lambda b: (weights * self.apply(query, key, value, bias=b)).sum())(bias))

    def jvp(self, query, key, value, tangent):
        query, key, value, tangent = arrays(query, key, value, tangent)
        return np.asarray(mx.jvp(lambda q: self.apply(q, key, value), [query], [tangent])[1][0])

    def second(self, query, key, value):
        query, key, value = arrays(query, key, value)
        gradient = mx.grad(lambda q: (self.apply(q, key, value) ** 2).sum())
        return np.asarray(mx.grad(lambda q: (gradient(q) ** 2).sum())(query))


def arrays(*xs):
    return [mx.array(x) for x in xs]


if __name__ == "__main__":
    main(MLX())
