"""Which kernels a call takes, and why: for people, and for tests."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp

from ._api import flash_attention
from ._autodiff.primitives import flash_attention_p
from ._kernels import select
from ._kernels.protocol import Pass, Target
from ._semantics.call import Call

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclass(frozen=True)
class PassExplanation:
    """How one pass of a call runs.

    Attributes:
      family: its kernels, as `implementation` names them.
      reasons: for each family that is not taken, why.
      plan: tile or block shapes, dtypes and form: a frozen value of the family's own, which prints its fields.
    """

    family: str
    reasons: dict[str, str]
    plan: Any


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
      platform: what the call was taken to be compiled for.
      forward, gradient, tangent: the pass that computes attention, and those of `jax.grad` and `jax.jvp`.
      temporary_bytes: by pass, what XLA allocates beside arguments and results on one device; None if not asked for.
    """

    platform: str
    forward: PassExplanation
    gradient: PassExplanation
    tangent: PassExplanation
    temporary_bytes: dict[str, int] | None = None

    def __str__(self) -> str:
        lines = [f"flash_attention on {self.platform}"]
        for name in ("forward", "gradient", "tangent"):
            taken: PassExplanation = getattr(self, name)
            lines.append(f"{name}: {taken.family}")
            if self.temporary_bytes is not None:
                lines.append(f"  temporary memory: {self.temporary_bytes[name] / 2**20:.1f} MiB")
            lines.append(f"  plan: {taken.plan}")
            lines += [f"  not {family}: {reason}" for family, reason in taken.reasons.items()]
        return "\n".join(lines)


def explain(*args: Any, platform: str | None = None, compiles: bool = False, **kwargs: Any) -> Explanation:
    """Say which kernels `flash_attention(*args, **kwargs)` takes, and why not the others.

    Example:
      >>> x = jax.ShapeDtypeStruct((2, 1024, 8, 64), jnp.bfloat16)
      >>> print(explain(x, x, x, is_causal=True))

    Args:
      *args, **kwargs: as of `flash_attention`; arrays, or `jax.ShapeDtypeStruct`s in place of arrays that a program
        gets. (An array is a constant of the program, as a mask may be.) No attention is computed.
      platform: 'cpu', 'cuda', 'rocm' or 'tpu'; by default the one that JAX runs on here. 'cuda' means GPUs like those
        here. Where there is none, a program for it takes pure JAX, unless implementation='mosaic_gpu' is asked for.
      compiles: also compile the call and its derivatives, for this process' device, and give the temporary bytes.

    Returns:
      An `Explanation`, plain data that prints well.

    Raises:
      ValueError, TypeError, NotImplementedError: as `flash_attention`; `compiles` for another platform; an axis of size
        0; implementation='cudnn'.
    """
    here = _platform_here()
    platform = here if platform is None else platform
    if platform not in _PLATFORMS:
        raise ValueError(f"platform must be one of {_PLATFORMS}, or None for the one here, got {platform!r}")
    if compiles and platform != here:
        raise ValueError(f"compiles=True needs the platform of this process, {here!r}, got platform={platform!r}")
    if kwargs.get("implementation") == "cudnn":
        raise NotImplementedError("explain knows our own kernels; implementation='cudnn' is jax.nn's, got 'cudnn'")
    leaves, structure = jax.tree.flatten((args, kwargs))
    types = [x for x in leaves if isinstance(x, jax.ShapeDtypeStruct)]

    def attention(*arrays: Any) -> Any:
        remaining = iter(arrays)
        filled = [next(remaining) if isinstance(x, jax.ShapeDtypeStruct) else x for x in leaves]
        args, kwargs = jax.tree.unflatten(structure, filled)
        return flash_attention(*args, **kwargs)

    call = next(_calls_of(jax.make_jaxpr(attention)(*types).jaxpr), None)
    if call is None:
        raise ValueError("explain needs a batch, queries, keys and heads: an axis has size 0, so that no kernel runs")
    target = Target(platform if platform in ("cpu", "cuda") else "accelerator")
    # Derivatives need the log-sum-exp, and out unrounded.
    derivative = call._replace(config=replace(call.config, needs_lse=True, rounds_out=False))
    forward = _explain(call, Pass.FORWARD, target)
    gradient, tangent = (_explain(derivative, which, target) for which in (Pass.COTANGENT, Pass.TANGENT))
    temporary_bytes = _temporary_bytes(attention, types) if compiles else None
    return Explanation(platform, forward, gradient, tangent, temporary_bytes)


def _platform_here() -> str:
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


def _explain(call: Call, which: Pass, target: Target) -> PassExplanation:
    family = select.choose(call, which, target)
    reasons = {name: reason for name, reason in select.reasons(call, which, target).items() if reason is not None}
    later = [f.name for f in select.families() if f.name != family.name and f.name not in reasons]
    reasons |= {name: f"{family.name} comes first and supports the call" for name in later}
    return PassExplanation(family.name, reasons, family.plan(call, which, target))


def _calls_of(jaxpr: Any) -> Iterator[Call]:
    """The calls in a program, of types in place of arrays."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is flash_attention_p:
            types = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
            yield Call(eqn.params["config"], jax.tree.unflatten(eqn.params["structure"], types))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _calls_of(getattr(inner, "jaxpr", inner))


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


def _temporary_bytes(attention: Callable, types: Sequence[jax.ShapeDtypeStruct]) -> dict[str, int]:
    is_float = [jnp.issubdtype(x.dtype, jnp.inexact) for x in types]

    def of_floats(arrays: Sequence[Any]) -> tuple[Callable, list[Any]]:
        def run(*floats: Any) -> Any:
            remaining = iter(floats)
            return attention(*(next(remaining) if flag else x for flag, x in zip(is_float, arrays, strict=True)))

        return run, [x for flag, x in zip(is_float, arrays, strict=True) if flag]

    def gradient(*arrays: Any) -> Any:
        run, floats = of_floats(arrays)
        out, pullback = jax.vjp(run, *floats)
        return pullback(jax.tree.map(jnp.ones_like, out))

    def tangent(*arrays: Any) -> Any:
        run, floats = of_floats(arrays)
        return jax.jvp(run, floats, floats)

    def size(program: Callable) -> int:
        analysis: Any = jax.jit(program).lower(*types).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    return {"forward": size(attention), "gradient": size(gradient), "tangent": size(tangent)}
