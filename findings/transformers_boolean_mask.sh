#!/usr/bin/env bash
# transformers 5.23.0: a causal boolean mask makes a model with eager attention see the future; with sdpa it is right.
#
# Seen in November 2026, with PyTorch 2.13.0, CPU, Python 3.11. A small LlamaForCausalLM, 8 tokens; the last one changes.
# How far the logits before it move:
#     sdpa: no mask, boolean mask (1, 1, 8, 8), the same as 0 and the lowest number: 0.0
#     eager: no mask, 0 and the lowest number: 0.0; boolean mask: not 0, and the output is that of a bias of 0 and 1
#
# Why one guesses otherwise: attn_implementation is documented as a choice of speed, and the 2-D mask of padding, of the same
# dtype, is right in both. A 4-D mask is passed on as it is. The eager function adds it, and a boolean is then 0 or 1,
# so that hidden keys are made 2.7 times less likely, and nothing more. A loss goes down faster than it should.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy==2.4.6
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
weights = LlamaForCausalLM(config).state_dict()
tokens = torch.randint(0, 64, (1, 8))
changed = tokens.clone()
changed[0, -1] = (changed[0, -1] + 1) % 64
visible = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
masks = {"none": None, "boolean": visible, "added": torch.where(visible, 0.0, torch.finfo(torch.float32).min)}
for implementation in ("sdpa", "eager"):
    model = LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()
    model.load_state_dict(weights)
    for words, mask in masks.items():
        with torch.no_grad():
            first, second = (model(x, attention_mask=mask).logits[0, :-1] for x in (tokens, changed))
        moved = (first - second).abs().max().item()
        print(f"{implementation}, mask {words}: earlier logits move by {moved:.3g}")
        assert (moved > 1e-3) == (implementation == "eager" and words == "boolean")
    if implementation == "eager":
        with torch.no_grad():
            same = model(tokens, attention_mask=visible.float()).logits.equal(model(tokens, attention_mask=visible).logits)
        assert same
PYTHON
