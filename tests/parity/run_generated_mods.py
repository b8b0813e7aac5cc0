"""Random expressions as `score_mod` and `mask_mod` against dense attention, in float64.

    python -m tests.parity.run_generated_mods --cases 200 --seed 0

Value, gradients of all arrays and arguments, a tangent, and the tangent of the gradients.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.support import environment

environment.configure()

import jax  # noqa: E402  (nothing may come before configure())
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from tests.support.mods import B, ModCase, N, S, T, check  # noqa: E402

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


def _function(parameters: str, expression: str) -> Callable:
    return eval(f"lambda {parameters}: {expression}", {"jnp": jnp, "jax": jax, "S": S})


def generated(seed: int) -> tuple[ModCase, dict[str, Any], str]:
    """A case, further options of the call, and what it says."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    score = f"score + {_expression(rng, 3)}"
    shapes = {"slopes": (N,), "table": (N, T + S), "gate": (B, S), "rows": (T,)}
    args = tuple(0.5 * numbers.standard_normal(shape) for shape in shapes.values())
    mask = _condition(rng, 2) if rng.random() < 0.6 else None
    options: dict[str, Any] = {}
    if rng.random() < 0.3:
        options["logits_soft_cap"] = 2.5
    tiles = {"block_q": rng.choice((None, 4, 8)), "block_kv": rng.choice((None, 4, 8))}
    is_causal = rng.random() < 0.3
    case = ModCase(
        _function(f"score, b, h, q, k, {', '.join(shapes)}", score),
        None if mask is None else _function("b, h, q, k", mask),
        score_args=args,
        options=options | ({"is_causal": True} if is_causal else {}),
        masks=_function("b, h, q, k", "k <= q") if is_causal else None,
    )
    return case, tiles, f"seed {seed}: score {score}; mask {mask}; {case.options}; {tiles}"


def main() -> int:
    """Checks the cases, prints those that fail, and returns whether any does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    arguments = parser.parse_args()
    failures, start = 0, time.monotonic()
    with environment.enable_x64(), environment.lenient_promotion():
        for seed in tqdm(range(arguments.seed, arguments.seed + arguments.cases), unit="case"):
            case, tiles, words = generated(seed)
            try:
                check(case, **tiles)
            except Exception as error:
                failures += 1
                tqdm.write(f"FAILED {words}\n    {type(error).__name__}: {str(error).strip().splitlines()[:6]}")
            if seed % 50 == 49:
                jax.clear_caches()
    print(f"JAX {jax.__version__}: {arguments.cases} cases, {failures} failures, {time.monotonic() - start:.0f} s")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
