"""Which of several equal forms of a kernel is taken on an accelerator: the one that XLA fuses best.

What XLA:GPU fuses was read off its optimised programs (docs/design.md has the list). On the CPU, in reverse mode
through a kernel and where XLA partitions a call, `is_active` is false and everything here with it, but that bounds of
the logits serve the CPU too.
"""

from dataclasses import dataclass

from ..._semantics.masks import Band, MaskOperands
from ..._semantics.sizes import Sizes, static_size
from ..protocol import Target
from .limits import Limits
from .loops import Nest
from .shapes import AcceleratorForm, TileShape


@dataclass(frozen=True)
class Forms:
    """Attributes:

    is_forward: of the forward kernel, not of a derivative.
    has_mask: a boolean mask.
    has_bias_or_dropout: further changes of single scores.
    is_bounded: bounds of the logits are known (`family.py`).
    summed_over_batch: a result of T * S elements is summed over batch rows.
    has_all_keys: see `Config`.
    """

    sizes: Sizes
    target: Target
    limits: Limits
    is_forward: bool
    has_mask: bool
    has_bias_or_dropout: bool
    needs_lse: bool
    is_bounded: bool
    summed_over_batch: bool
    has_all_keys: bool

    @property
    def is_elementwise(self) -> bool:
        """Whether something changes single scores; XLA:GPU fuses none of that into a product."""
        return self.has_mask or self.has_bias_or_dropout

    @property
    def is_active(self) -> bool:
        return self.target.platform != "cpu" and self._may_loop

    @property
    def _may_loop(self) -> bool:
        return not (self.target.is_reversed or self.target.is_sharded)

    @property
    def _num_scores(self) -> int:
        z = self.sizes
        return static_size(z.batch) * z.N * z.T * z.S

    @property
    def is_large(self) -> bool:
        return self._num_scores >= self.limits.accelerator_large

    @property
    def has_few_rows(self) -> bool:
        """Decoding: reading keys and values is what costs."""
        return self.is_active and self.is_forward and self.sizes.group_rows <= self.limits.few_rows

    @property
    def sums_values(self) -> bool:
        """Multiply and sum in place of a product, which wants its batch axes outermost: XLA would copy all values."""
        return self.has_few_rows and self.sizes.group_rows <= self.limits.fewest_rows

    def is_banded(self, band: Band, mask: MaskOperands) -> bool:
        """Whether tiles are empty often enough that several for a row are worth an online softmax."""
        is_banded = band != Band() or mask.key_start is not None
        if self.has_few_rows and not self.sums_values:
            return False
        if not self.is_active or band != Band() or mask.allowed is None:
            return is_banded
        # What a boolean mask leaves of a row may lie anywhere; if small, or alike in all rows, it empties no tile.
        is_small = self._num_scores <= self.limits.accelerator_scores
        return mask.key_value_length is not None or (mask.allowed.shape[-2] > 1 and not is_small)

    def tile_form(self, mask: MaskOperands) -> AcceleratorForm:
        is_split = not (self.is_forward or self.is_elementwise or mask.key_start is not None)
        return AcceleratorForm(
            varies_in_batch=self.is_active and mask.key_value_length is not None and len(self.sizes.batch) == 1,
            splits_rows=self.is_bounded or (self.is_large and is_split),
            reads_keys=self.has_few_rows,
            keeps_batch=self.summed_over_batch,
        )

    def fixes_layouts(self, tile: TileShape) -> bool:
        """Else XLA copies all of an operand into the layout that a product in a loop wants, and then slices of that."""
        is_sliced = self.has_few_rows or tile.batch != self.sizes.batch
        return self.is_active and self.target.fixes_layouts and is_sliced

    def makes_softmax_again(self, nest: Nest) -> bool:
        """Whether the cotangent kernel makes the softmax of whole rows again, and needs no log-sum-exp.

        XLA makes that softmax in one kernel, which reads the logits once. The log-sum-exp would be two more; if nothing
        reads it, XLA leaves it out.
        """
        has_rows = nest.visits_one_key_tile and self.has_all_keys
        return self.is_active and has_rows and (self.is_elementwise or not self.is_large)

    def normalizes(self, nest: Nest) -> bool:
        """Whether weights are divided by their sum before the product with the values: that same softmax."""
        return self.makes_softmax_again(nest) or (self.is_active and nest.visits_one_key_tile and not self.needs_lse)

    def passes_weights(self, tile: TileShape) -> bool:
        """Whether the weights enter a computation of their own as a parameter; see `cotangent.py`.

        It is skipped where cotangents are zero, of which the derivatives need not be.
        """
        scores = static_size(tile.batch) * self.sizes.G * tile.heads * tile.block_q * tile.block_kv
        return self.is_active and self.target.differentiated is None and scores >= self.limits.accelerator_large_tile

    def may_be_bounded(self, tile: TileShape, *, is_fused: bool) -> bool:
        """Whether a kernel that subtracts bounds of the logits is worth having beside the usual one.

        `is_fused`: XLA:CPU makes one kernel of the usual one's softmax and products, which a bound saves nothing of.
        """
        if self.has_bias_or_dropout or not self.is_forward:
            return False
        if self.is_active:
            return self.is_large and not (self.has_mask or self.has_few_rows or tile.follows_band)
        # For few rows the norms of the keys cost as much as what is saved; in a gradient that is little anyway.
        has_rows = self.sizes.group_rows > self.limits.few_rows and not self.needs_lse
        is_large = self._num_scores >= self.limits.cpu_large
        return self.target.platform == "cpu" and self._may_loop and has_rows and is_large and not is_fused
