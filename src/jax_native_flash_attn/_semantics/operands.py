"""What is known of each array by its name: the axes of each, and whether it has a derivative."""

from typing import NamedTuple


class Operand(NamedTuple):
    """What is known of an array by its name.

    Attributes:
      axes: a letter for each; B is the axis of the batch, or of a kernel several (an axis for each enclosing `vmap`).
        B, N and K may be sharded, and T and S together, around a ring.
      is_differentiable: whether it has a gradient.
    """

    axes: str
    is_differentiable: bool = False


class _Operands(dict[str, Operand]):
    def __missing__(self, name: str) -> Operand:
        """Of an argument of `score_mod` or `mask_mod`: argument.number.axes, as `trace_mod` names it."""
        argument, _, axes = name.split(".")
        return self.setdefault(name, Operand(f"B{axes}", is_differentiable=argument == "score_mod_args"))


class _Layouts(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return self.setdefault(name, OPERANDS[name].axes.removeprefix("B"))


# Every array, of the public functions' arguments, of the kernels' and of their results; a derivative is as its primal.
OPERANDS = _Operands(
    {
        "query": Operand("BTNH", is_differentiable=True),
        "key": Operand("BSKH", is_differentiable=True),
        "value": Operand("BSKD", is_differentiable=True),
        "scale": Operand("B", is_differentiable=True),
        "bias": Operand("BNTS", is_differentiable=True),
        # Masks as they are given, ...
        "mask": Operand("BNTS"),
        "traced_window": Operand("W"),
        "query_lengths": Operand("B"),
        "key_value_lengths": Operand("B"),
        "query_segment_ids": Operand("BT"),
        "key_value_segment_ids": Operand("BS"),
        "query_positions": Operand("BT"),
        "key_value_positions": Operand("BS"),
        "query_offset": Operand("B"),
        # ... and as kernels get them: see `MaskOperands`.
        "key_start": Operand("BNT"),
        "key_stop": Operand("BNT"),
        "allowed": Operand("BNTS"),
        "dead": Operand("BNT"),
        "key_value_length": Operand("B"),
        "shift": Operand("B"),
        "query_ids": Operand("BNTS"),
        "key_ids": Operand("BNTS"),
        "lowest_position": Operand("BNTS"),
        "highest_position": Operand("BNTS"),
        "key_positions": Operand("BNTS"),
        "is_exact": Operand("BNT"),
        "row_start": Operand("BNW"),
        "row_stop": Operand("BNW"),
        "row_bounds": Operand("BNWW"),
        "tile_classes": Operand("BNWW"),
        "row_has_key": Operand("BNT"),
        "sinks": Operand("BN", is_differentiable=True),
        "dropout_key": Operand("BW"),
        "head_index": Operand("BN"),
        "batch_number": Operand("B"),
        "head_number": Operand("BN"),
        "query_number": Operand("BT"),
        "key_number": Operand("BS"),
        # Results.
        "out": Operand("BTND"),
        "lse": Operand("BNT"),
        "max_logits": Operand("BNT"),
        "share": Operand("BNT"),  # the sum of the weights of some keys
    }
)

# Axes behind the batch axes.
LAYOUTS = _Layouts()
