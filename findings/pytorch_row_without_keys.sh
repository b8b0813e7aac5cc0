#!/usr/bin/env bash
# PyTorch 2.13.0: a row without keys is 0, NaN or a bias, by need_weights and, for one call, by torch.no_grad().
#
# Seen in November 2026, CPU, Python 3.11. The second row of an attention over 4 tokens may see no key.
#     scaled_dot_product_attention, boolean or -inf mask: 0
#     nn.MultiheadAttention, need_weights=True (as it comes): NaN
#     nn.MultiheadAttention, need_weights=False, training: 0 (plus the bias of the last projection)
#     nn.MultiheadAttention, need_weights=False, evaluation, gradients on: 0
#     nn.MultiheadAttention, need_weights=False, evaluation, inside torch.no_grad(): NaN
#
# Why one guesses otherwise: the module is built on the function, which gives 0, so a fully padded sequence looks safe.
# need_weights only says what else is returned, and no_grad() only that no gradient is wanted. Each picks another
# implementation here. A model may train and validate well and yield NaN only when it is served without gradients.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'EOF'
import torch

torch.manual_seed(0)
visible = torch.ones(4, 4, dtype=torch.bool)
visible[1] = False
x = torch.randn(1, 2, 4, 8)
for mask in (visible, torch.zeros(4, 4).masked_fill(~visible, float("-inf"))):
    out = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    print("scaled_dot_product_attention", mask.dtype, out[0, 0, 1, :3])
    assert (out[:, :, 1] == 0).all() and out.isfinite().all()

x = torch.randn(1, 4, 16)
layer = torch.nn.MultiheadAttention(16, 2, batch_first=True)
torch.nn.init.constant_(layer.out_proj.bias, 3.0)
for need_weights in (True, False):
    for training in (True, False):
        for gradients in (True, False):
            layer.train(training)
            with torch.set_grad_enabled(gradients):
                out = layer(x, x, x, attn_mask=~visible, need_weights=need_weights)[0]
            row = out[0, 1]
            print(f"MultiheadAttention {need_weights=} {training=} {gradients=}: {row[:3].tolist()}")
            assert out[0, [0, 2, 3]].isfinite().all()
            if need_weights or not (training or gradients):
                assert row.isnan().all()
            else:
                assert (row == 3.0).all()
EOF
