# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "onnx==1.23.2",
#     "onnxruntime==1.31.1",
#     "numpy==2.5.5",
# ]
# ///
"""ONNX' operator `Attention` of opset 24 in onnxruntime, on a CPU."""

import onnxruntime
from frameworks import main
from onnx_reference import Onnx


class OnnxRuntime(Onnx):
    name = "ONNX Attention 24 (onnxruntime)"
    packages = ("onnxruntime", "onnx")
    opset = 24
    windows = {}  # noqa: RUF012

    def evaluate(self, model, inputs):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, inputs)[0]


if __name__ == "__main__":
    main(OnnxRuntime())
