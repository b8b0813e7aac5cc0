"""Keywords that other libraries have: an error that says what to pass here."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from ._semantics.errors import did_you_mean

Function = TypeVar("Function", bound=Callable[..., Any])


def explains_keywords(function: Function) -> Function:
    """The function, with an error for a wrong keyword, or for too many positional arguments, that names the right one.

    Its signature stays as it is for `inspect`, `help` and type checkers; Flax asks for it.
    """
    parameters = inspect.signature(function).parameters
    names = frozenset(parameters)
    positional = [name for name, x in parameters.items() if x.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not names.issuperset(kwargs):
            raise unexpected_keyword(function.__name__, kwargs, parameters)
        if len(args) > len(positional):
            raise TypeError(
                f"{function.__name__}() takes {len(positional)} positional arguments ({', '.join(positional)}), got "
                f"{len(args)}: pass all others by name"
            )
        return function(*args, **kwargs)

    return cast(Function, call)


def unexpected_keyword(function: str, given: Iterable[str], accepted: Iterable[str]) -> TypeError:
    """For the first keyword that is not accepted: in Python's words, and what to do."""
    accepted = tuple(accepted)
    name = next(name for name in given if name not in accepted)
    if name in FOREIGN:
        advice = ": " + FOREIGN[name].format(with_lse=function.removesuffix("_with_lse") + "_with_lse")
    else:
        advice = did_you_mean(name, accepted) or f": it takes {', '.join(accepted)}"
    return TypeError(f"{function}() got an unexpected keyword argument {name!r}{advice}")


