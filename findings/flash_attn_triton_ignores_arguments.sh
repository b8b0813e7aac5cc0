#!/usr/bin/env bash
# flash_attn 2.8.3.post2, Triton kernels for AMD: window_size and softcap do nothing, and dropout is the same every time.
#
# Seen in November 2026 in Triton's interpreter (TRITON_INTERPRET=1) on a CPU, Python 3.11, torch 2.13.0, triton 3.7.1.
#     flash_attn_func(q, k, v, window_size=(1, 0)): equal to the call without a window; no error, no warning
#     flash_attn_func(q, k, v, softcap=0.5): equal to the call without a cap
#     flash_attn_func(q, k, v, dropout_p=0.5), twice, with other seeds of torch: equal to the last bit
#
# Why one guesses otherwise: the function is the one that CUDA users call, documents the three arguments, and picks its
# back end by an environment variable alone. A model with sliding windows runs and attends everything, and one with
# dropout trains with one fixed mask.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 triton==3.7.1 numpy==2.4.6 einops==0.8.2 setuptools wheel psutil ninja packaging
FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE \
  "$folder/venv/bin/pip" install -q --no-build-isolation --no-deps flash-attn==2.8.3.post2
FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore - <<'EOF'
import flash_attn.flash_attn_interface as interface
import torch
from flash_attn import flash_attn_func

interface._flash_attn_forward.register_kernel("cpu")(interface._flash_attn_forward._init_fn)  # of "cuda" only, as it is
q, k, v = torch.randn(3, 1, 8, 2, 16, generator=torch.Generator().manual_seed(0))
logits = torch.einsum("btnh,bsnh->bnts", q, k) / 4
index = torch.arange(8)
window = (index[:, None] - index >= 0) & (index[:, None] - index <= 1)


def dense(logits):
    return torch.einsum("bnts,bsnh->btnh", logits.softmax(-1), v)


plain = flash_attn_func(q, k, v)
torch.testing.assert_close(plain, dense(logits), atol=1e-5, rtol=1e-5)
for words, options, meant in (
    ("window_size", {"window_size": (1, 0)}, dense(logits.masked_fill(~window, float("-inf")))),
    ("softcap", {"softcap": 0.5}, dense(0.5 * torch.tanh(logits / 0.5))),
):
    out = flash_attn_func(q, k, v, **options)
    print(f"{words}: differs from the plain call by {(out - plain).abs().max():.1g}, from what it means by {(out - meant).abs().max():.2f}")
    assert torch.equal(out, plain) and (out - meant).abs().max() > 0.1
outs = []
for seed in range(3):
    torch.manual_seed(seed)
    outs.append(flash_attn_func(q, k, v, dropout_p=0.5))
print("dropout: three seeds give the same output:", all(torch.equal(out, outs[0]) for out in outs))
assert all(torch.equal(out, outs[0]) for out in outs) and not torch.allclose(outs[0], plain)
EOF
