# /// script
# requires-python = ">=3.12,<3.15"
# dependencies = [
#     "jax-native-flash-attn",
#     "flax==0.12.12",
#     "gemma==4.0.1",
#     "jax==0.12.0.1",
#     "torch==2.15.0",
#     "transformers==5.24.0",
# ]
#
# [tool.uv.sources]
# jax-native-flash-attn = { path = "..", editable = true }
# ///
"""Does `flash_attention` return what code that others wrote returns? Values and gradients, in float32 on the CPU.

    uv run benchmarks/compare_peers.py

uv installs the versions above into an environment of the script's own (9 GB, as PyTorch brings CUDA). Compared are:

- Gemma's attention layer, with random weights, and the same layer with our attention in place of its own: soft cap,
  local windows, grouped queries, a cache filled chunk by chunk. Gradients are those of the input and the weights.
- PyTorch's FlexAttention, and its `scaled_dot_product_attention` where that can do the same: packed documents, offsets,
  windows, soft cap, biases, values of another dimension. FlexAttention refuses gradients on the CPU by a check of the
  device, though it has the code. The script takes out the check.
- gpt-oss' attention with sinks, and its masks, from Hugging Face's transformers.

One line for each comparison: the largest difference of each result, relative to the largest element of theirs.
Exits with 1 if any is above 1e-5.
"""

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from gemma import gm  # pyright: ignore[reportMissingImports]
from gemma.gm.math import _positional_embeddings  # pyright: ignore[reportMissingImports]
from harness.machine import header
from harness.options import command_line
from torch.nn.attention import flex_attention as flex  # pyright: ignore[reportMissingImports]
from torch.nn.functional import scaled_dot_product_attention  # pyright: ignore[reportMissingImports]
from transformers import GptOssConfig, masking_utils  # pyright: ignore[reportMissingImports]
from transformers.models.gpt_oss.modeling_gpt_oss import (  # pyright: ignore[reportMissingImports]
    eager_attention_forward,
)

from jax_native_flash_attn import flash_attention

TOLERANCE = 1e-5
B, T, S, N, K, H = 2, 384, 384, 8, 2, 64
CHUNK, WINDOW, SOFT_CAP = 128, 100, 50.0

# Arguments of `flash_attention`.
CAUSAL = {"is_causal": True}
CAPPED = {"logits_soft_cap": SOFT_CAP}
LEFT_WINDOW = {"local_window_size": (WINDOW - 1, 0)}  # with the token itself, WINDOW keys

Arrays = dict[str, np.ndarray]
Arguments = dict[str, Any]


class Comparison(NamedTuple):
    """Values and gradients by name: those of a peer, and ours."""

    name: str
    theirs: Arrays
    ours: Arrays


def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape, np.float32)


def jax_results(function: Callable[..., jax.Array], inputs: Mapping[str, Any], cotangent: np.ndarray) -> Arrays:
    """The value of a function of named arrays, or trees of them, and the gradient of each array."""

    @jax.jit
    def value_and_gradients(inputs: Mapping[str, Any]) -> tuple[jax.Array, Any]:
        value, pullback = jax.vjp(lambda inputs: function(**inputs), inputs)
        return value, pullback(jnp.asarray(cotangent))[0]

    value, gradients = value_and_gradients(inputs)
    named = {
        jax.tree_util.keystr(path[-2:], simple=True, separator="."): np.asarray(gradient)
        for path, gradient in jax.tree_util.tree_leaves_with_path(gradients)
    }
    return {"out": np.asarray(value), **named}


def torch_results(function: Callable[..., Any], inputs: Arrays, cotangent: np.ndarray) -> Arrays:
    """The value of a function of named tensors, and the gradient of each."""
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in inputs.items()}
    value = function(**tensors)
    gradients = torch.autograd.grad(value, list(tensors.values()), torch.tensor(cotangent))
    named = dict(zip(tensors, gradients, strict=True))
    return {name: tensor.numpy() for name, tensor in {"out": value.detach(), **named}.items()}


