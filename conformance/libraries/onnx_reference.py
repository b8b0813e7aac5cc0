# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "onnx==1.23.2",
#     "numpy==2.5.5",
# ]
# ///
# ruff: noqa: RUF012
"""ONNX' operator `Attention`, of the newest opset that has one, in the reference evaluator of the package onnx."""

import numpy as np
import onnx
from frameworks import main
from onnx import helper
from onnx.reference import ReferenceEvaluator
from probes import Adapter


class Onnx(Adapter):
    name = "ONNX Attention 25 (reference)"
    packages = ("onnx", "numpy")
    functions = ()
    opset = 25
    windows = {
        "left_window_size=3, right_window_size=3": {"window": (3, 3)},
        "left 3, right 0": {"window": (3, 0)},
    }
    by = {"nan_past_lengths": "`nonpad_kv_seqlen`"}

    def arguments(self):
        schema = onnx.defs.get_schema("Attention", self.opset)
        return [*schema.attributes, *(x.name for x in schema.inputs)]

    def evaluate(self, model, inputs):
        return ReferenceEvaluator(model).run(None, inputs)[0]

    def run(self, query, key, value, raw_mask=None, lengths=None, **attributes):
        inputs = {"Q": query, "K": key, "V": value, "attn_mask": raw_mask, "nonpad_kv_seqlen": lengths}
        inputs = {name: np.asarray(x) for name, x in inputs.items() if x is not None}
        names = ["Q", "K", "V", "attn_mask" * ("attn_mask" in inputs)]
        names += ["", "", "nonpad_kv_seqlen"] if lengths is not None else []
        while not names[-1]:
            names.pop()
        node = helper.make_node("Attention", names, ["Y"], **attributes)
        infos = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for name, x in inputs.items()
        ]
        out = helper.make_tensor_value_info("Y", helper.np_dtype_to_tensor_dtype(query.dtype), None)
        graph = helper.make_graph([node], "attention", infos, [out])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=11)
        return self.evaluate(model, inputs)

    def native(self, query, key, value):
        return self.run(query, key, value, **({"q_num_heads": 3, "kv_num_heads": 3} if query.ndim == 3 else {}))

    def attention(
        self, query, key, value, *, causal=False, raw_mask=None, mask=None, bias=None, scale=None, soft_cap=None,
        window=None, lengths=None, **options,
    ):  # fmt: skip
        self.refuse(options, segments="segment", lengths="seqlen")
        raw_mask = next((x for x in (mask, raw_mask, bias) if x is not None), None)
        attributes = {"is_causal": int(causal), "scale": scale, "softcap": soft_cap}
        if window:
            self.windows_exist()
            attributes |= {"left_window_size": window[0], "right_window_size": window[1]}
        attributes = {name: x for name, x in attributes.items() if x is not None}
        lengths = None if lengths is None else lengths.astype(np.int64)
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        return self.run(query, key, value, raw_mask, lengths, **attributes).swapaxes(1, 2)

    def windows_exist(self):
        if "left_window_size" not in self.arguments():
            self.lacks("window")


if __name__ == "__main__":
    main(Onnx())
