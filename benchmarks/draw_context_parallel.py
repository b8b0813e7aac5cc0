"""Draws who computes what at which step of a ring: docs/context_parallel.png.

    python benchmarks/draw_context_parallel.py docs/context_parallel.png

Each cell is the square of all queries (down) and keys (across) of a causal call, by where tokens stand in the sequence.
Dark is what a device computes at a step, and the number how much that is: 1 would be an equal share. A step takes as
long as the device that has most to do.
"""

import argparse
from collections.abc import Sequence

import numpy as np
from harness.report import pyplot
from matplotlib.colors import to_rgb

from jax_native_flash_attn import balanced_order

DEVICES, LENGTH = 4, 64
EMPTY, VISIBLE, COMPUTED = 0, 1, 2
COLORS = {EMPTY: "white", VISIBLE: "#d6e4f2", COMPUTED: "#17508f"}


def cells(order: np.ndarray) -> np.ndarray:
    """(device, step, LENGTH, LENGTH): what of the square is visible, and what of that is computed there and then."""
    blocks = order.reshape(DEVICES, -1)
    causal = np.tri(LENGTH, dtype=int) * VISIBLE
    found = np.broadcast_to(causal, (DEVICES, DEVICES, LENGTH, LENGTH)).copy()
    for device in range(DEVICES):
        for step in range(DEVICES):
            visited = np.ix_(blocks[device], blocks[(device - step) % DEVICES])
            found[device, step][visited] *= COMPUTED
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="of the picture to write")
    path = parser.parse_args(argv).path
    plt = pyplot()
    orders = {
        "tokens as they come": np.arange(LENGTH),
        "in balanced_order": balanced_order(LENGTH, DEVICES),
    }
    figure = plt.figure(figsize=(9.6, 5.6), layout="constrained")
    for part, (name, order) in zip(figure.subfigures(1, 2, wspace=0.06), orders.items(), strict=True):
        found = cells(order)
        amounts = (found == COMPUTED).sum((2, 3)) * DEVICES**2 / (found[0, 0] != EMPTY).sum()
        time = amounts.max(0).sum()
        part.suptitle(f"{name}: {time:.1f} units of time", fontsize=10)
        axes = part.subplots(DEVICES, DEVICES)
        for device, step in np.ndindex(DEVICES, DEVICES):
            cell = axes[device, step]
            colors = np.array(list(map(to_rgb, COLORS.values())))
            cell.imshow(colors[found[device, step]], interpolation="nearest")
            cell.set(xticks=[], yticks=[])
            cell.text(0.95, 0.93, f"{amounts[device, step]:.1f}", transform=cell.transAxes, ha="right", va="top")
            if device == 0:
                cell.set_title(f"step {step}", fontsize=9)
            if step == 0:
                cell.set_ylabel(f"device {device}", fontsize=9)
    figure.savefig(path, dpi=90)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
