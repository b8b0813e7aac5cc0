"""The command lines of all scripts: every option that two of them share is described here, once."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.implementations import HELP, REFERENCE, check_name
from harness.shapes import MODES, AttentionShape
from harness.suites import NAMED_SHAPES, find_shape

BOTH = "both"


class _Modes(argparse.Action):
    """Stores a tuple of modes; both is all of them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, MODES if BOTH in values else tuple(values))


def checked(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """`convert` with the error that argparse shows to the user."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return converted


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(f"must be positive, got {text}")
    return int(text)


# By the name of the result: the option's flags, if not just that name, and its settings.
_OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "shapes": (
        (),
        {
            "nargs": "+",
            "type": checked(find_shape),
            "metavar": "SHAPE",
            "help": "named shapes, BxTxNxH, BxT/SxN/KxH or B,T,S,N,K,H; --list-shapes prints the names",
        },
    ),
    "modes": (("--mode", "--modes"), {"nargs": "+", "choices": (*MODES, BOTH), "action": _Modes}),
    "implementations": ((), {"nargs": "+", "type": checked(check_name), "metavar": "NAME", "help": HELP}),
    "dtype": ((), {"choices": ("float32", "bfloat16", "float16", "float64")}),
    "repeats": ((), {"type": checked(_positive), "help": "rounds of calls, in place of --time-per-case"}),
    "max_repeats": (("--max-repeats", "--repeats"), {"type": checked(_positive), "help": "rounds of calls at most"}),
    "time_per_case": (
        ("--time-per-case", "--seconds"),
        {
            "type": float,
            "metavar": "SECONDS",
            "help": "time for the samples of one case, at least three rounds (default: %(default)s)",
        },
    ),
    "time_budget": ((), {"type": float, "metavar": "SECONDS", "help": "for everything: start no further case then"}),
    "max_dense_gib": (
        (),
        {
            "type": float,
            "metavar": "GIB",
            "help": f"skip {REFERENCE} where its dense code needs more (default: %(default)s)",
        },
    ),
    "seed": ((), {"type": int, "help": "of the random numbers"}),
    "goals": ((), {"action": "store_true", "help": "say whether ours meets its goals"}),
    "json": ((), {"type": Path, "metavar": "FILE", "help": "write all figures"}),
    "plot": ((), {"type": Path, "metavar": "FILE.png", "help": "draw what is measured"}),
    "plot_lengths": ((), {"nargs": "+", "type": checked(_positive), "metavar": "T"}),
}


def command_line(description: str | None, required: Sequence[str] = (), **defaults: Any) -> argparse.ArgumentParser:
    """A parser that begins with the module's text and has the shared options that `defaults` names.

    Where there is no `time_budget` for everything, that flag is another name of `time_per_case`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (*required, *defaults):
        flags, settings = _OPTIONS[name]
        flags = flags or (f"--{name.replace('_', '-')}",)
        if name == "time_per_case" and "time_budget" not in defaults:
            flags += ("--time-budget",)
        presence: dict[str, Any] = {"required": True} if name in required else {"default": defaults[name]}
        parser.add_argument(*flags, dest=name, **settings, **presence)
    if "shapes" in (*required, *defaults):
        parser.add_argument("--list-shapes", action="version", version="\n".join(NAMED_SHAPES), help="and stop")
    return parser


def chosen_cases(options: argparse.Namespace) -> list[tuple[AttentionShape, str]]:
    """Every shape in every mode asked for, as far as the shape has it."""
    return [(shape, mode) for shape in options.shapes for mode in options.modes if mode in shape.modes]
