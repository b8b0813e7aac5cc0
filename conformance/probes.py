"""One function for each meaning: what a library's attention does with a small input, in a few words.

A probe gets an `Adapter` and returns the text of a cell of the tables. It compares the library's output with what each
known convention gives, computed in float64. An error of the library is a cell too: the name of its class.
"""

import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np

Array = np.ndarray
TOLERANCES = {"bfloat16": 2e-2}  # of each element, relative and absolute; 2e-3 for wider dtypes


class Lacks(Exception):
    """The library has no argument for it. A message is the text of the cell."""


# What an argument for an option would be called, in any library.
NAMES = {
    "bias": "bias",
    "causal": "causal",
    "dropout": "drop",
    "lengths": "length|seq_?len",
    "mask": "mask",
    "raw_mask": "mask",
    "scale": "scal",
    "segments": "segment|seq_?lens|varlen",
    "sinks": "sink|softmax_aux",
    "soft_cap": "cap|clamp",
    "window": "window|local",
    "lse": "lse|residual|logsumexp|aux",
}


class Adapter:
    """A library's attention, called with NumPy arrays in the layout (B, T, N, H).

    A subclass sets what differs. `attention` takes these options, as this library means them: `causal`, `mask` (True
    attends), `bias`, `lengths` (of keys and values), `scale`, `soft_cap`, `sinks`, `segments` (ids of both) and
    `dropout=(rate, seed)`; and `window` and `raw_mask`, which the other library gets as they are.
    """

    name: str  # of the column
    packages: tuple[str, ...]
    dtype: Any = np.float32  # of all arrays, unless the meaning names another
    functions: tuple[Callable[..., Any], ...]  # whose signatures hold all arguments
    lengths = (4, 8)  # smallest numbers of queries and keys to try, the first half of the second
    head_dim = 16
    windows: Mapping[str, dict[str, Any]] = MappingProxyType({})  # spelling of a window of 3 -> options
    mask_shapes: tuple[str, ...] = ("B N T S", "B 1 T S", "B T S", "T S")
    by: Mapping[str, str] = MappingProxyType({})  # meaning -> what the user writes, where it is not an argument
    masks = True
    row_masks = True  # a mask can hide a key from one row alone; else from all rows of a batch element or none
    true_masks = False  # what True in `raw_mask` means
    added_masks = False  # all masks are added to the logits
    scale: float | None = None  # of the logits, as it comes; None: 1 / sqrt(H)
    scale_is_required = False
    ids = (0, 0, 1, 1, 1, 1, -1, -1)  # of packed sequences; -1 where the library has no such thing: 2
    float16_modes = ("",)

    def attention(self, query: Array, key: Array, value: Array, **options: Any) -> Array:
        raise NotImplementedError

    def normal(self, *shape: int, seed: int = 0) -> Array:
        return np.random.default_rng(seed).standard_normal(shape).astype(self.dtype)

    def native(self, query: Array, key: Array, value: Array) -> Array:
        """The call without any change of layout."""
        raise NotImplementedError

    def arguments(self) -> list[str]:
        """Names of all arguments of `functions`."""
        return [name for function in self.functions for name in inspect.signature(function).parameters]

    def lacks(self, pattern: str) -> NoReturn:
        """Raise `Lacks`, if no argument's name matches. Else the adapter is out of date."""
        for name in self.arguments():
            if re.search(pattern, name):
                raise AssertionError(f"{self.name} has {name}: use it")
        raise Lacks

    def refuse(self, options: Iterable[str], *only: str, **names: str) -> None:
        """`lacks` for the first of the options, of those in `only` if any. `names`: patterns in place of `NAMES`."""
        for option in options:
            if not only or option in only:
                self.lacks(names.get(option, NAMES[option]))

    def lse(self, query: Array, key: Array, value: Array, **options: Any) -> Array | tuple[Array, ...]:
        """What the library returns beside the output, in its own layout."""
        self.refuse(["lse"])

    def gradient(self, query: Array, key: Array, value: Array, bias: Array, weights: Array) -> Array:
        """Of sum(weights * out) with respect to the bias."""
        raise Lacks("no derivatives")

    def lse_gradient(self, query: Array, key: Array, value: Array) -> Array:
        """Of the sum of the log-sum-exp, with respect to the query."""
        self.refuse(["lse"])

    def jvp(self, query: Array, key: Array, value: Array, tangent: Array) -> Array:
        """The output's tangent for that of the query."""
        raise Lacks("no derivatives")

    def second(self, query: Array, key: Array, value: Array) -> Array:
        """Gradient of the sum of squares of the query's gradient of sum(out ** 2)."""
        raise Lacks("no derivatives")


