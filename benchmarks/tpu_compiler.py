"""What a TPU would execute, seen without one: libtpu compiles ahead of time for any generation, and says what it made.

    python benchmarks/tpu_compiler.py shapes                    # 40 calls, with gradients: do they compile?
    python benchmarks/tpu_compiler.py bundles                   # for a tile of 512 x 512, beside JAX's splash attention
    python benchmarks/tpu_compiler.py bundles --names 512,256,2048,512,4 --topology v6e:2x2

It needs `jax[tpu]`, whose libtpu runs on a machine without a TPU. Nothing is executed. A bundle is a cycle of one core,
stalls and waits for memory aside. The schedule comes from libtpu's dump of each kernel.
"""

import argparse
import contextlib
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
# No machine with a TPU is asked, and several processes may compile.
OTHERS = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
TILE, HEAD_DIM, LENGTH = 512, 128, 8192


class Program(NamedTuple):
    """Forward and gradients of a call, what its kernels are called in libtpu's files, and tiles of their loop."""

    function: Callable[..., Any]
    types: tuple[Any, ...]
    family: Any
    tiles: int


class Counts(NamedTuple):
    """Of a kernel, for each tile: of an inner loop or, without one, of its longest stretch without a branch.

    A forward that tries to go without the maximum of rows has a loop for that, and then one with it.
    """

    kernel: str
    bundles: float
    whole: int
    units: dict[str, float]


def ours(blocks: str) -> Program:
    """A call without a mask; `blocks` are the numbers of `Blocks`."""
    import jax
    import jax.numpy as jnp

    from jax_native_flash_attn import flash_attention
    from jax_native_flash_attn._kernels.tpu.blocks import Blocks
    from jax_native_flash_attn._kernels.tpu.plan import BackwardBlocks
    from jax_native_flash_attn._kernels.tpu.support import TpuKernels

    x = jax.ShapeDtypeStruct((1, LENGTH, 2, HEAD_DIM), jnp.bfloat16)
    # (The sixth is 0 for no parts.)
    resident, tile, streamed, unit, unrolled, part, tries = [*map(int, blocks.split(",")), 0, 0][:7]
    same = Blocks(resident, tile, streamed, unit, unrolled, part or None, bool(tries))
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
    sizes: Any = kernel.BlockSizes(*(TILE,) * 8)  # pyright: ignore[reportArgumentType]
    call: Any = kernel.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    return Program(_gradients(call), (x,) * 4, None, 1)


def tokamax() -> Program:
    """Its own kernels: a forward, and one that computes all three gradients."""
    import jax
    import jax.numpy as jnp
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore[reportMissingImports]
        splash_attention_kernel as kernel,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore[reportMissingImports]
        splash_attention_mask as masks,
    )

    x = jax.ShapeDtypeStruct((2, LENGTH, HEAD_DIM), jnp.bfloat16)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv")
    config = kernel.SplashConfig(**dict.fromkeys(names, TILE))
    call = kernel.make_splash_mha_single_device(masks.FullMask((LENGTH, LENGTH)), config=config)
    return Program(_gradients(call), (x,) * 4, None, 1)


def _gradients(attention: Callable[..., Any]) -> Callable[..., Any]:
    def run(query: Any, key: Any, value: Any, dout: Any) -> Any:
        import jax

        out, pullback = jax.vjp(attention, query, key, value)
        return out, pullback(dout)

    return run


def mesh(topology: str) -> Any:
    """Of one chip."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices).reshape(-1)[:1], ("x",))


def compiled(topology: str, function: Callable[..., Any], types: Any, family: Any = None) -> Any:
    """The program for one chip."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from jax_native_flash_attn._kernels import select

    sharding = NamedSharding(mesh(topology), PartitionSpec())
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), types)
    with contextlib.nullcontext() if family is None else select.replacing(family):
        return jax.jit(function).trace(*types).lower(lowering_platforms=("tpu",)).compile()


