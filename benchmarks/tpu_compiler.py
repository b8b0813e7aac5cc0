"""What a TPU would execute, seen without one: libtpu compiles ahead of time for any generation, and says what it made.

    python benchmarks/tpu_compiler.py shapes                    # 40 calls, forward and gradients: do they compile?
    python benchmarks/tpu_compiler.py bundles --splash          # bundles for a tile of 512 x 512, beside JAX's splash
    python benchmarks/tpu_compiler.py bundles --blocks 512,512,2048,256,2

It needs `jax[tpu]`, whose libtpu runs on a machine without a TPU. Nothing is executed. A bundle is a cycle of one core,
stalls and waits for memory aside. The schedule comes from libtpu's dump of each kernel.
"""

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
TILE, HEAD_DIM, LENGTH = 512, 128, 8192


class Program(NamedTuple):
    """Forward and gradients of a call, what its kernels are called in libtpu's files, and tiles of their loop."""

    function: Callable[..., Any]
    types: tuple[Any, ...]
    family: Any
    tiles: int


class Counts(NamedTuple):
    """Of a kernel, for each tile: of its inner loop or, without one, of its longest stretch without a branch."""

    kernel: str
    bundles: float
    whole: int
    units: dict[str, float]


def ours(blocks: str) -> Program:
    """A call without a mask; `blocks` are numbers, or the name of a generation."""
    import jax
    import jax.numpy as jnp

    from jax_native_flash_attn import flash_attention
    from jax_native_flash_attn._kernels.tpu.blocks import Blocks
    from jax_native_flash_attn._kernels.tpu.plan import BackwardBlocks
    from jax_native_flash_attn._kernels.tpu.support import TpuKernels

    x = jax.ShapeDtypeStruct((1, LENGTH, 2, HEAD_DIM), jnp.bfloat16)
    family, tiles = TpuKernels(generation=blocks), 0
    if "," in blocks:
        same = Blocks(*map(int, blocks.split(",")))
        family = TpuKernels(forward_blocks=same, backward_blocks=BackwardBlocks(same, same, None))
        tiles = same.unrolled * same.resident * same.tile // TILE**2
    return Program(_gradients(functools.partial(flash_attention, implementation="mosaic_tpu")), (x,) * 4, family, tiles)


def splash() -> Program:
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    x = jax.ShapeDtypeStruct((2, LENGTH, HEAD_DIM), jnp.bfloat16)
    mask = masks.MultiHeadMask([masks.FullMask((LENGTH, LENGTH))] * 2)
    sizes = kernel.BlockSizes(*(TILE,) * 8)
    call: Any = kernel.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    return Program(_gradients(call), (x,) * 4, None, 1)


def _gradients(attention: Callable[..., Any]) -> Callable[..., Any]:
    def run(query: Any, key: Any, value: Any, dout: Any) -> Any:
        import jax

        out, pullback = jax.vjp(attention, query, key, value)
        return out, pullback(dout)

    return run


def compiled(topology: str, function: Callable[..., Any], types: Any, family: Any = None) -> Any:
    """The program for one chip."""
    import contextlib

    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jax_native_flash_attn._kernels import select

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = NamedSharding(Mesh(np.array(devices).reshape(-1)[:1], ("x",)), PartitionSpec())
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), types)
    with contextlib.nullcontext() if family is None else select.replacing(family):
        return jax.jit(function).trace(*types).lower(lowering_platforms=("tpu",)).compile()


def counts(folder: Path, tiles: int) -> Iterator[Counts]:
    """Of the kernels that libtpu has dumped into a folder; `tiles` in a stretch."""
    for file in sorted(folder.glob("*-final_bundles.txt")):
        kernel = re.sub(r"^\d+-|-\d+-final_bundles.txt$", "", file.name)
        utilization = next(folder.glob(f"{file.name.split('-')[0]}-*final_hlo-static-per-bundle-utilization.txt"), None)
        if "schedule" in kernel or utilization is None or not re.search("flash|splash", kernel):
            continue
        text = file.read_text()
        bundles = re.findall(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})?: (>* *)", text, re.MULTILINE)
        labels = [int(x, 16) for x in re.findall(r"^ *(0x[0-9a-f]+) +[A-Z]{2}:", text, re.MULTILINE)]
        length = 1 + int(bundles[-1][0], 16)
        inner = [int(number, 16) for number, depth in bundles if depth.startswith(">>")]
        stretches = zip([0, *labels], [*labels, length], strict=True)
        start, stop = (inner[0], inner[-1] + 1) if inner else max(stretches, key=lambda x: x[1] - x[0])
        lines = utilization.read_text().splitlines()
        units = next(line for line in lines if line.startswith("MXU")).split(", ")
        numbers = [line.split() for line in lines if re.fullmatch(r"[\d ]+", line) and len(line.split()) == len(units)]
        rows = [[int(x) for x in row] for row in numbers][-length:]
        sums = {unit: sum(row[i] for row in rows[start:stop]) / tiles for i, unit in enumerate(units)}
        yield Counts(kernel, (stop - start) / tiles, length, sums)


def in_child(topology: str, name: str) -> str:
    """What a process of its own prints, with libtpu's dumps on."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        others = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        command = [sys.executable, __file__, "child", "--topology", topology, "--names", name, "--folder", folder]
        done = subprocess.run(
            command, env=os.environ | others | {"LIBTPU_INIT_ARGS": flags}, capture_output=True, text=True
        )
        return done.stdout or f"failed: {done.stderr.strip().splitlines()[-1:]}\n"


def child(topology: str, name: str, folder: Path) -> None:
    program = splash() if name == "splash" else ours(name)
    compiled(topology, program.function, program.types, program.family)
    for x in counts(folder, max(program.tiles, 1)):
        shown = " ".join(f"{unit} {n:.0f}" for unit, n in x.units.items() if n)
        print(f"{topology} {name} {x.kernel}: {x.bundles:.0f} bundles for a tile, {x.whole} in all; {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bundles", "child"))
    parser.add_argument("--topology", nargs="*", default=TOPOLOGIES)
    parser.add_argument("--names", nargs="*", default=["splash", "512,512,2048,512,2"], help="splash, or blocks")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "child":
        return child(options.topology[0], options.names[0], Path(options.folder))
    for topology in options.topology:
        for name in options.names:
            print(in_child(topology, name), end="", flush=True)
    return None


if __name__ == "__main__":
    main()