# -- What a convention would give


def inputs(a: Adapter, T: int, S: int, *, B: int = 1, N: int = 1, K: int = 0, D: int = 0) -> tuple[Array, Array, Array]:
    H = a.head_dim
    return a.normal(B, T, N, H), a.normal(B, S, K or N, H, seed=1), a.normal(B, S, K or N, D or H, seed=2)


def logits(a: Adapter, query: Array, key: Array, scale: float | None = None) -> Array:
    scale = a.scale if scale is None else scale
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return scale * np.einsum("btnh,bsnh->bnts", query.astype(np.float64), key.astype(np.float64))


def softmax(x: Array) -> Array:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def dense(
    a: Adapter, query: Array, key: Array, value: Array, *, mask: Array | bool = True, x: Array | None = None
) -> Array:
    x = logits(a, query, key) if x is None else x
    return np.einsum("bnts,bsnh->btnh", softmax(np.where(mask, x, -np.inf)), value.astype(np.float64))


def close(a: Any, b: Any, tolerance: float | None = None) -> bool:
    """Whether results are those expected: to what the dtype of `a` allows, unless told."""
    a, b = np.asarray(a), np.asarray(b)
    tolerance = TOLERANCES.get(a.dtype.name, 2e-3) if tolerance is None else tolerance
    return a.shape == b.shape and np.allclose(a.astype(np.float64), b, rtol=tolerance, atol=tolerance, equal_nan=True)


def first(out: Array, candidates: dict[str, Any]) -> str:
    """The name of the convention that `out` follows."""
    return next((name for name, x in candidates.items() if close(out, np.broadcast_to(x, out.shape))), "something else")


def outcome(call: Callable[[], str]) -> str:
    """What it returns; of an error the name, and its message goes to `messages`."""
    try:
        return call()
    except Lacks:
        raise
    except Exception as error:
        if isinstance(error, AssertionError) and "use it" in str(error):
            raise
        messages.append(message(error))
        return type(error).__name__


