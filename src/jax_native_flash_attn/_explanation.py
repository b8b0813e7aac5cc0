"""What `explain` finds, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PassExplanation:
    """How one pass of a call runs.

    Attributes:
      family: its kernels, as `implementation` names them, or 'dense'.
      reasons: for each family that is not taken, why.
      plan: tile or block shapes, dtypes and form: a frozen value of the family's own, which prints its fields.

    Examples:
      >>> import jax
      >>> from jax_native_flash_attn import explain
      >>> x = jax.ShapeDtypeStruct((2, 1024, 8, 64), "bfloat16")
      >>> print(explain(x, x, x, platform="cpu").gradient.reasons["mosaic_gpu"])
      the call is compiled for cpu, not for an NVIDIA GPU alone
    """

    family: str
    reasons: dict[str, str]
    plan: Any


@dataclass(frozen=True)
class ContextExplanation:
    """How a sequence is split over devices.

    Attributes:
      strategy, devices: of the call.
      visits, skipped: how many blocks of keys a device attends, its own among them, and how many it never gets.
      bytes_sent: by pass, of key, value and their like, what a device sends. The gradient is without the forward pass.

    Examples:
      >>> import jax
      >>> from jax_native_flash_attn import explain
      >>> x = jax.ShapeDtypeStruct((2, 1024, 8, 64), "bfloat16")
      >>> context = explain(x, x, x, is_causal=True, local_window_size=1023, platform="cpu", devices=4).context
      >>> context.strategy, context.visits, context.skipped
      ('ring', 2, 2)
    """

    strategy: str
    devices: int
    visits: int
    skipped: int
    bytes_sent: dict[str, int]

    def __str__(self) -> str:
        sent = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in self.bytes_sent.items())
        return (
            f"{self.strategy} over {self.devices} devices: {self.visits} blocks of keys, {self.skipped} skipped; "
            f"each device sends {sent}"
        )


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
      platform: what the call was taken to be compiled for.
      forward, gradient, tangent: the pass that computes attention, and those of `jax.grad` and `jax.jvp`. In a ring of
        devices, those of one block of keys.
      temporary_bytes: by pass, what XLA allocates beside arguments and results on one device; None if not asked for.
      context: how the sequence is split; None if it is not.

    Examples:
      >>> import jax
      >>> from jax_native_flash_attn import explain
      >>> x = jax.ShapeDtypeStruct((2, 1024, 8, 64), "bfloat16")
      >>> found = explain(x, x, x, platform="cpu")
      >>> found.platform, found.gradient.family, found.context
      ('cpu', 'pure_jax', None)
    """

    platform: str
    forward: PassExplanation
    gradient: PassExplanation
    tangent: PassExplanation
    temporary_bytes: dict[str, int] | None = None
    context: ContextExplanation | None = None

    def __str__(self) -> str:
        lines = [f"flash_attention on {self.platform}"]
        lines += [] if self.context is None else [str(self.context)]
        for name in ("forward", "gradient", "tangent"):
            taken: PassExplanation = getattr(self, name)
            lines.append(f"{name}: {taken.family}")
            if self.temporary_bytes is not None:
                lines.append(f"  temporary memory: {self.temporary_bytes[name] / 2**20:.1f} MiB")
            lines.append(f"  plan: {taken.plan}")
            lines += [f"  not {family}: {reason}" for family, reason in taken.reasons.items()]
        return "\n".join(lines)
