"""Runs many generated calls against the oracle: `python -m tests.parity.run_generated --cases 2000 --seed 0`.

With `--derivatives`, forward mode and forward over reverse too. With `--pairs`, each feature and each pair of them.
"""

import argparse
import collections
import sys
import time

from tests.support import environment

environment.configure()

import hypothesis  # noqa: E402  (nothing may come before configure())
import jax  # noqa: E402
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from tests.support.cases import (  # noqa: E402
    DTYPES,
    FAST_COMPILATION,
    NEW_FEATURES,
    SHAPES,
    Case,
    cases,
    check_case,
    feature_pairs,
    features,
)
from tests.support.oracle import Accuracy  # noqa: E402
from tests.support.transformations import check_transformation, in_float64  # noqa: E402


def _quantile(values: np.ndarray, q: float) -> float:
    return float(np.sort(values)[int(q * (len(values) - 1))])  # np.quantile makes NaN of inf


def main() -> int:
    """Checks the cases, prints a summary, and returns the number of failures (at most 1)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="repeatable; default all")
    parser.add_argument("--derivatives", action="store_true", help="also jvp and hvp of each case, in float64")
    parser.add_argument("--pairs", action="store_true", help="each feature and each pair, not generated cases")
    parser.add_argument("--optimize", action="store_true", help="with LLVM's optimizations: five times slower")
    arguments = parser.parse_args()
    compiler_options = None if arguments.optimize else FAST_COMPILATION

    accuracies: dict[str, list[tuple[Accuracy, Case]]] = collections.defaultdict(list)
    failures: list[tuple[Case, str]] = []
    checked, seeds = 0, set()
    progress = tqdm(total=arguments.cases, unit="case")
    start = time.monotonic()

    @hypothesis.seed(arguments.seed)
    @hypothesis.settings(
        max_examples=20 * arguments.cases,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.large_base_example],
    )
    @hypothesis.given(cases(tuple(arguments.dtype or DTYPES)))
    def check(case: Case) -> None:
        # A failure is noted rather than raised, so that one bug does not hide the others.
        nonlocal checked
        if checked == arguments.cases or case.seed in seeds:
            return  # hypothesis also draws variations of earlier cases: spend the time on new ones
        seeds.add(case.seed)
        run(case)

    def run(case: Case) -> None:
        nonlocal checked
        try:
            for name, accuracy in check_case(case, compiler_options=compiler_options).items():
                accuracies[name].append((accuracy, case))
            if arguments.derivatives:
                for name in ("jvp", "forward over reverse"):
                    check_transformation(name, in_float64(case))
        except Exception as error:
            failures.append((case, f"{type(error).__name__}: {error}".splitlines()[0]))
            tqdm.write(f"FAILED {case}\n    {failures[-1][1]}")
        checked += 1
        progress.update()
        progress.set_postfix(failures=len(failures))
        if checked % 250 == 0:
            jax.clear_caches()  # every case compiles its own programs: give their memory back

    if arguments.pairs:
        names = [*((name,) for name in NEW_FEATURES), *feature_pairs()]
        pairs = [Case(SHAPES["small"], dtype, **features(*x)) for x in names for dtype in arguments.dtype or DTYPES]
        progress.reset(total=len(pairs))
        for case in pairs:
            run(case)
    else:
        check()
    progress.close()

    print(f"\nJAX {jax.__version__}, seed {arguments.seed}: {checked} cases, {len(failures)} failures,")
    print(f"{time.monotonic() - start:.0f} s. Error against float64, in units of the error of dense")
    print("attention in the same dtype: alone, and with the noise floor added (at most 2 passes).\n")
    print(f"{'':17} |{'/ dense':^16}| {'/ (dense + floor)':^23} |")
    print(f"{'result':10} {'cases':>6} | {'median':>6} {'90%':>7} | {'median':>7} {'99%':>7} {'worst':>7} | worst case")
    for name, entries in accuracies.items():
        ratios = np.array([accuracy.ratio for accuracy, _ in entries])
        alone = np.array([accuracy.dense_ratio for accuracy, case in entries if case.dtype != "float64"])
        alone = alone if alone.size else np.array([np.nan])  # float64: dense and oracle are the same
        worst = entries[int(ratios.argmax())][1]
        print(
            f"{name:10} {len(entries):6} | {np.median(alone):6.2f} {_quantile(alone, 0.9):7.2f} | "
            f"{np.median(ratios):7.2f} {_quantile(ratios, 0.99):7.2f} {ratios.max():7.2f} | "
            f"{worst.dtype} {worst.shape} seed={worst.seed}"
        )
    for case, message in failures[:20]:
        print(f"\n{message}\n    check_case({case})")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
