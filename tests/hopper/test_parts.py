"""Groups of query heads that the backward kernels divide, without a GPU: which heads a part has, and the sums of parts.

The kernels do not run here. In place of the one for gradients of keys and values, pure JAX makes those of the call that
it gets, whose groups are parts.
"""

import collections
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_native_flash_attn._kernels.protocol import LinearPass
from jax_native_flash_attn._kernels.xla.family import XlaKernels
from jax_native_flash_attn._semantics.call import Call
from jax_native_flash_attn._semantics.sizes import Sizes
from tests.support import hopper_mods
from tests.support.cases import Case, check_case, with_lengths
from tests.support.targets import needs_backend

pytestmark = needs_backend

_SHAPE = (2, 70, 39, 2, 6, 16)
_CASES = {
    "causal": Case(_SHAPE, "bfloat16", is_causal=True),
    "bias and mask": Case(_SHAPE, "bfloat16", bias=(True, True, True, True), mask=(False, True, True, True)),
    "dropout": Case(_SHAPE, "bfloat16", dropout_rate=0.3),
    "lengths, 3 heads": with_lengths(Case((2, 70, 39, 1, 3, 20), "float16")),
    "segments": Case(_SHAPE, "bfloat16", segment_ids="shuffled", traced=frozenset({"ids"})),
    "float32, lengths": with_lengths(Case((2, 70, 39, 2, 4, 20), "float32", value_dim=40)),
    "vmap": Case(_SHAPE, "bfloat16", bias=(False, True, True, True), vmapped=True),
}


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """Has pure JAX go through the cotangent for Hopper, however few the rows are; K and G that its kernel got."""
    from jax_native_flash_attn._kernels.hopper import backward, cotangent
    from jax_native_flash_attn._kernels.hopper.host import dkey_dvalue_plan
    from jax_native_flash_attn._kernels.hopper.host.turn_plan import TurnOuts
    from jax_native_flash_attn._kernels.hopper.pallas import pad_axis, round_up

    pure_jax, found = XlaKernels.cotangent, set[tuple[int, int]]()

    def unrounded(x: Any, length: Any = None) -> Any:
        if length is None:
            return x
        number = jnp.arange(x.shape[-3]).reshape((1,) * length.ndim + (-1, 1, 1))
        return jnp.where((number < length[..., None, None, None]) | jnp.isfinite(x), x, 0.0)

    def turn(x: Any, length: Any = None, **_: Any) -> TurnOuts:
        return TurnOuts(pad_axis(unrounded(x, length), -3, round_up(x.shape[-3], 8)), None)

    def of_hopper(self: XlaKernels, call: Call, given: LinearPass, target: Any) -> dict[str, jax.Array]:
        def padded(x: jax.Array) -> jax.Array:
            return pad_axis(x, -1, round_up(x.shape[-1], 16))

        def kernel(part: Any, blocks: Any, wanted: Any, cores: int) -> Any:
            found.add((part.sizes.K, part.sizes.G))
            inputs, S = part.inputs, part.sizes.S
            if part.products is not None:
                products = part.products.forward
                inputs = inputs._replace(key=products.key[..., :S, :, :], value=products.value[..., :S, :, :])
            cotangents = {name: padded(x) if name == "out" else x for name, x in given.operands.items()}
            types = {name: x for name, x in vars(wanted).items() if x is not None}
            asked = LinearPass(padded(given.out), given.lse, cotangents, types)
            return type(wanted)(**pure_jax(self, Call(part.config, inputs), asked, target))

        monkeypatch.setattr(backward, "_dkey_dvalue", kernel)
        of_keys = {name: x for name, x in given.wanted.items() if name in ("key", "value")}
        results = cotangent.cotangent(call, given._replace(wanted=of_keys), None, 132, at_once=False)
        others = {name: x for name, x in given.wanted.items() if name not in of_keys}
        return results | (pure_jax(self, call, given._replace(wanted=others), target) if others else {})

    monkeypatch.setattr(XlaKernels, "cotangent", of_hopper)
    monkeypatch.setattr(dkey_dvalue_plan, "_LEAST_ROWS", 1)
    monkeypatch.setattr(backward, "turn", turn)
    monkeypatch.setattr(backward, "rounded", unrounded)
    return found


@pytest.mark.parametrize("name", _CASES)
def test_gradients_of_keys_and_values(name: str, divided: set[tuple[int, int]]) -> None:
    *_, K, G, _ = _CASES[name].shape
    check_case(_CASES[name])
    assert divided == {(K * G, 1)}


def test_functions_of_heads(divided: set[tuple[int, int]]) -> None:
    hopper_mods.check(hopper_mods.CALLS["by batch row"], "pure_jax")
    assert divided == {(hopper_mods.N, 1)}


@pytest.mark.parametrize(
    ("batch", "K", "G", "parts", "blocks", "workers"),
    [((2,), 2, 4, 2, 3, 6), ((1, 2), 1, 6, 3, 2, 4), ((1,), 2, 2, 2, 4, 16)],
)
def test_what_the_fused_kernel_visits(
    batch: tuple[int, ...], K: int, G: int, parts: int, blocks: int, workers: int
) -> None:
    """Each block of keys meets each tile of each query head of its group once, and each tile has its own counter."""
    from jax_native_flash_attn._kernels.hopper.addition_order import AdditionOrder
    from jax_native_flash_attn._kernels.hopper.blocks import Blocks
    from jax_native_flash_attn._kernels.hopper.device.fused_context import FusedContext
    from jax_native_flash_attn._kernels.hopper.host.fused_plan import FusedPlan

    tiles, heads = 2 * blocks, 1
    for n in batch:
        heads *= n
    in_launch_order = workers == heads * K * parts * blocks
    order = AdditionOrder(heads * K * parts, blocks, tiles, G // parts, True, workers, in_launch_order)
    sizes = Sizes(batch, 64 * tiles, 64 * tiles, K, G, 128, 128)
    config: Any = None
    plan = FusedPlan(config, sizes, jnp.bfloat16, Blocks(64, 64, 2, 2), order, is_wide=True)
    assert plan.parts == parts
    context: Any = SimpleNamespace(sizes=sizes, plan=plan, turns=SimpleNamespace(at=range(plan.turns)))
    for name in ("kv_head_and_part", "kv_head", "head", "member", "turn"):
        setattr(context, name, getattr(FusedContext, name).__get__(context))
    visits, counters, written = collections.Counter[tuple](), collections.defaultdict(set), collections.Counter[tuple]()
    for worker in range(workers):
        for k in range(int(order.rounds_of(jnp.int32(worker)))):
            work = order.work(jnp.int32(k), jnp.int32(worker))
            tile, block = work.first, int(work.block)
            *_, kv_head, _ = index = tuple(map(int, context.kv_head_and_part(work)))
            written[(*index, block)] += 1
            for i in range(order.group * int(work.tiles)):
                member = context.member(work, jnp.int32(i))
                head = tuple(map(int, context.head(work, member)))
                assert head[:-1] == index[:-2]
                assert head[-1] // G == kv_head == int(context.kv_head(work)[-1])
                visits[(*head, int(tile), block)] += 1
                counters[context.turn(work, member, int(tile))].add((*head, int(tile)))
                tile = order.following(work, tile)
    assert set(visits.values()) == set(written.values()) == {1}
    assert len(visits) == heads * K * G * sum(tiles - 2 * block for block in range(blocks))
    assert len(written) == heads * K * parts * blocks
    assert [len(x) for x in counters.values()] == [1] * plan.turns
    assert len(set.union(*counters.values())) == plan.turns
