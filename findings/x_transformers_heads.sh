#!/usr/bin/env bash
# x-transformers 2.31.10: with grouped heads, query heads n, n + K, n + 2K share a key head, and not K neighbours.
#
# Seen in November 2026, with PyTorch 2.13.0, CPU, Python 3.11. Attend, 4 heads of queries, 2 of keys and values:
#     equal to attention with key heads 0, 1, 0, 1. PyTorch's enable_gqa=True, Llama's weights, jax.nn and all
#     others that we ran mean 0, 0, 1, 1
#     the same with flash=True
#     flash=True, causal, 8 queries and 4 keys: aligned to the first key; flash=False: to the last one
#
# Why one guesses otherwise: all shapes fit with either order, and so a converted checkpoint loads and runs. A model that
# is trained from nothing is as good with either. flash=True calls PyTorch's function, which could group heads itself, but
# gets keys that were repeated before. And a faster implementation should not move the causal mask.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 x-transformers==2.31.10 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.nn.functional import scaled_dot_product_attention
from x_transformers.attend import Attend

torch.manual_seed(0)
query, (key, value) = torch.randn(1, 4, 8, 16), torch.randn(2, 1, 2, 8, 16)
neighbours = scaled_dot_product_attention(query, key, value, enable_gqa=True)
turns = scaled_dot_product_attention(query, key[:, [0, 1, 0, 1]], value[:, [0, 1, 0, 1]])
for flash in (False, True):
    out = Attend(flash=flash).eval()(query, key, value)[0]
    errors = [(out - x).abs().max().item() for x in (neighbours, turns)]
    print(f"flash={flash}: differs from key heads 0, 0, 1, 1 by {errors[0]:.2g}, from 0, 1, 0, 1 by {errors[1]:.2g}")
    assert errors[0] > 0.1 and errors[1] < 1e-5

query, key, value = query[:, :2], key[:, :, :4], value[:, :, :4]
first, last = (torch.ones(8, 4, dtype=torch.bool).tril(n) for n in (0, -4))
for flash, mask in ((False, last), (True, first)):
    out = Attend(flash=flash, causal=True).eval()(query, key, value)[0]
    rows = mask.any(-1)
    error = (out - scaled_dot_product_attention(query, key, value, mask))[:, :, rows].abs().max().item()
    print(f"causal, flash={flash}: aligned to the {'last' if mask is last else 'first'} key, to {error:.2g}")
    assert error < 1e-5
PYTHON
