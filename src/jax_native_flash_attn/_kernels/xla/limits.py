"""The sizes at which a pass takes another tile or form: one value, in place of which tuners and tests give others."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What `make_plan` compares a call with. `XlaKernels` has it.

    Attributes, in elements (query rows x keys, over all heads, unless said), of a tile on CPU:
      cpu_shared_forward, cpu_shared_derivative: that several heads share where one has fewer.
      cpu_operands: of query and key in such a tile, which then stay in a core's cache.
      cpu_whole_scores: of a whole problem in one tile, without loops, slices and writes into a larger array.
      cpu_whole_forward, cpu_whole_16_bits, cpu_whole_derivative: of query and key of such a problem; 16_bits: of a
        forward whose products take 16-bit operands.
      cpu_fused: of a plain softmax that XLA fuses with its products; its scratch then is 16 MiB.
      cpu_keys: of the keys, where few rows make reading them what costs.
      cpu_whole_keys: of all keys, up to which those that lie in the caches are read faster than copied by tiles.
      cpu_reverse: in reverse mode through a kernel.

    On an accelerator:
      accelerator_scores: of float32 scores; 1 GiB for each temporary.
      accelerator_keys: of the keys, where few rows make reading them what costs.
      accelerator_least: that hide the launches of its kernels.

    Of both:
      widest_band: keys of a row, for a tile that follows a band; 1024 and the diagonal.
      cpu_band_rows, accelerator_band_rows: rows of such a tile.
      heads: key/value heads of a tile, which then has one batch row; None leaves the choice.

    Of a call:
      few_rows: query rows of a key/value head, up to which reading keys and values is what costs.
      fewest_rows: likewise, up to which an accelerator multiplies and sums in place of a product with the values.
      cpu_large: scores, from which on bounds save the CPU more than compiling a second kernel costs.
      accelerator_large, accelerator_large_tile: scores of a call and of a tile, from which on a second tile, or a
        decision at run time (a wait for the host), is worth the passes over the scores that it saves.
    """

    cpu_shared_forward: int = 1 << 20
    cpu_shared_derivative: int = 1 << 21
    cpu_operands: int = 1 << 19
    cpu_whole_scores: int = 1 << 20
    cpu_whole_forward: int = 1 << 18
    cpu_whole_16_bits: int = 1 << 21
    cpu_whole_derivative: int = 1 << 22
    cpu_fused: int = 1 << 22
    cpu_keys: int = 1 << 19
    cpu_whole_keys: int = 1 << 21
    cpu_reverse: int = 1 << 22
    accelerator_scores: int = 1 << 28
    accelerator_keys: int = 1 << 28
    accelerator_least: int = 1 << 25
    widest_band: int = 1025
    cpu_band_rows: int = 256
    accelerator_band_rows: int = 1024
    heads: int | None = None
    few_rows: int = 63
    fewest_rows: int = 8
    cpu_large: int = 1 << 22
    accelerator_large: int = 1 << 26
    accelerator_large_tile: int = 1 << 25
