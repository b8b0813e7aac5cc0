"""Adapters of JAX and PyTorch: NumPy in and out, and derivatives."""

import importlib.metadata
import json
import sys
from typing import Any

import numpy as np
from probes import Adapter, Array, cells


def main(adapter: Adapter) -> None:
    """Print the cells as JSON. Arguments, if any, are the meanings to try."""
    versions = {name: importlib.metadata.version(name) for name in adapter.packages}
    found = cells(adapter, sys.argv[1:])
    sys.stdout.flush()
    print("\n" + json.dumps({"name": adapter.name, "versions": versions, **found}))


class JaxAdapter(Adapter):
    jit = True
    arrays = True  # options are JAX arrays, not NumPy's
    float16_modes = ("eager", "jit")

    def apply(self, query: Any, key: Any, value: Any, **options: Any) -> Any:
        """The call, with JAX arrays in (B, T, N, H). `with_lse` asks for (out, lse)."""
        raise NotImplementedError

    def attention(self, query: Array, key: Array, value: Array, mode: str = "", **options: Any) -> Array:
        import jax

        jax.config.update("jax_enable_x64", query.dtype == np.float64)
        options = {
            n: jax.numpy.asarray(x) if isinstance(x, np.ndarray) and self.arrays else x for n, x in options.items()
        }
        call = lambda q, k, v: self.apply(q, k, v, **options)  # noqa: E731
        if (mode or "jit") == "jit" and self.jit:
            call = jax.jit(call)
        try:
            return np.asarray(call(*map(jax.numpy.asarray, (query, key, value))))
        finally:
            jax.config.update("jax_enable_x64", False)

    def gradient(self, query: Array, key: Array, value: Array, bias: Array, weights: Array) -> Array:
        import jax

        query, key, value, bias = map(jax.numpy.asarray, (query, key, value, bias))
        return np.asarray(jax.grad(lambda b: (weights * self.apply(query, key, value, bias=b)).sum())(bias))

    def jvp(self, query: Array, key: Array, value: Array, tangent: Array) -> Array:
        import jax

        query, key, value, tangent = map(jax.numpy.asarray, (query, key, value, tangent))
        return np.asarray(jax.jvp(lambda q: self.apply(q, key, value), (query,), (tangent,))[1])

    def second(self, query: Array, key: Array, value: Array) -> Array:
        import jax

        query, key, value = map(jax.numpy.asarray, (query, key, value))
        gradient = jax.grad(lambda q: (self.apply(q, key, value) ** 2).sum())
        return np.asarray(jax.grad(lambda q: (gradient(q) ** 2).sum())(query))


class JaxLseAdapter(JaxAdapter):
    """One whose `apply` returns (out, lse) for `with_lse=True`."""

    def lse(self, query: Array, key: Array, value: Array, **options: Any) -> Any:
        import jax

        return jax.tree.map(np.asarray, self.apply(query, key, value, with_lse=True, **options)[1])

    def lse_gradient(self, query: Array, key: Array, value: Array) -> Array:
        import jax

        return np.asarray(jax.grad(lambda q: self.apply(q, key, value, with_lse=True)[1].sum())(query))


class TorchAdapter(Adapter):
    device = "cpu"  # of all tensors of this process

    def apply(self, query: Any, key: Any, value: Any, **options: Any) -> Any:
        """The call, with tensors in (B, T, N, H). `with_lse` asks for (out, lse)."""
        raise NotImplementedError

    def attention(self, query: Array, key: Array, value: Array, **options: Any) -> Array:
        return array(self.apply(*tensors(query, key, value), **options))

    def gradient(self, query: Array, key: Array, value: Array, bias: Array, weights: Array) -> Array:
        b, w = tensors(bias, weights)
        b.requires_grad_()
        (self.apply(*tensors(query, key, value), bias=b) * w).sum().backward()
        return array(b.grad)

    def jvp(self, query: Array, key: Array, value: Array, tangent: Array) -> Array:
        import torch

        q, k, v, t = tensors(query, key, value, tangent)
        return array(torch.func.jvp(lambda q: self.apply(q, k, v), (q,), (t,))[1])

    def second(self, query: Array, key: Array, value: Array) -> Array:
        import torch

        q, k, v = tensors(query, key, value)
        q.requires_grad_()
        gradient = torch.autograd.grad((self.apply(q, k, v) ** 2).sum(), q, create_graph=True)[0]
        return array(torch.autograd.grad((gradient**2).sum(), q)[0])


class TorchLseAdapter(TorchAdapter):
    """One whose `apply` returns (out, lse) for `with_lse=True`."""

    def lse(self, query: Array, key: Array, value: Array, **options: Any) -> Any:
        return array(self.apply(*tensors(query, key, value), with_lse=True, **options)[1])

    def lse_gradient(self, query: Array, key: Array, value: Array) -> Array:
        q, k, v = tensors(query, key, value)
        q.requires_grad_()
        self.apply(q, k, v, with_lse=True)[1].sum().backward()
        return np.zeros_like(query) if q.grad is None else array(q.grad)


def tensors(*arrays: Array) -> list[Any]:
    import torch

    def tensor(x: Array) -> Any:
        if x.dtype.name == "bfloat16":  # which is not NumPy's own: PyTorch gets its bits
            return tensor(x.view(np.int16)).view(torch.bfloat16)
        return torch.tensor(x, device=TorchAdapter.device)

    return [tensor(x) for x in arrays]


def array(tensor: Any) -> Array:
    """The inverse of `tensors`, from any device."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
