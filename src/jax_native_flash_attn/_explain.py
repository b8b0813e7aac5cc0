"""Which kernels a call takes, and why: for people, and for tests."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from ._api import flash_attention
from ._autodiff.primitives import flash_attention_p
from ._context_parallel import context_parallel_attention
from ._convert import as_count
from ._explanation import ContextExplanation, Explanation, PassExplanation
from ._kernels import select
from ._kernels.protocol import Pass, Target
from ._keywords import FOREIGN
from ._semantics.call import Call
from ._semantics.dense import NAME as DENSE
from ._semantics.dense import DensePlan
from ._semantics.errors import did_you_mean
from ._semantics.numerics import accumulation_dtype
from ._sharding.passes import types_of_step
from ._strategies import DEFAULT_STRATEGY, SequenceOrder, Strategy, check_split

_AXIS = "devices"
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def explain(
    *args: Any,
    platform: str | None = None,
    compiles: bool = False,
    devices: int = 1,
    strategy: Strategy | None = None,
    order: SequenceOrder | None = None,
    **kwargs: Any,
) -> Explanation:
    """Say which kernels `flash_attention(*args, **kwargs)` takes, and why not the others.

    With `devices`, what `context_parallel_attention` does.

    Args:
      *args, **kwargs: as of `flash_attention`; arrays, or `jax.ShapeDtypeStruct`s in place of arrays that a program
        gets. (An array is a constant of the program, as a mask may be.) No attention is computed.
      platform: 'cpu', 'cuda', 'rocm' or 'tpu'; by default the one that JAX runs on here. 'cuda' means a GPU like those
        here, and one device. Where there is none, a program for it takes pure JAX, unless kernels for GPUs are asked
        for by name.
      compiles: also compile the call and its derivatives, for this process' device, and give the temporary bytes.
      devices: over how many devices a sequence is split; the arrays are then those of one of them, as inside
        `jax.shard_map`.
      strategy, order: as of `context_parallel_attention`.

    Returns:
      An `Explanation`, plain data that prints well.

    Raises:
      ValueError, TypeError, NotImplementedError: as `flash_attention`; `compiles` for another platform, or with several
        `devices`; `devices` that is no positive number; an axis of size 0; implementation='cudnn'.

    Examples:
      >>> import jax
      >>> from jax_native_flash_attn import explain
      >>> x = jax.ShapeDtypeStruct((2, 1024, 8, 64), "bfloat16")
      >>> found = explain(x, x, x, is_causal=True, platform="cpu")
      >>> print(found.forward.family)
      pure_jax
      >>> print(found)  # doctest: +ELLIPSIS
      flash_attention on cpu
      forward: pure_jax
        plan: ...
    """
    devices = as_count(devices, "devices", one=": 1 is for a sequence that is not split")
    check_split(strategy, order)
    _check_keywords(kwargs)
    here = _platform_here()
    platform = here if platform is None else platform
    if platform not in _PLATFORMS:
        raise ValueError(f"platform must be one of {_PLATFORMS}, or None for the one here, got {platform!r}")
    if compiles and platform != here:
        raise ValueError(f"compiles=True needs the platform of this process, {here!r}, got platform={platform!r}")
    if kwargs.get("implementation") == "cudnn":
        raise NotImplementedError("explain knows our own kernels; implementation='cudnn' is jax.nn's, got 'cudnn'")
    if compiles and devices > 1:
        raise ValueError(f"compiles=True is for one device, got devices={devices}: compile the jax.shard_map yourself")
    split = {"axis_name": _AXIS, "strategy": strategy, "order": order} if devices > 1 else {}
    attention, types = _program(args, kwargs | split, devices)
    program, is_dense = jax.make_jaxpr(attention)(*types), kwargs.get("implementation") == DENSE
    if is_dense:
        # There is no call in it. That of other kernels has the same sizes.
        kernels, types_of_kernels = _program(args, kwargs | split | {"implementation": None}, devices)
        program = jax.make_jaxpr(kernels)(*types_of_kernels)
    call = next(_calls_of(program.jaxpr), None)
    if call is None:
        raise ValueError("explain needs a batch, queries, keys and heads: an axis has size 0, so that no kernel runs")
    target = Target(platform if platform in ("cpu", "cuda", "tpu") else "accelerator", has_several=devices > 1)
    # Derivatives need the log-sum-exp, and out unrounded.
    derivative = call._replace(config=replace(call.config, needs_lse=True, rounds_out=False))
    passes = (call, Pass.FORWARD), (derivative, Pass.COTANGENT), (derivative, Pass.TANGENT)
    forward, gradient, tangent = (
        [_explain_dense(call)] * 3 if is_dense else [_explain(x, which, target) for x, which in passes]
    )
    temporary_bytes = _temporary_bytes(attention, types) if compiles else None
    context = None
    if devices > 1:
        context = _explain_context(call, strategy or DEFAULT_STRATEGY, devices)
    return Explanation(platform, forward, gradient, tangent, temporary_bytes, context)


def _check_keywords(given: dict[str, Any]) -> None:
    """Of a slip in one of `explain`'s own; `flash_attention` says the rest."""
    own = ("platform", "compiles", "devices", "strategy", "order")
    for name in given.keys() - inspect.signature(flash_attention).parameters.keys() - FOREIGN.keys():
        if advice := did_you_mean(name, own):
            raise TypeError(f"explain() got an unexpected keyword argument {name!r}{advice}")