def gemma_comparisons(random: np.random.Generator) -> Iterator[Comparison]:
    local = {"attn_type": gm.nn.AttentionType.LOCAL_SLIDING, "sliding_window_size": WINDOW}
    gemma2 = {"num_heads": N, "num_kv_heads": N // 2, "attn_logits_soft_cap": SOFT_CAP}
    gemma3 = {"num_heads": N // 2, "num_kv_heads": 1, "use_qk_norm": True}
    every_key = np.ones((B, T, S), bool)
    causal = np.tril(every_key)
    both_sides = {"local_window_size": WINDOW - 1}
    for name, settings, mask, chunk, arguments in (
        ("soft cap", gemma2, causal, T, CAUSAL | CAPPED),
        ("soft cap, local window", gemma2 | local, causal, T, CAUSAL | CAPPED | LEFT_WINDOW),
        ("soft cap, local window to both sides", gemma2 | local, every_key, T, CAPPED | both_sides),
        ("soft cap, queries not grouped", gemma2 | {"num_kv_heads": N}, causal, T, CAUSAL | CAPPED),
        ("soft cap, cache filled by chunks", gemma2, causal, CHUNK, CAUSAL | CAPPED),
        ("soft cap, local window, by chunks", gemma2 | local, causal, CHUNK, CAUSAL | CAPPED | LEFT_WINDOW),
        ("normalised, one key head", gemma3, causal, T, CAUSAL),
        ("normalised, one key head, local window", gemma3 | local, causal, T, CAUSAL | LEFT_WINDOW),
    ):
        settings = {"attn_type": gm.nn.AttentionType.GLOBAL, "features": 256, "head_dim": H, **settings}
        # The scale of Gemma 2 27B.
        layer = gm.nn.Attention(**settings, query_pre_attn_scalar=(256 / settings["num_heads"]) ** -0.5)
        outputs = functools.partial(gemma_outputs, layer, mask, chunk)
        # Large enough for logits that the cap changes.
        x = 2 * normal(random, B, T, layer.features)
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x, np.zeros((B, T), np.int32), None, causal)
        weights = jax.tree.map(lambda leaf: normal(random, *leaf.shape) / 16, shapes)
        inputs, cotangent = {"x": x, "weights": weights}, normal(random, *x.shape)
        theirs = jax_results(functools.partial(outputs, None), inputs, cotangent)
        ours = jax_results(functools.partial(outputs, arguments), inputs, cotangent)
        yield Comparison(f"Gemma: {name}", theirs, ours)


def gemma_outputs(layer: Any, mask: np.ndarray, chunk: int, ours: Arguments | None, x: jax.Array, weights: Any) -> Any:
    """What Gemma's layer makes of x (B, T, features), chunk by chunk; with arguments of ours, by `flash_attention`.

    Then query, key and value are what the layer projects, normalises and rotates, and its cache holds.
    """
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    cache = layer.init_cache(S, layer.num_kv_heads, layer.head_dim, B, dtype=x.dtype)
    outputs = []
    for start in range(0, T, chunk):
        part = np.s_[:, start : start + chunk]
        with recorded_rotations() as rotated:
            cache, output = layer.apply(weights, x[part], positions[part], cache, mask[part])
        if ours is not None:
            arguments = ours | {"query_offset": start, "scale": layer.query_pre_attn_scalar}
            encoded = flash_attention(rotated[0], cache["k"], cache["v"], **arguments)
            output = jnp.einsum("BTNH,NHD->BTD", encoded, weights["params"]["attn_vec_einsum"]["w"])
        outputs.append(output)
    return jnp.concatenate(outputs, axis=1)


@contextlib.contextmanager
def recorded_rotations() -> Iterator[list[jax.Array]]:
    """What Gemma's layers rotate meanwhile: the query, then the key."""
    rotated = []
    rotate = _positional_embeddings.apply_rope

    def apply_rope(*args: Any, **kwargs: Any) -> jax.Array:
        rotated.append(rotate(*args, **kwargs))
        return rotated[-1]

    with mock.patch.object(_positional_embeddings, "apply_rope", apply_rope):
        yield rotated


class TorchCase(NamedTuple):
    """A call that PyTorch can make too, always causal. Queries are the rows from `offsets` on, if there are any."""

    name: str
    ids: np.ndarray | None = None  # (B, S)
    positions: np.ndarray | None = None  # (B, S)
    offsets: np.ndarray | None = None  # (B,)
    window: int | None = None
    soft_cap: float | None = None
    has_bias: bool = False
    value_dim: int = H

    @property
    def query_length(self) -> int:
        return T if self.offsets is None else CHUNK

    def of_queries(self, array: np.ndarray) -> np.ndarray:
        """The elements (B, T) of the queries among (B, S)."""
        if self.offsets is None:
            return array
        return np.stack([row[start : start + CHUNK] for row, start in zip(array, self.offsets, strict=True)])

    def arguments(self) -> Arguments:
        """Those of `flash_attention`."""
        arguments: Arguments = dict(CAUSAL)
        if self.ids is not None:
            arguments |= {"query_segment_ids": self.of_queries(self.ids), "key_value_segment_ids": self.ids}
        if self.positions is not None:
            arguments |= {"query_positions": self.of_queries(self.positions), "key_value_positions": self.positions}
        if self.offsets is not None:
            arguments["query_offset"] = self.offsets
        if self.window is not None:
            arguments["local_window_size"] = (self.window - 1, 0)
        if self.soft_cap is not None:
            arguments["logits_soft_cap"] = self.soft_cap
        return arguments

    def mask_mod(self) -> Callable[..., Any]:
        """What FlexAttention calls so: may the query at row i attend the key at j?"""
        offsets = torch.zeros(B, dtype=torch.int64) if self.offsets is None else torch.tensor(self.offsets)
        ids, positions = (None if x is None else torch.tensor(x) for x in (self.ids, self.positions))

        def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
            i = i + offsets[b]
            behind = i - j if positions is None else positions[b, i] - positions[b, j]
            result = behind >= 0
            if self.window is not None:
                result = result & (behind < self.window)
            if ids is not None:
                result = result & (ids[b, i] == ids[b, j]) & (ids[b, j] >= 0)
            return result

        return visible


def torch_cases(random: np.random.Generator) -> list[TorchCase]:
    ids = np.repeat([[0, 1, 2, 3, -1], [0, 0, 0, 1, 1]], [50, 150, 30, 100, 54], axis=1)  # the last tokens are padding
    order = random.permuted(np.broadcast_to(np.arange(S), (B, S)), axis=1)
    shuffled_ids = np.take_along_axis(ids, order, axis=1)
    offsets = np.array([S - CHUNK, 40])
    return [
        TorchCase("packed documents", ids),
        TorchCase("packed documents, bias", ids, has_bias=True),
        TorchCase("documents and positions in any order, window", shuffled_ids, order, window=WINDOW),
        TorchCase("soft cap", soft_cap=SOFT_CAP),
        TorchCase("soft cap, bias", soft_cap=SOFT_CAP, has_bias=True),
        TorchCase("packed documents, soft cap", ids, soft_cap=SOFT_CAP),
        TorchCase("offset", offsets=offsets),
        TorchCase("offset, window", offsets=offsets, window=WINDOW),
        TorchCase("values of half the dimension", value_dim=H // 2),
        TorchCase(
            "packed documents, offset, window, soft cap, bias, values of half the dimension",
            ids,
            offsets=offsets,
            window=WINDOW,
            soft_cap=SOFT_CAP,
            has_bias=True,
            value_dim=H // 2,
        ),
    ]


def torch_comparisons(random: np.random.Generator) -> Iterator[Comparison]:
    for case in torch_cases(random):
        # Large enough for logits that the cap changes.
        inputs = {
            "query": 4 * normal(random, B, case.query_length, N, H),
            "key": normal(random, B, S, K, H),
            "value": normal(random, B, S, K, case.value_dim),
        }
        if case.has_bias:
            inputs["bias"] = normal(random, B, N, case.query_length, S)
        cotangent = normal(random, B, case.query_length, N, case.value_dim)
        ours = jax_results(functools.partial(flash_attention, **case.arguments()), inputs, cotangent)
        theirs = torch_results(functools.partial(by_flex_attention, case), inputs, cotangent)
        yield Comparison(f"FlexAttention: {case.name}", theirs, ours)
        if case.soft_cap is None:
            theirs = torch_results(functools.partial(by_sdpa, case), inputs, cotangent)
            yield Comparison(f"SDPA: {case.name}", theirs, ours)


def by_flex_attention(case: TorchCase, query: Any, key: Any, value: Any, bias: Any = None) -> Any:
    def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if bias is not None:
            score = score + bias[b, h, i, j]
        return score if case.soft_cap is None else case.soft_cap * torch.tanh(score / case.soft_cap)

    block_mask = flex.create_block_mask(case.mask_mod(), B, None, case.query_length, S, device="cpu")
    by_head = (array.transpose(1, 2) for array in (query, key, value))
    with mock.patch.object(flex, "_validate_device"):
        out = flex.flex_attention(*by_head, score_mod=score_mod, block_mask=block_mask, enable_gqa=True)
    return out.transpose(1, 2)


def by_sdpa(case: TorchCase, query: Any, key: Any, value: Any, bias: Any = None) -> Any:
    mask = flex.create_mask(case.mask_mod(), B, 1, case.query_length, S, device="cpu")
    if bias is not None:
        mask = bias.masked_fill(~mask, -torch.inf)
    by_head = (array.transpose(1, 2) for array in (query, key, value))
    return scaled_dot_product_attention(*by_head, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def gpt_oss_comparisons(random: np.random.Generator) -> Iterator[Comparison]:
    config = GptOssConfig(sliding_window=WINDOW, attn_implementation="eager")
    embedded = torch.zeros(B, T, 1)  # masks take its shape and dtype
    is_token = np.arange(T) >= np.array([[0], [70]])  # the prompts end together
    ids = np.where(is_token, 0, -1)
    padded = {"query_segment_ids": ids, "key_value_segment_ids": ids}
    for name, make_mask, tokens, arguments in (
        ("sinks", masking_utils.create_causal_mask, None, CAUSAL),
        ("sinks, sliding window", masking_utils.create_sliding_window_causal_mask, None, CAUSAL | LEFT_WINDOW),
        ("sinks, padded in front", masking_utils.create_causal_mask, is_token, CAUSAL | padded),
    ):
        mask = make_mask(config, embedded, None if tokens is None else torch.tensor(tokens), None)
        inputs = {
            "query": normal(random, B, T, N, H),
            "key": normal(random, B, S, K, H),
            "value": normal(random, B, S, K, H),
            "sinks": 2 * normal(random, N),
        }
        cotangent = normal(random, B, T, N, H)
        ours = jax_results(functools.partial(flash_attention, **arguments), inputs, cotangent)
        theirs = torch_results(functools.partial(by_gpt_oss, mask), inputs, cotangent)
        yield Comparison(f"gpt-oss: {name}", theirs, ours)


def by_gpt_oss(mask: Any, query: Any, key: Any, value: Any, sinks: Any) -> Any:
    module = SimpleNamespace(sinks=sinks, num_key_value_groups=N // K, training=False)
    by_head = (array.transpose(1, 2) for array in (query, key, value))
    return eager_attention_forward(module, *by_head, mask, H**-0.5)[0]


def main(argv: Sequence[str] | None = None) -> int:
    options = command_line(__doc__, seed=0).parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    print(header())
    print(", ".join(f"{name} {metadata.version(name)}" for name in ("gemma", "torch", "transformers")))
    random = np.random.default_rng(options.seed)
    all_agree = True
    for peer in (gemma_comparisons, torch_comparisons, gpt_oss_comparisons):
        for comparison in peer(random):
            differences = {
                name: np.abs(comparison.ours[name] - array).max() / np.abs(array).max()
                for name, array in comparison.theirs.items()
            }
            agrees = all(difference <= TOLERANCE for difference in differences.values())
            all_agree = all_agree and agrees
            figures = ", ".join(f"{name} {difference:.0e}" for name, difference in differences.items())
            print(f"{comparison.name}: {figures}: {'ok' if agrees else 'DIFFERENT'}", flush=True)
    return 0 if all_agree else 1


if __name__ == "__main__":
    sys.exit(main())