def message(error: Exception) -> str:
    """Its first lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(itertools.islice(lines, 2))[:200]


messages: list[str] = []  # of the errors in one cell that are no cell of their own


def seen(a: Adapter, T: int, S: int, **options: Any) -> Array:
    """Attention weights (T, S) for equal logits: the output for the identity as values."""
    H = max(a.head_dim, S)
    value = np.eye(S, H, dtype=a.dtype)[None, :, None]
    zeros = np.zeros((1, max(T, S), 1, H), a.dtype)
    weights = np.asarray(a.attention(zeros[:, :T], zeros[:, :S], value, **options))[0, :, 0, :S]
    return np.where(weights > 1e-20, weights, np.zeros_like(weights))  # Paddle's softmax gives no number below exp(-64)


def empty_row(row: Array, value: Array) -> str:
    """What a row that may attend no key gives, with values (S, H)."""
    mean = value.astype(np.float64).mean(0)
    text = first(row, {"0": 0, "mean of all values": mean, "NaN": np.nan})
    part = row.astype(np.float64) @ mean / (mean @ mean)  # a kernel may count the rest of its block as keys
    return f"{part:.3g} times the mean of all values" if text == "something else" and close(row / part, mean) else text


# -- The probes


def layout(a: Adapter) -> str:
    T = a.lengths[0]
    query, key, value = (a.normal(2, T, 3, a.head_dim, seed=i) for i in range(3))
    expected, found = dense(a, query, key, value), []
    for axes in ("BTNH", "BNTH", "TBNH", "BTHN", "BNHT", "TNH", "NTH"):
        order = ["BTNH".index(axis) for axis in axes]
        arrays = [query, key, value, expected]
        if len(axes) == 3:
            arrays, order = [x[0] for x in arrays], [i - 1 for i in order]
        *arrays, wanted = (x.transpose(order) for x in arrays)
        try:
            out = a.native(*arrays)
        except Exception as error:
            messages.append(message(error))
            continue
        if close(out, wanted):
            found.append(f"({', '.join(axes)})")
    for words, batch in {"(B, T, N * H)": slice(None), "(T, N * H)": 0}.items():
        *arrays, wanted = (x.reshape(2, T, -1)[batch] for x in (query, key, value, expected))
        try:
            if close(a.native(*arrays), wanted):
                found.append(words)
        except Exception:
            continue
    return " or ".join(found) or "none"


def _alignment(visible: Array) -> str:
    T, S = visible.shape
    names = {"top left": np.tri(T, S), "bottom right": np.tri(T, S, S - T)}
    return next((name for name, x in names.items() if (visible == x.astype(bool)).all()), "something else")


def causal(a: Adapter) -> str:
    return _alignment(seen(a, *a.lengths, causal=True) > 0)


def causal_more_queries(a: Adapter) -> str:
    S, T = a.lengths
    H = max(a.head_dim, S)
    query, key, value = a.normal(1, T, 1, H), a.normal(1, S, 1, H, seed=1), a.normal(1, S, 1, H, seed=2)
    out = np.asarray(a.attention(query, key, value, causal=True))
    if close(out, dense(a, query, key, value, mask=np.tri(T, S, dtype=bool))):
        return "top left"
    live = dense(a, query[:, T - S :], key, value, mask=np.tri(S, dtype=bool))
    if close(out[:, T - S :], live):
        return f"bottom right; the first T - S rows: {empty_row(out[0, : T - S, 0], value[0, :, 0])}"
    return "something else"


def window(a: Adapter) -> str:
    if not a.windows:
        a.lacks("window")
    texts = []
    S = 2 * a.lengths[1]
    for spelling, options in a.windows.items():

        def keys(options: dict[str, Any] = options) -> str:
            row = np.flatnonzero(seen(a, S, S, **options)[S // 2] > 0) - S // 2
            if len(row) == S:
                return "no effect"
            assert len(row) == row[-1] - row[0] + 1
            return " to ".join("t" + (f" {'-' if i < 0 else '+'} {abs(i)}" if i else "") for i in (row[0], row[-1]))

        texts.append(f"`{spelling}`: {outcome(keys)}")
    return "; ".join(texts)


def row_without_keys(a: Adapter) -> str:
    T = S = a.lengths[0]
    query, key, value = inputs(a, T, S)
    if not a.masks:  # the rows that a causal mask, aligned to the end, leaves without keys
        query = a.normal(1, 2 * T, 1, a.head_dim)
        out = np.asarray(a.attention(query, key, value, causal=True))
        if close(out[0, 0, 0], value[0, 0, 0]):
            return "no such row: no mask, causal is top left"
        return empty_row(out[0, 0, 0], value[0, :, 0])
    mask = np.ones((1, 1, T, S), bool)
    mask[:, :, 1] = False

    def row(mask: Array) -> str:
        return empty_row(np.asarray(a.attention(query, key, value, mask=mask))[0, 1, 0], value[0, :, 0])

    one, every = (outcome(lambda m=m: row(m)) for m in (mask, np.zeros_like(mask)))
    if not a.row_masks:
        return every
    return one if one == every else f"{one}; if all rows are so: {every}"


def mask_types(a: Adapter) -> str:
    T = S = a.lengths[0]
    query, key, value = inputs(a, T, S)
    visible = (np.arange(T)[:, None] * a.row_masks + np.arange(T)) % 2 == 0
    visible = visible[None, None]
    x, ones = logits(a, query, key), visible.astype(a.dtype)
    meanings = {
        "attends": dense(a, query, key, value, mask=visible),
        "masks": dense(a, query, key, value, mask=~visible),
        "added": dense(a, query, key, value, x=x + ones),
        "all attend": dense(a, query, key, value),
    }
    masks = {"bool": visible, "int": visible.astype(np.int32), "float": ones}

    def says(mask: Array) -> str:
        return first(np.asarray(a.attention(query, key, value, raw_mask=mask)), meanings)

    found: dict[str, list[str]] = {}
    for name, mask in masks.items():
        found.setdefault(outcome(lambda mask=mask: says(mask)), []).append(name)
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in found.items())


def mask_shapes(a: Adapter) -> str:
    sizes = {"B": 2, "N": 3, "T": a.lengths[0], "S": a.lengths[0], "1": 1}
    query, key, value = inputs(a, sizes["T"], sizes["S"], B=2, N=3)
    accepted = []
    for axes in a.mask_shapes:
        mask = np.random.default_rng(3).random([sizes[axis] for axis in axes.split()]) < 0.7
        mask[..., 0] = True
        expected = dense(
            a, query, key, value, mask=mask[{"B T S": np.s_[:, None], "B S": np.s_[:, None, None]}.get(axes, ...)]
        )
        raw = np.where(mask, 0, np.finfo(np.float32).min) if a.added_masks else mask ^ a.true_masks
        if outcome(lambda m=raw, e=expected: str(close(a.attention(query, key, value, raw_mask=m), e))) == "True":
            accepted.append(f"({', '.join(axes.split())})")
    return " ".join(accepted) or "none"


def bias(a: Adapter) -> str:
    T, S = a.lengths
    query, key, value = inputs(a, T, S)
    b = a.normal(1, 1, T, S, seed=3)
    try:
        out, x = a.attention(query, key, value, bias=b, scale=0.5), logits(a, query, key, 0.5)
    except Lacks:
        out, x = a.attention(query, key, value, bias=b), logits(a, query, key)
    names = {
        "added after the scale": dense(a, query, key, value, x=x + b),
        "added before the scale": dense(a, query, key, value, x=x + 0.5 * b),
    }
    return first(np.asarray(out), names)


def bias_gradient(a: Adapter) -> str:
    T, S = a.lengths
    query, key, value = inputs(a, T, S, B=2, N=2)
    b, weights = a.normal(1, 2, T, S, seed=3), a.normal(2, T, 2, a.head_dim, seed=4)
    got = np.asarray(a.gradient(query, key, value, b, weights))
    p = softmax(logits(a, query, key) + b)
    dp = np.einsum("btnh,bsnh->bnts", weights.astype(np.float64), value)
    expected = (p * (dp - (p * dp).sum(-1, keepdims=True))).sum(0, keepdims=True)
    return first(got, {"right": expected, "0": 0}) if got.shape == expected.shape else f"of shape {got.shape}"


def scale(a: Adapter) -> str:
    if a.scale_is_required:
        return "none: the scale is required"
    T, S = a.lengths
    query, key, value = inputs(a, T, S)
    out = np.asarray(a.attention(query, key, value))
    names = {"1 / sqrt(H)": a.head_dim**-0.5, "1": 1.0, "1 / H": 1 / a.head_dim}
    return first(out, {name: dense(a, query, key, value, x=logits(a, query, key, s)) for name, s in names.items()})


def value_dim(a: Adapter) -> str:
    T, S = a.lengths
    query, key, value = inputs(a, T, S, D=2 * a.head_dim)
    out = np.asarray(a.attention(query, key, value))
    names = {
        "works": a.scale or a.head_dim**-0.5,
        "works; the scale is by the dimension of the value": (2 * a.head_dim) ** -0.5,
    }
    return first(out, {name: dense(a, query, key, value, x=logits(a, query, key, s)) for name, s in names.items()})


def heads(a: Adapter) -> str:
    T, S = a.lengths
    query, key, value = inputs(a, T, S, N=4, K=2)
    out = np.asarray(a.attention(query, key, value))
    names = {
        "N / K neighbours share": [0, 0, 1, 1],
        "heads n, n + K, ... share": [0, 1, 0, 1],
    }
    return first(
        out,
        {n: dense(a, query, key[:, :, i], value[:, :, i], x=logits(a, query, key[:, :, i])) for n, i in names.items()},
    )


def lse(a: Adapter) -> str:
    T, S = a.lengths
    query, key, value = inputs(a, T, S, B=2, N=3)
    got = a.lse(query, key, value)
    x = logits(a, query, key)
    if isinstance(got, tuple):
        got = [np.asarray(part) for part in got]
        peak, total = got
        assert close(np.exp(peak) * total, np.exp(x).sum(-1)), "(max, sum)"
        return f"(maximum, sum) of (B, N, T), {total.dtype}"
    got = np.asarray(got)
    natural = np.log(np.exp(x).sum(-1))
    bases = {"natural": natural, "base 2": natural / np.log(2), "natural, less the largest logit": natural - x.max(-1)}
    for axes, order in {"(B, N, T)": (0, 1, 2), "(B, T, N)": (0, 2, 1)}.items():
        for base, expected in bases.items():
            if close(got, expected.transpose(order)):
                return f"{base}, {axes}, {got.dtype}"
    return "something else"


def lse_row_without_keys(a: Adapter) -> str:
    T = S = a.lengths[0]
    query, key, value = inputs(a, T, S)
    mask = np.ones((1, 1, T, S), bool)
    mask[:, :, 1] = False
    if not a.row_masks:
        mask[:] = False
    if a.masks:
        got = a.lse(query, key, value, mask=mask)
    else:
        got = a.lse(a.normal(1, 2 * T, 1, a.head_dim), key, value, causal=True)
    got = [np.asarray(x).reshape(-1)[1] for x in (got if isinstance(got, tuple) else (got,))]
    return ", ".join(f"{float(x):.3g}" for x in got)


def lse_gradient(a: Adapter) -> str:
    T, S = a.lengths
    query, key, value = inputs(a, T, S)
    got = np.asarray(a.lse_gradient(query, key, value))
    right = np.einsum("bnts,bsnh->btnh", softmax(logits(a, query, key)), key) * (a.scale or a.head_dim**-0.5)
    return first(got, {"0": 0, "right": right})


def dropped(a: Adapter, seed: int) -> Array:
    """Weights (B, N, T, S) after dropout of a half, for logits that are equal but not 0."""
    N, T = 2, 2 * a.lengths[1]
    H = max(T, a.head_dim)
    query = np.full((2, T, N, H), 0.5, a.dtype)
    value = np.broadcast_to(np.eye(T, H, dtype=a.dtype)[None, :, None], (2, T, N, H)).copy()
    return np.asarray(a.attention(query, query, value, dropout=(0.5, seed))).transpose(0, 2, 1, 3)[..., :T]


def dropout(a: Adapter) -> str:
    weights, again, other = dropped(a, 0), dropped(a, 0), dropped(a, 1)
    kept = weights[weights > 0]
    if (weights == weights.flat[0]).all():
        return "no effect"
    if close(weights.sum(-1, dtype=np.float32).astype(weights.dtype), np.ones(weights.shape[:-1])):
        what = "of logits: rows sum to 1"
    elif 0.35 < (weights > 0).mean() < 0.65 and close(kept, np.full_like(kept, 2 / weights.shape[-1])):
        what = "of weights"
    else:
        return "something else"
    if (weights == other).all():
        return f"{what}; the same for every seed"
    return f"{what}; {'repeats with the seed' if (weights == again).all() else 'does not repeat'}"


def dropout_masks(a: Adapter) -> str:
    weights = dropped(a, 0)
    if (weights == weights.flat[0]).all():
        return "no effect"
    pairs = {"batch": weights[0, 0] == weights[1, 0], "heads": weights[0, 0] == weights[0, 1]}
    shared = [name for name, same in pairs.items() if same.all()]
    return f"one for {' and '.join(shared)}" if shared else "one each"


def soft_cap(a: Adapter) -> str:
    T, S = a.lengths
    query, key, value = inputs(a, T, S)
    cap, b = 0.5, a.normal(1, 1, T, S, seed=3)
    x = logits(a, query, key, 1.0)

    def tanh(x: Array) -> Array:
        return cap * np.tanh(x / cap)

    got = np.asarray(a.attention(query, key, value, soft_cap=cap, scale=1.0))
    if not close(got, dense(a, query, key, value, x=tanh(x))):
        return "no effect" if close(got, dense(a, query, key, value, x=x)) else "something else"

    def order() -> str:
        with_bias = np.asarray(a.attention(query, key, value, soft_cap=cap, scale=1.0, bias=b))
        names = {"bias before the cap": tanh(x + b), "bias after the cap": tanh(x) + b}
        return first(with_bias, {name: dense(a, query, key, value, x=capped) for name, capped in names.items()})

    try:
        return f"c tanh(x / c); {outcome(order)}"
    except Lacks:
        return "c tanh(x / c); no bias"


def sinks(a: Adapter) -> str:
    T, S = a.lengths
    query, key, value = inputs(a, T, S, N=2)
    sink = np.array([0.5, 2.0], np.float32)
    out = np.asarray(a.attention(query, key, value, sinks=sink, scale=1.0))
    x = logits(a, query, key, 1.0)
    names = {"one logit per head, unscaled": sink[None, :, None, None], "all logits for each head, unscaled": sink}
    candidates = {}
    for name, more in names.items():
        more = np.broadcast_to(more, (*x.shape[:3], more.shape[-1]))
        weights = softmax(np.concatenate([x, more], -1))[..., : x.shape[-1]]
        candidates[name] = np.einsum("bnts,bsnh->btnh", weights, value)
    return first(out, candidates)


def segments(a: Adapter) -> str:
    T = a.lengths[1]
    ids = np.repeat(np.array(a.ids, np.int32), T // 8)
    got = seen(a, T, T, segments=ids) > 0
    equal = ids[:, None] == ids
    if (got == equal).all():
        if min(a.ids) >= 0:
            return "sequences do not see each other"
        return "equal ids attend; negative ids too"
    real = equal & (ids >= 0)
    if (got[ids >= 0] == real[ids >= 0]).all():
        return "equal ids attend; negative ids are padding"
    return "something else"


def nan_in_padding(a: Adapter) -> str:
    T, S = a.lengths
    query, key, value = inputs(a, T, S)
    visible = np.broadcast_to(np.arange(S) < S - 3, (1, 1, T, S)).copy()
    padded = ~visible[0, 0, 0][None, :, None, None]
    nan_key, nan_value = (np.where(padded, a.dtype(np.nan), x) for x in (key, value))

    def says(key: Array, value: Array) -> str:
        return "NaN" if np.isnan(a.attention(query, key, value, mask=visible)).any() else "no effect"

    return f"key: {says(nan_key, value)}; value: {says(key, nan_value)}"


def nan_past_lengths(a: Adapter) -> str:
    T, S = a.lengths
    query, key, value = inputs(a, T, S)
    key, value = (np.where(np.arange(S)[None, :, None, None] < S - 3, x, a.dtype(np.nan)) for x in (key, value))
    out = np.asarray(a.attention(query, key, value, lengths=np.array([S - 3], np.int32)))
    return first(out, {"no effect": dense(a, query, key[:, : S - 3], value[:, : S - 3]), "NaN in every row": np.nan})


def float16(a: Adapter) -> str:
    T = S = a.lengths[0]
    arrays = [x.astype(np.float16) for x in inputs(a, T, S)]
    expected = dense(a, *arrays)

    def run(mode: str) -> str:
        out = np.asarray(a.attention(*arrays, **({"mode": mode} if mode else {})))
        return f"works, {out.dtype} out" if close(out, expected, 1e-2) else "wrong"

    texts = {mode: outcome(lambda mode=mode: run(mode)) for mode in a.float16_modes}
    if len(set(texts.values())) == 1:
        return texts.popitem()[1]
    return "; ".join(f"{mode}: {text}" for mode, text in texts.items())


def float64(a: Adapter) -> str:
    T, S = a.lengths
    arrays = [x.astype(np.float64) for x in inputs(a, T, S)]
    out = np.asarray(a.attention(*arrays))
    error = np.abs(out - dense(a, *arrays, x=logits(a, *arrays[:2]))).max()
    size = "below 1e-12" if error < 1e-12 else "above 1e-9" if error > 1e-9 else "1e-12 to 1e-9"
    return f"{out.dtype} out, error {size}"


def empty(a: Adapter) -> str:
    def shape(T: int, S: int) -> str:
        arrays = [a.normal(1, n, 2, a.head_dim, seed=i) for i, n in enumerate((T, S, S))]
        out = np.asarray(
            [a.attention(*arrays) for _ in range(1 if T == 0 else 8)]
        )  # OpenVINO's differ from call to call
        if not out.size:
            return "empty output" if out.shape[1:] == (1, T, 2, a.head_dim) else f"shape {out.shape[1:]}"
        if not close(out[1:], np.broadcast_to(out[0], out[1:].shape), 0):
            return "differs from call to call"
        return first(out, {"0": 0, "NaN": np.nan})

    return f"T = 0: {outcome(lambda: shape(0, a.lengths[0]))}; S = 0: {outcome(lambda: shape(a.lengths[0], 0))}"


def forward_mode(a: Adapter) -> str:
    T, S = a.lengths
    query, key, value = inputs(a, T, S)
    tangent = a.normal(*query.shape, seed=5)
    got = np.asarray(a.jvp(query, key, value, tangent))
    step = 1e-5
    up, down = (
        dense(a, query, key, value, x=logits(a, query + sign * step * tangent.astype(np.float64), key))
        for sign in (1, -1)
    )
    return first(got, {"right": (up - down) / (2 * step), "0": 0})


def second_order(a: Adapter) -> str:
    T, S = a.lengths
    query, key, value = inputs(a, T, S)
    got = np.asarray(a.second(query, key, value))
    s = a.scale or a.head_dim**-0.5

    def gradient(query: Array) -> Array:  # of sum(out ** 2)
        p = softmax(logits(a, query, key))
        out = np.einsum("bnts,bsnh->btnh", p, value)
        dp = np.einsum("btnh,bsnh->bnts", 2 * out, value)
        return s * np.einsum("bnts,bsnh->btnh", p * (dp - (p * dp).sum(-1, keepdims=True)), key)

    g = gradient(query.astype(np.float64))
    step = 1e-5  # the Hessian is symmetric: H g is the derivative of the gradient along g
    right = 2 * (gradient(query + step * g) - gradient(query - step * g)) / (2 * step)
    largest = np.abs(right).max()  # by which errors of 16 bits are to be measured: elements cancel
    return first((got / largest).astype(got.dtype), {"right": right / largest, "0": 0})


# Key, words for the rows of tables, probe. In the order of the tables.
MEANINGS: dict[str, tuple[str, Callable[[Adapter], str]]] = {
    "layout": ("layout of arrays", layout),
    "heads": ("N query heads, K key/value heads", heads),
    "scale": ("default scale", scale),
    "value_dim": ("values of another head dimension", value_dim),
    "causal": ("causal, fewer queries than keys", causal),
    "causal_more_queries": ("causal, more queries than keys", causal_more_queries),
    "window": ("window: keys of row t", window),
    "mask_types": ("a mask's True or 1", mask_types),
    "mask_shapes": ("shapes of masks", mask_shapes),
    "row_without_keys": ("a row that may attend no key", row_without_keys),
    "bias": ("additive bias", bias),
    "bias_gradient": ("gradient of a bias shared by the batch", bias_gradient),
    "nan_in_padding": ("NaN in masked keys or values", nan_in_padding),
    "nan_past_lengths": ("NaN past the key/value length", nan_past_lengths),
    "lse": ("log-sum-exp", lse),
    "lse_row_without_keys": ("log-sum-exp, if it may attend no key", lse_row_without_keys),
    "lse_gradient": ("gradient through the log-sum-exp", lse_gradient),
    "dropout": ("dropout", dropout),
    "dropout_masks": ("its masks, for a batch with heads", dropout_masks),
    "soft_cap": ("soft cap c", soft_cap),
    "sinks": ("sinks", sinks),
    "segments": ("packed sequences", segments),
    "float16": ("float16", float16),
    "float64": ("float64", float64),
    "empty": ("no queries, no keys", empty),
    "forward_mode": ("forward mode (`jvp`)", forward_mode),
    "second_order": ("second derivative", second_order),
}


def cell(a: Adapter, key: str) -> tuple[str, str]:
    """Its text, and the message of the first error behind it, if there was one."""
    messages.clear()
    try:
        text = MEANINGS[key][1](a)
    except Lacks as error:
        return str(error) or "no argument", ""
    except Exception as error:
        return type(error).__name__, message(error)
    text = f"{text} ({a.by[key]})" if key in a.by and not text.startswith("no ") else text
    return text, messages[0] if messages else ""


def cells(a: Adapter, only: Iterable[str] = ()) -> dict[str, dict[str, str]]:
    """Every cell, and the message behind each error."""
    found = {key: cell(a, key) for key in MEANINGS if not only or key in only}
    return {
        "cells": {key: text for key, (text, _) in found.items()},
        "messages": {key: text for key, (_, text) in found.items() if text},
    }
