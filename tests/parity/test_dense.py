"""`implementation='dense'`: the semantics of all others, in JAX's own functions, differentiated by JAX."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn import context_parallel_attention, explain, flash_attention, flash_attention_with_lse
from tests.support.cases import FAST_COMPILATION, Case, check_case

SHAPE = (2, 13, 19, 2, 2, 8)
dense: Any = functools.partial(flash_attention, implementation="dense")

# Each argument in some, and together; with rows that have no key.
CASES = {
    "by index": Case(
        SHAPE,
        is_causal=True,
        local_window_size=(9, 3),
        query_offset=(4, -5),
        query_seq_lengths=(11, 13),
        key_value_seq_lengths=(19, 12),
        poison=True,
        bias=(False, True, True, True),
        mask=(True, True, False, True),
        scale=0.3,
        dropout_rate=0.2,
        value_dim=5,
        traced=frozenset({"window", "offset", "lengths", "scale"}),
        with_lse=True,
    ),
    "ids, positions, sinks": Case(
        SHAPE,
        segment_ids="padding between",
        query_positions="permuted",
        key_value_positions="zig-zag",
        is_causal=True,
        local_window_size=(9, 0),
        logits_soft_cap=1.5,
        magnitude=3.0,
        sinks="float32",
        bias=(True, True, True, False),
        traced=frozenset({"ids", "positions"}),
        with_lse=True,
    ),
    "ids, float64": Case(SHAPE, "float64", segment_ids="shuffled", logits_soft_cap=0.8, bias=(True, True, True, True)),
    "rows without keys, bfloat16": Case(SHAPE, "bfloat16", local_window_size=(2, -1), query_offset=-3, with_lse=True),
    "float16": Case(SHAPE, "float16", dropout_rate=0.3, broadcast_dropout=True, vmapped=True, mask=(True, True, True, True)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_lse_and_gradients(case: Case):
    function = flash_attention_with_lse if case.with_lse else flash_attention
    check_case(case, functools.partial(function, implementation="dense"), FAST_COMPILATION)
