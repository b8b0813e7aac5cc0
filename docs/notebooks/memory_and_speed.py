# %% [markdown]
# # Memory and speed over length
#
# Value and gradient of causal attention, compiled for this machine's CPU, with `jax.nn`
# beside it. Memory is what XLA says that it allocates besides arguments and results.
# Nothing has to run for that. Times are the better of two runs on the machine that
# built this page: look at how they grow, not at the milliseconds.

# %%
import time

import jax
import matplotlib.pyplot as plt
from jax_native_flash_attn import flash_attention

N, H = 4, 64
LENGTHS = (256, 512, 1024, 2048, 4096)
NAMES = {"flash_attention": flash_attention, "jax.nn": jax.nn.dot_product_attention}


def compiled(attention, length):
    """Value and gradient for one sequence of this length."""

    def loss(query, key, value):
        return attention(query, key, value, is_causal=True).sum()

    x = jax.ShapeDtypeStruct((1, length, N, H), "float32")
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(x, x, x).compile()


programs = {
    (name, length): compiled(f, length)
    for name, f in NAMES.items()
    for length in LENGTHS
}

# %% [markdown]
# ## Memory
#
# `jax.nn` keeps arrays of length x length: twice the length takes four times the
# memory. Here there are tiles, whose size has a limit, and a few arrays of the size of
# the arguments.

# %%
memory = {
    at: program.memory_analysis().temp_size_in_bytes / 2**20
    for at, program in programs.items()
}
print("length    flash_attention        jax.nn")
for length in LENGTHS:
    ours, theirs = (memory[name, length] for name in NAMES)
    print(f"{length:6} {ours:14.1f} MiB {theirs:9.1f} MiB")

# %% [markdown]
# ## Time


# %%
def milliseconds(program, length):
    """The better of two runs."""
    arrays = [*jax.random.normal(jax.random.key(0), (3, 1, length, N, H))]
    times = []
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


times = {at: milliseconds(program, at[1]) for at, program in programs.items()}

fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for ax, found, label in zip(
    axes, (memory, times), ("temporary memory, MiB", "time, ms"), strict=True
):
    for name, marker in zip(NAMES, "os", strict=True):
        ax.plot(
            LENGTHS,
            [found[name, length] for length in LENGTHS],
            marker=marker,
            label=name,
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("length")
    ax.set_title(label, fontsize=11)
    ax.grid(alpha=0.3)
    ax.legend()
plt.show()

# %% [markdown]
# ## Further
#
# - [What bounds the figures on a CPU](../benchmarks.md), with other shapes and dtypes.
# - [On GPUs](../benchmarks_gpu.md), beside cuDNN and tokamax.
# - `explain(..., compiles=True)` prints the memory of a call of yours.
