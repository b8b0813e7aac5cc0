"""Draws the pictures of the guides: which query attends which key.

    python benchmarks/draw_masks.py docs/images

Rows are queries and columns are keys. What is attended is found by running `flash_attention` itself: with queries of
zeros and an identity matrix for values, a row of the output is its attention weights.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from harness.report import pyplot
from matplotlib.colors import to_rgb

from jax_native_flash_attn import flash_attention_with_lse

MASKED, VISIBLE, UNUSED = 0, 1, 2
COLORS = {MASKED: "white", VISIBLE: "#17508f", UNUSED: "#dddddd"}
VISITED, SKIPPED = "#c05000", "#999999"


def attended(rows: int, keys: int, **options: Any) -> np.ndarray:
    """(rows, keys) bool: what the library attends."""
    query, key = jnp.zeros((1, rows, 1, 8)), jnp.zeros((1, keys, 1, 8))
    value = jnp.eye(keys)[None, :, None]
    out, lse = flash_attention_with_lse(query, key, value, **options)
    has_key = np.asarray(lse[0]) > -1e37  # a row without any key gives the mean of all values
    return np.asarray(out[0, :, 0] > 0) & has_key


def draw(cell: Any, kinds: np.ndarray, title: str, first_row: int = 0) -> None:
    """One square for each query and key; rows are numbered from first_row."""
    rows, keys = kinds.shape
    colors = np.array(list(map(to_rgb, COLORS.values())))
    cell.imshow(colors[kinds], interpolation="nearest", aspect="equal")
    cell.set_xticks(range(keys), range(keys), fontsize=7)
    cell.set_yticks(range(rows), range(first_row, first_row + rows), fontsize=7)
    cell.set_xticks(np.arange(-0.5, keys), minor=True)
    cell.set_yticks(np.arange(-0.5, rows), minor=True)
    cell.grid(which="minor", color="#bbbbbb", linewidth=0.6)
    cell.tick_params(which="both", length=0)
    cell.set_title(title, fontsize=9)


def draw_causal_alignment(plt: Any) -> Any:
    """The same four queries against eight keys, with and without an offset."""
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
    for cell, rows, offset, title in (
        (axes[0], 8, 0, "T = S = 8\nis_causal=True"),
        (axes[1], 4, 0, "T = 4, S = 8: top left\nis_causal=True"),
        (axes[2], 4, 4, "T = 4, S = 8: bottom right\nis_causal=True, query_offset=4"),
        (axes[3], 4, 2, "T = 4, slots 6 and 7 empty\nis_causal=True, query_offset=2"),
    ):
        kinds = attended(rows, 8, is_causal=True, query_offset=offset).astype(int)
        if offset == 2:
            kinds[:, 6:] = UNUSED
        draw(cell, kinds, title, offset)
        cell.set_xlabel("position of the key", fontsize=8)
    axes[0].set_ylabel("position of the query", fontsize=8)
    return figure


def draw_windows(plt: Any) -> Any:
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
    for cell, rows, window, offset, title in (
        (axes[0], 8, 2, 0, "local_window_size=2\nor (2, 2)"),
        (axes[1], 8, (2, 0), 0, "local_window_size=(2, 0)\nthree keys: two and its own"),
        (axes[2], 8, (8, 1), 0, "local_window_size=(S, 1)\nno limit on the left"),
        (axes[3], 4, (2, 0), 4, "local_window_size=(2, 0),\nquery_offset=4"),
    ):
        draw(cell, attended(rows, 8, local_window_size=window, query_offset=offset).astype(int), title, offset)
        cell.set_xlabel("position of the key", fontsize=8)
    axes[0].set_ylabel("position of the query", fontsize=8)
    return figure


def draw_chunked_prefill(plt: Any) -> Any:
    """A prompt of ten tokens in chunks of four, then one token, against a cache of twelve slots."""
    slots = 12
    chunks = ((0, 4, "chunk 1: query_offset=0"), (4, 4, "chunk 2: query_offset=4"), (8, 2, "chunk 3: query_offset=8"))
    steps = (*chunks, (10, 1, "one new token: query_offset=10"))
    figure, axes = plt.subplots(4, 1, figsize=(5.2, 6.0), layout="constrained", height_ratios=(4, 4, 2, 1))
    for cell, (offset, rows, title) in zip(axes, steps, strict=True):
        kinds = attended(rows, slots, is_causal=True, query_offset=offset).astype(int)
        kinds[:, offset + rows :] = UNUSED
        draw(cell, kinds, title, offset)
    axes[-1].set_xlabel("slot of the cache (grey: not written yet)", fontsize=8)
    figure.supylabel("position of the query", fontsize=8)
    return figure


def draw_packed_sequences(plt: Any) -> Any:
    """Three documents and padding in a row of sixteen tokens, sorted and mixed, with tiles of 4 x 4."""
    in_order = np.repeat([0, 1, 2, -1], [6, 4, 4, 2])
    mixed = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, -1, 0, -1])
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 4.9), layout="constrained")
    for cell, ids, title in ((axes[0], in_order, "ids in order"), (axes[1], mixed, "ids mixed")):
        packed = {"query_segment_ids": ids[None], "key_value_segment_ids": ids[None], "is_causal": True}
        seen = attended(16, 16, **packed) & (ids >= 0)[:, None]  # rows of padding give 0
        draw(cell, seen.astype(int), "")
        # A row reaches from its first to its last key.
        places = np.arange(16)
        first, last = (np.where(seen, places, fill) for fill in (16, -1))
        reach = (places >= first.min(1)[:, None]) & (places <= last.max(1)[:, None])
        visited = reach.reshape(4, 4, 4, 4).any((1, 3))
        for i, j in np.ndindex(4, 4):
            color, style = (VISITED, "-") if visited[i, j] else (SKIPPED, ":")
            corner = (4 * j - 0.38, 4 * i - 0.38)
            box = plt.Rectangle(corner, 3.76, 3.76, fill=False, edgecolor=color, linestyle=style, linewidth=1.8)
            cell.add_patch(box)
        cell.set_xticks(range(16), [str(i) if i >= 0 else "–" for i in ids], fontsize=8)  # noqa: RUF001
        cell.set_yticks(range(16), [str(i) if i >= 0 else "–" for i in ids], fontsize=8)  # noqa: RUF001
        cell.set_xlabel("segment id of the key (– is padding)", fontsize=8)  # noqa: RUF001
        cell.set_title(f"{title}: {visited.sum()} of 16 tiles are visited", fontsize=9)
    axes[0].set_ylabel("segment id of the query", fontsize=8)
    return figure


PICTURES = {
    "causal_alignment": draw_causal_alignment,
    "windows": draw_windows,
    "chunked_prefill": draw_chunked_prefill,
    "packed_sequences": draw_packed_sequences,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    folder = parser.parse_args(argv).folder
    plt = pyplot()
    for name, picture in PICTURES.items():
        path = folder / f"{name}.png"
        picture(plt).savefig(path, dpi=110, facecolor="white", bbox_inches="tight", pad_inches=0.12)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
