# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "openvino==2026.4.1",
#     "numpy",
# ]
# ///
"""OpenVINO's operator `ScaledDotProductAttention`, compiled for a CPU with float32 inside."""

import numpy as np
import openvino
from frameworks import main
from openvino import opset13
from probes import Adapter

core = openvino.Core()


class OpenVino(Adapter):
    name = "OpenVINO"
    packages = ("openvino",)
    functions = (opset13.scaled_dot_product_attention,)

    def run(self, query, key, value, mask=None, scale=None, causal=False):
        arrays = [np.ascontiguousarray(x) for x in (query, key, value, mask) if x is not None]
        parameters = [opset13.parameter(x.shape, x.dtype) for x in arrays]
        node = opset13.scaled_dot_product_attention(
            *parameters[:3],
            attention_mask=parameters[3] if mask is not None else None,
            scale=None if scale is None else opset13.constant(np.asarray(scale, query.dtype)),
            causal=causal,
        )
        model = openvino.Model([node], parameters)
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return compiled(arrays)[0]

    def native(self, query, key, value):
        return self.run(query, key, value)

    def attention(self, query, key, value, *, causal=False, raw_mask=None, mask=None, bias=None, scale=None, **options):
        self.refuse(options)
        raw_mask = next((x for x in (mask, raw_mask, bias) if x is not None), None)
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        return self.run(query, key, value, raw_mask, scale, causal).swapaxes(1, 2)


if __name__ == "__main__":
    main(OpenVino())
