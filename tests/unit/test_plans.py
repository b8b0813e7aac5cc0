"""Plans that tuners and tests pass in are those that calls take, also where JAX has compiled the call before."""

import jax
import jax.numpy as jnp
import pytest

from jax_native_flash_attn import explain, flash_attention
from jax_native_flash_attn._kernels.hopper.blocks import BackwardBlocks, Blocks
from jax_native_flash_attn._kernels.hopper.support import HopperKernels
from jax_native_flash_attn._kernels.select import families, replacing
from jax_native_flash_attn._kernels.xla.family import XlaKernels
from jax_native_flash_attn._kernels.xla.limits import Limits
from tests.support.grids import in_part
from tests.support.targets import needs_backend, pretend_gpu

pytestmark = in_part(0)

TYPES = [jax.ShapeDtypeStruct((2, 256, n, 64), jnp.bfloat16) for n in (4, 2, 2)]


@jax.jit
def gradient(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return jax.grad(lambda *x: flash_attention(*x).astype(jnp.float32).sum(), (0, 1, 2))(*arrays)


def lowered(platform: str) -> str:
    return gradient.trace(*TYPES).lower(lowering_platforms=(platform,)).as_text()


def test_limits():
    usual, program = explain(*TYPES, platform="cpu"), lowered("cpu")
    with replacing(XlaKernels(Limits(heads=1))):
        found = explain(*TYPES, platform="cpu")
        for taken in (found.forward, found.gradient, found.tangent):
            assert (taken.plan.tile.batch, taken.plan.tile.heads) == ((1,), 1)
        assert lowered("cpu") != program
    assert usual.forward.plan.tile.heads > 1
    assert explain(*TYPES, platform="cpu") == usual
    assert lowered("cpu") == program


def test_replacements_nest():
    outer, inner, hopper = XlaKernels(Limits(heads=2)), XlaKernels(Limits(heads=1)), HopperKernels(Blocks(64, 64, 2, 1))
    before = families()
    with replacing(outer):
        with replacing(inner, hopper):
            assert families() == (hopper, *before[1:-1], inner)
        assert families() == (*before[:-1], outer)
    assert families() == before


@needs_backend
def test_blocks_on_a_hopper_gpu(monkeypatch: pytest.MonkeyPatch):
    pretend_gpu(monkeypatch, "9.0")
    forward = Blocks(64, 64, 2, 1)
    backward = BackwardBlocks(dquery=Blocks(64, 64, 2, 1), dkey_dvalue=Blocks(32, 64, 1, 2), dbias=None)
    usual, program = explain(*TYPES, platform="cuda"), lowered("cuda")
    assert usual.forward.plan != forward
    for kernels in (HopperKernels(forward_blocks=forward), HopperKernels(backward_blocks=backward)):
        with replacing(kernels):
            found = explain(*TYPES, platform="cuda")
            assert found.forward.plan == (kernels.forward_blocks or usual.forward.plan)
            assert found.gradient.plan == (kernels.backward_blocks or usual.gradient.plan)
            assert lowered("cuda") != program
    assert explain(*TYPES, platform="cuda") == usual
