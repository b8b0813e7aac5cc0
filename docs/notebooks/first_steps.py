# %% [markdown]
# # First steps
#
# Attention with and without `jax.nn`: the same call, the same numbers, the same
# gradients. Then three things that `jax.nn` does not have: dropout, packed sequences,
# and an answer to "what did run?".

# %%
import jax
import jax.numpy as jnp
from jax_native_flash_attn import dropout_keep_mask, explain, flash_attention

# Batch, length, query heads, key/value heads, head dimension
B, T, N, K, H = 2, 256, 8, 2, 64
query = jax.random.normal(jax.random.key(0), (B, T, N, H))
key, value = jax.random.normal(jax.random.key(1), (2, B, T, K, H))

out = flash_attention(query, key, value, is_causal=True)
print(out.shape, out.dtype)

# %% [markdown]
# ## The same as `jax.nn`
#
# Only the order of the sums differs, so results agree to rounding. `K` may be smaller
# than `N`: each key/value head then serves `N // K` query heads.


# %%
def difference(x, y):
    return f"{float(jnp.abs(x - y).max()):.1e}"


expected = jax.nn.dot_product_attention(query, key, value, is_causal=True)
print("largest difference of values   ", difference(out, expected))


def loss(attention, query, key, value):
    return jnp.sum(jnp.sin(attention(query, key, value, is_causal=True)))


ours = jax.grad(loss, (1, 2, 3))(flash_attention, query, key, value)
theirs = jax.grad(loss, (1, 2, 3))(jax.nn.dot_product_attention, query, key, value)
for name, x, y in zip(("query", "key", "value"), ours, theirs, strict=True):
    print(f"largest difference of d{name:6}", difference(x, y))

# %% [markdown]
# ## Padding
#
# Lengths say how much of each row is real. What lies behind is never read, so that it
# may hold anything.

# %%
lengths = jnp.array([256, 100])
padded = key.at[1, 100:].set(jnp.nan)
out = flash_attention(query, padded, value, key_value_seq_lengths=lengths)
print("all finite:", bool(jnp.isfinite(out).all()))

# %% [markdown]
# ## Packed sequences
#
# Several documents share a row. Ids say which token is of which; a negative id is
# padding. Tokens attend to their own document alone, and the tiles between documents
# are skipped.

# %%
ids = jnp.repeat(jnp.array([[0, 1, -1], [0, 1, 2]]), jnp.array([100, 100, 56]), axis=1)
packed = flash_attention(
    query, key, value, query_segment_ids=ids, key_value_segment_ids=ids, is_causal=True
)
alone = flash_attention(
    query[:, 100:200], key[:, 100:200], value[:, 100:200], is_causal=True
)
print("second document, packed and alone:", difference(packed[:, 100:200], alone))

# %% [markdown]
# ## Dropout
#
# It drops attention weights, and the mask depends on nothing but the key of the random
# numbers: not on tiles, not on devices. `dropout_keep_mask` shows it.

# %%
rng = jax.random.key(7)
first = flash_attention(query, key, value, dropout_rate=0.1, dropout_rng=rng)
second = flash_attention(
    query, key, value, dropout_rate=0.1, dropout_rng=rng, block_q=32, block_kv=64
)
print("other tiles, same dropout:", difference(first, second))
print("kept:", float(dropout_keep_mask(rng, 0.1, (B, N, T, T)).mean()))

# %% [markdown]
# ## What did run?
#
# `explain` takes the arguments of a call and computes nothing. It says which kernels
# run and with which tiles, and why not the others. With `compiles=True` it also says
# how much memory XLA allocates besides arguments and results.

# %%
types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)]
print(explain(*types, is_causal=True, compiles=True))
