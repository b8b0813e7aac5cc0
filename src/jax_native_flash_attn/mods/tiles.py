"""What is known of a mask before it is used, and its picture."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._convert import as_count
from .._semantics.mods import INDICES, Program, trace_mod
from .._semantics.tile_masks import BLOCK, FULL, PARTIAL, TiledMask, Tiles, elements_of, find_tiles


def make_tile_mask(
    mask_mod: Any,
    T: int,
    S: int,
    *,
    mask_mod_args: tuple[Any, ...] = (),
    batch: int | None = None,
    num_heads: int | None = None,
    block: int = BLOCK,
) -> TiledMask:
    """Find, once for any number of layers and calls, which tiles of a mask are empty and which full.

    A call that gets a function finds this by itself, in T * S evaluations of it. Pass what this gives as `mask_mod` to
    save that. It takes memory for its tiles, and none of T x S elements.

    Args:
      mask_mod: (batch, head, query_index, key_index, *mask_mod_args) -> bool.
      T, S: numbers of query rows and keys of the calls.
      mask_mod_args: further arguments of it; the calls get them from here.
      batch, num_heads: B and N of the calls; needed where the function reads its batch or head.
      block: rows and keys of a tile. Kernels join several for theirs.

    Returns:
      A `TiledMask`, a pytree, which can be an argument of a jitted function.

    Raises:
      TypeError: as `flash_attention`, for a wrong function.
      ValueError: the function reads its batch or head, and there is no `batch` or no `num_heads`; a length or block
        that is no positive number.

    Examples:
      >>> import jax
      >>> from jax_native_flash_attn import flash_attention, mods
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 64, 8, 32))
      >>> mask = mods.make_tile_mask(mods.Dilated(step=4), 64, 64, block=16)
      >>> mask.classes.shape
      (1, 1, 4, 4)
      >>> flash_attention(query, key, value, mask_mod=mask).shape
      (2, 64, 8, 32)
    """
    T, S, block = as_count(T, "T"), as_count(S, "S"), as_count(block, "block")
    program, args = trace_mod(mask_mod, "mask_mod", mask_mod_args, None)
    sizes = {"batch": batch, "head": num_heads}
    for name, reads, public in zip(INDICES, program.uses, ("batch", "num_heads"), strict=False):
        if reads and sizes[name] is None:
            raise ValueError(f"{public} is needed, as mask_mod reads its {name}, got None: pass that of the calls")
    flags = zip(sizes.items(), program.uses, strict=False)
    counts = [as_count(n or 1, name) if reads else 1 for (name, n), reads in flags]
    tiles = _find((program, counts[0], counts[1], T, S, block), args)
    return TiledMask(tiles.classes, tiles.has_key, tuple(mask_mod_args), mask_mod, (T, S), block)


@functools.partial(jax.jit, static_argnums=0)
def _find(sizes: tuple[Program, int, int, int, int, int], args: dict[str, jax.Array]) -> Tiles:
    """Compiled once for all functions that say the same."""
    program, batch, num_heads, T, S, block = sizes
    batches, heads, rows, keys = (jnp.arange(n, dtype=jnp.int32) for n in (batch, num_heads, T, S))
    return find_tiles(elements_of(program, (batches, heads, rows[None], keys[None]), args), T, S, block)


def visualize_mask(
    mask_mod: Any,
    T: int,
    S: int,
    *,
    mask_mod_args: tuple[Any, ...] = (),
    batch: int = 0,
    head: int = 0,
    block: int = 16,
    ax: Any = None,
) -> Any:
    """Draw which keys (across) each query (down) attends, and the class of each tile; needs matplotlib.

    White tiles are empty and skipped; green ones are full and need no mask; in blue ones the function is evaluated.

    Args:
      mask_mod, T, S, mask_mod_args, block: as of `make_tile_mask`.
      batch, head: of which the mask is drawn.
      ax: a matplotlib `Axes`; by default one of a new figure.

    Returns:
      The `Axes`.

    Raises:
      ImportError: there is no matplotlib.
      TypeError, ValueError: as `make_tile_mask`.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    T, S, block = as_count(T, "T"), as_count(S, "S"), as_count(block, "block")

    def of_one(_b: Any, _h: Any, query_index: Any, key_index: Any, *args: Any) -> Any:
        return mask_mod(jnp.int32(batch), jnp.int32(head), query_index, key_index, *args)

    program, args = trace_mod(of_one, "mask_mod", mask_mod_args, None)
    zero, (rows, keys) = jnp.zeros(1, jnp.int32), (jnp.arange(n, dtype=jnp.int32) for n in (T, S))
    elements = elements_of(program, (zero, zero, rows[None], keys[None]), args)
    allowed = np.broadcast_to(np.asarray(elements(rows, keys))[0, 0], (T, S))
    classes = np.asarray(find_tiles(elements, T, S, block).classes)[0, 0]
    in_tiles = np.repeat(np.repeat(classes, block, 0), block, 1)[:T, :S]
    if ax is None:
        _, ax = plt.subplots()
    colors = ["white", "#c9d7ee", "#2f5fa8", "#3f9b6b"]  # empty; in part, masked and not; full
    drawn = np.where(in_tiles == FULL, 3, np.where(in_tiles == PARTIAL, 1 + allowed, 0))
    ax.imshow(drawn, ListedColormap(colors), vmin=0, vmax=3)
    for position in range(block, max(T, S), block):
        if position < S:
            ax.axvline(position - 0.5, color="0.7", linewidth=0.5)
        if position < T:
            ax.axhline(position - 0.5, color="0.7", linewidth=0.5)
    ax.set_xlabel("key_index")
    ax.set_ylabel("query_index")
    return ax
