# %% [markdown]
# # Masks, drawn
#
# Attention is computed tile by tile. A tile without any visible element is skipped, a
# full one needs no mask, and only tiles at an edge compare positions. So a mask that
# leaves half of the elements costs about half of the time.
#
# The pictures below are not drawn from formulas: they ask the library. With queries of
# zeros, all visible keys weigh the same; with an identity matrix as values, the result
# *is* the weights. A sink takes all of the weight where a row has no key, so that such
# a row stays empty.

# %% tags=["hide-input"]
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax_native_flash_attn import balanced_order, flash_attention
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

T, TILE = 64, 8
COLORS = {
    "empty: skipped": "#eceff1",
    "edge: compared": "#ffcc80",
    "full: no mask": "#64b5f6",
}


def visible(T=T, S=T, **masks):
    """(T, S) bool: which query sees which key."""
    query, key = jnp.zeros((1, T, 1, 1)), jnp.zeros((1, S, 1, 1))
    value = jnp.eye(S).reshape(1, S, 1, S)
    weights = flash_attention(query, key, value, sinks=jnp.zeros(1), **masks)
    return np.asarray(weights)[0, :, 0] > 0


def draw(ax, mask, title):
    """Tiles coloured by what is to be done for them; a dot is a visible element."""
    rows, columns = mask.shape
    tiles = mask.reshape(rows // TILE, TILE, columns // TILE, TILE)
    state = tiles.any((1, 3)).astype(int) + tiles.all((1, 3))
    colors = ListedColormap(list(COLORS.values()))
    ax.imshow(state, cmap=colors, vmin=0, vmax=2, extent=(0, columns, rows, 0))
    ax.set_xticks(range(0, columns + 1, TILE), [])
    ax.set_yticks(range(0, rows + 1, TILE), [])
    ax.scatter(
        *(np.argwhere(mask)[:, ::-1] + 0.5).T, s=0.6, color="#37474f", linewidths=0
    )
    ax.grid(color="white", linewidth=1)
    ax.tick_params(length=0)
    ax.set_title(f"{title}\n{(state > 0).mean():.0%} of tiles computed", fontsize=10)
    ax.set_xlabel("keys", fontsize=9)
    ax.set_ylabel("queries", fontsize=9)
    return state


def figure(columns, height=3.4):
    fig, axes = plt.subplots(
        1, columns, figsize=(2.9 * columns, height), layout="constrained"
    )
    handles = [
        Patch(facecolor=color, edgecolor="#90a4ae", label=name)
        for name, color in COLORS.items()
    ]
    fig.legend(
        handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False
    )
    return axes


# %% [markdown]
# ## Causal, and windows
#
# `is_causal`: a query sees the keys up to its own place. `local_window_size=(left,
# right)`: at most so many keys to the left and to the right. Both together are a
# sliding window.

# %%
axes = figure(3)
draw(axes[0], visible(is_causal=True), "is_causal=True")
draw(axes[1], visible(local_window_size=(20, 4)), "local_window_size=(20, 4)")
draw(axes[2], visible(is_causal=True, local_window_size=(15, 0)), "both: window of 16")
plt.show()

# %% [markdown]
# ## Offset
#
# 16 queries against a cache of 64 keys. Without an offset the first query is at place
# 0, and most of the cache is out of sight, which is seldom meant. `query_offset` says
# at which place the queries begin.

# %%
axes = figure(2, height=1.9)
draw(axes[0], visible(T=16, is_causal=True, query_offset=0), "query_offset=0")
draw(axes[1], visible(T=16, is_causal=True, query_offset=40), "query_offset=40")
plt.show()

# %% [markdown]
# ## Packed sequences, and lengths
#
# Segment ids keep documents apart. Here three of 24, 20 and 12 tokens, then padding (a
# negative id). Lengths cut what is behind: rows past `query_seq_lengths` give 0, keys
# past `key_value_seq_lengths` are never read.

# %%
ids = jnp.repeat(jnp.array([[0, 1, 2, -1]]), jnp.array([24, 20, 12, 8]), axis=1)
packed = {"query_segment_ids": ids, "key_value_segment_ids": ids}
axes = figure(3)
draw(axes[0], visible(**packed), "segment ids")
draw(axes[1], visible(**packed, is_causal=True), "segment ids, causal")
lengths = {
    "query_seq_lengths": jnp.array([52]),
    "key_value_seq_lengths": jnp.array([44]),
}
draw(axes[2], visible(**lengths), "lengths 52 and 44")
plt.show()

# %% [markdown]
# ## Balanced order
#
# A causal sequence split over four devices: the first device has few keys to see, the
# last has all of them, and all wait for the last. In `balanced_order` each device has
# one part from the front and one from the back. Then every device computes the same
# number of tiles.

# %%
DEVICES = 4
order = balanced_order(T, DEVICES)
places = jnp.asarray(order)[None]
balanced = visible(is_causal=True, query_positions=places, key_value_positions=places)
axes = figure(2, height=4)
orders = {
    "usual order": draw(axes[0], visible(is_causal=True), "usual order"),
    "balanced order": draw(axes[1], balanced, "balanced order"),
}
for ax in axes:
    for device in range(DEVICES):
        ax.axhline(device * T / DEVICES, color="#d32f2f", linewidth=1.5)
        ax.text(
            T + 1,
            (device + 0.5) * T / DEVICES,
            f"device {device}",
            fontsize=8,
            va="center",
        )
plt.show()

for name, state in orders.items():
    tiles = (state > 0).reshape(DEVICES, -1).sum(1)
    print(f"{name:15} tiles of each device: {tiles}")
