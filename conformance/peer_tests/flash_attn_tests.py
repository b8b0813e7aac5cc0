# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
# ]
# ///
"""What tests/test_flash_attn.py of FlashAttention asks, of calls and not of kernels.

Its grids have up to 63 360 cases. Here each value of a parameter meets each value of each other parameter at least
once, with two of their twelve head dimensions and lengths up to 1025. Batch and heads are fewer. The measure is theirs:
an error at most twice that of dense code in the same dtype.
"""

import jax
import numpy as np
from harness import Peer, Test, cases, check, inputs, pairs

from jax_native_flash_attn import flash_attention

DTYPES = ["float16", "bfloat16"]
HEAD_DIMS = [59, 128]
LENGTHS = [97, 128, 200, 384, 1025]
BOTH = [(113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1023, 1024)]
CAUSAL = [(1, 239), (3, 799), (127, 512), (127, 513), (113, 203), (128, 217), (113, 211), (108, 256), (256, 512),
          (1023, 1024)]  # fmt: skip
DECODING = [(1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (16, 20000), (128, 128)]
KV_HEADS = {"mha": 4, "mqa": 1, "gqa": 2}
ON = [False, True]


def attention(
    T, S, d, dtype, mha="mha", causal=False, local=False, alibi=False, dropout=0.0, softcap=0.0, lengths=None,
    deterministic=False, backward=True, batch=None,
):  # fmt: skip
    """A call whose masks are aligned to the last key, of each row's own length where there are lengths."""
    B, N = batch or (2 if max(T, S) < 1000 else 1), 4
    generator = np.random.default_rng(T + S + d)
    query, key, value = inputs((B, T, N, d), (B, S, KV_HEADS[mha], d), dtype=dtype)
    if softcap:
        query = (query.astype(np.float32) * softcap).astype(query.dtype)
    options, offset = {}, np.full(B, S - T)
    if lengths:
        queries, keys = (np.maximum(1, generator.integers(n // 2, n + 1, B)) for n in (T, S))
        options |= {"query_seq_lengths": queries, "key_value_seq_lengths": keys}
        offset = keys - queries
    if causal or local:
        options["query_offset"] = offset
    if causal:
        options["is_causal"] = True
    if local:
        options["local_window_size"] = tuple(int(x) for x in generator.integers(0, S, 2))
    if softcap:
        options["logits_soft_cap"] = softcap
    if dropout:
        options |= {"dropout_rate": dropout, "dropout_rng": jax.random.key(0)}
    bias = None
    if alibi:
        slopes = generator.random((B, N, 1, 1), np.float32) * 0.3
        distance = np.abs(np.arange(T)[:, None] + offset[:, None, None] - np.arange(S))[:, None]
        bias = -slopes * distance.astype(np.float32)

    def attend(q, k, v, _):
        return flash_attention(q, k, v, bias, **options)

    check([query, key, value], bias, attend=attend, like_dense=True, gradients=(1e-2, 1e-2) if backward else None,
          bias_gradient=False, live_rows=True, twice=deterministic, **options)  # fmt: skip


def packed(seqlen, **options):
    attention(seqlen, seqlen, **options)


def both(lengths_of_both, **options):
    attention(*lengths_of_both, **options)


def rows_without_keys(lengths_of_both, d):
    """T > S: the first T - S rows, which are 0 there."""
    T, S = lengths_of_both
    query, key, value = inputs((1, T, 2, d), (1, S, 2, d), dtype="float16")
    out = flash_attention(query, key, value, is_causal=True, query_offset=S - T)
    np.testing.assert_array_equal(np.asarray(out[:, : T - S]), 0)


def overflow(seqlen, d, causal):
    query, key, value = inputs((2, seqlen, 5, d), dtype="float16")
    query, key, value = (x * np.float16(factor) for x, factor in ((query, 5), (key, 3), (value, 3)))
    check([query, key, value], like_dense=True, gradients=(1e-3, 1e-3), is_causal=causal)


def no_dropout_with_cap(dropout, softcap, **_):
    return not (dropout and softcap)


COMMON = {"deterministic": ON, "alibi": ON, "local": ON, "causal": ON}
MASKED = {"dtype": DTYPES, "local": ON, "causal": [True]}
TWO = {"dtype": DTYPES, "mha": list(KV_HEADS), **COMMON, "dropout": [0.0, 0.17], "softcap": [0.0, 50.0]}

if __name__ == "__main__":
    Peer(
        "FlashAttention",
        "Dao-AILab/flash-attention tests/test_flash_attn.py, 0251105a2fb1",
        ("jax",),
        [
            Test(
                "test_flash_attn_qkvpacked (6 144 cases)",
                pairs(packed, seqlen=LENGTHS, d=HEAD_DIMS, dtype=DTYPES, **COMMON, dropout=[0.0, 0.17]),
            ),
            Test(
                "test_flash_attn_output (63 360 cases)",
                pairs(both, no_dropout_with_cap, lengths_of_both=BOTH, d=HEAD_DIMS, **TWO),
            ),
            Test(
                "test_flash_attn_varlen_output (63 360 cases), _varlen_qkvpacked",
                pairs(both, no_dropout_with_cap, lengths_of_both=BOTH, d=HEAD_DIMS, **TWO, lengths=[True]),
            ),
            Test(
                "test_flash_attn_causal (960 cases), _deterministic",
                pairs(both, lengths_of_both=CAUSAL, d=HEAD_DIMS, **MASKED, deterministic=[True]),
            ),
            Test(
                "test_flash_attn_varlen_causal (2 880 cases), _varlen_deterministic",
                pairs(
                    both,
                    lengths_of_both=[x[::-1] for x in CAUSAL],
                    d=HEAD_DIMS,
                    **MASKED,
                    lengths=[True],
                    deterministic=[True],
                ),
            ),
            Test(
                "test_flash_attn_kvcache, _splitkv (forward, over a cache)",
                pairs(
                    both,
                    lengths_of_both=DECODING,
                    d=HEAD_DIMS,
                    dtype=["float16"],
                    mha=list(KV_HEADS),
                    alibi=ON,
                    local=ON,
                    causal=ON,
                    lengths=[True],
                    backward=[False],
                ),
            ),
            Test(
                "test_flash_attn_bwd_overflow (30 cases)",
                pairs(overflow, seqlen=[1, 2, 5, 17, 128], d=[16, 32, 64], causal=ON),
            ),
            Test(
                "(rows without keys of the causal tests)",
                cases(rows_without_keys, lengths_of_both=[(512, 256), (1024, 1023), (239, 1)], d=[32, 64]),
                "such rows are the mean of the values here, as in jax.nn, and 0 there",
            ),
        ],
        {
            "rotary, paged and left-padded caches, batch_idx of test_flash_attn_kvcache": "no such arguments",
            "test_flash_attn_bwd_transpose": "about strides of tensors: arrays of JAX have none",
            "test_flash_attn_race_condition": "the bits of two runs are compared in the other tests",
            "test_flash_attn_bwd_varlen_overflow": "about memory past the end of packed tensors",
            "test_flash_attn_varlen_paged_kv_num_splits, _kvcache_paged_block_table_bounds": "no paged caches",
            "test_flash_attn_generator_arg_must_be_none": "about an argument of PyTorch",
        },
    ).run()
