# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.6.2",
#     "jaxlib==0.6.2",
#     "numpy==2.2.6",
#     "ringattention==0.1.2",
# ]
# ///
# ruff: noqa: RUF012
"""`ringattention.ringattention` on a mesh of one device. Newer JAX cannot import it."""

import jax
import jax.numpy as jnp
import numpy as np
from frameworks import JaxAdapter, main
from jax.sharding import Mesh, PartitionSpec
from ringattention import ringattention


class RingAttention(JaxAdapter):
    name = "ringattention"
    packages = ("ringattention", "jax")
    functions = (
        lambda q, k, v, attn_bias, segment_ids, cache_idx, axis_name, float32_logits, blockwise_kwargs: None,
        lambda causal_block_size, query_chunk_size, key_chunk_size, deterministic, dropout_rng, attn_pdrop, dtype: None,
    )
    masks = False
    by = {"causal": "`causal_block_size=1`", "causal_more_queries": "`causal_block_size=1`"}

    def native(self, query, key, value):
        return self.apply(*map(jnp.asarray, (query, key, value)))

    def apply(self, query, key, value, *, causal=False, bias=None, segments=None, dropout=None, **options):
        self.refuse(options, scale="scal")
        if key.shape[2] != query.shape[2]:
            self.lacks("heads")
        rate, seed = dropout or (0.0, 0)
        with jax.ensure_compile_time_eval():
            rng = jax.random.key(seed)
        blockwise = {
            "causal_block_size": 1 if causal else None, "deterministic": not rate, "dropout_rng": rng,
            "attn_pdrop": rate, "query_chunk_size": query.shape[1], "key_chunk_size": key.shape[1],
            "dtype": query.dtype,
            "policy": jax.checkpoint_policies.nothing_saveable, "precision": None, "prevent_cse": True,
        }  # fmt: skip
        ids = None if segments is None else jnp.broadcast_to(segments, query.shape[:2])
        call = jax.shard_map(
            lambda q, k, v, b, i: ringattention(q, k, v, b, i, None, "ring", query.dtype == jnp.float32, blockwise),
            mesh=Mesh(np.array(jax.devices()), ("ring",)), in_specs=PartitionSpec(), out_specs=PartitionSpec(),
            check_vma=False,
        )  # fmt: skip
        return call(query, key, value, bias, ids)


if __name__ == "__main__":
    main(RingAttention())