def shapes() -> dict[str, Program]:
    """Calls by name, with gradients of all that has one: lengths, head dimensions, masks, dtypes."""
    import jax
    import jax.numpy as jnp

    from jax_native_flash_attn import flash_attention

    found: dict[str, Program] = {}

    def add(name: str, B: int, T: int, S: int, heads: tuple[int, int], H: int, /, **options: Any) -> None:
        dtype, D = jnp.dtype(options.pop("dtype", "bfloat16")), options.pop("D", H)
        N, K = heads
        axes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, D)}
        floats = {key: jax.ShapeDtypeStruct(shape, dtype) for key, shape in axes.items()}
        static = {key: x for key, x in options.items() if not isinstance(x, jax.ShapeDtypeStruct)}
        others = {key: x for key, x in options.items() if key not in static}
        floats |= {key: others.pop(key) for key in ("bias", "sinks") if key in others}
        dout = jax.ShapeDtypeStruct((B, T, N, D), dtype)

        def run(floats: Any, others: Any, dout: Any) -> Any:
            out, pullback = jax.vjp(
                lambda x: flash_attention(**x, **others, **static, implementation="mosaic_tpu"), floats
            )
            return out, pullback(dout)

        found[name] = Program(run, (floats, others, dout), None, 0)

    def integers(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def reals(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def booleans(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bool_)

    for H in (16, 40, 64, 72, 80, 96, 128, 144, 160, 192, 256):
        add(f"H {H}, causal", 1, 1024, 1024, (2, 2), H, is_causal=True)
    add("H 192, D 128", 1, 1024, 1024, (2, 2), 192, D=128, is_causal=True)
    add("H 64, D 256", 1, 1024, 1024, (2, 2), 64, D=256)
    for T, S in ((1, 4096), (5, 300), (100, 100), (1001, 777), (777, 4000), (4096, 1)):
        add(f"T {T}, S {S}", 2, T, S, (2, 2), 128)
    add("no mask", 1, 4096, 4096, (2, 2), 128)
    add("GQA", 1, 2048, 2048, (8, 2), 128, is_causal=True)
    add("MQA", 1, 2048, 2048, (8, 1), 64, is_causal=True)
    add("window", 1, 4096, 4096, (2, 2), 128, local_window_size=(512, 0))
    add("float32", 1, 1024, 1024, (2, 2), 64, is_causal=True, dtype="float32")
    add("float32, 256, highest", 1, 1000, 1000, (2, 2), 256, dtype="float32", precision="highest")
    lengths = {"query_seq_lengths": integers(2), "key_value_seq_lengths": integers(2)}
    add("lengths", 2, 1000, 1000, (2, 2), 128, **lengths)
    add("lengths, causal, float32", 2, 1024, 1024, (2, 2), 128, is_causal=True, dtype="float32", **lengths)
    add("offset", 2, 256, 2048, (4, 2), 128, is_causal=True, query_offset=integers(2))
    ids = {"query_segment_ids": integers(2, 1024), "key_value_segment_ids": integers(2, 1024)}
    add("segments", 2, 1024, 1024, (2, 2), 128, is_causal=True, **ids)
    positions = {"query_positions": integers(2, 1000), "key_value_positions": integers(2, 1000)}
    add("positions", 2, 1000, 1000, (2, 2), 64, is_causal=True, **positions)
    add("mask", 2, 1000, 1000, (2, 2), 128, mask=booleans(2, 2, 1000, 1000))
    add("mask of keys", 2, 1024, 1024, (2, 2), 64, mask=booleans(2, 1, 1, 1024), is_causal=True)
    add("mask of rows", 2, 1024, 1024, (2, 2), 64, mask=booleans(2, 1, 1024, 1))
    add("bias", 2, 1000, 1000, (2, 2), 64, bias=reals(2, 2, 1000, 1000, dtype=jnp.bfloat16))
    add("bias of all, float32", 2, 1024, 1024, (2, 2), 128, bias=reals(1, 1, 1024, 1024))
    add("bias of keys", 2, 1000, 1000, (2, 2), 64, bias=reals(1, 2, 1, 1000))
    add("bias of rows", 2, 1000, 1000, (2, 2), 64, bias=reals(1, 1, 1000, 1))
    add("soft cap, sinks", 2, 1024, 1024, (2, 2), 128, logits_soft_cap=30.0, sinks=reals(2))
    dropout = {"dropout_rate": 0.1, "dropout_rng": jax.ShapeDtypeStruct((2,), jnp.uint32)}
    add("dropout", 2, 1000, 1000, (2, 2), 64, is_causal=True, **dropout)
    add("dropout, bias, mask", 1, 1024, 1024, (2, 2), 128, bias=reals(1, 2, 1024, 1024), mask=booleans(1, 1, 1, 1024))
    return found


def check_shape(topology: str, name: str) -> str:
    """Compiles a call with the tile shapes of that chip: its kernels, and temporary memory outside of them, in MiB."""
    from jax_native_flash_attn._kernels.tpu.support import TpuKernels

    program = shapes()[name]
    # ('v7' of 'tpu7x:2x2x1'.)
    family = TpuKernels(generation=re.sub(r"\D*(\d+).*", r"v\1", topology))
    text = compiled(topology, program.function, program.types, family)
    kernels = (text.as_text() or "").count("tpu_custom_call")
    return f"{kernels} kernels, {text.memory_analysis().temp_size_in_bytes / 2**20:.2f} MiB beside them"


def counts(folder: Path, tiles: int) -> Iterator[Counts]:
    """Of the loops of kernels that libtpu has dumped into a folder; `tiles` in a stretch."""
    for file in sorted(folder.glob("*-final_bundles.txt")):
        kernel = re.sub(r"^\d+-|-\d+-final_bundles.txt$", "", file.name)
        utilization = next(folder.glob(f"{file.name.split('-')[0]}-*final_hlo-static-per-bundle-utilization.txt"), None)
        if "schedule" in kernel or utilization is None or not re.search("flash|splash", kernel):
            continue
        text = file.read_text()
        bundles = re.findall(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})?: (>* *)", text, re.MULTILINE)
        labels = [int(x, 16) for x in re.findall(r"^ *(0x[0-9a-f]+) +[A-Z]{2}:", text, re.MULTILINE)]
        length = 1 + int(bundles[-1][0], 16)
        loops: list[tuple[int, int]] = []
        for at in (int(number, 16) for number, depth in bundles if depth.startswith(">>")):
            # (What lies between the ends of a loop is not all marked.)
            is_new = not loops or at > loops[-1][1] + 16
            loops = [*loops, (at, at + 1)] if is_new else [*loops[:-1], (loops[-1][0], at + 1)]
        longest = max(zip([0, *labels], [*labels, length], strict=True), key=lambda x: x[1] - x[0])
        lines = utilization.read_text().splitlines()
        units = next(line for line in lines if line.startswith("MXU")).split(", ")
        numbers = [line.split() for line in lines if re.fullmatch(r"[\d ]+", line) and len(line.split()) == len(units)]
        rows = [[int(x) for x in row] for row in numbers][-length:]
        for start, stop in loops or [longest]:
            sums = {unit: sum(row[i] for row in rows[start:stop]) / tiles for i, unit in enumerate(units)}
            yield Counts(kernel, (stop - start) / tiles, length, sums)


def in_child(topology: str, name: str) -> str:
    """What a process of its own prints, with libtpu's dumps on."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        command = [sys.executable, __file__, "child", "--topology", topology, "--names", name, "--folder", folder]
        done = subprocess.run(
            command, env=os.environ | OTHERS | {"LIBTPU_INIT_ARGS": flags}, capture_output=True, text=True
        )
        return done.stdout or f"failed: {done.stderr.strip().splitlines()[-1:]}\n"


def child(topology: str, name: str, folder: Path) -> None:
    import jax

    program = {"splash": splash, "tokamax": tokamax}.get(name, functools.partial(ours, name))()
    # (Tokamax asks it which chip it is.)
    with (
        jax.sharding.use_abstract_mesh(mesh(topology).abstract_mesh) if name == "tokamax" else contextlib.nullcontext()
    ):
        compiled(topology, program.function, program.types, program.family)
    for x in counts(folder, max(program.tiles, 1)):
        shown = " ".join(f"{unit} {n:.0f}" for unit, n in x.units.items() if n)
        print(f"{topology} {name} {x.kernel}: {x.bundles:.0f} bundles for a tile, {x.whole} in all; {shown}")


def compile_shapes(topologies: list[str], names: list[str] | None) -> None:
    os.environ |= OTHERS
    failed = 0
    for topology in topologies:
        for name in names or shapes():
            try:
                print(f"{topology} {name}: {check_shape(topology, name)}", flush=True)
            except Exception as error:  # whatever the compiler says
                failed += 1
                print(f"{topology} {name}: failed: {str(error)[:500]}", flush=True)
    sys.exit(failed > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bundles", "shapes", "child"))
    parser.add_argument("--topology", nargs="*", default=TOPOLOGIES)
    parser.add_argument("--names", nargs="*", help="splash, tokamax, or blocks; of shapes, some of them")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "child":
        return child(options.topology[0], options.names[0], Path(options.folder))
    if options.what == "shapes":
        return compile_shapes(options.topology, options.names)
    for topology in options.topology:
        for name in options.names or ["splash", "512,512,2048,512,2"]:
            print(in_child(topology, name), end="", flush=True)
    return None


if __name__ == "__main__":
    main()