def _program(args: Any, kwargs: dict[str, Any], devices: int) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """The call as a function of the arrays that a program gets, and their types."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    function = context_parallel_attention if devices > 1 else flash_attention

    def attention(*arrays: Any) -> Any:
        remaining = iter(arrays)
        filled = [next(remaining) if isinstance(x, jax.ShapeDtypeStruct) else x for x in leaves]
        args, kwargs = jax.tree.unflatten(structure, filled)
        return function(*args, **kwargs)

    if devices > 1:
        mesh = AbstractMesh((devices,), (_AXIS,))
        specs: dict[str, Any] = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(_AXIS)}
        attention = jax.shard_map(attention, mesh=mesh, **specs, check_vma=False)
    return attention, [x for x in leaves if isinstance(x, jax.ShapeDtypeStruct)]


def _explain_context(call: Call, strategy: str, devices: int) -> ContextExplanation:
    """Of the call as its kernels get it: of a ring's shards, of all keys, or of some heads and all the sequence."""
    ring, inputs = call.config.ring, call.inputs
    visits = devices if ring is None else len(ring.distances)

    def size(*arrays: Any, itemsize: int | None = None) -> int:
        return sum(math.prod(x.shape) * (itemsize or x.dtype.itemsize) for x in arrays)

    keys = size(inputs.key, inputs.value)
    if ring is not None:
        # Of each block but the own, the part of its keys that travels.
        length = call.sizes.S
        meetings = [ring.meeting(distance, length) for distance in ring.distances[1:]]
        lengths = [length if meeting is None else meeting.length for meeting in meetings]
        arriving = keys // length * sum(lengths)
        unrounded = size(inputs.key, inputs.value, itemsize=accumulation_dtype(inputs.query.dtype).itemsize)
        # Gradients are rounded on the last way.
        gradients = (max(0, visits - 2) * unrounded + keys) // length * max(lengths, default=0)
        sent: dict[str, int] = {"forward": arriving, "gradient": arriving + gradients}
    elif strategy == "all_gather":
        sent = dict.fromkeys(("forward", "gradient"), keys * (devices - 1) // devices)
    else:
        out = size(inputs.query) // inputs.query.shape[-1] * inputs.value.shape[-1]
        sent = dict.fromkeys(("forward", "gradient"), (size(inputs.query) + keys + out) * (devices - 1) // devices)
    return ContextExplanation(strategy, devices, visits, devices - visits, sent)


def _platform_here() -> str:
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


def _explain(call: Call, which: Pass, target: Target) -> PassExplanation:
    call = types_of_step(call, which, target)
    family = select.choose(call, which, target)
    reasons = {name: reason for name, reason in select.reasons(call, which, target).items() if reason is not None}
    later = [f.name for f in select.families() if f.name != family.name and f.name not in reasons]
    reasons |= {name: f"{family.name} comes first and supports the call" for name in later}
    return PassExplanation(family.name, reasons, family.plan(call, which, target))


def _explain_dense(call: Call) -> PassExplanation:
    z = call.sizes
    plan = DensePlan((*z.batch, z.N, z.T, z.S), str(accumulation_dtype(call.inputs.query.dtype)))
    reasons = {family.name: f"implementation={DENSE!r} was asked for" for family in select.families()}
    return PassExplanation(DENSE, reasons, plan)


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
