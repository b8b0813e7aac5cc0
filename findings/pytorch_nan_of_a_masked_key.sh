#!/usr/bin/env bash
# PyTorch 2.13.0: a NaN key that causal attention hides makes earlier rows NaN or not, by how the mask is written.
#
# Seen in November 2026, CPU, Python 3.11. scaled_dot_product_attention of 4 tokens, the last key is NaN (or inf).
#     is_causal=True: rows 0 to 2 are finite, row 3 is NaN
#     attn_mask=torch.ones(4, 4, dtype=torch.bool).tril(): all rows are NaN
#     is_causal=True inside sdpa_kernel(SDPBackend.MATH): all rows are NaN
#     is_causal=True with dropout_p=1e-6, which selects that kernel: all rows are NaN
#
# Why one guesses otherwise: a boolean mask says which keys take part, so what is stored in another key should not
# matter, and the two spellings say the same. A boolean mask is turned into 0 and -inf that are added, and NaN + -inf
# and inf + -inf are NaN. So a cache from torch.empty() works with is_causal=True and fails with the mask spelled out,
# and one bad token in a batch spoils the whole row as soon as dropout is on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'EOF'
import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 1, 4, 8)
tril = torch.ones(4, 4, dtype=torch.bool).tril()
for bad in (float("nan"), float("inf")):
    key[..., 3, :] = bad
    for words, options, kernel, expected in (
        ("is_causal", {"is_causal": True}, contextlib.nullcontext(), [False, False, False, True]),
        ("attn_mask", {"attn_mask": tril}, contextlib.nullcontext(), [True] * 4),
        ("is_causal, math", {"is_causal": True}, sdpa_kernel(SDPBackend.MATH), [True] * 4),
        ("is_causal, dropout", {"is_causal": True, "dropout_p": 1e-6}, contextlib.nullcontext(), [True] * 4),
    ):
        with kernel:
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
        rows = out[0, 0].isnan().any(-1).tolist()
        print(f"last key {bad}, {words}: rows with NaN {rows}")
        assert rows == expected
EOF
