#!/usr/bin/env bash
# JAX 0.10.2, XLA for NVIDIA GPUs: of two independent ppermutes, the first is hidden by nothing.
#
# Seen in November 2026, compiled for two H100s on a machine without a GPU.
#     two arrays: start, done, start, compute, done
#     one array: start, compute, done
#
# Why one guesses otherwise: collectives of JAX are asynchronous on GPUs, and the latency-hiding scheduler is on. Neither
# transfer depends on the other, nor on the matrix product beside them, so one expects both to run during it, as they
# would on two streams. But the scheduler has at most one of them under way at a time, and does not put work beside the
# first: it starts it, waits for it, and only then starts the second and the product. Ring attention sends a key and a
# value at each step, and loses half of the overlap, which no profile of one GPU shows. Sent as one array, all of it is
# hidden. (The flag --xla_gpu_experimental_parallel_collective_overlap_limit raises the limit for a whole program. JAX
# 0.11.2 did the same on two H200s. XLA of JAX 0.12.0.1 combines the two transfers by itself.)
set -euo pipefail
python=
for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "This needs Python 3.12 or newer; none was found." >&2; exit 2; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 \
  numpy==2.5.5
cat >"$folder/schedule.py" <<'EOF'
import re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } name: "NVIDIA H100" core_count: 132
  fpus_per_core: 128 threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072 device_address_bits: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100"
"""
topology = topologies.get_topology_desc("1x1x2", "cuda", target_config=H100, topology="1x1x2")
mesh = jax.sharding.Mesh(topology.devices[:2], ("ring",))
x = jax.ShapeDtypeStruct((2 * 8192, 8192), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("ring")))


def send(x):
    return jax.lax.ppermute(x, "ring", [(0, 1), (1, 0)])


def two_arrays(key, value, query):
    return send(key), send(value), query @ query


def one_array(key, value, query):
    return send(jnp.stack([key, value])), query @ query


def schedule(f, results):
    spec = PartitionSpec("ring")
    outs = (PartitionSpec(None, "ring"), spec) if results == 2 else (spec,) * 3
    program = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(spec,) * 3, out_specs=outs))
    text = program.trace(x, x, x).lower(lowering_platforms=("cuda",)).compile().as_text()
    found = []
    for line in text[text.index("\nENTRY"):].splitlines():
        if match := re.search(r"collective-permute-(start|done)\(", line):
            found.append(match[1])
        elif "dot_general" in line.split("=")[0]:
            found.append("compute")
    return found


two, one = schedule(two_arrays, 3), schedule(one_array, 2)
print("two arrays:", ", ".join(two))
print("one array:", ", ".join(one))
assert two == ["start", "done", "start", "compute", "done"], two
assert one == ["start", "compute", "done"], one
EOF
export JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 TF_CPP_MIN_LOG_LEVEL=3
"$folder/venv/bin/python" "$folder/schedule.py"
