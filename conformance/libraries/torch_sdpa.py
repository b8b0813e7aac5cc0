# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "torch==2.15.0",
#     "numpy==2.5.5",
# ]
# ///
"""`torch.nn.functional.scaled_dot_product_attention`."""

import inspect

import torch
from frameworks import TorchAdapter, array, main, tensors
from torch.nn.attention import SDPBackend, sdpa_kernel

sdpa = torch.nn.functional.scaled_dot_product_attention


def signature(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False): ...


class SDPA(TorchAdapter):
    name = "torch SDPA"
    packages = ("torch", "numpy")
    functions = (signature,)  # that of its docstring: the function is a builtin

    def native(self, query, key, value):
        return array(sdpa(*tensors(query, key, value)))

    def apply(self, query, key, value, *, causal=False, raw_mask=None, mask=None, bias=None, dropout=None, **options):
        self.refuse(options, "soft_cap", "sinks", "lengths", "segments")
        for x in (raw_mask, mask, bias):
            if x is not None:
                options["attn_mask"] = x if isinstance(x, torch.Tensor) else tensors(x)[0]
        if dropout:
            torch.manual_seed(dropout[1])
            options["dropout_p"] = dropout[0]
        swapped = [x.transpose(1, 2) for x in (query, key, value)]
        try:
            out = sdpa(*swapped, is_causal=causal, **options)
        except RuntimeError:
            if key.shape[2] == query.shape[2]:
                raise
            self.by = dict(self.by) | {"heads": "`enable_gqa=True`; RuntimeError without"}
            out = sdpa(*swapped, is_causal=causal, enable_gqa=True, **options)
        return out.transpose(1, 2)

    def jvp(self, *arrays):
        return self.with_math("forward_mode", super().jvp, *arrays)

    def second(self, *arrays):
        return self.with_math("second_order", super().second, *arrays)

    def with_math(self, meaning, derivative, *arrays):
        """The derivative; where the default kernel has none, that of the math kernel, and a note of it."""
        try:
            return derivative(*arrays)
        except RuntimeError as error:
            self.by = dict(self.by) | {meaning: f"`sdpa_kernel(SDPBackend.MATH)`; {type(error).__name__} without"}
            with sdpa_kernel(SDPBackend.MATH):
                return derivative(*arrays)


if __name__ == "__main__":
    for name in inspect.signature(signature).parameters:
        assert name in sdpa.__doc__, name
    main(SDPA())
