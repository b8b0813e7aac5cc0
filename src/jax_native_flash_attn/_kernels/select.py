"""Which kernel family does a pass of a call where it is lowered: the first, in order, that supports it.

The choice is made while a primitive is lowered, so that one traced program runs on any platform. What is not lowered
for one kind of GPU alone (an export for several platforms) takes the pure JAX kernels.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import jax

from .._semantics import visible
from .._semantics.call import Call
from .._semantics.masks import Band, MaskOperands
from .._semantics.visible import Visible
from .cudnn.family import CudnnKernels
from .hopper.support import HopperKernels
from .protocol import Forward, Kernels, LinearPass, Pass, Target
from .tpu.support import TpuKernels
from .xla.family import XlaKernels

# In order of preference; the last supports every call.
FAMILIES: tuple[Kernels, ...] = (HopperKernels(), CudnnKernels(), TpuKernels(), XlaKernels())
_replacements: dict[str, Kernels] = {}


def families() -> tuple[Kernels, ...]:
    """In order of preference."""
    return tuple(_replacements.get(family.name, family) for family in FAMILIES)


@contextlib.contextmanager
def replacing(*others: Kernels) -> Iterator[None]:
    """Takes families of other limits or plans, each in place of the one of its name: for tuners and tests.

    In the whole process. What JAX has traced and compiled is forgotten before and behind it, so that no program made
    outside runs inside, or the other way round; but what `lower` and `compile` have returned stays as it is.
    """
    before = dict(_replacements)
    _replacements.update({family.name: family for family in others})
    jax.clear_caches()
    try:
        yield
    finally:
        _replacements.clear()
        _replacements.update(before)
        jax.clear_caches()


def reasons(call: Call, which: Pass, target: Target) -> dict[str, str | None]:
    """For each family, why it does not do this pass (None: it can); of arrays the types suffice.

    Of a call that asks for an implementation, other families do the passes that it lacks.
    """
    asked = call.config.implementation
    return {
        family.name: f"implementation={asked!r} was asked for"
        if asked == FAMILIES[-1].name != family.name
        else family.supports(call, which, target)
        for family in families()
    }


def choose(call: Call, which: Pass, target: Target) -> Kernels:
    """The family for a pass.

    Raises:
      NotImplementedError: an implementation was asked for that cannot run here; with every family's reason.
    """
    found, asked = reasons(call, which, target), call.config.implementation
    if asked is not None and found[asked] is not None and target.differentiated is None:
        # All that a family must do is the value: it may lack the log-sum-exp, too, which derivatives need.
        forward = reasons(call._replace(config=replace(call.config, needs_lse=False)), Pass.FORWARD, target)
        if forward[asked] is not None:
            others = "; ".join(
                f"{name!r}: {reason or 'runs here'}" for name, reason in forward.items() if name != asked
            )
            raise NotImplementedError(
                f"implementation={asked!r} does not run here: {forward[asked]}. Of the others, {others}"
            )
    return _first(call, found)


def forward(call: Call, target: Target) -> Forward:
    """out and lse, each as `call.config` asks for it."""
    return choose(call, Pass.FORWARD, target).forward(call, target)


def cotangent(call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
    """Cotangents of some of the differentiable operands, by name."""
    return choose(call, Pass.COTANGENT, target).cotangent(call, given, target)


def makes_gradients_together(call: Call, given: LinearPass, target: Target) -> bool:
    """Whether one `cotangent` takes less time than one for some of what is wanted, and one for the rest."""
    return choose(call, Pass.COTANGENT, target).makes_gradients_together(call, given, target)


def tangent(call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
    """Tangents of 'out' and/or 'lse', by name."""
    return choose(call, Pass.TANGENT, target).tangent(call, given, target)


def find_visible(
    mask: MaskOperands,
    T: int,
    S: int,
    padded: jax.Array | None,
    has_dead_rows: bool | None,
    band: Band | None,
    target: Target,
    implementation: str | None,
) -> Visible:
    """See `_semantics.visible.find_visible`; by the kernel of the family that has one, where that runs.

    `implementation`: what the call asks for.
    """
    kernels = next(family for family in families() if isinstance(family, HopperKernels))
    if implementation != FAMILIES[-1].name and kernels.finds_visible(mask, T, S, target, implementation):
        return kernels.find_visible(mask, T, S, padded, has_dead_rows, band)
    block_scores = 1 << (20 if target.platform == "cpu" else 26)
    return visible.find_visible(
        mask, T, S, padded, has_dead_rows, band, may_branch=not target.is_sharded, block_scores=block_scores
    )


def is_opaque(call: Call, which: Pass, target: Target) -> bool:
    """Whether the family for a pass has kernels that XLA cannot split over devices; of arrays the types suffice."""
    return _first(call, reasons(call, which, target)).is_opaque


def _first(call: Call, found: dict[str, str | None]) -> Kernels:
    """The one that was asked for, if it supports the pass, or the first that does."""
    able = [family for family in families() if found[family.name] is None]
    return next((family for family in able if family.name == call.config.implementation), able[0])
