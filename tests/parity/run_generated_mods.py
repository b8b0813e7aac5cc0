"""Random expressions as `score_mod` and `mask_mod` against dense attention in float64.

    python -m tests.parity.run_generated_mods --cases 200 --seed 0
    python -m tests.parity.run_generated_mods --cases 200 --seed 0 --hopper

In float64: value, gradients of all arrays and arguments, a tangent, and the tangent of the gradients.
With `--hopper`, on a GPU: value and gradients of query, key and value in 16 bits, at most twice as far off as dense
attention in that dtype, of the functions that the Hopper kernels take.
"""

import argparse
import collections
import random
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.support import environment

environment.configure()

import jax  # noqa: E402  (nothing may come before configure())
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from tests.support import hopper_mods, mods  # noqa: E402
from tests.support.hopper_mods import ModCall  # noqa: E402
from tests.support.mods import ModCase  # noqa: E402

# Of numbers, each smooth, or with a corner where no case is.
_UNARY = (
    "jnp.tanh({})",
    "jnp.sin({})",
    "jnp.exp(-jnp.square({}))",
    "jnp.sqrt(1 + jnp.square({}))",
    "jax.nn.softplus({})",
)
_BINARY = ("({} + {})", "({} - {})", "({} * {})", "({} / (2 + jnp.square({})))")
_LEAVES = (
    "score",
    "score",
    "score",
    "slopes[h]",
    "table[h, q - k + S - 1]",
    "table[0, jnp.clip(k - q, 0, 5)]",
    "gate[b, k]",
    "rows[q]",
    "((q - k).astype(score.dtype) / 8)",
    "(q * 0.1)",
    "0.7",
)
_CONDITIONS = (
    "k <= q",
    "q - k < 5",
    "(q + k) % 3 == 0",
    "k >= h",
    "b == 0",
    "(q // 4) == (k // 4)",
    "k > 2 * q",
    "k < 9",
)


def _expression(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(_LEAVES)
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(_UNARY).format(_expression(rng, depth - 1))
    if kind < 0.45:
        return f"jnp.where({_condition(rng, 1)}, {_expression(rng, depth - 1)}, {_expression(rng, depth - 1)})"
    return rng.choice(_BINARY).format(_expression(rng, depth - 1), _expression(rng, depth - 1))


def _condition(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.3:
        return f"({rng.choice(_CONDITIONS)})"
    if rng.random() < 0.2:
        return f"~{_condition(rng, depth - 1)}"
    return f"({_condition(rng, depth - 1)} {rng.choice('&|')} {_condition(rng, depth - 1)})"


class Generated(NamedTuple):
    """Functions, their arguments and what stands beside them; `words` says it."""

    score_mod: Callable[..., Any]
    mask_mod: Callable[..., Any] | None
    args: tuple[np.ndarray, ...]
    options: dict[str, Any]
    tiles: dict[str, int | None]
    words: str


def generated(rng: random.Random, numbers: np.random.Generator, shape: tuple[int, int, int, int]) -> Generated:
    """For calls of B, N, T, S."""
    B, N, T, S = shape

    def function(parameters: str, expression: str) -> Callable[..., Any]:
        return eval(f"lambda {parameters}: {expression}", {"jnp": jnp, "jax": jax, "S": S})

    score = f"score + {_expression(rng, 3)}"
    shapes = {"slopes": (N,), "table": (N, T + S), "gate": (B, S), "rows": (T,)}
    args = tuple(0.5 * numbers.standard_normal(shape) for shape in shapes.values())
    mask = _condition(rng, 2) if rng.random() < 0.6 else None
    options: dict[str, Any] = {"logits_soft_cap": 2.5} if rng.random() < 0.3 else {}
    tiles = {"block_q": rng.choice((None, 4, 8)), "block_kv": rng.choice((None, 4, 8))}
    if rng.random() < 0.3:
        options["is_causal"] = True
    return Generated(
        function(f"score, b, h, q, k, {', '.join(shapes)}", score),
        None if mask is None else function("b, h, q, k", mask),
        args,
        options,
        tiles,
        f"score {score}; mask {mask}; {options}",
    )


def in_float64(seed: int) -> tuple[str, Callable[[], str]]:
    """What the call is, and its check, which says how it ended."""
    rng = random.Random(seed)
    made = generated(rng, np.random.default_rng(seed), (mods.B, mods.N, mods.T, mods.S))
    masks = (lambda b, h, q, k: k <= q) if "is_causal" in made.options else None
    case = ModCase(made.score_mod, made.mask_mod, score_args=made.args, options=made.options, masks=masks)

    def check() -> str:
        with environment.enable_x64():
            mods.check(case, **made.tiles)
        return "passed"

    return f"{made.words}; {made.tiles}", check


def in_16_bits(seed: int) -> tuple[str, Callable[[], str]]:
    """The same of a call for Hopper kernels."""
    rng = random.Random(seed)
    shape = (hopper_mods.B, hopper_mods.N, hopper_mods.T, hopper_mods.S)
    made = generated(rng, np.random.default_rng(seed), shape)
    args = tuple(x.astype(np.float32) for x in made.args)
    options = {"score_mod": made.score_mod, "score_mod_args": args, "mask_mod": made.mask_mod, **made.options}
    call = ModCall(options, rng.choice(("bfloat16", "float16")), H=rng.choice((64, 128)))

    def check() -> str:
        if hopper_mods.family(call) != "mosaic_gpu":
            return "not taken"
        hopper_mods.check(call, "mosaic_gpu")
        return "passed"

    return f"{made.words}; {call.dtype}, H {call.H}", check


def main() -> int:
    """Checks the cases, prints those that fail, and returns whether any does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--hopper", action="store_true", help="in 16 bits, by the kernels that a GPU takes by default")
    arguments = parser.parse_args()
    start, outcomes = time.monotonic(), collections.Counter[str]()
    for seed in tqdm(range(arguments.seed, arguments.seed + arguments.cases), unit="case"):
        words, check = (in_16_bits if arguments.hopper else in_float64)(seed)
        try:
            with environment.lenient_promotion():
                outcomes[check()] += 1
        except Exception as error:
            outcomes["failed"] += 1
            tqdm.write(f"FAILED seed {seed}: {words}\n    {type(error).__name__}: {str(error).splitlines()[:6]}")
        if seed % 50 == 49:
            jax.clear_caches()
    print(f"JAX {jax.__version__}: {arguments.cases} cases, {dict(outcomes)}, {time.monotonic() - start:.0f} s")
    return int(outcomes["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