# What other libraries call it, and what to do here. Looked up only for what a function does not take.
FOREIGN = {
    name: advice
    for names, advice in (
        ("q queries query_states", "pass query"),
        ("k key_ keys key_states", "pass key"),
        ("v values value_states", "pass value"),
        ("layout qkv_layout input_layout", "query is (B, T, N, H); transpose (B, N, T, H) with x.swapaxes(1, 2)"),
        # masks
        (
            "attn_mask",
            "pass mask if it is bool, True where a query attends a key; bias if it is added to the logits",
        ),
        (
            "attention_mask padding_mask kv_mask",
            "pass mask, bool, broadcastable to (B, N, T, S); for (B, S) attention_mask[:, None, None, :].astype(bool), "
            "or key_value_seq_lengths",
        ),
        (
            "key_padding_mask",
            "pass mask=~key_padding_mask[:, None, None, :], as True is attended here, or key_value_seq_lengths",
        ),
        ("attn_bias attention_bias position_bias pair_bias ab", "pass bias, which is added to the scaled logits"),
        ("alibi_slopes", "pass bias, (N, T, S), such as alibi_slopes[:, None, None] * -abs(t - s)"),
        (
            "block_mask",
            "pass mask_mod, the function itself, or what mods.make_tile_mask makes of it",
        ),
        (
            "causal use_causal_mask causal_mask",
            "pass is_causal, aligned at the top left; add query_offset=S - T if T != S, for alignment at the bottom "
            "right, which is that of flash_attn",
        ),
        ("q_offset offset causal_offset q_start", "pass query_offset: query t has position t + query_offset"),
        (
            "window_size window attention_window",
            "pass local_window_size=(left, right), two distances or one for both; a side without a limit, -1 in "
            "flash_attn, is S here",
        ),
        (
            "sliding_window sliding_window_size",
            "pass local_window_size=(w - 1, 0) for a window of w keys that counts the query's own, as distances to the "
            "left and to the right",
        ),
        # scale and cap
        (
            "softmax_scale sm_scale scaling logits_scale attn_scale qk_scale scale_factor",
            "pass scale; None is 1 / sqrt(H), where kernels of Pallas and splash attention take 1",
        ),
        (
            "softcap soft_cap attn_logits_soft_cap attn_soft_cap attn_logit_softcapping logit_softcapping",
            "pass logits_soft_cap, with None, not 0, for no cap; scale and bias come before the cap, masks behind",
        ),
        (
            "sink s_aux learnable_sink logit_sink attention_sinks softmax_offset",
            "pass sinks, one logit for each of the N query heads",
        ),
        # dropout
        (
            "dropout_p dropout attention_dropout dropout_prob",
            "pass dropout_rate, and dropout_rng such as jax.random.key(0)",
        ),
        (
            "rng dropout_key dropout_seed seed prng_key rngs",
            "pass dropout_rng, a PRNG key such as jax.random.key(0)",
        ),
        ("training is_training train", "pass deterministic=True where that is False: no dropout then"),
        ("inference eval", "pass deterministic=True for no dropout"),
        # grouped heads
        (
            "enable_gqa num_kv_heads num_key_value_groups",
            "leave it out: key and value may have K heads if the N query heads are a multiple of K",
        ),
        # results
        (
            "return_lse return_softmax_lse return_logsumexp return_residual return_residuals return_aux save_residuals",
            "{with_lse} returns out and lse, (B, T, N)",
        ),
        (
            "return_attn_probs need_weights return_attention_scores output_attentions return_weights",
            "attention weights are never stored; {with_lse} gives lse, and weights are exp(logits - lse)",
        ),
        ("return_max_logit return_max_logits", "call {with_lse}(..., return_max_logits=True)"),
        # tiles and kernels
        ("block_size block_sizes chunk_size config", "pass block_q and block_kv; by default they are chosen by shape"),
        ("query_chunk_size q_chunk_size block_m BLOCK_M", "pass block_q, or nothing: it is chosen by shape"),
        ("key_chunk_size kv_chunk_size block_k block_n BLOCK_N", "pass block_kv, or nothing: it is chosen by shape"),
        (
            "backend impl flash_attention use_flash use_flash_attention",
            "pass implementation, None for the fastest that supports the call",
        ),
        ("dtype", "results have query's dtype, and softmax is at least float32: cast query, key and value"),
        # packed sequences and lengths
        (
            "segment_ids decoder_segment_ids",
            "pass query_segment_ids, (B, T), and key_value_segment_ids, (B, S), for self-attention the same array "
            "twice; a negative id is padding (where 0 is, subtract 1)",
        ),
        ("q_segment_ids", "pass query_segment_ids, (B, T); a negative id is padding"),
        ("kv_segment_ids k_segment_ids", "pass key_value_segment_ids, (B, S); a negative id is padding"),
        (
            "cu_seqlens cu_seqlens_q cu_seqlens_k cu_seqlens_kv cu_seq_lens_q cu_seq_lens_k max_seqlen_q max_seqlen_k",
            "pass query_segment_ids and key_value_segment_ids, an id for each token: "
            "jnp.repeat(jnp.arange(len(lengths)), lengths)",
        ),
        ("q_len q_lens q_lengths q_seqlen q_seqlens query_lengths seqused_q", "pass query_seq_lengths, (B,)"),
        (
            "kv_len kv_lens kv_lengths kv_seqlen kv_seqlens key_value_lengths key_lengths seqused_k cache_seqlens",
            "pass key_value_seq_lengths, (B,)",
        ),
        ("lengths seq_lengths seq_lens seqlens", "pass query_seq_lengths and key_value_seq_lengths, (B,)"),
        ("q_positions q_pos", "pass query_positions, (B, T)"),
        ("kv_positions kv_pos k_positions key_positions", "pass key_value_positions, (B, S)"),
        ("positions position_ids", "pass query_positions, (B, T), and key_value_positions, (B, S)"),
        # several devices
        ("axis_name strategy order", "context_parallel_attention takes it, for a sequence split over devices"),
        ("context_parallel_axis ring_axis cp_axis", "call context_parallel_attention with axis_name"),
        ("context_parallel_strategy", "call context_parallel_attention with strategy"),
        (
            "context_parallel_causal_load_balanced",
            "call context_parallel_attention with order='balanced', tokens in balanced_order",
        ),
    )
    for name in names.split()
}
