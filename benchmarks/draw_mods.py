"""Draws the functions of docs/guides/score_mod.md, as that page defines them.

python benchmarks/draw_mods.py docs/images
"""

import argparse
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from harness.report import pyplot

from jax_native_flash_attn import mods

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "score_mod.md"
T = 64


def heat_map(cell: Any, score_mod: Any, *args: Any, is_causal: bool = False, scores: Any = 0.0, head: Any = 0) -> None:
    """What becomes of `scores`, (T, T) or a number; `head` may differ between rows, (T, 1)."""
    rows, keys = jnp.arange(T, dtype=jnp.int32)[:, None], jnp.arange(T, dtype=jnp.int32)[None]
    scores = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (T, T))
    found = np.asarray(score_mod(scores, jnp.zeros((1, 1), jnp.int32), jnp.asarray(head), rows, keys, *args))
    largest = np.abs(found).max()
    if is_causal:
        found = np.where(keys <= rows, found, np.nan)
    cell.imshow(found, "RdBu_r", vmin=-largest, vmax=largest)
    cell.set_xlabel("key_index")
    cell.set_ylabel("query_index")


def pictures(page: dict[str, Any]) -> dict[str, Any]:
    """By the name of the file, a function that draws on an axis."""
    ramp = jnp.linspace(-4, 4, T)[None]
    by_head = jnp.repeat(jnp.arange(4), T // 4)[:, None]
    draw = mods.visualize_mask
    tree = {"mask_mod_args": (page["ancestors"], page["cache_length"]), "block": 8}
    return {
        "alibi": lambda cell: heat_map(cell, page["alibi"], page["slopes"], is_causal=True),
        "t5": lambda cell: heat_map(cell, page["t5"], page["table"]),
        "relative": lambda cell: heat_map(cell, page["relative"], page["by_distance"]),
        "soft_cap": lambda cell: heat_map(cell, page["soft_cap"], scores=ramp),
        "temperature": lambda cell: heat_map(
            cell, page["with_temperature"](page["temperature"]), scores=ramp, head=by_head
        ),
        "forget": lambda cell: heat_map(cell, page["forget"], jnp.cumsum(page["gates"], -1), is_causal=True),
        "prefix": lambda cell: draw(mods.prefix_lm, T, T, mask_mod_args=(page["prefix_lengths"],), ax=cell),
        "document": lambda cell: draw(page["document"], T, T, mask_mod_args=(page["ids"],), block=8, ax=cell),
        "global": lambda cell: draw(page["with_global"], T, T, block=4, ax=cell),
        "dilated": lambda cell: draw(page["dilated"], T, T, ax=cell),
        "neighbourhood": lambda cell: draw(page["neighbourhood"], T, T, block=8, ax=cell),
        "tree": lambda cell: draw(mods.tree, 8, T, **tree, ax=cell),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    page: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), page)
    plt = pyplot()
    for name, draw in pictures(page).items():
        figure, cell = plt.subplots(figsize=(2.6, 1.4 if name == "tree" else 2.6), layout="constrained")
        draw(cell)
        figure.savefig(folder / f"mod_{name}.png", dpi=120)
        plt.close(figure)


if __name__ == "__main__":
    main()
