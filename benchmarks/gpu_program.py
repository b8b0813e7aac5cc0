"""What XLA makes of a call on an H100, without one: kernels in order, with the bytes that each reads and writes.

python benchmarks/gpu_program.py --shapes gpu-2x8192x16x128 --implementations flash:pure_jax jax.nn --mode forward

Needs the CUDA plugin of JAX (`jax-cuda13-plugin`, `jax-cuda13-pjrt`, no CUDA libraries) and `ptxas`. On a GPU the
autotuner may take cuBLAS for a product; fusions are the same. Bytes of an operand that is sliced count in full.
"""

import re
from collections.abc import Sequence

import jax
from harness.implementations import jax_call
from harness.inputs import input_types
from harness.memory import temporary_bytes
from harness.options import chosen_cases, command_line
from harness.programs import computations
from harness.shapes import FORWARD
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# What XLA asks a device for; figures of NVIDIA's H100 SXM.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  device_address_bits: 64 ecc_enabled: true name: "NVIDIA H100" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100"
"""
_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}
_INSTRUCTION = re.compile(r"(?:ROOT )?%([\w.\-]+) = (\(.*?\)|[^ ]+) ([\w\-]+)\((.*)$")
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, ["shapes"], implementations=["flash:pure_jax", "jax.nn"], modes=(FORWARD,))
    parser.add_argument("--least-mib", type=float, default=1.0, help="leave out smaller kernels")
    options = parser.parse_args(argv)
    topology = topologies.get_topology_desc("1x1x1", "cuda", target_config=_H100, topology="1x1x1")
    sharding = SingleDeviceSharding(topology.devices[0])
    for shape, mode in chosen_cases(options):
        types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), input_types(shape))
        for name in options.implementations:
            traced = jax.jit(jax_call(name, shape, mode)).trace(types)
            compiled = traced.lower(lowering_platforms=("cuda",)).compile()
            temporary = (temporary_bytes(compiled) or 0) / 2**20
            print(f"\n{shape.name} {mode} {name}: {temporary:.0f} MiB of temporary memory")
            entry, found = computations(compiled.as_text() or "")
            _print_computation(entry, found, options.least_mib, "")


def _print_computation(name: str, computations: dict[str, list[str]], least_mib: float, indent: str) -> None:
    shapes: dict[str, str] = {}
    total = 0.0
    for line in computations[name]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        result, shape, operation, rest = match.groups()
        shapes[result] = shape
        if operation in _FREE:
            continue
        if operation in ("while", "conditional", "call"):
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
            print(f"{indent}{operation}" + (f", {trips.group(1)} times" if trips else ""))
            for called in _called(rest):
                _print_computation(called, computations, least_mib, indent + "    ")
            continue
        operands = [shapes.get(x, "") for x in re.findall(r"%([\w.\-]+)", rest.split("), ")[0])]
        mib = (_size(shape) + sum(map(_size, operands))) / 2**20
        total += mib
        if mib >= least_mib:
            kind = " ".join(re.findall(r'kind=k\w+|"kind":"\w+"|custom_call_target="[^"]*"', rest))
            operands = [x for x in operands if _size(x) >= least_mib * 2**17]
            print(f"{indent}{mib:9.1f} MiB  {result} {kind}  {_short(shape)} <- {' '.join(map(_short, operands))}")
    print(f"{indent}{total:9.0f} MiB in all")


def _called(rest: str) -> list[str]:
    called = re.findall(r"(?:body|to_apply|true_computation|false_computation)=%([\w.\-]+)", rest)
    branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
    return called + (re.findall(r"%([\w.\-]+)", branches.group(1)) if branches else [])


def _size(shape: str) -> int:
    total = 0
    for dtype, axes in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        size = _ITEM_BYTES.get(dtype, 0)
        for n in filter(None, axes.split(",")):
            size *= int(n)
        total += size
    return total


def _short(shape: str) -> str:
    return re.sub(r"\{[\d,:A-Z()]*\}", "", shape)


if __name__ == "__main__":
    main()
