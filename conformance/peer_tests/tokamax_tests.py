# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "jax==0.12.0.1",
#     "jaxlib==0.12.0.1",
#     "numpy==2.5.5",
#     "flatbuffers==25.9.23",
# ]
# ///
"""What tokamax' tests of attention ask (its test base and the tests of its public function)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from harness import Peer, Test, cases, check, close, inputs, normal, raises
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_native_flash_attn import flash_attention, flash_attention_with_lse, merge_attention

T, SHAPE = 1024, (2, 1024, 4, 64)
ROWS = np.arange(T)


def plain(query=SHAPE, key=None, D=0, dtype="float32", out=1e-6, bias_shape=None, mask_shape=None, **options):
    bias = None if bias_shape is None else normal(*bias_shape, seed=4, dtype=dtype)
    mask = None if mask_shape is None else np.random.default_rng(5).random(mask_shape) < 0.5
    gradients = (max(2 * out, 5e-6), max(out / 5, 1e-6))
    check(inputs(query, key, D, dtype), bias, mask, out=(out, max(out / 10, 1e-6)), gradients=gradients,
          live_rows=mask is not None, **options)  # fmt: skip


def dtypes(dtype):
    plain(dtype=dtype, out={"float32": 1e-6, "bfloat16": 1e-2, "float16": 5e-4}[dtype])


def head_dims(H, D):
    plain((2, T, 4, H), D=D)


def causal_cross(S):
    plain(key=(2, S, 4, 64), is_causal=True)


def order(n):
    return np.random.default_rng(0).permutation(n).astype(np.int32)


def positions(which):
    side = {f"{which}_positions": np.tile(order(512), (2, 1)), "is_causal": True}
    plain((2, 512, 4, 64), **side)


def rows_of_interval():
    rows = order(512)
    mask = ((rows >= 42) & (rows < 42 + 256))[:, None] & np.ones(512, bool)
    check(inputs((2, 512, 4, 64)), None, mask[None, None], live_rows=True)


def padding(nan):
    queries, keys = (np.arange(T) < np.array(ends)[:, None] for ends in ([456, 987], [123, 999]))
    mask = (queries[:, :, None] & keys[:, None])[:, None]
    query, key, value = inputs(SHAPE)
    lengths = {"query_seq_lengths": np.array([456, 987]), "key_value_seq_lengths": np.array([123, 999])}
    if not nan:
        return check([query, key, value], None, mask, live_rows=True)
    bad = lambda valid, x, fill: jnp.where(valid[:, :, None, None], x, fill)  # noqa: E731
    largest = float(np.finfo(np.float32).max)

    def attend(q, k, v, _):
        return flash_attention(bad(queries, q, jnp.nan), bad(keys, k, jnp.nan), bad(keys, v, largest), **lengths)

    return check([query, key, value], gradients=None, attend=attend, **lengths)


def window():
    plain(is_causal=True, local_window_size=(127, 0))


def up(a, b=None):
    return np.arange(a) if b is None else np.arange(a, b)


H = T // 2
HOURGLASS = (np.r_[up(H), up(H)[::-1]], np.r_[T - up(H), H + 1 + up(H)])
WIDE = (
    np.r_[up(H - 12), np.full(24, H - 13), up(H - 12)[::-1]],
    np.r_[T - up(H - 12), np.full(24, H + 13), H + 13 + up(H - 12)],
)
INTERVALS = [
    {"causal": True}, {"k_end": up(1, T + 1)}, {"k_start": up(T)}, {"q_start": up(T)}, {"q_start": up(T)[::-1]},
    {"q_end": up(1, T + 1)}, {"q_end": up(1, T + 1)[::-1]}, {"k_start": HOURGLASS[0], "k_end": HOURGLASS[1]},
    {"k_start": WIDE[0], "k_end": WIDE[1], "shift": 3}, {"q_start": HOURGLASS[0], "q_end": HOURGLASS[1]},
    {"k_start": H, "causal": True}, {"k_end": H + 1, "causal": True},
    {"k_start": 256, "k_end": T - 255, "causal": True},
    {"q_start": 17, "k_start": up(T)}, {"q_start": 128, "k_end": up(1, T + 1)}, {"q_end": 1007, "k_start": up(T)},
    {"q_end": 896, "k_end": up(1, T + 1)}, {"k_start": 576},
]  # fmt: skip


def interval(spec):
    spec, N = dict(spec), 4
    causal, shift = spec.pop("causal", False), spec.pop("shift", 0)
    q, k = ROWS[:, None], ROWS[None, :]
    mask = np.ones((1, N if shift else 1, T, T), bool)
    for name, bound in spec.items():
        bound = np.broadcast_to(bound, T) + shift * np.arange(mask.shape[1])[:, None]
        x, limit = (k, bound[:, :, None]) if name[0] == "k" else (q, bound[:, None, :])
        mask &= (x >= limit if name.endswith("start") else x < limit)[None]
    check(inputs(SHAPE), None, mask, live_rows=True, is_causal=causal)


def soft_cap(bias):
    plain(bias_shape=(2, 4, T, T) if bias else None, logits_soft_cap=10.0, out=2e-6)


def dropout():
    plain(dropout_rate=0.5, dropout_rng=jax.random.key(42))


def vmaps(axes):
    sizes = {"q": (T // 4, 4, 64), "b": (4, T // 4, T // 4)}
    shapes = {"q": sizes["q"], "k": sizes["q"], "v": sizes["q"], "b": sizes["b"], "m": sizes["b"]}
    call = lambda q, k, v, b, m: flash_attention(q, k, v, b, m)  # noqa: E731
    for index, level in enumerate(axes):
        call = jax.vmap(call, in_axes=level)
        for (name, shape), axis in zip(shapes.items(), level, strict=True):
            shapes[name] = ((3, 2)[index], *shape) if axis == 0 else shape
    arrays = [normal(*shape, seed=i) for i, shape in enumerate(shapes.values())]
    arrays[4] = arrays[4] > 0
    out = call(*arrays)
    full = {"q": arrays[0].shape[arrays[0].ndim - 3 :], "b": sizes["b"]}
    flat = []
    for x, name in zip(arrays, "qqqbb", strict=True):
        missing = [i for i, level in enumerate(reversed(axes)) if level[len(flat)] is None]
        flat.append(np.broadcast_to(np.expand_dims(x, missing), (2, 3, *full[name])).reshape(6, *full[name]))
    expected = flash_attention(*flat[:4], flat[4], implementation="dense").reshape(out.shape)
    live = flat[4].any(-1).transpose(0, 2, 1).reshape(*out.shape[:-1], 1)
    close("out", out * live, np.asarray(expected, float) * live, (3e-6, 1e-6))


def wrong(shapes):
    bias_shape, mask_shape = shapes
    arrays = inputs((4, 64, 2, 64))
    bias = None if bias_shape is None else normal(*bias_shape)
    mask = None if mask_shape is None else np.ones(mask_shape, bool)
    raises(lambda: flash_attention(*arrays, bias, mask))


def partial():
    query, key, value = inputs(SHAPE)

    def attend(q, k, v, _):
        halves = [flash_attention_with_lse(q, k[:, part], v[:, part]) for part in (np.s_[:H], np.s_[H:])]
        outs, lses = zip(*halves, strict=True)
        return merge_attention(outs, lses)[0]

    check([query, key, value], attend=attend, gradients=None)


def mode(kinds):
    n, kinds = 256, kinds.split()
    rows = np.arange(n)
    options = {"is_causal": "causal" in kinds}
    if "padding" in kinds:
        options["query_seq_lengths"] = np.array([n // 2, n // 4])
        options["key_value_seq_lengths"] = np.array([n // 4, n // 2])
    if "window" in kinds:
        options["local_window_size"] = (3, 2)
    mask = ((rows[:, None] + rows) % 2 == 0)[None, None] if "custom" in kinds else None
    bias = normal(1, 4, n, n, seed=4, dtype="bfloat16") if "bias" in kinds else None
    check(inputs((2, n, 4, 64), dtype="bfloat16"), bias, mask, out=(0.01, 0.01), gradients=(0.05, 0.05), **options)


def groups(dtype, group, vmap):
    arrays = inputs((2, 128, 4, 64), (2, 128, 4 // group, 64), dtype=dtype)
    attend = (lambda q, k, v, _: jax.vmap(flash_attention)(q, k, v)) if vmap else None
    check(arrays, attend=attend, out=(0.01, 0.01), gradients=(0.01, 0.01))


def bias_gradient(batch, vmap):
    x, mask = normal(batch, 128, 4, 64, dtype="bfloat16"), np.ones((1, 1, 128), bool)
    call = lambda q, k, v, b: flash_attention(q, k, v, b, mask)  # noqa: E731
    check([x] * 3, normal(batch, 4, 128, 128, seed=4, dtype="bfloat16"), mask, out=(0.01, 0.01), gradients=(0.25, 0.25),
          attend=jax.vmap(call) if vmap else call)  # fmt: skip


def memory(backward):
    def peak(n):
        x = jax.ShapeDtypeStruct((1, n, 16, 128), jnp.bfloat16)
        call = lambda x: flash_attention(x, x, x)  # noqa: E731
        both = lambda x: jax.vjp(call, x)[1](x)  # noqa: E731
        return jax.jit(both if backward else call).lower(x).compile().memory_analysis().peak_memory_in_bytes

    growth = peak(4096) / peak(1024)
    assert 1 <= growth <= 6, growth


def export(sizes):
    import jax.export

    b, s = jax.export.symbolic_shape("b, s") if sizes == "both" else (*jax.export.symbolic_shape("b"), 16)
    x, bias = jax.ShapeDtypeStruct((b, s, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((b, 4, 1, s), jnp.bfloat16)
    call = jax.jit(lambda x, bias: flash_attention(x, x, x, bias))
    exported = jax.export.deserialize(jax.export.export(call)(x, bias).serialize())
    x, bias = normal(2, 16, 4, 64, dtype="bfloat16"), normal(2, 4, 1, 16, dtype="bfloat16")
    close("out", jax.jit(exported.call)(x, bias), np.asarray(call(x, bias), float), (0, 0))


def sharded(axes, short=False, explicit=False, bias_shape=None, mask_shape=None, **options):
    names = ("batch", "seq", "heads", "features")
    mesh = Mesh(np.array(jax.devices()).reshape((8,) if len(axes) == 1 else (2, 4)), axes,
                axis_types=(AxisType.Explicit if explicit else AxisType.Auto,) * len(axes))  # fmt: skip
    spec = [name if name in axes else None for name in names]
    spec = PartitionSpec(*(spec[: names.index(axes[0]) + 1] if short else spec))
    arrays = inputs((8, 64, 8, 32))  # theirs are (16, 256, 16, 32)
    bias = None if bias_shape is None else normal(*bias_shape, seed=4)
    mask = None if mask_shape is None else np.random.default_rng(5).random(mask_shape) < 0.5

    def grads(arrays, bias):
        out, vjp = jax.vjp(lambda a, b: flash_attention(*a, b, mask, **options), arrays, bias)
        return out, vjp(out)

    expected = jax.jit(grads)(arrays, bias)
    with jax.set_mesh(mesh):
        keys = PartitionSpec(*(None if name == "seq" else name for name in spec))
        places = [spec, keys, keys] if explicit else [spec] * 3
        arrays = [jax.device_put(x, NamedSharding(mesh, place)) for x, place in zip(arrays, places, strict=True)]
        got = jax.jit(grads)(arrays, bias)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        close("sharded", x, np.asarray(y, float), (5e-6, 1e-6))


AXES = [("batch",), ("seq",), ("heads",)]
SMALL = [(1, 8, 64, 64), (8, 1, 64, 64), (8, 8, 1, 64), (8, 8, 64, 64)]


def of_bias_or_mask(name, shape):
    axis = dict(zip(SMALL, ("batch", "heads", "seq", "batch"), strict=True))[shape]
    sharded((axis,), **{name: shape})


KINDS = ["bias", "causal", "padding", "custom", "causal padding", "custom padding", "bias causal", "causal window",
         "causal custom"]  # fmt: skip
VMAPS = [((0, None, None, 0, 0), (0, None, None, 0, 0)), ((0, None, None, None, 0), (None, 0, 0, 0, None))]
BATCHED = "one batch axis: more are an error that says to reshape or vmap"
SYMBOLIC = "a symbolic length is an error that says so"

if __name__ == "__main__":
    Peer(
        "tokamax",
        "openxla/tokamax tokamax/_src/ops/attention/test_base.py, 02523c92b5b7, and api_test.py",
        ("jax",),
        [
            Test("test_self_attention", cases(dtypes, dtype=["float32", "bfloat16", "float16"])),
            Test("test_cross_attention", [functools.partial(plain, key=(2, 1536, 4, 64))]),
            Test("test_different_output_head_dim", cases(head_dims, H=[24, 128], D=[64, 112])),
            Test("test_multi_query_attention", [functools.partial(plain, key=(2, T, 1, 64))]),
            Test("test_grouped_query_attention", [functools.partial(plain, (2, T, 16, 64), (2, T, 4, 64))]),
            Test("test_no_batch_dim", [functools.partial(plain, (T, 4, 64))]),
            Test("test_multiple_batch_dims", [functools.partial(plain, (2, 3, 4, 64, 4, 64))], BATCHED),
            Test("test_non_power_of_two_head_dim", [functools.partial(plain, (2, T, 4, 48))]),
            Test("test_bias", [functools.partial(plain, bias_shape=(4, T, T), out=5e-6)]),
            Test("test_mask", [functools.partial(plain, mask_shape=(1, 4, 1, T))]),
            Test("test_causal_mask", [functools.partial(plain, is_causal=True)]),
            Test("test_causal_mask_cross_attention", cases(causal_cross, S=[512, 539])),
            Test("test_causal_mask_q_indices, _k_indices", cases(positions, which=["query", "key_value"])),
            Test("test_q_start_end_indices", [rows_of_interval]),
            Test("test_padding_mask, _with_nans", cases(padding, nan=[False, True])),
            Test("test_local_attention_mask", [window]),
            Test("test_mask_api", cases(interval, spec=INTERVALS)),
            Test("test_tanh_clipping", cases(soft_cap, bias=[True, False])),
            Test("test_dropout", [dropout]),
            Test("test_vmap", cases(vmaps, axes=VMAPS)),
            Test("test_invalid_shapes", cases(wrong, shapes=[((4, 2, 64, 32), None), (None, (4, 2, 32, 64))])),
            Test("test_partial_attention", [partial]),
            Test(
                "test_dot_product_attention", cases(groups, dtype=["bfloat16", "float16"], group=[1, 2, 4], vmap=[0, 1])
            ),
            Test("testDotProductAttentionMask", cases(mode, kinds=KINDS)),
            Test("test_dot_product_attention_bias_gradient", cases(bias_gradient, batch=[1, 16], vmap=[0, 1])),
            Test("test_memory_scaling", cases(memory, backward=[False, True])),
            Test("test_symbolic_export (of the batch)", cases(export, sizes=["batch"])),
            Test("test_symbolic_export (of the length too)", cases(export, sizes=["both"]), SYMBOLIC),
            Test("test_self_attention_one_axis", cases(sharded, axes=AXES)),
            Test("test_self_attention_one_axis_shorter_spec", cases(sharded, axes=AXES, short=[True])),
            Test("test_causal_attention_one_axis", cases(sharded, axes=AXES, is_causal=[True])),
            Test("test_self_attention_two_axes", cases(sharded, axes=[("batch", "seq"), ("seq", "heads")])),
            Test(
                "test_self_attention_bias, _mask",
                cases(of_bias_or_mask, name=["bias_shape", "mask_shape"], shape=SMALL),
            ),
            Test("(the first two with explicit axes)", cases(sharded, axes=AXES, explicit=[True], short=[False, True])),
        ],
        {
            "test_quantized_int8, _int4 (4 cases)": "no quantised arrays: dequantise them first",
            "test_logits_dtype (2 cases)": "logits are always in float32 or wider",
            "test_normalize_output (1 case)": "no unnormalised output; `merge_attention` joins parts",
            "test_bench": "benchmarks, with shapes of their own",
            "test_precision, test_impl_in_hlo": "about the choice among their implementations",
        },
    ).run()
