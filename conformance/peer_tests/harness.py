"""Cases of other libraries' tests, run with `flash_attention`, and what came out.

The cases are written from what those tests ask: shapes, dtypes, arguments, tolerances. Nothing is copied. What a case
is compared with is computed in float64 by tests/support/oracle.py.
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_NATIVE_FLASH_ATTN_WARNINGS"] = "0"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jax_native_flash_attn import dropout_keep_mask, flash_attention  # noqa: E402
from tests.support import oracle  # noqa: E402
from tests.support.environment import fast_compilation  # noqa: E402

CaseRun = Callable[[], Any]


@dataclasses.dataclass
class Test:
    """One test of the other library, with one case for each set of its parameters."""

    name: str
    cases: list[CaseRun]
    differs: str = ""  # why some cases give something else here, if that is so


@dataclasses.dataclass
class Peer:
    name: str
    source: str  # the file and commit whose tests were read
    packages: tuple[str, ...]
    tests: list[Test]
    absent: Mapping[str, str]  # tests that were not written -> why

    def run(self) -> None:
        """Print the results as JSON. Arguments, if any, are the tests to run."""
        found = {}
        for test in self.tests:
            if sys.argv[1:] and test.name not in sys.argv[1:]:
                continue
            failures, expected = [], (ValueError, TypeError, NotImplementedError, AssertionError)
            explained = bool(test.differs)
            for number, case in enumerate(test.cases):
                try:
                    case()
                except Exception as error:
                    explained &= isinstance(error, expected)
                    failures.append(f"{number}: {type(error).__name__}: {str(error).strip()[:300]}")
            found[test.name] = {"cases": len(test.cases), "passed": len(test.cases) - len(failures)}
            if failures:
                found[test.name] |= {"differs": test.differs if explained else "not explained"}
            print(test.name, found[test.name], *failures[:3], file=sys.stderr, flush=True)
        versions = {name: importlib.metadata.version(name) for name in self.packages}
        cells = {"name": self.name, "versions": versions, "source": self.source, "cells": found, "absent": self.absent}
        print("\n" + json.dumps(cells))


def cases(function: Callable[..., Any], **axes: Iterable[Any]) -> list[CaseRun]:
    """A case for each combination of the values."""
    return [lambda c=c: function(**dict(zip(axes, c, strict=True))) for c in itertools.product(*axes.values())]


def pairs(function: Callable[..., Any], allowed: Callable[..., bool] | None = None, **axes: Any) -> list[CaseRun]:
    """Cases such that each value of each axis meets each value of each other axis, where `allowed`."""
    generator, names, chosen = random.Random(0), list(axes), []
    axes = {name: list(values) for name, values in axes.items()}

    def of(case: dict[str, int]) -> set[Any]:
        return set(itertools.combinations(sorted(case.items()), 2))

    def fits(case: dict[str, int]) -> bool:
        return allowed is None or allowed(**{name: axes[name][i] for name, i in case.items()})

    whole = (dict(zip(names, c, strict=True)) for c in itertools.product(*(range(len(axes[n])) for n in names)))
    left: set[Any] = set().union(*(of(case) for case in whole if fits(case)))
    while left:
        (a, i), (b, j) = min(left)
        tries = [{n: generator.randrange(len(axes[n])) for n in names} | {a: i, b: j} for _ in range(60)]
        best = max((case for case in tries if fits(case)), key=lambda case: len(of(case) & left))
        left -= of(best)
        chosen.append(best)
    return [lambda c=c: function(**{name: axes[name][i] for name, i in c.items()}) for c in chosen]


def normal(*shape: int, seed: int = 0, dtype: Any = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(jnp.dtype(dtype))


def inputs(query: tuple[int, ...], key: Any = None, D: int = 0, dtype: Any = "float32") -> list[np.ndarray]:
    """Query, key and value of these shapes; D features of the values."""
    key = key or query
    value = (*key[:-1], D) if D else key
    return [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate((query, key, value))]


def close(name: str, actual: Any, expected: Any, tolerance: tuple[float, float]) -> None:
    atol, rtol = tolerance
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol, atol, err_msg=name)


def raises(call: Callable[[], Any], words: str = "") -> None:
    try:
        call()
    except (ValueError, TypeError, NotImplementedError) as error:
        if words not in str(error):
            raise AssertionError(str(error)) from error
    else:
        raise AssertionError("no error")


def check(
    arrays: list[np.ndarray], bias: Any = None, mask: Any = None, *, out: tuple[float, float] = (1e-6, 1e-6),
    gradients: tuple[float, float] | None = (5e-6, 1e-6), like_dense: bool = False, live_rows: bool = False,
    attend: Callable[..., Any] | None = None, bias_gradient: bool = True, twice: bool = False,
    **options: Any,
) -> None:  # fmt: skip
    """Compare output and gradients with dense float64: by (atol, rtol), or by twice the error of dense code.

    `options` are those of the call and of the oracle. With `live_rows`, rows that may attend no key are left out.
    `attend` is what to call in place of `flash_attention`. `twice`: a second run gives the same bits.
    """
    call = attend or (lambda q, k, v, b: flash_attention(q, k, v, b, mask, **options))
    whole = [x.reshape(-1, *x.shape[-3:]) for x in arrays]
    selection = dict(options)
    scale = selection.pop("scale", None) or arrays[0].shape[-1] ** -0.5
    rate, rng = selection.get("dropout_rate", 0.0), selection.pop("dropout_rng", None)
    shape = (*whole[0].shape[:1], whole[0].shape[2], whole[0].shape[1], whole[1].shape[1])
    keep = None
    if rng is not None:
        keep = dropout_keep_mask(rng, rate, shape)
    masks = oracle.masking(whole[0], whole[1], mask, keep=keep, **selection)

    dout = normal(*arrays[0].shape[:-1], arrays[2].shape[-1], seed=7, dtype=arrays[0].dtype)
    live = masks.allowed.any(-1).transpose(0, 2, 1).reshape(*dout.shape[:-1], 1)
    if live_rows:
        dout = np.where(live, dout, 0).astype(dout.dtype)

    @functools.partial(jax.jit, compiler_options=fast_compilation() if like_dense else None)
    def run(arrays: Any, bias: Any, dout: Any) -> Any:
        if gradients is None:
            return call(*arrays, bias), ()
        result, vjp = jax.vjp(lambda a, b: call(*a, b), arrays, bias)
        return result, vjp(dout)

    result, got = run(arrays, bias, dout)
    if twice:
        jax.tree.map(np.testing.assert_array_equal, (result, got), run(arrays, bias, dout))
    assert result.dtype == arrays[2].dtype
    assert result.shape == dout.shape

    wide = [x.astype(np.float64) for x in whole]
    added = np.zeros(shape) if bias is None else np.broadcast_to(oracle.to_4d(np.asarray(bias, np.float64)), shape)
    dout_wide = dout.reshape(*whole[0].shape[:3], -1).astype(float)
    dense = oracle.dense_numpy(*wide, added, np.float64(scale), masks, dout_wide)
    expected = dense.results(whole[1].shape[2])
    actual = {"out": np.where(live, np.asarray(result, np.float64), 0) if live_rows else result}
    if live_rows:
        expected["out"] = np.where(live.reshape(*whole[0].shape[:3], 1), expected["out"], 0)
    if gradients is not None:
        actual |= dict(zip(("query", "key", "value"), got[0], strict=True))
    if bias is not None and gradients is not None and bias_gradient:
        small = oracle.to_4d(np.asarray(bias)).shape
        axes = tuple(i for i in range(4) if small[i] == 1)
        expected["bias"] = expected["bias"].sum(axes, keepdims=True)
        actual["bias"] = got[1]
    same = {}
    if like_dense:
        masks = dataclasses.replace(masks, factor=jnp.asarray(masks.factor, jnp.float32))

        @functools.partial(jax.jit, compiler_options=fast_compilation())
        def low(arrays: Any, bias: Any, masks: Any, dout: Any) -> Any:
            with jax.numpy_dtype_promotion("standard"):
                found, vjp = jax.vjp(lambda *a: oracle.dense_same_dtype(*a, bias, scale, masks)[0], *arrays)
                return dict(zip(("out", "query", "key", "value"), (found, *vjp(dout)), strict=True))

        same = low(whole, added.astype(np.float32), masks, dout.reshape(*whole[0].shape[:3], -1))
    for name, x in actual.items():
        wanted = expected[name].reshape(np.shape(x))
        if name in same:
            judged = np.asarray(x, np.float64).astype(arrays[0].dtype)
            oracle.assert_as_accurate_as_dense(name, judged, np.asarray(same[name]).reshape(np.shape(x)), wanted)
        else:
            close(name, x, wanted, out if name == "out" else gradients or out)
